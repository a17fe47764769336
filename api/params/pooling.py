"""Parameters and results of embeddings and scores."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

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
    """How the hidden states of a prompt are pooled to vectors.

    Attributes:
        dimensions: Keep only this many leading elements of the vector (for models trained for this).
        use_activation: Scale the vector to length 1. None: as configured by ``--pooler-config``.
        truncate_prompt_tokens: Keep only this many of the last tokens of a longer prompt; -1: as many as fit the model.
        prompt_name: Name of a prompt in the model's files that precedes texts. None: their default; empty: none.
        task: A task of the model, such as ``retrieval.query``, by whose adapter and prompt texts are embedded.
    """

    dimensions: int | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None
    prompt_name: str | None = None
    task: str | None = None


def resolve_pooling(
    params: PoolingParams, pooler: PoolerConfig, limits: ModelLimits, *, every_token: bool = False
) -> ResolvedPoolingParams:
    """Converts a user's parameters to the engine's.

    Args:
        params: The user's parameters.
        pooler: Defaults from the server's options and the model's files.
        limits: The model's limits.
        every_token: Return a vector for each token instead of one for the prompt.

    Raises:
        RequestError: ``dimensions`` is out of range for the model.
    """
    pooling_type = "ALL" if every_token else pooler.pooling_type or limits.pooling.pooling_type
    size = (limits.pooling.token_size if pooling_type == "ALL" else 0) or limits.hidden_size
    dimensions = params.dimensions
    if dimensions is not None and not 1 <= dimensions <= size:
        whose = "the model's vectors of tokens" if pooling_type == "ALL" else "the model's vectors"
        raise RequestError(
            f"dimensions must be between 1 and {size}, the size of {whose}, got {dimensions}", "dimensions"
        )
    if pooler.pooling_type == "STEP" and not every_token:
        raise RequestError("the pooling type STEP is for tokens; use the task token_embed or token_classify", "task")
    wanted = pooler.use_activation if params.use_activation is None else params.use_activation
    return ResolvedPoolingParams(pooling_type=pooling_type, normalize=wanted is not False, dimensions=dimensions)


PoolingTask = Literal["embed", "classify", "score", "token_embed", "token_classify"]
POOLING_TASKS: tuple[PoolingTask, ...] = ("embed", "classify", "score", "token_embed", "token_classify")


def resolve_task(
    task: PoolingTask, params: PoolingParams, pooler: PoolerConfig, limits: ModelLimits
) -> ResolvedPoolingParams:
    """The engine's parameters of a task: vectors of prompts or tokens, or what the model's classifier says of them.

    Raises:
        RequestError: The model cannot do it, or a parameter is out of range.
    """
    if task in ("embed", "token_embed"):
        return resolve_pooling(params, pooler, limits, every_token=task == "token_embed")
    own = limits.pooling.head_pooling
    every_token = task == "token_classify"
    if not own or (own not in ("ALL", "LAST") if every_token else own == "ALL"):
        has = "no classifier" if not own else "a classifier of tokens only" if own == "ALL" else "one of whole texts"
        raise RequestError(f"the model cannot do {task}: it has {has}", "task")
    count = len(limits.pooling.labels)
    if task == "score" and count != 1:
        raise RequestError(f"scores need a classifier with one label, the model's has {count}; use /classify", "task")
    if params.dimensions is not None:
        raise RequestError("dimensions is for embeddings only", "dimensions")
    pooling_type = "ALL" if every_token else own
    return ResolvedPoolingParams(
        pooling_type=pooling_type, normalize=params.use_activation is not False, classifies=True
    )


def is_cross_encoder(limits: ModelLimits) -> bool:
    """Whether a classifier of whole texts scores pairs; other models compare vectors."""
    return limits.pooling.head_pooling not in ("", "ALL")


def check_prompt_length(num_tokens: int, limits: ModelLimits) -> None:
    """Rejects a prompt that is longer than the model's context; for pooling it may fill the context.

    Raises:
        RequestError: The prompt is too long.
    """
    if num_tokens > limits.max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {limits.max_model_len} tokens. However, your prompt contains "
            f"{num_tokens} input tokens. Please shorten the prompt or set truncate_prompt_tokens.",
        )


def without_special(rows: F32, token_ids: Sequence[int], special: Collection[int], task: PoolingTask) -> F32:
    """The rows of a prompt's own tokens, as BGE-M3 uses them: vectors of all but the token at the start, weights of all
    but those at both ends.

    Args:
        rows: [num_tokens, any].
        token_ids: The prompt.
        special: Ids of special tokens.
        task: token_embed or token_classify.
    """
    begin, end = 0, len(rows)
    if begin < end and token_ids[begin] in special:
        begin += 1
    if task == "token_classify" and begin < end and token_ids[end - 1] in special:
        end -= 1
    return rows[begin:end]


def rows_of_steps(rows: F32, token_ids: Sequence[int], step_tag_id: int) -> F32:
    """The rows [steps, any] of the tokens that end steps, of those of a whole prompt."""
    return rows[np.flatnonzero(np.asarray(token_ids) == step_tag_id)]


def pair_up(num_queries: int, num_documents: int, field: str) -> list[tuple[int, int]]:
    """Index pairs of queries and documents to compare: one query with each document, or pairwise.

    Raises:
        RequestError: The numbers do not match.
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
    """One vector, or one vector per token."""

    data: F32
    """float32 [dimensions] or [num_tokens, dimensions]."""


@dataclass
class EmbeddingOutput:
    embedding: list[float]


@dataclass
class ClassificationOutput:
    probs: list[float]
    """A number for each label."""

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.probs)


@dataclass
class ScoringOutput:
    score: float
    """Cosine similarity, -1 to 1, or what the model's files name; of a cross-encoder, its score."""


@dataclass
class RerankOutput:
    """A document of ``LLM.rerank``."""

    index: int
    document: str
    relevance_score: float


@dataclass
class PoolingRequestOutput(Generic[T]):
    """A prompt and its pooling result."""

    request_id: str
    outputs: T
    prompt_token_ids: list[int]
    """For a score: the tokens of both texts, concatenated."""
    num_cached_tokens: int = 0
    finished: bool = True


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """Result of ``LLM.embed``; ``outputs.embedding`` is a list of floats."""


class ClassificationRequestOutput(PoolingRequestOutput[ClassificationOutput]):
    """Result of ``LLM.classify``; ``outputs.probs`` is a list of floats."""


class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """Result of ``LLM.score``; ``outputs.score`` is a float."""
