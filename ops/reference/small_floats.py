"""Floating-point numbers of 4 and 8 bits in plain torch: weights' codes, and scales of groups of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12)
"""Twice the numbers of codes 0 to 7 of mxfp4 and nvfp4; codes 8 to 15 are their negatives."""
E2M1_OFFSET = 16
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""As bitsandbytes has them."""
FP4_VALUES = tuple(sign * number / 12 for sign in (1, -1) for number in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
"""As bitsandbytes has them: the largest is 1."""


@dataclass(frozen=True)
class FloatFormat:
    """A format of codes whose numbers are those of a table, times a scale."""

    bits: int
    group_size: int = 0
    """Columns of a group; 0: any multiple of 32, or whole rows."""
    scale_dtype: torch.dtype | None = None
    """Of the groups' scales; None: float16, bfloat16 or float32."""
    is_integer: bool = False
    """Its numbers are multiples of half a scale, so it can be multiplied with activations in int8."""


FLOAT_FORMATS = {
    "fp8_e4m3": FloatFormat(8),
    "nf4": FloatFormat(4),
    "fp4": FloatFormat(4),
    "mxfp4": FloatFormat(4, 32, torch.float8_e8m0fnu, is_integer=True),
    "nvfp4": FloatFormat(4, 16, torch.float8_e4m3fn, is_integer=True),
}
"""By the names of ``Encoding.format``."""


def e2m1_codes(codes: Tensor) -> Tensor:
    """Twice the numbers of codes of E2M1, plus 16: uint8."""
    values = [E2M1_OFFSET + sign * each for sign in (1, -1) for each in E2M1_DOUBLED]
    return torch.tensor(values, dtype=torch.uint8, device=codes.device)[codes.long()]


def values_of(codes: Tensor, name: str) -> Tensor:
    """The numbers, before they are scaled, of codes that are no integers: float32."""
    if name == "fp8_e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    table = NF4_VALUES if name == "nf4" else FP4_VALUES
    return torch.tensor(table, dtype=torch.float32, device=codes.device)[codes.long()]


def float_values(codes: Tensor, format: str) -> Tensor:
    """The numbers, before they are scaled, that codes of any of these formats stand for: float32 of the same shape."""
    if FLOAT_FORMATS[format].is_integer:
        return (e2m1_codes(codes).float() - E2M1_OFFSET) / 2
    return values_of(codes, format)


def halved_power(exponents: Tensor) -> Tensor:
    """``2**(e - 128)`` of uint8: half of what a scale of mxfp4 stands for. Float32 has all of them."""
    wide = exponents.to(torch.int32)
    return torch.where(wide < 2, 0x00200000 << wide, (wide - 1) << 23).view(torch.float32)
