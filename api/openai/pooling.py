"""Common parts of the pooling endpoints: texts become prompts, prompts become vectors."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from api.engine.queue_bound import NOBODY, Tenant
from api.errors import RequestError
from api.generation.generation import EngineWork, WholeReply
from api.generation.served_model import NO_IMAGES, ServedModel
from api.model.tokenizer import NOTHING_ADDED
from api.openai.pooling_protocol import (
    ClassifyRequest,
    EmbeddingRequest,
    PoolingRequest,
    PoolingUsage,
    RerankRequest,
    ScoreRequest,
)
from api.params.truncation import check_truncation, truncate_prompt
from engine_core.messages import MultiModalFeature, ResolvedPoolingParams

MAX_INPUTS = 2048
STEPS_PER_VECTOR = 512
IDS_PER_CHAR = 4
"""Token ids that are checked in about the time it takes to tokenise a character."""


def check_count(count: int, field: str) -> None:
    """Checks the number of texts in a request.

    Raises:
        RequestError: There are too many.
    """
    if count > MAX_INPUTS:
        raise RequestError(f"{field} may contain at most {MAX_INPUTS} entries, got {count}", field)


async def pooling_prompt(
    model: ServedModel,
    request: PoolingRequest,
    text: str | list[int],
    *,
    field: str,
    add_special_tokens: bool,
    max_tokens: int = 0,
) -> array[int]:
    """The token ids of a text, truncated as the request asks.

    They are packed, since freeing millions of integer objects would stall everyone.

    Args:
        model: Provides the tokenizer and limits.
        request: Sets the maximum length of the prompt.
        text: A text or token ids.
        field: Name of the field in errors.
        add_special_tokens: Add the tokenizer's special tokens.
        max_tokens: Use at most this many leading tokens of the text; 0: all.

    Raises:
        RequestError: The text is too long, empty or invalid.
    """
    keep = request.truncate_prompt_tokens
    around = NOTHING_ADDED
    if isinstance(text, str):
        text = model.prompt_before(request.prompt_name) + text
        around = model.tokenizer.added_around(add_special_tokens)
        any_length = keep is not None or max_tokens > 0
        text = await model.tokenize(text, add_special_tokens=add_special_tokens, any_length=any_length)
    side = request.truncation_side
    prompt = truncate_prompt(text, keep, model.limits, around, side=side, max_own=max_tokens)
    model.check_token_ids(prompt, field)
    await model.host.spend_turn(len(prompt) // IDS_PER_CHAR)  # a request may have thousands of prompts
    return array("i", prompt)


def is_query_prompt(name: str | None) -> bool:
    """Whether a text for late interaction is a query; unnamed texts are documents.

    Raises:
        RequestError: The name is neither.
    """
    if name not in (None, "", "query", "document"):
        raise RequestError(f"prompt_name {name!r} is unknown; choose query or document", "prompt_name")
    return name == "query"


async def late_work(
    model: ServedModel,
    request_id: str,
    texts: Sequence[tuple[str, bool, int]],
    params: ResolvedPoolingParams,
    request: EmbeddingRequest | ClassifyRequest | ScoreRequest | RerankRequest,
    *,
    field: str,
    tenant: Tenant = NOBODY,
) -> PoolingWork:
    """The work on texts for late interaction.

    Args:
        model: The model.
        request_id: See ``ServedModel.submit_pooling``.
        texts: Texts, whether each is a query, and the most tokens of each; 0: as the model's files say.
        params: How the prompts are pooled.
        request: The body.
        field: Name of the texts in errors.
        tenant: Whom they are for.

    Raises:
        RequestError: A text is invalid.
    """
    check_truncation(request.truncate_prompt_tokens, model.limits)
    if request.add_special_tokens is False:
        raise RequestError(
            "the model compares texts with their special tokens: omit add_special_tokens", "add_special_tokens"
        )
    side = request.truncation_side or "right"
    most = max(0, request.truncate_prompt_tokens or 0)
    prompts = [
        await model.tokenize_late(text, is_query=is_query, max_tokens=own or most, side=side)
        for text, is_query, own in texts
    ]
    each = [replace(params, num_attended=prompt.num_attended) for prompt in prompts]
    ids = [array("i", prompt.token_ids) for prompt in prompts]
    kept = [prompt.kept for prompt in prompts]
    return PoolingWork(model, request_id, ids, each, request, field=field, tenant=tenant, kept=kept)


class PoolingWork(EngineWork):
    """The vectors of prompts."""

    def __init__(
        self,
        model: ServedModel,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        params: ResolvedPoolingParams | Sequence[ResolvedPoolingParams],
        request: PoolingRequest,
        *,
        field: str,
        tenant: Tenant = NOBODY,
        mm_features: Mapping[int, tuple[MultiModalFeature, ...]] = NO_IMAGES,
        kept: Sequence[list[int] | None] = (),
    ) -> None:
        """See ``ServedModel.submit_pooling``. ``kept``: the tokens of each prompt whose vectors count."""
        self._kept = kept
        self._mm_features = mm_features
        super().__init__(model, request_id, prompts, len(prompts))
        self._params = params
        self._request = request
        self._field = field
        self._tenant = tenant

    async def submit(self) -> None:
        """Starts the requests."""
        await self._model.submit_pooling(
            self._channel,
            self.request_id,
            self.prompts,
            self._params,
            self.states,
            field=self._field,
            priority=self._request.priority or 0,
            cache_salt=self._request.cache_salt or "",
            tenant=self._tenant,
            mm_features=self._mm_features,
            data_parallel_rank=self.data_parallel_rank,
        )

    async def build(self, reply: WholeReply) -> bytes:
        """Encoding many vectors is slow, so it runs in a thread."""
        return await self._model.host.apart(STEPS_PER_VECTOR * len(self.prompts), b"".join, reply.whole())

    def vectors(self) -> list[npt.NDArray[np.float32]]:
        """float32 [dimensions], or [num_tokens, dimensions], per prompt, once all are done."""
        vectors = []
        for number, state in enumerate(self.states):
            vector = state.pooling_output
            assert vector is not None
            kept = self._kept[number] if self._kept else None
            if kept is not None:
                vector = vector[kept]
            elif vector.ndim == 2:
                vector = self._model.counted_rows(vector, self.prompts[number])
            vectors.append(vector)
        return vectors

    def usage(self) -> PoolingUsage:
        count = sum(map(len, self.prompts))
        return PoolingUsage(prompt_tokens=count, total_tokens=count)
