"""All kernels in the configurations that launchers choose: compiled ahead of time, and checked without a GPU.

Each module of kernels has a function ``cases``, which names calls of its launchers. A case runs on meta tensors, for a
target: the launches that it records are those that a GPU of this kind would see.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ops.triton.configs import Target
from ops.triton.launch import Launch, for_target, recorded, scratch

MODULES = (
    "adapters",
    "attention",
    "collectives",
    "drafts",
    "experts",
    "fp8",
    "gather",
    "gemm",
    "kv_cache",
    "latent",
    "logprobs",
    "norm",
    "per_token",
    "pointwise",
    "prepare",
    "quantized",
    "recurrent",
    "rope",
    "route",
    "sample",
    "short_conv",
)
"""Modules of this package with kernels."""


@dataclass(frozen=True)
class Case:
    """A call of a launcher, and what its kernels must look like when they are compiled."""

    config: str
    """What distinguishes it from other calls of the launcher: sizes and types."""
    call: Callable[[], Any]
    needs_tensor_cores: bool = False
    """Whether its products must use the target's instruction for tiles."""
    is_exact: bool = False
    """Whether its results must be those of the reference, bit for bit: no product and sum may be fused."""
    min_load: int = 4
    """Bytes of the smallest load from global memory."""
    family: str = ""
    """Cases of a family must add in the same order: their tiles may replace each other."""
    targets: frozenset[str] | None = None
    """Where launchers choose it; None: on all targets."""

    def launches(self, target: Target) -> list[Launch]:
        """What the call launches on a target."""
        with for_target(target), recorded() as launches:
            self.call()
        scratch.clear()
        return launches


def cases() -> Iterator[Case]:
    """All cases, module by module."""
    for name in MODULES:
        yield from importlib.import_module(f"ops.triton.{name}").cases()


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without data, as an argument of a case."""
    return torch.empty(shape, dtype=dtype, device="meta")


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """What Triton's compiler is told of a launch's arguments, as its own dispatch would.

    Returns:
        The type of each parameter, values of those that are constants, and attributes by place.
    """
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for parameter in launch.kernel.params:
        name, place = parameter.name, (parameter.num,)
        value = launch.constants[name] if parameter.is_constexpr else launch.args[name]
        specialises = not parameter.do_not_specialize
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or value is None or (is_number and specialises and value == 1):
            types[name], constants[name] = "constexpr", value
            continue
        types[name] = _type_of(value)
        if isinstance(value, Tensor) or (is_number and specialises and value % 16 == 0):
            attributes[place] = [["tt.divisibility", 16]]
    return types, constants, attributes


_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e4m3fnuz: "fp8e4b8",
    torch.float8_e5m2: "fp8e5",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    assert isinstance(value, float), f"{value!r} cannot be passed to a kernel"
    return "fp32"
