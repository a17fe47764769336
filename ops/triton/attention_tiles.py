"""Which layers of attention the kernels compute, and how they are cut into tiles."""

from __future__ import annotations

import torch

from ops.metadata import KV_CODES, AttentionShape
from ops.triton.configs import KIB
from ops.triton.launch import target

PART = 512
"""Tokens of a part."""
SPLIT_ROWS = 16
"""Height of the tiles of items that are split into parts: queries times heads that share a KV head."""
SPLIT_PARTS = 4096
"""Parts of one query that partial results are kept for; requests beyond are not split."""
MAX_HEAD_DIM = 512
"""Numbers of a head."""
WIDE_HEAD_DIM = 256
"""Of more, few rows fit into registers: heads of global layers (Gemma 4), and latents."""
FLOAT32_SHARED = 160 * KIB
"""Bytes of shared memory that tiles of wide heads need in float32."""


def unsupported(shape: AttentionShape, dtype: torch.dtype) -> str | None:
    """The reason why the kernels cannot compute such a layer, or None if they can."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"activations in {str(dtype).removeprefix('torch.')} are not supported"
    largest = max(shape.head_dim, shape.v_dim)
    if largest > MAX_HEAD_DIM:
        return f"heads of {largest} numbers are not supported; at most {MAX_HEAD_DIM}"
    if dtype == torch.float32 and largest > 128 and target().backend == "hip":
        return f"heads of {largest} numbers in float32 are not supported on AMD; use bfloat16"
    if dtype == torch.float32 and largest > WIDE_HEAD_DIM and target().max_shared < FLOAT32_SHARED:
        return f"heads of {largest} numbers in float32 need a GPU with more shared memory; use --dtype bfloat16"
    return None


def unsupported_cache(kv_dtype: torch.dtype, dtype: torch.dtype, shape: AttentionShape) -> str | None:
    """The reason why the kernels have no cache of a type for activations in ``dtype``, or None if they have."""
    if kv_dtype not in KV_CODES:
        return None if kv_dtype == dtype else "GPUs keep K and V in the type of the activations, or in 8 bits"
    if dtype == torch.float32:
        return "GPUs do not run a KV cache in 8 bits with --dtype float32; use bfloat16"
    if kv_dtype == torch.int8:
        is_wide = max(shape.head_dim, shape.v_dim) > 128 and target().backend == "hip"
        return (
            "AMD GPUs do not run a KV cache in int8 with heads of more than 128 numbers; use auto" if is_wide else None
        )
    if target().backend == "hip":
        return "AMD GPUs do not run a KV cache in fp8 yet; use int8"
    if kv_dtype == torch.float8_e4m3fn and target().capability < 89:
        return "fp8_e4m3 needs a GPU of compute capability 8.9; use fp8_e5m2"
    return None


def is_wide(shape: AttentionShape) -> bool:
    """Whether a tile has few rows."""
    return max(shape.head_dim, shape.v_dim) > WIDE_HEAD_DIM


def is_split(shape: AttentionShape) -> bool:
    """Whether rows with few queries are cut into parts. For wide heads, AMD's scalar registers do not suffice."""
    return not (is_wide(shape) and shape.kind == "kv" and target().backend == "hip")


def split_parts(shape: AttentionShape) -> int:
    """See ``SPLIT_PARTS``. Parts of wide heads have results that take more memory."""
    return max(1, SPLIT_PARTS // 8) if is_wide(shape) else SPLIT_PARTS


def split_queries(shape: AttentionShape) -> int:
    """Queries of a row up to which it is split into parts."""
    return max(1, 2 * SPLIT_ROWS // group_of(shape)) if is_split(shape) else 0


def group_of(shape: AttentionShape) -> int:
    """Heads that share a KV head."""
    return shape.num_heads // shape.num_kv_heads


def window_of(shape: AttentionShape) -> int:
    """Tokens that a token attends to, on each side if not causal; 0: all. Chunks have negative lengths."""
    window = shape.sliding_window or 0
    return -window if shape.is_chunked else window


def step_of(shape: AttentionShape, dtype: torch.dtype) -> int:
    """Tokens of a step of the online softmax. It decides bits, so it is the same for all tiles."""
    if dtype == torch.int8 and target().backend == "hip":
        return 32  # codes become numbers in registers
    return 64 if max(shape.head_dim, shape.v_dim) * max(dtype.itemsize, 2) <= 256 else 32


def whole_tile(shape: AttentionShape, dtype: torch.dtype) -> tuple[int, int, int]:
    """Height of the tiles of long rows, warps and stages. None of them decides bits."""
    largest = max(shape.head_dim, shape.v_dim)
    if is_wide(shape):
        return 16, 8, 1
    if dtype == torch.float32:
        return (16, 4, 2) if largest <= 64 else (32, 8, 2) if largest <= 128 else (16, 8, 1)
    if target().capability == 90 and largest <= 128:
        return 128, 8, 2
    if target().capability == 90 and dtype in KV_CODES:
        return 32, 8, 2
    if target().capability == 100 and (largest > 128 or shape.has_biases):
        return 64, 8, 1
    return (64, 8, 2) if largest <= 128 or target().capability == 90 or target().backend == "hip" else (32, 8, 2)


def split_tile(shape: AttentionShape, dtype: torch.dtype) -> tuple[int, int, int]:
    """Likewise of the tiles of parts."""
    if is_wide(shape):
        return SPLIT_ROWS, 8, 1
    if target().capability == 100 and dtype == torch.float32:
        return SPLIT_ROWS, 8, 1
    if dtype == torch.int8 or (target().backend == "hip" and shape.sliding_window and not shape.causal):
        return SPLIT_ROWS, 8, 2
    widest = {0: 64, 100: 0}.get(target().capability, 128)
    if target().capability == 90 and dtype == torch.float32:
        widest = 64
    return SPLIT_ROWS, 4 if max(shape.head_dim, shape.v_dim) <= widest else 8, 2
