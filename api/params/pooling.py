"""Embeddings and scores: what users say about them, and what becomes of the vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from api.config import PoolerConfig
from api.errors import ContextLengthError, RequestError
from api.params.sampling import ModelLimits
from engine_core.messages import ResolvedPoolingParams

T = TypeVar("T")
F32 = npt.NDArray[np.float32]


class PoolingParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is made of the hidden states of a prompt.

    Attributes:
        dimensions: Keep that many leading numbers of the vector (for models that were trained so).
        use_activation: Scale the vector to length 1. None: as ``--pooler-config`` says.
        truncate_prompt_tokens: Keep so many tokens of a longer prompt, the last ones; -1: as many as the model takes.
    """

    dimensions: int | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None


def resolve_pooling(
    params: PoolingParams, pooler: PoolerConfig, limits: ModelLimits, *, every_token: bool = False
) -> ResolvedPoolingParams:
    """Turns a user's parameters into the engine's.

    Args:
        params: What the user wants.
        pooler: What the server is configured for, and the model's files say.
        limits: What the model can do.
        every_token: A vector for each token instead of one for the prompt.

    Raises:
        RequestError: The model has no vectors of that size.
    """
    dimensions = params.dimensions
    if dimensions is not None and not 1 <= dimensions <= limits.hidden_size:
        raise RequestError(
            f"dimensions must be between 1 and the model's hidden size of {limits.hidden_size}, got {dimensions}",
            "dimensions",
        )
    wanted = pooler.use_activation if params.use_activation is None else params.use_activation
    pooling_type = "ALL" if every_token else pooler.pooling_type or "LAST"
    return ResolvedPoolingParams(pooling_type=pooling_type, normalize=wanted is not False, dimensions=dimensions)


def check_prompt_length(num_tokens: int, limits: ModelLimits) -> None:
    """Refuses a prompt that is longer than the model's context; a pooled one may fill it.

    Raises:
        RequestError: It is too long.
    """
    if num_tokens > limits.max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {limits.max_model_len} tokens. However, your prompt contains "
            f"{num_tokens} input tokens. Please shorten the prompt or set truncate_prompt_tokens.",
        )


def cosine(x: F32, y: F32) -> float:
    """Cosine of the angle between two vectors, -1 to 1; 0 if one of them has no direction."""
    a, b = x.astype(np.float64), y.astype(np.float64)
    lengths = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return max(-1.0, min(1.0, float((a * b).sum()) / lengths)) if lengths else 0.0


def pair_up(num_queries: int, num_documents: int, field: str) -> list[tuple[int, int]]:
    """Which query is compared with which document: one with each, or each with its own.

    Raises:
        RequestError: The numbers do not go together.
    """
    if not num_queries or not num_documents:
        raise RequestError("each side needs at least one text", field)
    if num_queries == 1:
        return [(0, number) for number in range(num_documents)]
    if num_queries != num_documents:
        raise RequestError(
            f"expected one query, or as many as documents; got {num_queries} queries and {num_documents} documents",
            field,
        )
    return [(number, number) for number in range(num_queries)]


# ---------------------------------------------------------------------------------------------------------
# Results of the offline class


@dataclass
class PoolingOutput:
    """A vector, or one for each token."""

    data: F32
    """float32 [dimensions] or [num_tokens, dimensions]."""


@dataclass
class EmbeddingOutput:
    embedding: list[float]


@dataclass
class ScoringOutput:
    score: float
    """Cosine similarity, -1 to 1."""


@dataclass
class PoolingRequestOutput(Generic[T]):
    """A prompt and what it was pooled into."""

    request_id: str
    outputs: T
    prompt_token_ids: list[int]
    """Of a score: the tokens of both texts, one after the other."""
    num_cached_tokens: int = 0
    finished: bool = True


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """Of ``LLM.embed``; ``outputs.embedding`` is a list of floats."""


class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """Of ``LLM.score``; ``outputs.score`` is a float."""
