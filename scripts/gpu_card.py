"""What benchmarks ask of a GPU, and a stand-in with which they are rehearsed: on a card, time is scarce."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from unittest import mock

import torch

import ops
from executor.config import DeviceConfig
from executor.device.base import Memory
from executor.device.cuda import CudaDevice, CudaSteps
from ops.triton import launch

REPLAYS = 11
Calls = Sequence[Callable[[], object]]


class Card(Protocol):
    """A GPU."""

    name: str
    device: torch.device
    is_real: bool

    def seconds(self, calls: Calls) -> float:
        """Time of one of some calls, which do the same with other memory: what a cache holds of the last one is no
        help."""

    def used_bytes(self) -> int:
        """Memory that is taken, by whomever."""

    def free_bytes(self) -> int:
        """Memory that is left."""


class RealCard:
    """The GPU of this machine."""

    is_real = True

    def __init__(self) -> None:
        device = CudaDevice()
        device.initialize(DeviceConfig(), 0)
        self.device = device.torch_device
        self.name = torch.cuda.get_device_name(self.device)

    def seconds(self, calls: Calls) -> float:
        for call in calls:
            call()  # compiles, and takes the memory that kernels share
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times: list[float] = []
        for _ in range(REPLAYS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / len(calls))
        return statistics.median(times[1:])

    def used_bytes(self) -> int:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]


class RehearsedCard:
    """No GPU: kernels compute nothing, and nothing that is measured means anything."""

    name = "rehearsal"
    device = torch.device("cpu")
    is_real = False

    def seconds(self, calls: Calls) -> float:
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) / len(calls)

    def used_bytes(self) -> int:
        return 1 << 30

    def free_bytes(self) -> int:
        return 1 << 30


class StubbedGpu(CudaDevice):
    """A GPU whose kernels take no time, and compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_device = torch.device("cpu")

    def initialize(self, config: DeviceConfig, rank: int) -> None:
        ops.use("cpu", "triton")

    def memory(self) -> Memory:
        return Memory(80 << 30, 80 << 30)

    def steps(self) -> CudaSteps:
        return CudaSteps(self.torch_device)


def no_launch(each: launch.Launch) -> None:
    """Computes nothing."""


def empty_launch(each: launch.Launch) -> None:
    """Computes nothing, but that the sampler chose token 0."""
    if each.name == "sample_kernel":
        for name in ("tokens_ptr", "status_ptr"):
            if isinstance(each.args[name], torch.Tensor):
                each.args[name].zero_()


@contextmanager
def without_hardware(run: Callable[[launch.Launch], None] = no_launch) -> Iterator[RehearsedCard]:
    """Puts stand-ins in the place of torch's streams, events and graphs, and ``run`` in that of kernels."""
    from tests.stub_cuda import Event, stubbed

    before = ops.op_set("cpu")
    with (
        stubbed(),
        mock.patch.object(Event, "synchronize", lambda event: time.sleep(0.002)),  # waits without the interpreter lock
        mock.patch.object(launch.Launch, "run", run),
        mock.patch("executor.worker.create_device", lambda _: StubbedGpu()),
    ):
        try:
            yield RehearsedCard()
        finally:
            ops.use("cpu", before)
            launch.scratch.clear()


class IdleTimes:
    """Notes how long a GPU waits between steps: from the end of one to the beginning of the next."""

    def __init__(self, channel: CudaSteps) -> None:
        self._results: list[Any] = []
        self._download = channel.download
        channel.download = self._noted  # type: ignore[method-assign]
        self._channel = channel

    def _noted(self, tensors: Sequence[torch.Tensor]) -> Any:
        results = self._download(tensors)
        self._results.append(results)
        return results

    def seconds(self) -> float:
        """The median of all steps so far, whose results are collected."""
        self._channel.download = self._download  # type: ignore[method-assign]
        pairs = zip(self._results[:-1], self._results[1:], strict=True)
        gaps: list[float] = [one._end.elapsed_time(other._begin) / 1e3 for one, other in pairs]
        return statistics.median(gaps)
