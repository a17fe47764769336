"""FP8 weights: numbers of 8 bits (E4M3) with a scale for all of them, for each row, or for each block.

Activations stay as they are. Kernels of GPUs round them to FP8, too, as checkpoints ask for; their scales are ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from executor.layers.parameter import MISFIT, Part, ShardId, WeightParameter
from executor.quantization.base import EmbeddingMethod, LinearShape, Options
from executor.quantization.codes import Floats
from executor.quantization.fields import FP8Fields, read
from executor.quantization.groups import MakeSource, PlainSource, Source, SourceMethod
from executor.quantization.packed import log_float_only
from executor.quantization.unquantized import UnquantizedEmbedding

logger = logging.getLogger(__name__)

INPUT_SCALES = r"\.(input_scale|input_zero_point|input_global_scale|input_scale_ub|activation_scale)$"
"""Scales of activations."""
CACHE_RENAMES = (
    (r"\.([kv])_proj\.(?:output_scale|\1_scale)$", r".attn.\1_scale"),
    (r"(?<!\.attn)\.([kv])_scale$", r".attn.\1_scale"),
)
"""Scales of the KV cache, as several writers name them."""
CACHE_SCALES = r"\.attn\.[kv]_scale$"
"""The same after renaming."""
OTHER_SCALES = r"\.(q|kv|prob)_(scale|zero_point)$|\.[kv]_zero_point$|\.[qkv]_proj\.output_(scale|zero_point)$"
"""Of what else attention reads."""


class FP8(SourceMethod):
    """The method of models quantised by transformers, AutoFP8, DeepSeek or FBGEMM."""

    renames = ((r"\.weight_scale_inv$", ".weight_scale"), *CACHE_RENAMES)
    ignored = (INPUT_SCALES, OTHER_SCALES)
    has_cache_scales = True

    def __init__(self, fields: Mapping[str, Any], options: Options) -> None:
        self.fields = read(FP8Fields, fields)
        self.options = options
        log_activations("FP8", options)
        log_float_only("fp8", options)

    def source(self, name: str) -> MakeSource:
        return partial(FP8Source, self.fields.weight_block_size) if self.fields.has_module(name) else PlainSource

    def embedding_method(self, name: str) -> EmbeddingMethod[Any]:
        return UnquantizedEmbedding()


def log_activations(kind: str, options: Options, *, is_fp8: bool = True) -> None:
    """Says that activations are not what the checkpoint asks for, unless the user asks for the same."""
    if is_fp8 and options.activations == "fp8":
        return
    logger.info("activations are not rounded to %s, as the checkpoint asks: they stay in floating point", kind)


def log_cache(is_float: bool = True) -> None:
    """Says what becomes of the checkpoint's scales for a KV cache in 8 bits."""
    if is_float:
        logger.info("the checkpoint has scales for a KV cache in FP8; --kv-cache-dtype fp8 uses them on CPUs")
    else:
        logger.info("the checkpoint's scales for a KV cache in int8 are not used; --kv-cache-dtype int8 has its own")


class ScaleParameter(WeightParameter):
    """Scales of rows [out_features, groups], from one for all rows, for each, or for each block of rows."""

    block_rows: int

    @classmethod
    def of(cls, shape: LinearShape, groups: Part, block_rows: int) -> ScaleParameter:
        """Uninitialised."""
        parts = {shard_id: (rows, groups) for shard_id, rows in shape.outputs.items()}
        parameter = cls.empty(parts, dtype=torch.float32, device=shape.device)
        parameter.block_rows = block_rows
        return parameter

    def load(self, tensor: Tensor, shard_id: ShardId = None) -> None:
        tensor = tensor.float()
        rows, groups = (part.full for part in self.parts[shard_id])
        if tensor.numel() == 1:
            tensor = tensor.reshape(1, 1).expand(rows, groups)
        elif groups == 1 and tensor.numel() == rows:
            tensor = tensor.reshape(rows, 1)
        else:
            blocks = [-(-rows // self.block_rows), groups]
            if list(tensor.shape) != blocks:
                raise ValueError(f"has shape {list(tensor.shape)}, the model needs {blocks}{MISFIT}")
            tensor = tensor.repeat_interleave(self.block_rows, 0)[:rows]
        super().load(tensor, shard_id)


class FP8Source(Source):
    weight: nn.Parameter
    """float8_e4m3fn [out_features, in_features]."""
    weight_scale: nn.Parameter
    """float32 [out_features, groups]."""

    def __init__(self, block: Sequence[int] | None, shape: LinearShape) -> None:
        super().__init__()
        weight = {shard_id: (rows, shape.input) for shard_id, rows in shape.outputs.items()}
        self.weight = WeightParameter.empty(weight, dtype=torch.float8_e4m3fn, device=shape.device)
        block_rows, block_columns = block or (1, shape.input.full)
        self.group_size = block_columns
        groups = Part.whole(1) if block is None else shape.input.in_units_of(block_columns)
        self.weight_scale = ScaleParameter.of(shape, groups, block_rows)

    def unpack(self) -> Floats:
        return Floats(self.weight.data.view(torch.uint8), self.weight_scale.data, "fp8_e4m3", self.group_size)
