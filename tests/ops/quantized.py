"""Quantised weights for tests."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize, quantize
from torch import Tensor

from ops.reference.gguf_blocks import BLOCK_FORMATS
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
    scales = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q6_K": (208, 210)}
    first, end = scales.get(name, (0, 4 if name.endswith(("_1", "4_K", "5_K")) else 2))
    result[..., first:end] = template[..., first:end]
    return result.flatten(1)


def meaning(rows: Tensor, name: str) -> Tensor:
    """The numbers of rows according to the package ``gguf``: float32."""
    return torch.from_numpy(np.array(dequantize(rows.numpy(), GGMLQuantizationType[name])))
