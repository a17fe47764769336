"""A device for Octavo that computes on the CPU, to show what a package must bring."""

from __future__ import annotations

import torch
from torch import Tensor

import ops
from executor.config import DeviceConfig
from executor.device.base import Memory
from executor.device.steps import ImmediateSteps
from executor.parallel import ParallelState
from ops import OpSet, SingleRank


def add(x: Tensor, y: Tensor) -> Tensor:
    """The op ``add``, as this device computes it."""
    return x + y


class ToyDevice:
    """See ``executor.device.base.Device``."""

    name = "toy"
    torch_device = torch.device("cpu")
    kernels = "toy"
    memory_utilization: float | None = None  # the cache takes default_kv_bytes
    max_num_batched_tokens = 256
    shares_memory = True  # of the host
    maps_kv = True  # as CPUs: a new worker goes on with the cache of one that died

    @classmethod
    def unavailable(cls) -> str | None:
        return None  # or the reason: "no card was found", "the driver is too old"

    def initialize(self, config: DeviceConfig, rank: int) -> None:
        torch.set_num_threads(config.num_threads or 1)
        ops.use(self.torch_device.type, OpSet("toy", {"add": add}))

    def memory(self) -> Memory:
        return Memory(total_bytes=4 << 30, free_bytes=2 << 30)

    def default_kv_bytes(self) -> int:
        return 256 << 20

    def steps(self) -> ImmediateSteps:
        return ImmediateSteps()

    def communicator(self, parallel: ParallelState) -> SingleRank:
        return SingleRank()

    def stage_transfer(self) -> None:
        return None

    def allocate_kv(self, shape: tuple[int, ...], dtype: torch.dtype, memory: Tensor | None = None) -> Tensor:
        if memory is None:
            return torch.zeros(shape, dtype=dtype)
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if len(memory) < num_bytes:
            raise ValueError(f"a KV cache of {num_bytes} bytes does not fit into {len(memory)} bytes of memory")
        return memory[:num_bytes].view(dtype).view(shape)
