"""The device seam: one class per kind of device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from executor.base import ModelError
from executor.config import DeviceConfig
from executor.device.steps import StepChannel
from executor.registry import resolve


@dataclass(frozen=True)
class Memory:
    total_bytes: int
    free_bytes: int


class Device(Protocol):
    """What a worker asks of the hardware it runs on."""

    name: str
    torch_device: torch.device

    def initialize(self, config: DeviceConfig, rank: int) -> None:
        """Prepares this process: threads, affinity, streams."""

    def memory(self) -> Memory: ...

    def default_kv_bytes(self) -> int:
        """Size of the KV cache when nothing is configured."""

    def steps(self) -> StepChannel:
        """A channel to a model's device; called once for each."""

    def allocate_kv(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A zeroed tensor that costs memory only where it is written, if the device can do that."""


REGISTRY = {"cpu": "executor.device.cpu:CpuDevice"}


def create_device(name: str) -> Device:
    """The device of that name; ``auto`` takes the best that is there.

    Raises:
        ModelError: There is no such device.
    """
    if name == "auto":
        name = "cpu"
    try:
        factory: type[Device] = resolve(REGISTRY, name, "device")
    except ValueError as error:
        raise ModelError(str(error)) from error
    return factory()
