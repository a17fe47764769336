"""POST /v2/embed: embeddings in the form of Cohere's API."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
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
from api.openai.protocol import ChatMessage, JsonObject, PositiveCount
from api.params.lora import AdapterFields

SIDES: dict[str, Literal["left", "right"]] = {"START": "left", "END": "right"}
"""Where ``truncate`` cuts texts."""
PROMPT_NAMES = {"search_query": ("query",), "search_document": ("document", "passage")}
"""Names that the prompts of an ``input_type`` have in models' files."""
BITS = ("binary", "ubinary")
"""Forms with a bit per number, eight in an integer."""


class CoherePart(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A text or an image."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: JsonObject | None = None
    """Its ``url`` is a data URI."""


class CohereInput(msgspec.Struct, kw_only=True):
    """What becomes one vector."""

    content: Annotated[list[CoherePart], Meta(min_length=1)]
    """Texts, which are joined, or an image, for models of texts and images."""


class CohereEmbedRequest(AdapterFields, kw_only=True):
    """Body of POST /v2/embed."""

    model: str | None = None
    """Name of the model. None: the served model."""
    texts: Annotated[list[str], Meta(min_length=1)] | None = None
    images: Annotated[list[str], Meta(min_length=1)] | None = None
    """Images in place of ``texts``, as data URIs, for models of texts and images."""
    inputs: Annotated[list[CohereInput], Meta(min_length=1)] | None = None
    """Texts and images in place of ``texts``."""
    input_type: str | None = None
    """``search_query`` and ``search_document`` choose the prompt of that kind, if the model has one."""
    embedding_types: list[Literal["float", "base64", "binary", "ubinary"]] | None = None
    """Forms of the vectors. ``ubinary`` has a bit for each number, whether it is positive, eight in an integer from 0
    to 255, the first one highest; ``binary`` the same integers less 128. Default: float."""
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
    size = body.output_dimension or model.default_dimensions or model.limits.hidden_size
    if size % 8 and any(kind in BITS for kind in body.embedding_types or ()):
        raise RequestError(f"binary and ubinary need vectors of a multiple of 8 numbers, not {size}", "embedding_types")
    inner = EmbeddingRequest(
        model=body.model,
        **_what(body, model),
        dimensions=body.output_dimension,
        prompt_name=names[0] if names else None,
        truncate_prompt_tokens=None if side is None else body.max_tokens or -1,
        truncation_side=side,
    )
    work = await start_pooling(model, request, inner, embedding_params(model, inner), "embd")
    return WholeAnswer(work, CohereEmbedReply(model, body, work))


def _what(body: CohereEmbedRequest, model: ServedModel) -> dict[str, Any]:
    """The fields of an embedding request that say what to embed. Raises RequestError."""
    if sum(given is not None for given in (body.texts, body.images, body.inputs)) != 1:
        raise RequestError("exactly one of texts, images and inputs is required", "texts")
    if body.texts is not None:
        return {"input": list(body.texts)}
    field = "images" if body.inputs is None else "inputs"
    contents = [each.content for each in body.inputs or ()]
    contents += [[CoherePart(type="image_url", image_url={"url": url})] for url in body.images or ()]
    parts = [part for content in contents for part in content]
    if any((part.text if part.type == "text" else part.image_url) is None for part in parts):
        raise RequestError(f"{field}: a part of type text needs a text, and one of type image_url an image_url", field)
    if all(part.type == "text" for part in parts):
        return {"input": ["".join(part.text or "" for part in content) for content in contents]}
    if model.images is None or not model.images.spec.is_pooled:
        raise RequestError(f"{field}: this model makes no vectors of images; send texts", field)
    messages = [ChatMessage(role="user", content=list(map(msgspec.to_builtins, content))) for content in contents]
    return {"messages": [[message] for message in messages]}


FORMS: Mapping[str, Callable[[npt.NDArray[np.float32]], Any]] = {
    "float": lambda vector: vector.tolist(),
    "base64": lambda vector: base64.b64encode(vector.tobytes()).decode(),
    "ubinary": lambda vector: np.packbits(vector > 0).tolist(),
    "binary": lambda vector: (np.packbits(vector > 0).astype(np.int16) - 128).tolist(),
}


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
        kinds: Sequence[str] = self._request.embedding_types or ["float"]
        forms = {kind: list(map(FORMS[kind], vectors)) for kind in kinds}
        units = CohereBilledUnits(input_tokens=self._work.usage().prompt_tokens)
        yield msgspec.json.encode(
            CohereEmbedResponse(
                id=self._work.request_id,
                embeddings=forms,
                texts=self._request.texts or [],
                meta=CohereMeta(billed_units=units),
            )
        )
