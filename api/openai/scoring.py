"""POST /score and /rerank: similarity of texts.

A cross-encoder reads both texts as one prompt and scores it. Other models have no relevance output, so a score is the
cosine similarity of two embeddings, or what the model's files name; with late interaction, the sum of the largest
products of vectors of their tokens.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
from api.openai.pooling import PoolingWork, check_count, late_work, pooling_prompt
from api.openai.pooling_protocol import (
    RerankDocument,
    RerankRequest,
    RerankResponse,
    RerankResult,
    Score,
    ScoreRequest,
    ScoreResponse,
)
from api.openai.sampling import answer_id
from api.params.pooling import PoolingParams, is_cross_encoder, pair_up
from api.params.truncation import check_truncation
from engine_core.messages import ResolvedPoolingParams

SCORE_DECODER = msgspec.json.Decoder(ScoreRequest)
RERANK_DECODER = msgspec.json.Decoder(RerankRequest)

QUERY_FIELDS = ("queries", "text_1", "data_1")
DOCUMENT_FIELDS = ("documents", "items", "text_2", "data_2")


async def score(request: Request) -> Response:
    """Scores the similarity of each pair of texts."""
    serving: Serving = request.app.state.serving
    body = await read_json(request, SCORE_DECODER, serving.config.max_body_size)
    model = await serving.choose_model(body.model, body)
    query_field, queries = _side(body, QUERY_FIELDS)
    document_field, documents = _side(body, DOCUMENT_FIELDS)
    texts = _Texts(query_field, queries, document_field, documents)
    comparison = await _start(model, request, body, "score", texts)
    return WholeAnswer(comparison.work, ScoreReply(model, comparison))


async def v1_score(request: Request) -> Response:
    """Alias of /score."""
    return await score(request)


async def rerank(request: Request) -> Response:
    """Sorts documents by similarity to a query."""
    serving: Serving = request.app.state.serving
    body = await read_json(request, RERANK_DECODER, serving.config.max_body_size)
    model = await serving.choose_model(body.model, body)
    texts = [document if isinstance(document, str) else document.text for document in body.documents]
    comparison = await _start(model, request, body, "rerank", _Texts("query", [body.query], "documents", texts))
    return WholeAnswer(comparison.work, RerankReply(model, body, comparison, texts))


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


class Comparison:
    """The prompts of a request, and the score of each of its pairs once they are pooled."""

    def __init__(
        self, model: ServedModel, work: PoolingWork, pairs: Sequence[tuple[int, int]], num_queries: int | None
    ) -> None:
        """Takes the work.

        Args:
            model: The model, which says how vectors are compared.
            work: Has a prompt for each text, queries first; or one for each pair.
            pairs: Indexes of queries and documents.
            num_queries: How many prompts are queries; None: a prompt is a pair.
        """
        self._compare = model.similarity
        self.work = work
        self._pairs = pairs
        self._num_queries = num_queries

    def scores(self) -> list[float]:
        """The score of each pair."""
        vectors = self.work.vectors()
        if self._num_queries is None:
            return [float(vector[0]) for vector in vectors]
        queries, documents = vectors[: self._num_queries], vectors[self._num_queries :]
        return [self._compare(queries[query], documents[document]) for query, document in self._pairs]


@dataclass
class _Texts:
    """What is compared, and the names of the fields that it comes from."""

    query_field: str
    queries: Sequence[str]
    document_field: str
    documents: Sequence[str]


async def _start(
    model: ServedModel, request: Request, body: ScoreRequest | RerankRequest, prefix: str, texts: _Texts
) -> Comparison:
    """Prompts for all pairs, or for all queries and then all documents.

    Raises:
        RequestError: A text is invalid, or there are too many.
    """
    check_count(len(texts.queries), texts.query_field)
    check_count(len(texts.documents), texts.document_field)
    pairs = pair_up(len(texts.queries), len(texts.documents), texts.document_field)
    is_cross = is_cross_encoder(model.limits)
    count = len(pairs) if is_cross else len(texts.queries) + len(texts.documents)
    tenant = enter_queue(request, model, body.user, count)
    template = model.pair_template
    if body.instruction is not None and (not is_cross or template is None):
        raise RequestError("instruction: the model's prompts have no place for it; omit it", "instruction")
    work_id = answer_id(prefix, request, body.request_id)
    if model.sentences.late is not None:
        sides = [(text, True, body.max_tokens_per_query or 0) for text in texts.queries]
        sides += [(text, False, body.max_tokens_per_doc or 0) for text in texts.documents]
        every = model.pooling_params("token_embed", PoolingParams())
        work = await late_work(model, work_id, sides, every, body, field=texts.document_field, tenant=tenant)
        return Comparison(model, work, pairs, len(texts.queries))
    params: ResolvedPoolingParams | list[ResolvedPoolingParams]
    if is_cross:
        own = model.pooling_params("score", PoolingParams(use_activation=body.use_activation))
        prompts, params = [], []
        for query, document in pairs:
            ids, second = await _pair_prompt(model, body, texts.queries[query], texts.documents[document])
            prompts.append(array("i", ids))
            params.append(msgspec.structs.replace(own, second_segment=second))
    else:
        params = model.pooling_params("embed", PoolingParams())
        prompts = await _separate_prompts(model, body, texts)
    work = PoolingWork(model, work_id, prompts, params, body, field=texts.document_field, tenant=tenant)
    return Comparison(model, work, pairs, None if is_cross else len(texts.queries))


async def _pair_prompt(
    model: ServedModel, body: ScoreRequest | RerankRequest, query: str, document: str
) -> tuple[list[int], int]:
    """The token ids of a pair, and where its second segment begins; see ``Tokenizer.encode_pair``."""
    keep = body.truncate_prompt_tokens
    check_truncation(keep, model.limits)
    limit = model.limits.max_model_len if keep == -1 else keep or 0
    return await model.tokenize_pair(
        query,
        document,
        max_tokens=limit,
        max_first=body.max_tokens_per_query or 0,
        max_second=body.max_tokens_per_doc or 0,
        instruction=body.instruction,
        prompt_name=body.prompt_name,
    )


async def _separate_prompts(model: ServedModel, body: ScoreRequest | RerankRequest, texts: _Texts) -> list[array[int]]:
    sides = (
        (texts.query_field, texts.queries, body.max_tokens_per_query or 0),
        (texts.document_field, texts.documents, body.max_tokens_per_doc or 0),
    )
    return [
        await pooling_prompt(
            model,
            body,
            text,
            field=field,
            add_special_tokens=body.add_special_tokens is not False,
            max_tokens=max_tokens,
        )
        for field, side, max_tokens in sides
        for text in side
    ]


class ScoreReply:
    """One score per pair."""

    def __init__(self, model: ServedModel, comparison: Comparison) -> None:
        self._model = model
        self._comparison = comparison

    def fold(self, deltas: Sequence[Delta]) -> None:
        """Deltas only signal that a vector is ready."""

    def whole(self) -> Iterator[bytes]:
        work = self._comparison.work
        answer = ScoreResponse(
            id=work.request_id,
            created=int(time.time()),
            model=self._model.name,
            data=[Score(index=index, score=score) for index, score in enumerate(self._comparison.scores())],
            usage=work.usage(),
        )
        yield msgspec.json.encode(answer)


class RerankReply:
    """Documents, best first."""

    def __init__(
        self, model: ServedModel, request: RerankRequest, comparison: Comparison, texts: Sequence[str]
    ) -> None:
        self._model = model
        self._request = request
        self._comparison = comparison
        self._texts = texts

    def fold(self, deltas: Sequence[Delta]) -> None:
        """Deltas only signal that a vector is ready."""

    def whole(self) -> Iterator[bytes]:
        scores, work = self._comparison.scores(), self._comparison.work
        results = [RerankResult(index=index, relevance_score=score) for index, score in enumerate(scores)]
        results.sort(key=lambda result: -result.relevance_score)
        results = results[: self._request.top_n or None]
        if self._request.return_documents is not False:
            for result in results:
                result.document = RerankDocument(text=self._texts[result.index])
        answer = RerankResponse(id=work.request_id, model=self._model.name, usage=work.usage(), results=results)
        yield msgspec.json.encode(answer)
