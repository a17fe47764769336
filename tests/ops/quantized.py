"""Quantised weights for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize, quantize
from torch import Tensor

from ops.reference.gguf_blocks import BLOCK_FORMATS
from ops.reference.small_floats import FLOAT_FORMATS
from tests.ops.cpu import randn
from tests.tiny import random_blocks

BLOCK_TYPES = list(BLOCK_FORMATS)


def blocks(name: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Random rows in a type of GGUF: uint8 [rows, bytes of a row]."""
    kind = GGMLQuantizationType[name]
    try:
        return torch.from_numpy(quantize(randn(rows, columns, seed=seed).numpy(), kind))
    except NotImplementedError:
        return torch.from_numpy(random_blocks((rows, columns), kind, np.random.default_rng(seed)))


def extreme_blocks(name: str, rows: int, columns: int) -> Tensor:
    """Rows whose codes are all the largest, or all the smallest, in turn; scales are small."""
    kind = GGMLQuantizationType[name]
    _, num_bytes = GGML_QUANT_SIZES[kind]
    template = blocks(name, rows, columns).unflatten(1, (-1, num_bytes))
    result = torch.full_like(template, 255)
    result[1::2] = 0
    if name == "Q8_0":
        result[0::2], result[1::2] = 127, 128
    scales = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q6_K": (208, 210), "MXFP4": (0, 1)}
    first, end = scales.get(name, (0, 4 if name.endswith(("_1", "4_K", "5_K")) else 2))
    result[..., first:end] = template[..., first:end]
    return result.flatten(1)


def float_arguments(name: str, rows: int, columns: int, seed: int = 0) -> dict[str, Any]:
    """Random codes in a format of ``pack_floats``, and scales."""
    generator = torch.Generator().manual_seed(seed)

    def random(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)

    codes = random(0, 1 << FLOAT_FORMATS[name].bits, rows, columns)
    if name == "fp8_e4m3":
        codes[codes & 127 == 127] = 1  # no NaN
    if name == "mxfp4":
        return {"codes": codes, "scales": random(118, 132, rows, -(-columns // 32))}
    if name == "nvfp4":
        scales = random(0, 80, rows, -(-columns // 16)).view(torch.float8_e4m3fn)
        return {"codes": codes, "scales": scales, "row_scales": randn(rows, seed=seed), "divides": seed % 2 == 1}
    size = min(128 if name == "fp8_e4m3" else 64, columns)
    return {"codes": codes, "scales": randn(rows, -(-columns // size), seed=seed), "group_size": size}


def meaning(rows: Tensor, name: str) -> Tensor:
    """The numbers of rows according to the package ``gguf``: float32."""
    return torch.from_numpy(np.array(dequantize(rows.numpy(), GGMLQuantizationType[name])))
