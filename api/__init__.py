"""Octavo: LLM inference and serving."""

from api.beam_search import BeamSearchParams
from api.llm import LLM
from api.params import SamplingParams, StructuredOutputsParams
from api.pooling import PoolingParams

__all__ = ["LLM", "BeamSearchParams", "PoolingParams", "SamplingParams", "StructuredOutputsParams"]
