"""The device seam: one class per kind of device."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Protocol

from executor.base import ModelError
from executor.config import DeviceConfig
from executor.log import get_logger
from executor.registry import resolve

if TYPE_CHECKING:  # the names are known without torch
    import torch

    from executor.device.steps import StepChannel
    from executor.parallel import ParallelState
    from ops import Communicator

logger = get_logger()


@dataclass(frozen=True)
class Memory:
    total_bytes: int
    free_bytes: int


class Device(Protocol):
    """What a worker asks of the hardware it runs on."""

    name: str
    torch_device: torch.device
    kernels: str
    """Name of its op set; see ``ops.use``."""

    @classmethod
    def available(cls) -> bool:
        """Whether this machine has one. Changes nothing in this process."""

    def initialize(self, config: DeviceConfig, rank: int) -> None:
        """Prepares this process: its op set, threads, affinity, streams."""

    def memory(self) -> Memory: ...

    def default_kv_bytes(self) -> int:
        """Size of the KV cache when nothing is configured."""

    def steps(self) -> StepChannel:
        """A channel to a model's device; called once for each."""

    def communicator(self, parallel: ParallelState) -> Communicator:
        """Where the ranks meet that share a model's layers.

        Raises:
            ModelError: There is no way for so many.
        """

    def allocate_kv(
        self, shape: tuple[int, ...], dtype: torch.dtype, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A tensor for a KV cache.

        Args:
            shape: Of the tensor.
            dtype: Of its numbers.
            memory: uint8 [>= bytes of the tensor] on the device: where the tensor lies, with what is there. None: it
                is allocated, zero, and costs memory only where it is written, if the device can do that.

        Raises:
            ValueError: ``memory`` is too small.
        """


REGISTRY = {"cpu": "executor.device.cpu:CpuDevice"}
"""The best one first."""
ENTRY_POINTS = "octavo.devices"
"""Under this name packages register devices of their own: name -> ``module:Class``."""
AUTO = "auto"


def known_devices() -> dict[str, str]:
    """All devices by name, in the order in which ``auto`` tries them: those of other packages, then ours."""
    others = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    return {name: others[name] for name in sorted(others.keys() - REGISTRY)} | REGISTRY


def device_problem(name: str) -> str | None:
    """What is wrong with a device's name, if anything. Imports nothing that the name stands for."""
    if name == AUTO or name in REGISTRY or name in (known := known_devices()):
        return None
    return f"unknown device {name!r}; choose from {AUTO}, {', '.join(known)}"


def create_device(name: str) -> Device:
    """The device of that name; ``auto`` takes the first one that this machine has.

    Raises:
        ModelError: There is no such device.
    """
    problem = device_problem(name)
    if problem is not None:
        raise ModelError(f"--device: {problem}")
    known = known_devices()
    for candidate in known if name == AUTO else [name]:
        try:
            device: type[Device] = resolve(known, candidate, "device")
        except ImportError as error:
            if name != AUTO:
                raise ModelError(f"--device: {name!r} cannot be loaded: {error}") from error
            logger.warning("device %s is left out: %s", candidate, error)
            continue
        if device.available():
            return device()
    raise ModelError(f"--device: this machine has no {name!r}")
