"""Bodies of the endpoints that pool: embeddings, scores and rankings. Types only, as in ``protocol.py``."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from api.openai.protocol import MAX_INT32, ChatMessage, Int32, JsonObject, Label, Later, PositiveCount

Limit = Annotated[int, Meta(ge=0, le=MAX_INT32)]

# ---------------------------------------------------------------------------------------------------------
# Requests


class PoolingRequest(msgspec.Struct, kw_only=True):
    """What all of them have in common."""

    model: str | None = None
    """None: the model that is served."""
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=MAX_INT32)] | None = None
    """Keep so many tokens of a longer text, with those that the tokenizer adds; -1: as many as the model takes."""
    truncation_side: Literal["left", "right"] | None = None
    """Where tokens are cut off. Default: left, the last tokens stay."""
    priority: Int32 | None = None
    """Lower runs first; needs a server with that policy."""
    cache_salt: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    """Requests share cached prompts with those of the same salt only."""
    request_id: Label | None = None
    """Becomes part of the answer's id. Default: the X-Request-Id header, else a random one."""
    user: str | None = None
    """Who the request is for: users of an API key take turns."""


class EmbeddingRequest(PoolingRequest, kw_only=True):
    """Body of POST /v1/embeddings: ``input``, or ``messages`` with what chat completions take to render them."""

    input: str | list[str | int | list[int]] | None = None
    """A text, several texts, token ids, or several lists of token ids."""
    messages: Annotated[list[ChatMessage | list[ChatMessage]], Meta(min_length=1)] | None = None
    """A conversation, or a list of conversations."""
    encoding_format: Literal["float", "base64"] | None = None
    """base64: the bytes of the numbers, which is smaller and faster."""
    dimensions: PositiveCount | None = None
    """Keep that many leading numbers (for models that were trained so), then scale the vector to length 1."""
    use_activation: bool | None = None
    """Scale vectors to length 1. Default: as the server is configured."""
    normalize: bool | None = None
    """Older name of ``use_activation``."""
    embed_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Type of the numbers in base64. Default: float32."""
    endianness: Literal["native", "little", "big"] | None = None
    """Order of their bytes. Default: the server's, which is little."""
    add_special_tokens: bool | None = None
    """Let the tokenizer add its start token. Default: for ``input``, not for ``messages``, whose template has it."""
    add_generation_prompt: bool | None = None
    """End with the header of an assistant message. Default: no."""
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: JsonObject | None = None
    documents: list[JsonObject] | None = None
    reasoning_effort: str | None = None


class ScoreRequest(PoolingRequest, kw_only=True):
    """Body of POST /score: one query with each document, or each query with its own document.

    The two sides have several names; one of each side is needed.
    """

    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    items: str | list[str] | None = None
    """Another name of ``documents``."""
    text_1: str | list[str] | None = None
    """Another name of ``queries``."""
    text_2: str | list[str] | None = None
    """Another name of ``documents``."""
    data_1: str | list[str] | None = None
    """Another name of ``queries``."""
    data_2: str | list[str] | None = None
    """Another name of ``documents``."""
    max_tokens_per_query: Limit | None = None
    """Use the first so many tokens of a query; 0: all."""
    max_tokens_per_doc: Limit | None = None
    """Use the first so many tokens of a document, those that the tokenizer adds not counted; 0: all."""
    add_special_tokens: bool | None = None
    """Let the tokenizer add its start token. Default: yes."""
    instruction: Later = None


class RerankDocument(msgspec.Struct, kw_only=True):
    text: str


class RerankRequest(PoolingRequest, kw_only=True):
    """Body of POST /rerank, in the form that Jina and Cohere share."""

    query: str
    documents: Annotated[list[str | RerankDocument], Meta(min_length=1)]
    top_n: Limit | None = None
    """Return the best so many; 0: all."""
    return_documents: bool | None = None
    """Repeat the texts in the answer. Default: yes."""
    max_tokens_per_query: Limit | None = None
    """Use the first so many tokens of the query; 0: all."""
    max_tokens_per_doc: Limit | None = None
    """Use the first so many tokens of a document, those that the tokenizer adds not counted; 0: all."""
    add_special_tokens: bool | None = None
    """Let the tokenizer add its start token. Default: yes."""
    instruction: Later = None


# ---------------------------------------------------------------------------------------------------------
# Answers


class PoolingUsage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    """Of all texts, each counted once."""
    total_tokens: int


class Embedding(msgspec.Struct, kw_only=True):
    index: int
    object: str = "embedding"
    embedding: list[float] | str
    """Numbers, or base64 of their bytes."""


class EmbeddingResponse(msgspec.Struct, kw_only=True):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Embedding]
    usage: PoolingUsage


class Score(msgspec.Struct, kw_only=True):
    index: int
    object: str = "score"
    score: float
    """Cosine similarity, -1 to 1."""


class ScoreResponse(msgspec.Struct, kw_only=True):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Score]
    usage: PoolingUsage


class RerankResult(msgspec.Struct, kw_only=True):
    index: int
    """Place of the document in the request."""
    document: RerankDocument | UnsetType = UNSET
    relevance_score: float
    """Cosine similarity, -1 to 1."""


class RerankResponse(msgspec.Struct, kw_only=True):
    id: str
    model: str
    usage: PoolingUsage
    results: list[RerankResult]
    """From the best to the worst; equal ones in the order of the request."""
