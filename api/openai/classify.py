"""POST /classify and /pooling: what a model's classifier says of texts, and all that can be pooled."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.engine.channel import Delta
from api.generation.served_model import ServedModel
from api.generation.serving import Serving
from api.http.body import read_json
from api.http.stream import WholeAnswer
from api.openai.embeddings import embedding_params, encoded, start_pooling
from api.openai.pooling import PoolingWork
from api.openai.pooling_protocol import (
    Classification,
    ClassifyRequest,
    ClassifyResponse,
    Pooled,
    PoolRequest,
    PoolResponse,
)
from api.params.pooling import PoolingParams

CLASSIFY_DECODER = msgspec.json.Decoder(ClassifyRequest)
POOL_DECODER = msgspec.json.Decoder(PoolRequest)


async def classify(request: Request) -> Response:
    """Classifies texts or conversations."""
    serving: Serving = request.app.state.serving
    body = await read_json(request, CLASSIFY_DECODER, serving.config.max_body_size)
    model = await serving.choose_model(body.model, body)
    wanted = body.activation if body.use_activation is None else body.use_activation
    params = model.pooling_params("classify", PoolingParams(use_activation=wanted))
    work = await start_pooling(model, request, body, params, "classify")
    return WholeAnswer(work, ClassifyReply(model, work))


async def pool(request: Request) -> Response:
    """Pools texts or conversations: vectors of texts or tokens, or their classes."""
    serving: Serving = request.app.state.serving
    body = await read_json(request, POOL_DECODER, serving.config.max_body_size)
    model = await serving.choose_model(body.model, body)
    params = embedding_params(model, body, body.task or model.usual_task)
    work = await start_pooling(model, request, body, params, "pool")
    return WholeAnswer(work, PoolReply(model, body, work))


class ClassifyReply:
    """The classes of each text."""

    def __init__(self, model: ServedModel, work: PoolingWork) -> None:
        self._model = model
        self._work = work

    def fold(self, deltas: Sequence[Delta]) -> None:
        """Deltas only signal that a result is ready."""

    def whole(self) -> Iterator[bytes]:
        labels = self._model.limits.pooling.labels
        data = [
            Classification(
                index=index, label=labels[int(numbers.argmax())], probs=numbers.tolist(), num_classes=len(labels)
            )
            for index, numbers in enumerate(self._work.vectors())
        ]
        yield msgspec.json.encode(
            ClassifyResponse(
                id=self._work.request_id,
                created=int(time.time()),
                model=self._model.name,
                data=data,
                usage=self._work.usage(),
            )
        )


class PoolReply:
    """Whatever was pooled, as numbers or as base64."""

    def __init__(self, model: ServedModel, request: PoolRequest, work: PoolingWork) -> None:
        self._model = model
        self._request = request
        self._work = work

    def fold(self, deltas: Sequence[Delta]) -> None:
        """Deltas only signal that a result is ready."""

    def whole(self) -> Iterator[bytes]:
        data = [
            Pooled(index=index, data=encoded(numbers, self._request))
            for index, numbers in enumerate(self._work.vectors())
        ]
        yield msgspec.json.encode(
            PoolResponse(
                id=self._work.request_id,
                created=int(time.time()),
                model=self._model.name,
                data=data,
                usage=self._work.usage(),
            )
        )
