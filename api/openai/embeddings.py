"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt
from starlette.requests import Request
from starlette.responses import Response

from api.engine.channel import Delta
from api.errors import RequestError
from api.generation.served_model import NO_IMAGES, ServedModel
from api.generation.serving import Serving
from api.http.body import read_json
from api.http.stream import WholeAnswer
from api.http.tenants import enter_queue
from api.openai.completions import list_prompts
from api.openai.images import pooled_images
from api.openai.pooling import PoolingWork, check_count, is_query_prompt, late_work, pooling_prompt
from api.openai.pooling_protocol import ClassifyRequest, Embedding, EmbeddingRequest, EmbeddingResponse
from api.openai.prompts import render_messages
from api.openai.protocol import ChatMessage
from api.openai.sampling import answer_id
from api.params.pooling import PoolingParams, PoolingTask
from engine_core.messages import MultiModalFeature, ResolvedPoolingParams

DECODER = msgspec.json.Decoder(EmbeddingRequest)


async def create_embedding(request: Request) -> Response:
    """Embeds texts or conversations."""
    serving: Serving = request.app.state.serving
    body = await read_json(request, DECODER, serving.config.max_body_size)
    model = serving.with_task(await serving.choose_model(body.model, body), body.task)
    if body.prompt_name is None and body.task in model.sentences.prompts:
        body.prompt_name = body.task
    work = await start_pooling(model, request, body, embedding_params(model, body), "embd")
    return WholeAnswer(work, EmbeddingReply(model, body, work))


def embedding_params(model: ServedModel, body: EmbeddingRequest, task: PoolingTask = "embed") -> ResolvedPoolingParams:
    """The engine's parameters of a request for vectors. Raises RequestError."""
    params = PoolingParams(
        dimensions=body.dimensions,
        use_activation=body.normalize if body.use_activation is None else body.use_activation,
    )
    return model.pooling_params(task, params)


async def start_pooling(
    model: ServedModel,
    request: Request,
    body: EmbeddingRequest | ClassifyRequest,
    params: ResolvedPoolingParams,
    prefix: str,
) -> PoolingWork:
    """Turns the texts or conversations of a request into prompts.

    Args:
        model: The served model.
        request: The HTTP request.
        body: Its body.
        params: How the prompts are pooled.
        prefix: Of the answer's id.

    Raises:
        RequestError: A text is invalid, or there are too many.
    """
    if (body.input is None) == (body.messages is None):
        raise RequestError("exactly one of input and messages is required", "input")
    late = model.sentences.late is not None and params.pooling_type == "ALL"
    if not late:
        params = msgspec.structs.replace(params, num_skipped=await model.num_skipped(body.prompt_name))
    field = "input" if body.messages is None else "messages"
    enter_queue(request, model, body.user)
    texts, features = await _texts(model, body)
    tenant = enter_queue(request, model, body.user, len(texts))
    add_special_tokens = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    if model.images is not None and model.images.spec.is_pooled:
        add_special_tokens = body.add_special_tokens is not False
    work_id = answer_id(prefix, request, body.request_id)
    if late and all(isinstance(text, str) for text in texts):
        sides = [(cast("str", text), is_query_prompt(body.prompt_name), 0) for text in texts]
        return await late_work(model, work_id, sides, params, body, field=field, tenant=tenant)
    prompts = [
        await pooling_prompt(model, body, text, field=field, add_special_tokens=add_special_tokens) for text in texts
    ]
    return PoolingWork(model, work_id, prompts, params, body, field=field, tenant=tenant, mm_features=features)


async def _texts(
    model: ServedModel, body: EmbeddingRequest | ClassifyRequest
) -> tuple[list[str | list[int]], Mapping[int, tuple[MultiModalFeature, ...]]]:
    """What to embed, and the images of each by number."""
    if body.messages is None:
        assert body.input is not None
        texts = list_prompts(body.input, "input")
        check_count(len(texts), "input")
        return texts, NO_IMAGES
    conversations = list_conversations(body.messages)
    check_count(len(conversations), "messages")
    if model.images is not None and model.images.spec.is_pooled:
        return await pooled_images(model.images, conversations)
    if body.add_generation_prompt is None:
        body.add_generation_prompt = False
    return [await render_messages(model, body, conversation) for conversation in conversations], NO_IMAGES


def list_conversations(messages: list[ChatMessage | list[ChatMessage]]) -> list[list[ChatMessage]]:
    """The conversations of a request.

    Raises:
        RequestError: One is empty, or the list mixes messages and conversations.
    """
    several = [item for item in messages if isinstance(item, list)]
    if not several:
        return [cast("list[ChatMessage]", messages)]
    if len(several) != len(messages):
        raise RequestError("messages must be a list of messages or a list of conversations", "messages")
    if not all(several):
        raise RequestError("messages must not contain an empty conversation", "messages")
    return several


class EmbeddingReply:
    """Vectors as numbers or as base64."""

    def __init__(self, model: ServedModel, request: EmbeddingRequest, work: PoolingWork) -> None:
        self._model = model
        self._request = request
        self._work = work

    def fold(self, deltas: Sequence[Delta]) -> None:
        """Deltas only signal that a vector is ready."""

    def whole(self) -> Iterator[bytes]:
        answer = EmbeddingResponse(
            id=self._work.request_id,
            created=int(time.time()),
            model=self._model.name,
            # One at a time: encoding all at once would hold the GIL for long.
            data=[
                cast("Embedding", msgspec.Raw(msgspec.json.encode(Embedding(index=index, embedding=numbers))))
                for index, numbers in enumerate(map(self._encode, self._work.vectors()))
            ],
            usage=self._work.usage(),
        )
        yield msgspec.json.encode(answer)

    def _encode(self, vector: npt.NDArray[np.float32]) -> list[float] | str:
        return cast("list[float] | str", encoded(vector, self._request))


def encoded(vector: npt.NDArray[np.float32], request: EmbeddingRequest) -> Any:
    """The numbers of an array in the form that a request asks for: lists of numbers, or base64."""
    if request.encoding_format != "base64":
        return vector.tolist()
    data = to_dtype(vector, request.embed_dtype or "float32")
    if (request.endianness or "native") not in ("native", sys.byteorder):
        data = data.byteswap()
    return base64.b64encode(data.tobytes()).decode()


def to_dtype(vector: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.generic]:
    """Converts to another number type; bfloat16 as its bits, rounded to nearest even."""
    if dtype == "bfloat16":
        bits = vector.view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        halves: npt.NDArray[np.uint16] = np.right_shift(rounded, np.uint32(16)).astype(np.uint16)
        return halves
    result: npt.NDArray[np.generic] = vector.astype(dtype)
    return result
