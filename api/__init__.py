"""Octavo: LLM inference and serving."""

from api.llm import LLM
from api.params import SamplingParams

__all__ = ["LLM", "SamplingParams"]
