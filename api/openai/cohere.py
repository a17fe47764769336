"""POST /v2/embed: embeddings in the form of Cohere's API."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from api.engine.channel import Delta
from api.errors import RequestError
from api.generation.served_model import ServedModel
from api.generation.serving import Serving
from api.http.body import read_json
from api.http.stream import WholeAnswer
from api.openai.embeddings import embedding_params, start_pooling
from api.openai.pooling import PoolingWork
from api.openai.pooling_protocol import EmbeddingRequest
from api.openai.protocol import PositiveCount
from api.params.lora import AdapterFields

SIDES: dict[str, Literal["left", "right"]] = {"START": "left", "END": "right"}
"""Where ``truncate`` cuts texts."""
PROMPT_NAMES = {"search_query": ("query",), "search_document": ("document", "passage")}
"""Names that the prompts of an ``input_type`` have in models' files."""


class CohereEmbedRequest(AdapterFields, kw_only=True):
    """Body of POST /v2/embed."""

    model: str | None = None
    """Name of the model. None: the served model."""
    texts: Annotated[list[str], Meta(min_length=1)]
    input_type: str | None = None
    """``search_query`` and ``search_document`` choose the prompt of that kind, if the model has one."""
    embedding_types: list[Literal["float", "base64"]] | None = None
    """Forms of the vectors. Default: float."""
    output_dimension: PositiveCount | None = None
    """Truncate vectors to this length, for models trained for it."""
    truncate: Literal["NONE", "START", "END"] | None = None
    """Side on which texts that are too long are cut; NONE: they are rejected. Default: END."""
    max_tokens: PositiveCount | None = None
    """Cut texts to this many tokens. Default: the model's maximum."""


class CohereBilledUnits(msgspec.Struct, kw_only=True):
    input_tokens: int


class CohereMeta(msgspec.Struct, kw_only=True):
    billed_units: CohereBilledUnits
    api_version: dict[str, str] = msgspec.field(default_factory=lambda: {"version": "2"})


class CohereEmbedResponse(msgspec.Struct, kw_only=True):
    id: str
    embeddings: dict[str, list[Any]]
    """The vectors in each form, in the order of the texts."""
    texts: list[str]
    meta: CohereMeta
    response_type: str = "embeddings_by_type"


DECODER = msgspec.json.Decoder(CohereEmbedRequest)


async def embed(request: Request) -> Response:
    """Embeds texts."""
    serving: Serving = request.app.state.serving
    body = await read_json(request, DECODER, serving.config.max_body_size)
    model = await serving.choose_model(body.model, body)
    known = model.sentences.prompts
    names = [name for name in PROMPT_NAMES.get(body.input_type or "", ()) if name in known]
    side = SIDES.get(body.truncate or "END")
    if side is None and body.max_tokens is not None:
        raise RequestError("max_tokens cuts texts; truncate must be START or END, not NONE", "max_tokens")
    inner = EmbeddingRequest(
        model=body.model,
        input=list(body.texts),
        dimensions=body.output_dimension,
        prompt_name=names[0] if names else None,
        truncate_prompt_tokens=None if side is None else body.max_tokens or -1,
        truncation_side=side,
    )
    work = await start_pooling(model, request, inner, embedding_params(model, inner), "embd")
    return WholeAnswer(work, CohereEmbedReply(model, body, work))


class CohereEmbedReply:
    """Vectors by type."""

    def __init__(self, model: ServedModel, request: CohereEmbedRequest, work: PoolingWork) -> None:
        self._model = model
        self._request = request
        self._work = work

    def fold(self, deltas: Sequence[Delta]) -> None:
        """Deltas only signal that a vector is ready."""

    def whole(self) -> Iterator[bytes]:
        vectors = self._work.vectors()
        forms: dict[str, list[Any]] = {}
        for kind in self._request.embedding_types or ["float"]:
            if kind == "float":
                forms[kind] = [vector.tolist() for vector in vectors]
            else:
                forms[kind] = [base64.b64encode(vector.tobytes()).decode() for vector in vectors]
        units = CohereBilledUnits(input_tokens=self._work.usage().prompt_tokens)
        yield msgspec.json.encode(
            CohereEmbedResponse(
                id=self._work.request_id,
                embeddings=forms,
                texts=self._request.texts,
                meta=CohereMeta(billed_units=units),
            )
        )
