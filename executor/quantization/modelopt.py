"""Checkpoints of NVIDIA's Model Optimizer in FP8 and NVFP4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from executor.quantization.base import EmbeddingMethod, LinearMethod, Options, QuantizationConfig
from executor.quantization.fields import read
from executor.quantization.fp4 import FP4Names, NVFP4Source
from executor.quantization.fp8 import CACHE_SCALES, INPUT_SCALES, FP8Source, log_activations, log_cache
from executor.quantization.groups import GroupEmbedding, GroupLinear, MakeSource, PlainSource
from executor.quantization.modelopt_fields import ModelOptFields
from executor.quantization.unquantized import UnquantizedEmbedding

NAMES = FP4Names("weight", "weight_scale_2", divides=False)


class ModelOpt(QuantizationConfig):
    ignored = (INPUT_SCALES, CACHE_SCALES)

    def __init__(self, fields: Mapping[str, Any], options: Options) -> None:
        self.fields = read(ModelOptFields, fields)
        self.options = options
        log_activations(self.fields.quant_algo)
        if self.fields.kv_cache_quant_algo or self.fields.kv_cache_scheme:
            log_cache()

    def _source(self, name: str) -> MakeSource:
        if not self.fields.has_module(name):
            return PlainSource
        if self.fields.quant_algo == "FP8":
            return partial(FP8Source, None)
        return partial(NVFP4Source, NAMES)

    def linear_method(self, names: Sequence[str]) -> LinearMethod[Any]:
        return GroupLinear([self._source(name) for name in names], self.options)

    def embedding_method(self, name: str) -> EmbeddingMethod[Any]:
        if name.endswith("lm_head") and self.fields.has_module(name):
            return GroupEmbedding(self._source(name), self.options)
        return UnquantizedEmbedding()
