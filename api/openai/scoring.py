"""POST /score and /rerank: similarity of texts.

Generative models have no relevance output, so a score is the cosine similarity of two embeddings.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.engine.channel import Delta
from api.errors import RequestError
from api.generation.served_model import ServedModel
from api.generation.serving import Serving
from api.http.body import read_json
from api.http.stream import WholeAnswer
from api.http.tenants import enter_queue
from api.openai.pooling import PoolingWork, check_count, pooling_prompt
from api.openai.pooling_protocol import (
    RerankDocument,
    RerankRequest,
    RerankResponse,
    RerankResult,
    Score,
    ScoreRequest,
    ScoreResponse,
)
from api.openai.refusals import NOT_SUPPORTED
from api.openai.sampling import answer_id
from api.params.pooling import PoolingParams, cosine, pair_up, resolve_pooling

SCORE_DECODER = msgspec.json.Decoder(ScoreRequest)
RERANK_DECODER = msgspec.json.Decoder(RerankRequest)

QUERY_FIELDS = ("queries", "text_1", "data_1")
DOCUMENT_FIELDS = ("documents", "items", "text_2", "data_2")


async def score(request: Request) -> Response:
    """Scores the similarity of each pair of texts."""
    serving: Serving = request.app.state.serving
    body = await read_json(request, SCORE_DECODER, serving.config.max_body_size)
    model = serving.find_model(body.model)
    query_field, queries = _side(body, QUERY_FIELDS)
    document_field, documents = _side(body, DOCUMENT_FIELDS)
    pairs = pair_up(len(queries), len(documents), document_field)
    work = await _start(model, request, body, "score", queries, documents, (query_field, document_field))
    return WholeAnswer(work, ScoreReply(model, work, pairs, len(queries)))


async def v1_score(request: Request) -> Response:
    """Alias of /score."""
    return await score(request)


async def rerank(request: Request) -> Response:
    """Sorts documents by similarity to a query."""
    serving: Serving = request.app.state.serving
    body = await read_json(request, RERANK_DECODER, serving.config.max_body_size)
    model = serving.find_model(body.model)
    texts = [document if isinstance(document, str) else document.text for document in body.documents]
    work = await _start(model, request, body, "rerank", [body.query], texts, ("query", "documents"))
    return WholeAnswer(work, RerankReply(model, body, work, texts))


async def v1_rerank(request: Request) -> Response:
    """Alias of /rerank at Jina's path."""
    return await rerank(request)


async def v2_rerank(request: Request) -> Response:
    """Alias of /rerank at Cohere's path."""
    return await rerank(request)


def _side(body: ScoreRequest, names: Sequence[str]) -> tuple[str, list[str]]:
    """The name and the texts of one side of a comparison."""
    fields = msgspec.structs.asdict(body)
    given = [name for name in names if fields[name] is not None]
    if len(given) != 1:
        raise RequestError(f"exactly one of {', '.join(names)} is required", names[0])
    texts = fields[given[0]]
    texts = [texts] if isinstance(texts, str) else texts
    if not texts:
        raise RequestError(f"{given[0]} must not be empty", given[0])
    return given[0], texts


async def _start(
    model: ServedModel,
    request: Request,
    body: ScoreRequest | RerankRequest,
    prefix: str,
    queries: Sequence[str],
    documents: Sequence[str],
    fields: tuple[str, str],
) -> PoolingWork:
    """Embeds the queries, then the documents."""
    if body.instruction is not None:
        raise RequestError(NOT_SUPPORTED.format("instruction"), "instruction")
    sides = (
        (fields[0], queries, body.max_tokens_per_query or 0),
        (fields[1], documents, body.max_tokens_per_doc or 0),
    )
    params = resolve_pooling(PoolingParams(), model.pooler, model.limits)
    for field, texts, _ in sides:
        check_count(len(texts), field)
    tenant = enter_queue(request, model, body.user, len(queries) + len(documents))
    prompts = []
    for field, texts, max_tokens in sides:
        prompts += [
            await pooling_prompt(
                model,
                body,
                text,
                field=field,
                add_special_tokens=body.add_special_tokens is not False,
                max_tokens=max_tokens,
            )
            for text in texts
        ]
    work_id = answer_id(prefix, request, body.request_id)
    return PoolingWork(model, work_id, prompts, params, body, field=fields[1], tenant=tenant)


class ScoreReply:
    """One score per pair."""

    def __init__(
        self, model: ServedModel, work: PoolingWork, pairs: Sequence[tuple[int, int]], num_queries: int
    ) -> None:
        self._model = model
        self._work = work
        self._pairs = pairs
        self._num_queries = num_queries

    def fold(self, deltas: Sequence[Delta]) -> None:
        """Deltas only signal that a vector is ready."""

    def whole(self) -> Iterator[bytes]:
        vectors = self._work.vectors()
        queries, documents = vectors[: self._num_queries], vectors[self._num_queries :]
        answer = ScoreResponse(
            id=self._work.request_id,
            created=int(time.time()),
            model=self._model.name,
            data=[
                Score(index=index, score=cosine(queries[query], documents[document]))
                for index, (query, document) in enumerate(self._pairs)
            ],
            usage=self._work.usage(),
        )
        yield msgspec.json.encode(answer)


class RerankReply:
    """Documents, best first."""

    def __init__(self, model: ServedModel, request: RerankRequest, work: PoolingWork, texts: Sequence[str]) -> None:
        self._model = model
        self._request = request
        self._work = work
        self._texts = texts

    def fold(self, deltas: Sequence[Delta]) -> None:
        """Deltas only signal that a vector is ready."""

    def whole(self) -> Iterator[bytes]:
        query, *documents = self._work.vectors()
        results = [
            RerankResult(index=index, relevance_score=cosine(query, document))
            for index, document in enumerate(documents)
        ]
        results.sort(key=lambda result: -result.relevance_score)
        results = results[: self._request.top_n or None]
        if self._request.return_documents is not False:
            for result in results:
                result.document = RerankDocument(text=self._texts[result.index])
        answer = RerankResponse(
            id=self._work.request_id, model=self._model.name, usage=self._work.usage(), results=results
        )
        yield msgspec.json.encode(answer)
