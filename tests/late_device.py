"""A device without hardware: its tensors have no values for the host, and its results come late.

What a step on an accelerator must not do shows here as an error: reading a tensor before its results were collected,
handing it a tensor of the host, counting on uploads to outlive their step. The ops are the references, so its tokens
are those of a CPU without kernels. ``plugins`` beside this file is a package that registers it as ``late``.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

import ops
from executor.config import DeviceConfig
from executor.deferred import Array
from executor.device.base import Memory
from executor.device.steps import RECENT_TOKENS, DeviceTokens, Graphs, Pending, RecentTokens, StagingBuffer, StagingPool
from executor.parallel import ParallelState
from ops.dispatch import Op, OpSet

POISON = 0xA5
"""What memory holds that nobody may read: large negative indices and tiny numbers."""
LONGEST_DELAY = 0.004
"""Seconds that a step's results may lag behind the one before."""

READS = {"numpy", "tolist", "item", "cpu", "data_ptr", "is_nonzero", "equal", "allclose"}
READS |= {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "repeat_interleave"}
READS |= {"__array__", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__iter__", "__reversed__"}
READS |= {"__contains__", "__repr__", "__format__", "__str__"}
"""What needs the values of a tensor, or their address, on the host."""
WITHOUT_WEIGHTS = {"paged_attention", "sample", "weight_sum"}
"""Ops all of whose tensors belong to steps."""
VIEWS = {"view", "narrow", "unsqueeze", "squeeze", "flatten", "unflatten", "transpose", "permute", "expand", "split"}
VIEWS |= {"__get__", "__len__", "size", "stride", "dim", "numel", "is_floating_point", "element_size", "new_empty"}
VIEWS |= {"is_contiguous", "storage_offset", "data_ptr", "reshape", "chunk", "unbind", "select", "detach"}
"""Functions that neither read nor write memory."""


class HostReadError(AssertionError):
    """The host touched what is on the device."""


class Watcher(Protocol):
    """Hears what torch does with tensors of the device."""

    def computes(self, name: str) -> None:
        """A function is about to read or write them."""

    def allocated(self, tensor: LateTensor) -> None:
        """A tensor was made that has no values yet."""


class LateTensor(Tensor):
    """A tensor of the device. What is computed of it is one, too."""

    watcher: ClassVar[Watcher | None] = None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        places = [value for value in (*args[1:], *(kwargs or {}).values()) if isinstance(value, str | torch.device)]
        if name in READS or (name == "to" and places) or (name == "where" and len(args) == 1):
            raise HostReadError(f"{name} reads a tensor of the device")
        if name in ("__getitem__", "__setitem__"):
            for index in args[1] if isinstance(args[1], tuple) else (args[1],):
                if isinstance(index, list | np.ndarray) or (isinstance(index, Tensor) and index.dtype == torch.bool):
                    raise HostReadError(f"an index of type {type(index).__name__} has to be read by the host")
        for tensor in tensors_in((args, kwargs or {})):
            if not isinstance(tensor, LateTensor):
                raise HostReadError(f"{name} mixes a tensor of the device with one of the host")
        watcher, is_view = LateTensor.watcher, name in VIEWS or (name == "__getitem__" and not _has_tensor(args[1]))
        if watcher is not None and not is_view:
            watcher.computes(name)
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if watcher is not None and name == "new_empty":
            watcher.allocated(result)
        return result

    def __iter__(self) -> Iterator[Tensor]:
        raise HostReadError("the elements of a tensor of the device are not for the host")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return f"LateTensor({list(self.shape)}, {self.dtype})"


def _has_tensor(index: Any) -> bool:
    return next(tensors_in(index), None) is not None


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, field.name) for field in dataclasses.fields(value)])


def on_device(tensor: Tensor) -> LateTensor:
    """The same memory, as the device sees it."""
    return tensor.as_subclass(LateTensor)


def plain(value: Any) -> Any:
    """What the device itself computes with."""
    if isinstance(value, LateTensor):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(Tensor)
    if isinstance(value, tuple | list):
        return type(value)(map(plain, value))
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and next(tensors_in(value), None) is not None:
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: plain(part) for name, part in fields.items()})
    return value


def _late(value: Any) -> Any:
    return tuple(map(_late, value)) if isinstance(value, tuple) else on_device(value)


# ---------------------------------------------------------------------------------------------------------
# ops


def _kernel(op: Op[Any, Any]) -> Callable[..., Any]:
    """An op as a kernel of the device. Weights are loaded there; all else has come through the channel."""

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = list(tensors_in((args, kwargs)))
        if not any(isinstance(tensor, LateTensor) for tensor in tensors):
            return op.reference(*args, **kwargs)  # while the model is loaded
        for tensor in tensors:
            is_weight = tensor.dtype.is_floating_point and op.name not in WITHOUT_WEIGHTS
            if not isinstance(tensor, LateTensor) and not is_weight:
                raise HostReadError(f"{op.name} takes a tensor of the host")
        return _late(op.reference(*plain(args), **{name: plain(value) for name, value in kwargs.items()}))

    return run


class LateOps(OpSet):
    """The references, as kernels of the device."""

    def __init__(self) -> None:
        found = [op for op in vars(ops).values() if isinstance(op, Op)]
        super().__init__("late", {op.name: _kernel(op) for op in found})


# ---------------------------------------------------------------------------------------------------------
# steps


class LateResults:
    """A step's results. See ``executor.device.steps.Pending``."""

    device_ms = 0.0

    def __init__(self, channel: LateSteps, arrays: list[Array], buffers: list[StagingBuffer]) -> None:
        self._channel = channel
        self._arrays = arrays
        self._buffers = buffers
        self.has_come = threading.Event()

    def is_ready(self) -> bool:
        return self.has_come.is_set()

    def collect(self) -> list[Array]:
        os.eventfd_read(self._channel.event)  # waits
        assert self.has_come.is_set(), "results are collected in the order of the steps"
        self._channel.num_in_flight -= 1
        for buffer in self._buffers:
            plain(buffer.device).fill_(POISON)
        self._channel.pool.give_back(self._buffers)
        return self._arrays


class LateSteps:
    """The way to the device and back. See ``executor.device.steps.StepChannel``."""

    graphs: Graphs | None = None

    def __init__(self, *, by_itself: bool) -> None:
        """Results come by themselves, after some time; or when ``let_come`` says so."""
        self.pool = StagingPool(self._make_buffer, self._copy)
        self.event = os.eventfd(0, os.EFD_SEMAPHORE)
        weakref.finalize(self, os.close, self.event)
        self.num_in_flight = 0
        self.most_in_flight = 0
        self._launched: queue.SimpleQueue[LateResults] = queue.SimpleQueue()
        if by_itself:
            threading.Thread(target=_run, args=(self._launched, self.event), daemon=True, name="late device").start()

    @staticmethod
    def _make_buffer(size: int) -> StagingBuffer:
        return StagingBuffer(np.full(size, POISON, np.uint8), on_device(torch.full((size,), POISON, dtype=torch.uint8)))

    @staticmethod
    def _copy(buffer: StagingBuffer, begin: int, end: int) -> None:
        plain(buffer.device)[begin:end] = torch.from_numpy(buffer.host[begin:end])

    def upload(self, columns: Mapping[str, Array]) -> Mapping[str, Tensor]:
        return self.pool.upload(columns)

    def download(self, tensors: Sequence[Tensor]) -> Pending:
        assert all(isinstance(tensor, LateTensor) for tensor in tensors), "results are on the device"
        arrays = [plain(tensor).clone().numpy() for tensor in tensors]
        return self._start(LateResults(self, arrays, self.pool.take()))

    def _start(self, results: LateResults) -> Pending:
        """Results are on their way."""
        self.num_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
        self._launched.put(results)
        return results

    def let_come(self) -> None:
        """The oldest results that have not come yet come now."""
        self._launched.get_nowait().has_come.set()
        os.eventfd_write(self.event, 1)

    def recent_tokens(self, max_num_seqs: int) -> RecentTokens:
        tokens = torch.full((max_num_seqs * RECENT_TOKENS,), -1, dtype=torch.int32)
        return DeviceTokens(self, on_device(tokens))

    def fileno(self) -> int:
        return self.event


def _run(launched: queue.SimpleQueue[LateResults], event: int) -> None:
    """The device: a thread that takes its time."""
    delays = random.Random(0)
    while True:
        results = launched.get()
        time.sleep(delays.uniform(0, LONGEST_DELAY))
        results.has_come.set()
        os.eventfd_write(event, 1)


# ---------------------------------------------------------------------------------------------------------


class LateDevice:
    """See ``executor.device.base.Device``."""

    name = "late"
    torch_device = torch.device("cpu")
    kernels = "late"

    def __init__(self, *, by_itself: bool = True) -> None:
        self.by_itself = by_itself
        self.channel: LateSteps | None = None

    memory_utilization: float | None = None
    max_num_batched_tokens = 64
    maps_kv = False
    shares_memory = False

    @classmethod
    def unavailable(cls) -> str | None:
        return None

    def initialize(self, config: DeviceConfig, rank: int) -> None:
        torch.set_num_threads(config.num_threads or 1)
        ops.use(self.torch_device.type, LateOps())

    def memory(self) -> Memory:
        return Memory(1 << 34, 1 << 33)

    def default_kv_bytes(self) -> int:
        return 64 << 20

    def communicator(self, parallel: ParallelState) -> ops.Communicator:
        return ops.SingleRank()

    def stage_transfer(self) -> None:
        return None

    def steps(self) -> LateSteps:
        self.channel = LateSteps(by_itself=self.by_itself)
        return self.channel

    def allocate_kv(self, shape: tuple[int, ...], dtype: torch.dtype, memory: Tensor | None = None) -> Tensor:
        assert memory is None
        return on_device(torch.zeros(shape, dtype=dtype))
