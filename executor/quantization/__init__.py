"""Quantisation methods."""

from executor.quantization.base import (
    REGISTRY,
    EmbeddingMethod,
    LinearMethod,
    Options,
    QuantizationConfig,
    choose_quantization,
)

__all__ = ["REGISTRY", "EmbeddingMethod", "LinearMethod", "Options", "QuantizationConfig", "choose_quantization"]
