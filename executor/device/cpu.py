"""The CPU as a device."""

from __future__ import annotations

import os

import torch

import ops
from executor.base import ModelError
from executor.config import DEFAULT_STEP_TOKENS, DeviceConfig
from executor.device.base import Memory
from executor.device.steps import ImmediateSteps
from executor.host_memory import host_memory
from executor.log import get_logger
from executor.parallel import ParallelState
from ops import Communicator, SingleRank
from ops.cpu import library
from ops.cpu.memory import map_zeros
from ops.cpu.ranks import SharedRank

logger = get_logger()

TESTED_TORCH = "2.13"
"""The release series pinned by constraints.txt."""

_GIB = 1 << 30


class CpuDevice:
    name = "cpu"
    torch_device = torch.device("cpu")
    kernels = "cpu"
    memory_utilization: float | None = None
    max_num_batched_tokens = DEFAULT_STEP_TOKENS
    maps_kv = True
    shares_memory = True

    @classmethod
    def unavailable(cls) -> str | None:
        return None

    def initialize(self, config: DeviceConfig, rank: int) -> None:
        if config.matmul != "auto":
            raise ModelError(f"--matmul {config.matmul}: only GPUs have it; use auto")
        ops.use(self.torch_device.type, self.kernels)
        advice = about_torch(torch.__version__, torch.version.cuda)
        if advice is not None:
            logger.warning("%s", advice)
        torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))

    def memory(self) -> Memory:
        return Memory(*host_memory())

    def default_kv_bytes(self) -> int:
        return min(4 * _GIB, self.memory().free_bytes // 4)

    def steps(self) -> ImmediateSteps:
        return ImmediateSteps()

    def communicator(self, parallel: ParallelState) -> Communicator:
        if parallel.tp_size == 1:
            return SingleRank()
        flag = f"--tensor-parallel-size {parallel.tp_size}"
        kernels = library.chosen()
        if kernels is None:
            raise ModelError(f"{flag}: ranks need the CPU kernels, which could not be compiled or are off; use 1")
        if parallel.memory_fd < 0:
            raise ModelError(f"{flag}: ranks are processes, which --distributed-executor-backend mp starts")
        return SharedRank(kernels, parallel.memory_fd, parallel.tp_rank, parallel.tp_size)

    def stage_transfer(self) -> None:
        return None

    def allocate_kv(
        self, shape: tuple[int, ...], dtype: torch.dtype, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if memory is None:
            # torch.zeros writes every page; an anonymous mapping is zero and commits memory only where written.
            memory = map_zeros(num_bytes)
        elif len(memory) < num_bytes:
            raise ValueError(f"a KV cache of {num_bytes} bytes does not fit into {len(memory)} bytes of memory")
        return memory[:num_bytes].view(dtype).view(shape)


def about_torch(version: str, cuda: str | None) -> str | None:
    """A warning about the installed torch, or None if it is a tested build.

    Args:
        version: ``torch.__version__``.
        cuda: ``torch.version.cuda``.
    """
    faults = []
    if cuda is not None:
        faults.append(f"is built for CUDA {cuda}, gigabytes that the CPU never uses")
    if not version.startswith(f"{TESTED_TORCH}."):
        faults.append(f"is not of the series {TESTED_TORCH} that Octavo is tested with")
    if not faults:
        return None
    return f"torch {version} {' and '.join(faults)}; see Install in the README for the CPU build"
