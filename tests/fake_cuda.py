"""A GPU without hardware: the device of ``late_device``, with Triton's kernels in the interpreter, and with graphs.

Launches and copies wait in a queue until somebody asks for results, so the host is always ahead of the device: memory
that the host reuses too early, or a launch that the host forgets to repeat, shows in the tokens. What nobody has
written in this step is not a number.

With ``kernels="reference"`` each op is one launch that runs its reference, which is faster than the interpreter.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import ops
from executor.config import DeviceConfig
from executor.deferred import Array
from executor.device.group import GroupRank, join_group
from executor.device.steps import Graphs, Pending, StagingBuffer, StagingPool
from executor.parallel import ParallelState
from ops import AttentionMetadata
from ops.dispatch import Node, Op, OpSet, Spec
from ops.triton import launch
from ops.triton.configs import Config
from ops.triton.launch import Launch, submit
from ops.triton.program import TritonProgram
from tests import triton_interpreter  # noqa: F401  # amends the interpreter
from tests.late_device import (
    HostReadError,
    LateDevice,
    LateResults,
    LateSteps,
    LateTensor,
    on_device,
    plain,
    tensors_in,
)

NOT_A_NUMBER = 0xFF
"""Bytes that are NaN in every type of floats, and -1 in those of integers."""


class FakeBlock:
    """See ``executor.device.steps.Block``."""

    def __init__(self, steps: FakeCudaSteps, num_bytes: int) -> None:
        self.device = on_device(torch.full((num_bytes,), NOT_A_NUMBER, dtype=torch.uint8))
        self._steps = steps
        self._pool = StagingPool(self._make, steps.copy_in_order)
        steps.pools.append(self._pool)

    def _make(self, size: int) -> StagingBuffer:
        assert len(self.device) <= size
        return StagingBuffer(np.full(size, NOT_A_NUMBER, np.uint8), self.device)

    def write(self, data: npt.NDArray[np.uint8]) -> None:
        self._steps.begin()
        self._steps.calls["upload"] += 1
        assert not self._pool.is_in_use, "one block per step"
        self._pool.upload({"block": data})


class FakeGraphs:
    """See ``executor.device.steps.Graphs``."""

    reserve_bytes = 1 << 20

    def __init__(self, steps: FakeCudaSteps) -> None:
        self._steps = steps
        self.num_captured = 0
        self.compiled: list[Any] = []

    def block(self, num_bytes: int) -> FakeBlock:
        return FakeBlock(self._steps, num_bytes)

    def compile(self, launches: Sequence[Any]) -> None:
        self.compiled += launches

    def capture(self, launches: Sequence[Any]) -> Callable[[], None]:
        """Keeps the launches with the numbers and addresses that they have now, as a graph does."""
        self.num_captured += 1
        frozen = [_plain_launch(each) for each in launches]
        marks = [_mark(each) for each in launches]

        def replay() -> None:
            assert [_mark(each) for each in launches] == marks, "a graph keeps the arguments that it was captured with"
            self._steps.calls["graph"] += 1
            for each in frozen:
                self._steps.enqueue(each.run)

        return replay


def _plain_launch(each: Launch) -> Launch:
    return replace(each, args={name: plain(value) for name, value in each.args.items()})


def _mark(each: Launch) -> tuple[Any, ...]:
    args = {
        name: (plain(value).data_ptr(), value.shape, value.stride()) if isinstance(value, Tensor) else value
        for name, value in each.args.items()
    }
    return each.name, each.grid, args, dict(each.constants)


class FakeCudaSteps(LateSteps):
    """See ``executor.device.steps.StepChannel``."""

    def __init__(self, *, by_itself: bool, with_graphs: bool, queue: list[Callable[[], object]]) -> None:
        """``queue``: the device's work, of all channels."""
        super().__init__(by_itself=by_itself)
        self.is_lazy = not by_itself
        """Whether work waits until results are asked for. Otherwise only results are late."""
        self.pools = [self.pool]
        self.calls: Counter[str] = Counter()
        """What the host has asked the device for."""
        self.fake_graphs = FakeGraphs(self)
        self.graphs: Graphs | None = self.fake_graphs if with_graphs else None
        self.arenas: list[Tensor] = []
        """Memory that holds nothing from one step to the next."""
        self._queue = queue
        self._random = random.Random(0)
        self._has_begun = False

    def enqueue(self, work: Callable[[], object]) -> None:
        """Adds work of the device, in order."""
        if self.is_lazy:
            self._queue.append(work)
        else:
            work()

    def flush(self) -> None:
        """Does all work so far."""
        works = self._queue[:]
        self._queue.clear()
        for work in works:
            work()

    def begin(self) -> None:
        """A step begins, if none has: what the last one left in the arenas is gone."""
        if self._has_begun:
            return
        self._has_begun = True
        for arena in self.arenas:
            self.enqueue(lambda arena=arena: plain(arena).fill_(NOT_A_NUMBER))  # type: ignore[misc]

    def copy_in_order(self, buffer: StagingBuffer, begin: int, end: int) -> None:
        """Copies after all earlier work; reads the host's memory only then."""
        self.enqueue(lambda: LateSteps._copy(buffer, begin, end))

    def _copy(self, buffer: StagingBuffer, begin: int, end: int) -> None:  # type: ignore[override]
        if self._random.random() < 0.5:
            self.copy_in_order(buffer, begin, end)
        else:  # on a stream of its own, which was faster
            LateSteps._copy(buffer, begin, end)

    def upload(self, columns: Mapping[str, Array]) -> Mapping[str, Tensor]:
        self.calls["upload"] += 1
        return self.pool.upload(columns)

    def download(self, tensors: Sequence[Tensor]) -> Pending:
        assert all(isinstance(tensor, LateTensor) for tensor in tensors), "results are on the device"
        self._has_begun = False
        self.calls["download"] += len({plain(tensor).untyped_storage().data_ptr() for tensor in tensors})
        arrays: list[Array] = [np.empty(0)] * len(tensors)

        def fetch() -> None:
            for index, tensor in enumerate(tensors):
                arrays[index] = plain(tensor).clone().numpy()

        self.enqueue(fetch)
        buffers = [(pool, pool.take()) for pool in self.pools]
        return self._start(FakeResults(self, arrays, buffers))

    def let_come(self) -> None:
        self.flush()
        super().let_come()


class FakeResults(LateResults):
    """A step's results, which give back the buffers of several pools."""

    def __init__(
        self, channel: FakeCudaSteps, arrays: list[Array], buffers: list[tuple[StagingPool, list[StagingBuffer]]]
    ) -> None:
        super().__init__(channel, arrays, [])
        self._taken = buffers

    def collect(self) -> list[Array]:
        if isinstance(self._channel, FakeCudaSteps) and self._channel.is_lazy and not self.has_come.is_set():
            self._channel.let_come()
        arrays = super().collect()
        for pool, buffers in self._taken:
            for buffer in buffers:
                buffer.host.fill(NOT_A_NUMBER)
                if pool is self._channel.pool:
                    plain(buffer.device).fill_(NOT_A_NUMBER)
            pool.give_back(buffers)
        return arrays


# ---------------------------------------------------------------------------------------------------------
# references as kernels


@dataclass(frozen=True)
class ReferenceLaunch(Launch):
    """An op on memory of the device: ``kernel``. Its arguments are under ``args``, ``kwargs`` and ``out``."""

    @property
    def name(self) -> str:
        return str(self.kernel.name)

    @property
    def tensors(self) -> list[Tensor]:
        return list(tensors_in(self.args))

    def run(self) -> None:
        args, kwargs, out = (self.args[name] for name in ("args", "kwargs", "out"))
        if self.kernel.name == "paged_attention":
            num_tokens, args = _without_padding(args)
            out = out[:num_tokens]
        results = self.kernel.reference(*args, **kwargs)
        if not isinstance(out, tuple):
            out, results = (out,), (results,)
        for place, result in zip(out, results, strict=True):
            place.copy_(result)


def _without_padding(args: tuple[Any, ...]) -> tuple[int, tuple[Any, ...]]:
    """Number of tokens, and arguments of attention without those that belong to no request."""
    q, k, v, cache, meta, *rest = args
    num_rows = int((meta.seq_lens > 0).sum())
    num_tokens = int(meta.query_start_loc[num_rows])
    assert (meta.query_start_loc[num_rows:] == num_tokens).all() and (meta.slot_mapping[num_tokens:] == -1).all()
    real = AttentionMetadata(
        meta.query_start_loc[: num_rows + 1],
        meta.seq_lens[:num_rows],
        meta.block_table[:num_rows],
        meta.slot_mapping[:num_tokens],
        meta.block_size,
    )
    q, k, v = (None if x is None else x[:num_tokens] for x in (q, k, v))
    return num_tokens, (q, k, v, cache, real, *rest)


def _launcher(op: Op[Any, Any]) -> Callable[..., Any]:
    def run(*args: Any, out: Any = None, **kwargs: Any) -> Any:
        if any(tensor.is_meta for tensor in tensors_in(out)):
            return out  # while memory is planned
        if not any(isinstance(tensor, LateTensor) for tensor in tensors_in((args, kwargs))):
            return op.reference(*args, **kwargs)  # while the model is loaded
        if out is None:  # nobody plans its memory: the device does the rest first
            assert isinstance(LateTensor.watcher, FakeCuda)
            LateTensor.watcher.computes(op.name)
            return on_device(op.reference(*plain(args), **plain(kwargs)))
        each = {"args": args, "kwargs": kwargs, "out": out}
        submit(ReferenceLaunch(op, (1,), each, {}, Config(), launch.target()))
        return out

    return run


class ReferenceKernels(OpSet):
    """The references, launched like kernels."""

    def __init__(self) -> None:
        found = [op for op in vars(ops).values() if isinstance(op, Op)]
        super().__init__("reference kernels", {op.name: _launcher(op) for op in found})

    def compile(
        self,
        nodes: list[Node],
        specs: list[Spec],
        inputs: dict[str, int],
        outputs: list[int],
        capacity: dict[str, int],
    ) -> TritonProgram:
        return TritonProgram(self.implementations, nodes, specs, inputs, outputs, capacity)


# ---------------------------------------------------------------------------------------------------------


def put_on_device(module: nn.Module) -> None:
    """Makes a module's tensors those of the device, as torch's functions use them beside those of a step."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                each._parameters[name] = nn.Parameter(on_device(parameter.data), requires_grad=False)
        for name, buffer in each._buffers.items():
            each._buffers[name] = None if buffer is None else on_device(buffer)
        for name, value in vars(each).items():
            if isinstance(value, Tensor):
                setattr(each, name, on_device(value))


def _is_loaded(tensor: Tensor) -> bool:
    """Whether a tensor belongs to the model, or stays as it is, like what kernels keep."""
    return tensor.is_floating_point() or any(tensor is piece for piece in launch.scratch.pieces())


class FakeCuda(LateDevice):
    """See ``executor.device.base.Device``."""

    name = "fake-cuda"
    kernels = "triton"

    def __init__(self, *, by_itself: bool = True, with_graphs: bool = True, kernels: str = "triton") -> None:
        super().__init__(by_itself=by_itself)
        self.kernels = kernels
        self.with_graphs = with_graphs
        self._opened = ExitStack()
        self._queue: list[Callable[[], object]] = []
        self._has_channel = False
        self.group: GroupRank | None = None

    def initialize(self, config: DeviceConfig, rank: int) -> None:
        self._has_channel = False
        torch.set_num_threads(config.num_threads or 1)
        ops.use(self.torch_device.type, ReferenceKernels() if self.kernels == "reference" else self.kernels)
        self._opened.enter_context(launch.redirected(self._launch))
        self._opened.enter_context(mock.patch.object(launch.scratch, "get", self._scratch))
        LateTensor.watcher = self

    def communicator(self, parallel: ParallelState) -> ops.Communicator:
        if parallel.tp_size * parallel.pp_size == 1:
            return ops.SingleRank()
        os.environ.setdefault("GLOO_SOCKET_IFNAME", parallel.interface or "lo")
        self.group = join_group(parallel, "gloo", self.torch_device)
        return self.group

    def stage_transfer(self) -> FakeTransfer | None:  # type: ignore[override]
        return None if self.group is None else FakeTransfer(self, self.group)

    def close(self) -> None:
        """Leaves the process as it was."""
        self._opened.close()
        LateTensor.watcher = None

    def steps(self) -> FakeCudaSteps:
        """A channel; ``channel`` is the first one, that of the model and not of the one that drafts for it."""
        channel = FakeCudaSteps(by_itself=self.by_itself, with_graphs=self.with_graphs, queue=self._queue)
        if not self._has_channel:
            self.channel: FakeCudaSteps = channel
            self._has_channel = True
        return channel

    def _scratch(self, purpose: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As ``launch.Scratch.get``: memory of the device, so launches between its pieces alone wait in the queue."""
        piece = launch.Scratch.get(launch.scratch, purpose, size, dtype, device)
        return piece if piece.is_meta else on_device(piece)

    def _launch(self, each: Launch) -> None:
        if self.channel is None or not any(isinstance(tensor, LateTensor) for tensor in each.tensors):
            each.run()  # while the model is loaded
            return
        for name, value in each.args.items():
            if isinstance(value, Tensor) and not isinstance(value, LateTensor) and not _is_loaded(value):
                raise HostReadError(f"{each.name} takes a tensor of the host as {name}")
        self.channel.calls["launch"] += 1
        self.channel.enqueue(_plain_launch(each).run)

    def computes(self, name: str) -> None:
        """torch computes something on the device: a launch of its own."""
        if launch.redirected_to() != self._launch:
            raise HostReadError(f"{name} runs once, while launches are recorded for many steps")
        self.channel.calls["launch"] += 1
        self.channel.flush()

    def allocated(self, tensor: LateTensor) -> None:
        plain(tensor).view(torch.uint8).fill_(NOT_A_NUMBER)
        if tensor.dtype == torch.uint8:
            self.channel.arenas.append(tensor)


class FakeTransfer:
    """See ``executor.device.base.StageTransfer``."""

    def __init__(self, device: FakeCuda, group: GroupRank) -> None:
        self._device = device
        self._group = group

    def send(self, x: Tensor, stage: int) -> None:
        assert isinstance(x, LateTensor)
        self._device.channel.enqueue(lambda: self._group.send(plain(x), stage))

    def receive(self, out: Tensor, stage: int) -> None:
        assert isinstance(out, LateTensor)
        self._device.channel.enqueue(lambda: self._group.receive(plain(out), stage))

    def memory(self, num_bytes: int) -> Tensor:
        return on_device(torch.full((num_bytes,), NOT_A_NUMBER, dtype=torch.uint8))

    def check(self) -> None:
        self._group.check()


class FakeGpu(FakeCuda):
    """For servers: results come by themselves, and the ops are the references. ``plugins`` registers it."""

    name = "fake-gpu"

    def __init__(self) -> None:
        super().__init__(kernels="reference")
