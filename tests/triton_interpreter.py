"""Triton's interpreter as a GPU computes: importing this module amends it and selects no op set.

* bfloat16 and fp8 are rounded to the nearest, ties to even. Arithmetic on them is refused, since the interpreter would
  compute with their bit patterns: kernels convert to float32 first.
* ``tl.dot`` of 16-bit numbers is a tensor core's: groups of 16 along k in ascending order, each summed exactly with the
  accumulator and rounded once. Of float32 it is a chain of fused multiply-adds.
* Programs of a grid run in the order that ``grid_order`` says.
* Bytes that kernels load and store are counted (``count_bytes``).
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402
import triton.runtime.interpreter as ti  # noqa: E402

Array = np.ndarray[Any, Any]
Order = Literal["forward", "reversed", "shuffled"]
ORDERS: tuple[Order, ...] = ("forward", "reversed", "shuffled")
K_GROUP = 16
"""Numbers along k that a tensor core adds at once, in 16 bits."""

assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton is imported"


@dataclass
class Traffic:
    """Bytes that kernels moved."""

    loaded: int = 0
    stored: int = 0


_order: Order = "forward"
_seed = 0
_traffic: Traffic | None = None


@contextmanager
def grid_order(order: Order, seed: int = 0) -> Iterator[None]:
    """Runs the programs of each grid in another order."""
    global _order, _seed
    before = _order, _seed
    _order, _seed = order, seed
    try:
        yield
    finally:
        _order, _seed = before


@contextmanager
def count_bytes() -> Iterator[Traffic]:
    """Counts what kernels load and store; numbers that a mask leaves out do not count."""
    global _traffic
    before, _traffic = _traffic, Traffic()
    try:
        yield _traffic
    finally:
        _traffic = before


def programs(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The places of a grid in the order in which they run."""
    places = list(product(*(range(size) for size in grid)))
    if _order == "reversed":
        places.reverse()
    elif _order == "shuffled":
        random.Random(_seed).shuffle(places)
    return places


class OrderedGrid(ti.GridExecutor):  # type: ignore[misc]
    """Runs the programs of a grid, on the CPU tensors themselves."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        known = inspect.getfullargspec(self.fn)
        kwargs = {key: value for key, value in kwargs.items() if key in (*known.args, *known.kwonlyargs)}
        scope = ti._patch_lang(self.fn)
        _patched.clear()
        try:
            bound = inspect.getcallargs(self.fn, *args, **kwargs)
            bound = {
                name: value if name in self.constexprs else ti._implicit_cvt(_plain(value))
                for name, value in bound.items()
            }
            grid = (*self.grid, 1, 1)[:3]
            ti.interpreter_builder.set_grid_dim(*grid)
            with np.errstate(all="ignore"):  # a GPU does not warn
                for place in programs(grid):
                    ti.interpreter_builder.set_grid_idx(*place)
                    self.fn(**bound)
        finally:
            scope.restore()


_patched: set[str] = set()
"""Modules whose names for Triton's language are those of the interpreter, while a grid runs."""


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a kernel's helper. Triton would patch its language again each time, which takes most of the time."""
    if self.fn.__module__ not in _patched:
        ti._patch_lang(self.fn)
        _patched.add(self.fn.__module__)
    return self.rewrite()(*args, **kwargs)


def _plain(value: Any) -> Any:
    """A tensor of a subclass as a plain one, of which only the address is read."""
    return value.as_subclass(torch.Tensor) if isinstance(value, torch.Tensor) else value


# ---------------------------------------------------------------------------------------------------------
# numbers

SMALL = {
    tl.bfloat16: (torch.bfloat16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
    tl.float8e4b8: (torch.float8_e4m3fnuz, np.uint8),
    tl.float8e5: (torch.float8_e5m2, np.uint8),
    tl.float8e5b16: (torch.float8_e5m2fnuz, np.uint8),
}
"""Types that numpy lacks; the interpreter keeps their bits."""
ARITHMETIC = (np.add, np.subtract, np.multiply, np.divide, np.fmod)


def widened(data: Array, dtype: Any) -> Array:
    """The numbers of a type, as an array that numpy computes with."""
    if dtype not in SMALL:
        return data
    kind, _ = SMALL[dtype]
    if dtype == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    values: Array = torch.from_numpy(np.ascontiguousarray(data)).view(kind).float().numpy()
    return values


def rounded(data: Array, dtype: Any) -> Array:
    """Numbers rounded to a type, to the nearest and ties to even, as the interpreter keeps them."""
    if dtype not in SMALL:
        result: Array = data.astype(ti._get_np_dtype(dtype))
        return result
    kind, bits = SMALL[dtype]
    values = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).to(kind)
    unsigned = torch.uint8 if bits is np.uint8 else torch.int16
    bits_of: Array = values.view(unsigned).numpy()
    return bits_of.view(bits)


def tensor_core(a: Array, b: Array, accumulator: Array) -> Array:
    """``a @ b + accumulator`` [..., m, n] in float32, of numbers in 16 or 8 bits."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[-1], K_GROUP):
        exact = wide_a[..., k : k + K_GROUP] @ wide_b[..., k : k + K_GROUP, :]
        accumulator = (accumulator + exact).astype(np.float32)
    return accumulator


def fused_chain(a: Array, b: Array, accumulator: Array) -> Array:
    """``a @ b + accumulator`` in float32, one k after the other."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    for k in range(a.shape[-1]):
        accumulator = (accumulator + wide_a[..., :, k, None] * wide_b[..., None, k, :]).astype(np.float32)
    return accumulator


def _dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    x, y = widened(a.data, a.dtype.scalar), widened(b.data, b.dtype.scalar)
    if x.dtype.kind in "iu":
        data = (x.astype(np.float64) @ y.astype(np.float64)).astype(d.data.dtype) + d.data
    elif a.dtype.primitive_bitwidth == 32 and not _is_small(a):
        data = fused_chain(x, y, d.data)
    elif a.dtype.primitive_bitwidth == 64:
        data = x @ y + d.data
    else:
        data = tensor_core(x, y, d.data)
    return ti.TensorHandle(data, d.dtype.scalar)


def _is_small(handle: Any) -> bool:
    return handle.dtype.scalar in SMALL


_plain_cast = ti.InterpreterBuilder.cast_impl
_plain_binary = ti.InterpreterBuilder.binary_op
_plain_load = ti.InterpreterBuilder.create_masked_load
_plain_store = ti.InterpreterBuilder.create_masked_store


def _cast(self: Any, source: Any, target: Any) -> Any:
    source_type, target_type = source.dtype.scalar, target.scalar
    if source_type in SMALL or target_type in SMALL:
        return ti.TensorHandle(rounded(widened(source.data, source_type), target_type), target_type)
    return _plain_cast(self, source, target)


def _fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    return _cast(self, source, target)


def _binary(self: Any, left: Any, right: Any, function: Callable[..., Any]) -> Any:
    if function in ARITHMETIC and (_is_small(left) or _is_small(right)):
        raise TypeError(f"{function.__name__} of {left.dtype} and {right.dtype}: convert to float32 first")
    return _plain_binary(self, left, right, function)


def _load(self: Any, pointers: Any, mask: Any, other: Any, cache: Any, is_volatile: Any) -> Any:
    if _traffic is not None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        _traffic.loaded += int(np.unique(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]).size) * size
    return _plain_load(self, pointers, mask, other, cache, is_volatile)


def _store(self: Any, pointers: Any, value: Any, mask: Any, cache: Any) -> Any:
    if _traffic is not None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        _traffic.stored += int(np.broadcast_to(mask.data, pointers.data.shape).sum()) * size
    return _plain_store(self, pointers, value, mask, cache)


ti.GridExecutor = OrderedGrid
ti.InterpretedFunction.__call__ = _call
ti.InterpreterBuilder.create_dot = _dot
ti.InterpreterBuilder.cast_impl = _cast
ti.InterpreterBuilder.create_fp_to_fp = _fp_to_fp
ti.InterpreterBuilder.binary_op = _binary
ti.InterpreterBuilder.create_masked_load = _load
ti.InterpreterBuilder.create_masked_store = _store
