"""GPUs of NVIDIA, and of AMD through ROCm, which torch presents under the same name.

All work of steps is on one stream, in the order in which it is launched. The host waits for nothing: a thread waits for
the events of results, and wakes the worker through a descriptor.
"""

from __future__ import annotations

import ctypes
import importlib.util
import operator
import os
import queue
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import ops
from executor.base import ModelError
from executor.config import DeviceConfig
from executor.deferred import Array
from executor.device.base import Memory
from executor.device.steps import (
    ALIGNMENT,
    RECENT_TOKENS,
    DeviceTokens,
    Launch,
    Pending,
    RecentTokens,
    StagingBuffer,
    StagingPool,
)
from executor.log import get_logger
from executor.parallel import ParallelState
from ops import Communicator, SingleRank

if TYPE_CHECKING:
    from executor.device.group import GroupRank

logger = get_logger()

NCCL_THAT_HANGS = (2, 28, 9), (2, 30, 4)
"""The first version whose collectives deadlock in graphs across machines, and the first that does not again."""

_MIB = 1 << 20
RESERVE_BYTES = 512 * _MIB
"""For graphs, code of kernels, and what torch's allocator rounds up."""
LARGEST_GAP = 4096
"""Bytes between results that are copied along rather than skipped."""
KEPT_RESULTS = 64 << 10
"""Bytes of results up to which the way to the host is kept, and with it their memory."""
MOST_PARTS = 64
"""Parts of a pinned buffer that are kept."""
MOST_COMPILERS = 8
"""Kernels that are compiled at the same time."""
LARGE_COPY = 256 << 10
"""Bytes from which a copy gets a stream of its own: it need not wait for the step before."""


class CudaDevice:
    """One GPU. See ``executor.device.base.Device``."""

    name = "cuda"
    kernels = "triton"
    memory_utilization: float | None = 0.92
    max_num_batched_tokens = 8192
    maps_kv = False
    shares_memory = False

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda")
        self._group: GroupRank | None = None

    @classmethod
    def unavailable(cls) -> str | None:
        if torch.version.cuda is None and torch.version.hip is None:
            return f"torch {torch.__version__} is built for CPUs only"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install 'octavo[gpu]'"
        if not has_compiler():
            return "Triton needs a C compiler when a model starts: install gcc, or name one in CC"
        # torch asks the driver's management library: no context is created in this process.
        if torch.cuda.device_count() == 0:
            build = f"CUDA {torch.version.cuda}" if torch.version.hip is None else f"ROCm {torch.version.hip}"
            return f"no GPU with a driver for {build} was found"
        return None

    def initialize(self, config: DeviceConfig, rank: int) -> None:
        from ops.triton import configs, launch  # and with it triton

        index = own_index(config.first_index, rank)
        torch.cuda.set_device(index)
        self.torch_device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(index)
        try:
            if torch.version.hip is not None:
                launch.use_target(configs.target_of("hip", properties.gcnArchName))
            else:
                launch.use_target(configs.target_of("cuda", 10 * properties.major + properties.minor))
        except ValueError as error:
            raise ModelError(f"--device cuda: {properties.name}: {error}") from error
        use_kernels(self.torch_device.type, config)
        # What has no kernel is computed by torch, as exactly as it can.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.set_num_threads(config.num_threads or min(8, len(os.sched_getaffinity(0))))
        torch.cuda.set_stream(torch.cuda.Stream())  # the default one waits for all others, and cannot be captured
        refuse_wrong_kernels(self.torch_device, properties.name)
        logger.info("%s, %.4g GiB", properties.name, properties.total_memory / 2**30)

    def memory(self) -> Memory:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return Memory(total, free)

    def default_kv_bytes(self) -> int:
        return self.memory().free_bytes

    def steps(self) -> CudaSteps:
        return CudaSteps(self.torch_device)

    def communicator(self, parallel: ParallelState) -> Communicator:
        size = parallel.tp_size * parallel.pp_size
        if size == 1:
            return SingleRank()
        flag = f"--tensor-parallel-size {parallel.tp_size}, --pipeline-parallel-size {parallel.pp_size}"
        if parallel.rendezvous_fd < 0 and parallel.store is None:
            raise ModelError(f"{flag}: ranks are processes, which --distributed-executor-backend mp starts")
        if not torch.distributed.is_nccl_available():
            build = torch.__version__
            raise ModelError(f"{flag}: torch {build} lacks NCCL (on AMD, RCCL); install another build, or use 1")
        if parallel.store is None:  # all ranks are on this machine: nobody outside it need reach them
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        else:
            os.environ["NCCL_SOCKET_IFNAME"] = f"={parallel.interface}"
            version = torch.cuda.nccl.version()
            if torch.version.hip is None and NCCL_THAT_HANGS[0] <= version < NCCL_THAT_HANGS[1]:
                name = ".".join(map(str, version))
                logger.warning("NCCL %s may hang in graphs across machines; add --enforce-eager", name)
        from executor.device.group import join_group  # and with it torch.distributed

        self._group = join_group(parallel, "nccl", self.torch_device)
        return self._group

    def stage_transfer(self) -> GroupRank | None:
        return self._group

    def allocate_kv(self, shape: tuple[int, ...], dtype: torch.dtype, memory: Tensor | None = None) -> Tensor:
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if memory is None:
            try:
                memory = torch.zeros(num_bytes, dtype=torch.uint8, device=self.torch_device)
            except torch.OutOfMemoryError as error:
                free = torch.cuda.mem_get_info()[0]
                raise ModelError(
                    f"--gpu-memory-utilization: {num_bytes / 2**30:.3g} GiB of the KV cache were planned, but only "
                    f"{free / 2**30:.3g} GiB are free now: other processes use this GPU; stop them, or lower the option"
                ) from error
        elif len(memory) < num_bytes:
            raise ValueError(f"a KV cache of {num_bytes} bytes does not fit into {len(memory)} bytes of memory")
        return memory[:num_bytes].view(dtype).view(shape)


def own_index(first: int, rank: int) -> int:
    """The GPU of a worker.

    Args:
        first: Index of the engine's first one; those before belong to other replicas.
        rank: Index among the engine's workers on this machine.

    Raises:
        ModelError: There are too few.
    """
    count, index = torch.cuda.device_count(), first + rank
    if index < count:
        return index
    chosen = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES")}
    if torch.version.hip is not None:
        chosen["HIP_VISIBLE_DEVICES"] = os.environ.get("HIP_VISIBLE_DEVICES")
    visible = "".join(f", those of {name}={value}" for name, value in chosen.items() if value)
    if first:
        raise ModelError(
            f"--data-parallel-size: a replica needs GPU {index}, but this machine has only {count}{visible}"
        )
    raise ModelError(
        f"--tensor-parallel-size, --pipeline-parallel-size: worker {rank} needs a GPU of its own, but this machine has "
        f"only {count}{visible}; use at most {count} in all"
    )


def has_compiler() -> bool:
    """Whether there is a C compiler, as Triton looks for one."""
    return "CC" in os.environ or any(shutil.which(name) for name in ("gcc", "clang"))


def refuse_wrong_kernels(device: torch.device, name: str) -> None:
    """Computes a little, and compares.

    Raises:
        ModelError: The kernels are wrong.
    """
    import triton

    from ops.triton import self_test

    problem = self_test.problem(device)
    if problem is not None:
        raise ModelError(
            f"--device cuda: {problem} are wrong on {name} with Triton {triton.__version__}; install another version, "
            "or use --device cpu"
        )


def use_kernels(device_type: str, config: DeviceConfig) -> None:
    """Selects the kernels that ``--matmul`` asks for."""
    if config.matmul == "auto":
        ops.use(device_type, "triton")
        return
    from ops.triton.op_set import TritonOps

    logger.warning("--matmul %s: a request's tokens may depend on what runs beside it", config.matmul)
    ops.use(device_type, TritonOps(uses_library=True))


def pinned(num_bytes: int) -> Tensor:
    """Memory of the host that the device copies by itself, uint8."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


# ---------------------------------------------------------------------------------------------------------
# steps


@dataclass(eq=False)
class _PinnedBuffer(StagingBuffer):
    memory: Tensor = torch.empty(0)
    """``host`` as a tensor."""
    parts: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Starts of the buffer on both sides, by their bytes."""


def _new_buffer(size: int, device: Tensor) -> _PinnedBuffer:
    memory = pinned(size)
    return _PinnedBuffer(memory.numpy(), device, memory=memory)


def _copy(buffer: StagingBuffer, begin: int, end: int) -> None:
    assert isinstance(buffer, _PinnedBuffer)
    buffer.device[begin:end].copy_(buffer.memory[begin:end], non_blocking=True)


class CudaBlock:
    """See ``executor.device.steps.Block``."""

    def __init__(self, steps: CudaSteps, num_bytes: int) -> None:
        self.device = torch.zeros(num_bytes, dtype=torch.uint8, device=steps.device)
        self._steps = steps
        self._free: list[StagingBuffer] = []
        self._current: list[StagingBuffer] = []
        steps.pools.append(self)

    def write(self, data: npt.NDArray[np.uint8]) -> None:
        assert not self._current, "a step writes a block once"
        self._steps.begin()
        buffer = self._free.pop() if self._free else _new_buffer(self.device.nbytes, self.device)
        assert isinstance(buffer, _PinnedBuffer)
        self._current.append(buffer)
        size = len(data)
        buffer.host[:size] = data
        if size not in buffer.parts:
            buffer.parts[size] = buffer.device[:size], buffer.memory[:size]
        device, host = buffer.parts[size]
        device.copy_(host, non_blocking=True)

    def take(self) -> list[StagingBuffer]:
        """See ``StagingPool``."""
        buffers, self._current = self._current, []
        return buffers

    def give_back(self, buffers: list[StagingBuffer]) -> None:
        """See ``StagingPool``."""
        self._free += buffers


class CudaGraphs:
    """See ``executor.device.steps.Graphs``."""

    reserve_bytes = RESERVE_BYTES

    def __init__(self, steps: CudaSteps) -> None:
        self._steps = steps
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def block(self, num_bytes: int) -> CudaBlock:
        return CudaBlock(self._steps, num_bytes)

    def compile(self, launches: Sequence[Launch]) -> None:
        from ops.triton.launch import different  # and with it triton

        launches = different(launches)  # type: ignore[arg-type]
        begin, device = time.perf_counter(), self._steps.device
        with ThreadPoolExecutor(min(MOST_COMPILERS, len(os.sched_getaffinity(0))), "compile", _use, (device,)) as pool:
            for _ in pool.map(lambda each: each.compile(), launches):
                pass
        logger.debug("%d kernels compiled in %.1f s", len(launches), time.perf_counter() - begin)

    def capture(self, launches: Sequence[Launch]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Only of this thread: another one waits for events meanwhile.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                for each in launches:
                    each.run()
            finally:
                graph.capture_end()
        return graph.replay


def _use(device: torch.device) -> None:
    """Lets a thread work for a GPU: each begins with the first one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


class CudaSteps:
    """See ``executor.device.steps.StepChannel``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._staging = StagingPool(self._make_buffer, self._copy)
        self.pools: list[StagingPool | CudaBlock] = [self._staging]
        self._route: _Route | None = None
        """That of the last results."""
        self.graphs = CudaGraphs(self)
        self._copies = torch.cuda.Stream()
        self._outputs: list[_Output] = []
        """Pinned buffers for results, free ones."""
        self._begin: torch.cuda.Event | None = None
        """When the device began with the current step."""
        self._event_fd = os.eventfd(0, os.EFD_SEMAPHORE)
        weakref.finalize(self, os.close, self._event_fd)
        self._launched: queue.SimpleQueue[CudaResults] = queue.SimpleQueue()
        arguments = (self._launched, self._event_fd)
        threading.Thread(target=_wait_for_results, args=arguments, daemon=True, name="results").start()

    def _make_buffer(self, size: int) -> StagingBuffer:
        return _new_buffer(size, torch.empty(size, dtype=torch.uint8, device=self.device))

    def _copy(self, buffer: StagingBuffer, begin: int, end: int) -> None:
        if end - begin < LARGE_COPY:
            _copy(buffer, begin, end)
            return
        with torch.cuda.stream(self._copies):
            _copy(buffer, begin, end)
        torch.cuda.current_stream().wait_stream(self._copies)

    def begin(self) -> None:
        """Notes when the device begins with a step."""
        if self._begin is None:
            self._begin = torch.cuda.Event(enable_timing=True)
            self._begin.record()

    def upload(self, columns: Mapping[str, Array]) -> Mapping[str, Tensor]:
        self.begin()
        return self._staging.upload(columns)

    def download(self, tensors: Sequence[Tensor]) -> Pending:
        self.begin()
        assert self._begin is not None
        route = self._route
        if route is None or not route.suits(tensors):
            route = _Route(tensors)
            self._route = route if route.num_bytes <= KEPT_RESULTS else None
        results = CudaResults(self, self._begin, [(pool, pool.take()) for pool in self.pools])
        results.start(route)
        self._begin = None
        self._launched.put(results)
        return results

    def take_output(self, num_bytes: int) -> _Output:
        """A pinned buffer for results."""
        for index, buffer in enumerate(self._outputs):
            if num_bytes <= len(buffer.host):
                return self._outputs.pop(index)
        return _Output(pinned(max(num_bytes, 64 << 10)))

    def give_back(self, output: _Output) -> None:
        """Returns a buffer whose results are collected."""
        self._outputs.append(output)

    def recent_tokens(self, max_num_seqs: int) -> RecentTokens:
        tokens = torch.full((max_num_seqs * RECENT_TOKENS,), -1, dtype=torch.int32, device=self.device)
        return DeviceTokens(self, tokens)

    def fileno(self) -> int:
        return self._event_fd

    def acknowledge(self) -> None:
        """Takes one result from the descriptor; waits for it."""
        os.eventfd_read(self._event_fd)


class CudaResults:
    """A step's results. See ``executor.device.steps.Pending``."""

    def __init__(
        self,
        steps: CudaSteps,
        begin: torch.cuda.Event,
        taken: Sequence[tuple[StagingPool | CudaBlock, list[StagingBuffer]]],
    ) -> None:
        self._steps = steps
        self._begin = begin
        self._taken = taken
        self._end = torch.cuda.Event(enable_timing=True, blocking=True)
        self._output: _Output | None = None
        self._places: Sequence[_Place] = ()
        self._has_arrived = False
        self._error: Exception | None = None

    def start(self, route: _Route) -> None:
        """Launches the copies."""
        self._output = output = self._steps.take_output(route.num_bytes)
        for begin, end, memory in route.copies:
            output.part(begin, end).copy_(memory, non_blocking=True)
        self._places = route.places
        self._end.record()

    def wait(self) -> None:
        """Waits for the device, in another thread than the worker's."""
        try:
            self._end.synchronize()
        except Exception as error:
            self._error = error
        self._has_arrived = True

    def is_ready(self) -> bool:
        return self._has_arrived

    def collect(self) -> list[Array]:
        self._steps.acknowledge()
        if self._error is not None:
            raise self._error
        output = self._output
        assert output is not None
        arrays = [output.host[begin:end].view(dtype).reshape(shape).copy() for begin, end, dtype, shape in self._places]
        self._steps.give_back(output)
        for pool, buffers in self._taken:
            pool.give_back(buffers)
        return arrays

    @property
    def device_ms(self) -> float:
        return float(self._begin.elapsed_time(self._end)) if self._error is None else 0.0


class _Output:
    """A pinned buffer for results."""

    def __init__(self, memory: Tensor) -> None:
        self.host = memory.numpy()
        self._memory = memory
        self._parts: dict[tuple[int, int], Tensor] = {}

    def part(self, begin: int, end: int) -> Tensor:
        """Some of its bytes. Few parts are ever asked for."""
        found = self._parts.get((begin, end))
        if found is None:
            if len(self._parts) == MOST_PARTS:
                self._parts.clear()
            found = self._parts[begin, end] = self._memory[begin:end]
        return found


_Place = tuple[int, int, np.dtype[Any], tuple[int, ...]]
"""Where a result lies in a buffer: first byte and end, and its dtype and shape."""


class _Route:
    """How tensors are copied to one buffer of the host. Steps whose results lie where the last ones did share it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensors)
        self._is_dense = all(tensor.is_contiguous() for tensor in tensors)
        stretches = joined(tensors)
        begins = np.cumsum([0, *(-(-memory.nbytes // ALIGNMENT) * ALIGNMENT for memory, _ in stretches)]).tolist()
        self.num_bytes: int = begins[-1]
        self.copies = [
            (begin, begin + memory.nbytes, memory) for begin, (memory, _) in zip(begins, stretches, strict=False)
        ]
        """First byte and end in the buffer, and what is copied there."""
        places: dict[int, int] = {}
        for begin, (_, members) in zip(begins, stretches, strict=False):
            places |= {index: begin + inner for index, inner in members.items()}
        self.places: list[_Place] = [
            (places[index], places[index] + tensor.nbytes, _numpy_dtype(tensor), tuple(tensor.shape))
            for index, tensor in enumerate(tensors)
        ]

    def suits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, and what was made of them still holds."""
        return self._is_dense and len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors))


def _numpy_dtype(tensor: Tensor) -> np.dtype[Any]:
    return torch.empty(0, dtype=tensor.dtype).numpy().dtype


def joined(tensors: Sequence[Tensor]) -> list[tuple[Tensor, dict[int, int]]]:
    """The stretches of memory that hold some tensors, so that neighbours are copied at once.

    Returns:
        uint8 memory of each stretch, and where in it tensors begin, by their indices.
    """
    found: list[tuple[Tensor, dict[int, int]]] = []
    dense = [tensor.contiguous() for tensor in tensors]
    order = sorted(range(len(dense)), key=lambda index: dense[index].data_ptr())
    for index in order:
        tensor = dense[index]
        storage = tensor.untyped_storage()
        begin = int(tensor.storage_offset()) * tensor.itemsize
        if found:
            memory, members = found[-1]
            start = int(memory.storage_offset())
            gap = begin - start - memory.nbytes
            if memory.untyped_storage().data_ptr() == storage.data_ptr() and gap <= LARGEST_GAP:
                end = max(start + memory.nbytes, begin + tensor.nbytes)
                found[-1] = (_bytes_of(memory, start, end), {**members, index: begin - start})
                continue
        found.append((_bytes_of(tensor, begin, begin + tensor.nbytes), {index: 0}))
    return found


def _bytes_of(tensor: Tensor, begin: int, end: int) -> Tensor:
    """A part of a tensor's memory."""
    view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    view.set_(tensor.untyped_storage(), begin, (end - begin,), (1,))
    return view


def _wait_for_results(launched: queue.SimpleQueue[CudaResults], event_fd: int) -> None:
    # Unlike os.eventfd_write, this call keeps the interpreter's lock: the worker, which it wakes, gets the lock once
    # this thread waits for the device again. Otherwise this thread would ask for the lock while the next step is
    # launched, and hold it up at each copy.
    write = ctypes.PyDLL(None).eventfd_write
    write.argtypes = (ctypes.c_int, ctypes.c_uint64)
    while True:
        launched.get().wait()
        write(event_fd, 1)
