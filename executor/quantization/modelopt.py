"""Checkpoints of NVIDIA's Model Optimizer in FP8 and NVFP4."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from executor.quantization.base import Options
from executor.quantization.fields import read
from executor.quantization.fp4 import FP4Names, NVFP4Source
from executor.quantization.fp8 import CACHE_RENAMES, INPUT_SCALES, OTHER_SCALES, FP8Source, log_activations, log_cache
from executor.quantization.groups import MakeSource, PlainSource, SourceMethod
from executor.quantization.modelopt_fields import ModelOptFields

NAMES = FP4Names("weight", "weight_scale_2", divides=False)


class ModelOpt(SourceMethod):
    renames = CACHE_RENAMES
    ignored = (INPUT_SCALES, OTHER_SCALES)
    has_cache_scales = True

    def __init__(self, fields: Mapping[str, Any], options: Options) -> None:
        self.fields = read(ModelOptFields, fields)
        self.options = options
        log_activations(self.fields.quant_algo, options, is_fp8=self.fields.quant_algo == "FP8")
        if self.fields.kv_cache_quant_algo or self.fields.kv_cache_scheme:
            log_cache()

    def source(self, name: str) -> MakeSource:
        if not self.fields.has_module(name):
            return PlainSource
        if self.fields.quant_algo == "FP8":
            return partial(FP8Source, None)
        return partial(NVFP4Source, NAMES)
