"""Targets, and how many warps and stages each kernel uses there. Data only: nothing is tuned at run time.

No choice here may depend on the number of rows unless every choice has the same bits: a row's result is the same alone
or in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

KIB = 1024


@dataclass(frozen=True)
class Target:
    """A kind of GPU that kernels are compiled for."""

    name: str
    backend: Literal["cuda", "hip"]
    arch: int | str
    """As Triton has it: 90 for compute capability 9.0, ``gfx942``."""
    warp_size: int
    max_shared: int
    """Bytes of shared memory that a program may use."""
    max_registers: int = 255

    @property
    def capability(self) -> int:
        """The compute capability of an NVIDIA card; 0 of others."""
        return self.arch if isinstance(self.arch, int) else 0

    @property
    def has_wgmma(self) -> bool:
        """Whether warp groups multiply tiles together, with operands in shared memory (Hopper, Blackwell)."""
        return self.capability in (90, 100)


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * KIB),
        Target("sm_86", "cuda", 86, 32, 99 * KIB),
        Target("sm_89", "cuda", 89, 32, 99 * KIB),
        Target("sm_90", "cuda", 90, 32, 227 * KIB),
        Target("sm_100", "cuda", 100, 32, 227 * KIB),
        Target("sm_120", "cuda", 120, 32, 99 * KIB),
        Target("gfx942", "hip", "gfx942", 64, 64 * KIB, max_registers=512),
    )
}
"""By name. Other cards use the kernels of the closest one (``target_of``)."""
DEFAULT = TARGETS["sm_90"]
"""Of the interpreter, which has no limits."""


def target_of(backend: Literal["cuda", "hip"], arch: int | str) -> Target:
    """The target of a card.

    Args:
        backend: Whose card it is.
        arch: As of ``Target``.

    Raises:
        ValueError: There are no kernels for it.
    """
    if backend == "hip":
        name = str(arch).partition(":")[0]
        if name in TARGETS:
            return TARGETS[name]
        raise ValueError(f"there are no kernels for {name}; supported: {', '.join(TARGETS)}")
    known = sorted(target.capability for target in TARGETS.values() if target.backend == "cuda")
    capability = int(arch)
    if capability < known[0]:
        raise ValueError(f"a GPU of compute capability {known[0] / 10} or higher is needed, not {capability / 10}")
    return TARGETS[f"sm_{max(each for each in known if each <= capability)}"]


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled. ``tile`` are the sizes of its blocks, by the names of its constants."""

    num_warps: int = 4
    num_stages: int = 2
    tile: tuple[tuple[str, int], ...] = ()


def power_of_two(size: int, at_least: int = 1) -> int:
    """The smallest power of two that is not below either."""
    return max(at_least, 1 << (size - 1).bit_length())


def row(width: int, elements_per_thread: int = 16) -> int:
    """Warps of a program that keeps ``width`` numbers in registers."""
    return min(max(power_of_two(width) // (32 * elements_per_thread), 1), 16)


GEMM = {
    8: Config(4, 4, (("TILE_N", 64), ("TILE_K", 128))),
    16: Config(4, 4, (("TILE_N", 64), ("TILE_K", 128))),
    32: Config(4, 4, (("TILE_N", 64), ("TILE_K", 128))),
    64: Config(4, 4, (("TILE_N", 128), ("TILE_K", 64))),
    128: Config(8, 3, (("TILE_N", 128), ("TILE_K", 64))),
    256: Config(8, 3, (("TILE_N", 128), ("TILE_K", 64))),
}
"""Tiles of products by rows of a tile. All have the same bits."""
GEMM_FLOAT32 = {
    16: Config(4, 2, (("TILE_N", 32), ("TILE_K", 32))),
    64: Config(4, 2, (("TILE_N", 64), ("TILE_K", 16))),
}


def gemm(
    target: Target,
    rows: int,
    k: int,
    dtype: torch.dtype,
    segments: int,
    activation: str,
    is_gated: bool,
    has_rows: bool = False,
) -> Config:
    """The configuration of a product with ``rows`` rows.

    Args:
        target: The GPU.
        rows: Rows of the result.
        k: Numbers that are added up.
        dtype: Of both operands.
        segments: Into how many k is cut.
        activation: What follows; "none" if nothing does.
        is_gated: Whether a program has two tiles of weights.
        has_rows: Whether rows are gathered.
    """
    table = GEMM_FLOAT32 if dtype == torch.float32 else GEMM
    is_even = k % 64 == 0  # else masks take registers
    # A tile of 256 rows leaves none for anything else.
    most = 256 if segments == 1 and activation == "none" and target.has_wgmma and is_even else 128
    if not is_even and target.backend == "cuda" and not target.has_wgmma and rows > 32 and dtype != torch.float32:
        return Config(8, 2, (("TILE_M", 64), ("TILE_N", 64), ("TILE_K", 64)))
    # Two products of 8 rows: ptxas would let one wait for the other.
    least = 16 if is_gated or target.backend == "hip" else 8
    sizes = [size for size in table if least <= size <= most]
    tile_m = min((size for size in sizes if size >= rows), default=sizes[-1])
    chosen = table[tile_m]
    tile = dict(chosen.tile)
    tile_n = max(64, tile["TILE_N"] // 2) if is_gated and dtype != torch.float32 else tile["TILE_N"]
    tile_k = tile["TILE_K"] if k % tile["TILE_K"] == 0 else min(tile["TILE_K"], 64)
    stage = (tile_m + tile_n * (2 if is_gated else 1)) * tile_k * dtype.itemsize
    wanted = 2 if has_rows and not target.has_wgmma else chosen.num_stages  # their addresses take registers
    stages = 2 if target.backend == "hip" else max(2, min(wanted, target.max_shared // stage))
    return Config(chosen.num_warps, stages, (("TILE_M", tile_m), ("TILE_N", tile_n), ("TILE_K", tile_k)))


QUANTIZED_GEMM = {
    8: Config(4, 3, (("TILE_N", 64), ("TILE_K", 128))),
    16: Config(4, 3, (("TILE_N", 64), ("TILE_K", 128))),
    32: Config(4, 3, (("TILE_N", 64), ("TILE_K", 128))),
    64: Config(4, 3, (("TILE_N", 64), ("TILE_K", 64))),
    128: Config(8, 3, (("TILE_N", 128), ("TILE_K", 64))),
}
"""As ``GEMM``, for weights that are restored in registers."""


def quantized_gemm(target: Target, rows: int, dtype: torch.dtype, bits: int, is_gated: bool) -> Config:
    """The configuration of a product with quantised weights of ``bits``; the rest is as of ``gemm``."""
    table = GEMM_FLOAT32 if dtype == torch.float32 else QUANTIZED_GEMM
    sizes = [size for size in table if size >= (16 if is_gated or target.backend == "hip" else 8)]
    tile_m = min((size for size in sizes if size >= rows), default=sizes[-1])
    chosen = table[tile_m]
    tile = dict(chosen.tile)
    tile_n = max(64, tile["TILE_N"] // 2) if is_gated and dtype != torch.float32 else tile["TILE_N"]
    warps = chosen.num_warps
    if target.capability == 100 and tile_m == 128:
        # Sums are in tensor memory: with more warps, ptxas leaves each too few registers.
        warps, tile_n = 4, 64
    stages = 2 if target.backend == "hip" else chosen.num_stages
    return Config(warps, stages, (("TILE_M", tile_m), ("TILE_N", tile_n), ("TILE_K", tile["TILE_K"])))
