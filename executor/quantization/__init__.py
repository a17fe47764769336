"""Quantisation methods."""

from executor.quantization.base import (
    REGISTRY,
    EmbeddingMethod,
    LinearMethod,
    QuantizationConfig,
    choose_quantization,
)

__all__ = ["REGISTRY", "EmbeddingMethod", "LinearMethod", "QuantizationConfig", "choose_quantization"]
