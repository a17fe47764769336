"""Every launch of a kernel passes here: what decides bits, which GPU it is for, and who runs it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ops.triton import configs
from ops.triton.configs import Config, Target

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors. Decided by TRITON_INTERPRET when Triton is imported."""
Grid = tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, with all that it needs. It may run any number of times."""

    kernel: Any
    """A function under ``triton.jit``."""
    grid: Grid
    args: Mapping[str, Any]
    """Tensors and numbers, by parameter."""
    constants: Mapping[str, Any]
    """The ``tl.constexpr`` parameters."""
    config: Config
    target: Target

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that it reads and writes."""
        return [arg for arg in self.args.values() if isinstance(arg, Tensor)]

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler. None is left to its defaults, which differ between versions and decide bits."""
        options: dict[str, Any] = {
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
            "enable_fp_fusion": False,
        }
        if self.target.backend == "hip":
            # Other shapes of the instruction group the sum over k differently.
            options["matrix_instr_nonkdim"] = 16
        return options

    def compile(self) -> None:
        """Compiles the kernel for these arguments, on the current GPU. Kernels that are interpreted need it not."""
        if not INTERPRETED:
            self.kernel.warmup(grid=self.grid, **self.args, **self.constants, **self.options)

    def run(self) -> None:
        """Runs the kernel on the current stream.

        Raises:
            RuntimeError: The tensors are on a device without kernels.
        """
        if not INTERPRETED and any(not tensor.is_cuda for tensor in self.tensors):
            raise RuntimeError(
                f"{self.name}: Triton's kernels run on GPUs; set TRITON_INTERPRET=1 before triton is imported to "
                "interpret them on CPU tensors"
            )
        self.kernel[self.grid](**self.args, **self.constants, **self.options)


@dataclass(frozen=True)
class Call(Launch):
    """A function of a library among launches: ``kernel``, which writes to tensors in its arguments."""

    def compile(self) -> None:
        pass

    def run(self) -> None:
        self.kernel(**self.args)


def different(launches: Sequence[Launch]) -> list[Launch]:
    """Of launches that are the same kernel to the compiler, one each."""
    found: dict[tuple[Any, ...], Launch] = {}
    for each in launches:
        args = [(name, *_kind(value)) for name, value in each.args.items()]
        found.setdefault((each.name, *args, each.config, repr(each.constants)), each)
    return list(found.values())


def _kind(value: Any) -> tuple[Any, ...]:
    """What the compiler may know of an argument."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return (type(value), value in (0, 1), value % 16 == 0) if isinstance(value, int) else (type(value),)


Sink = Callable[[Launch], None]


def _run(each: Launch) -> None:
    each.run()


_sink: Sink = _run
_target: Target = configs.DEFAULT


def launch(kernel: Any, grid: Grid, args: Mapping[str, Any], config: Config, **constants: Any) -> None:
    """Launches a kernel, or hands the launch to whoever collects them (``redirected``).

    Args:
        kernel: A function under ``triton.jit``.
        grid: Number of programs along up to three axes. An empty grid launches nothing.
        args: The kernel's parameters that are not constants, by name: tensors, numbers, None.
        config: Warps and stages; its tile becomes constants.
        constants: The ``tl.constexpr`` parameters.
    """
    if 0 in grid:
        return
    _sink(Launch(kernel, grid, args, dict(config.tile) | constants, config, _target))


def call(function: Callable[..., None], args: Mapping[str, Any]) -> None:
    """As ``launch``, of a function that enqueues work on the current stream."""
    _sink(Call(function, (1,), args, {}, Config(), _target))


def submit(each: Launch) -> None:
    """Runs a launch that was recorded, or hands it on as ``launch`` does."""
    _sink(each)


def redirected_to() -> Sink:
    """The function that gets launches at the moment."""
    return _sink


def target() -> Target:
    """The GPU that launchers choose configurations for."""
    return _target


def use_target(chosen: Target) -> None:
    """Selects the GPU, once, when its device is initialised."""
    global _target
    _target = chosen


@contextmanager
def for_target(chosen: Target) -> Iterator[None]:
    """Lets launchers choose configurations for another GPU."""
    before = _target
    use_target(chosen)
    try:
        yield
    finally:
        use_target(before)


@contextmanager
def redirected(sink: Sink) -> Iterator[None]:
    """Hands all launches to a function instead of running them. It may run them (``Launch.run``), now or later."""
    global _sink
    before, _sink = _sink, sink
    try:
        yield
    finally:
        _sink = before


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects launches without running them."""
    launches: list[Launch] = []
    with redirected(launches.append):
        yield launches


@contextmanager
def counted() -> Iterator[list[str]]:
    """Collects the names of kernels as they are launched."""
    names: list[str] = []
    before = _sink

    def count(each: Launch) -> None:
        names.append(each.name)
        before(each)

    with redirected(count):
        yield names


# ---------------------------------------------------------------------------------------------------------
# memory


class Scratch:
    """Memory that kernels use between their programs, one piece per purpose and device.

    Kernels on a stream run one after another, so all launches share it. It never shrinks or moves unless a launch needs
    more than any before; who captures launches therefore records the largest first.
    """

    def __init__(self) -> None:
        self._pieces: dict[tuple[str, torch.device], Tensor] = {}
        self._kept: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        """By identity: tensors compare their elements."""

    def get(self, purpose: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``size`` elements. They are zero at first, and are whatever a kernel left there later."""
        key = (purpose, device)
        piece = self._pieces.get(key)
        if piece is None or len(piece) < size:
            piece = self._pieces[key] = torch.zeros(size, dtype=dtype, device=device)
        return piece

    def keep(self, tensor: Tensor) -> Tensor:
        """Notes a tensor that a kernel's launches share and that stays as it is. Its owner keeps it."""
        self._kept[id(tensor)] = tensor
        return tensor

    def num_bytes(self, device: torch.device) -> int:
        """What a device's pieces occupy."""
        return sum(piece.nbytes for (_, where), piece in self._pieces.items() if where == device)

    def drop(self, device: torch.device) -> None:
        """Frees a device's pieces."""
        self._pieces = {key: piece for key, piece in self._pieces.items() if key[1] != device}

    def pieces(self) -> list[Tensor]:
        """All of them, and what is kept."""
        return [*self._pieces.values(), *self._kept.values()]

    def clear(self) -> None:
        """Frees all pieces."""
        self._pieces.clear()


scratch = Scratch()


def result(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """The memory for a result: ``out``, or new memory on the device of ``like``."""
    if out is None:
        return like.new_empty(shape, dtype=dtype)
    assert out.shape == shape and out.dtype == dtype, (
        f"expected {dtype} {list(shape)}, not {out.dtype} {list(out.shape)}"
    )
    return out


def row_stride(x: Tensor) -> int:
    """Elements from a row to the next. Columns are next to each other."""
    assert x.stride(-1) == 1 or x.shape[-1] == 1, "columns must be next to each other"
    return x.stride(0)
