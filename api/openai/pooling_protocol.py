"""Types of request and response bodies of the pooling endpoints: embeddings, scores and rankings."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from api.openai.protocol import MAX_INT32, ChatMessage, Int32, JsonObject, Label, PositiveCount
from api.params.lora import AdapterFields

Limit = Annotated[int, Meta(ge=0, le=MAX_INT32)]

# ---------------------------------------------------------------------------------------------------------
# Requests


class PoolingRequest(AdapterFields, kw_only=True):
    """Common fields of the pooling endpoints."""

    model: str | None = None
    """Name of the model. None: the served model."""
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=MAX_INT32)] | None = None
    """Truncate each text to this many tokens, including special tokens that the tokenizer adds. -1: to the model's
    maximum length."""
    truncation_side: Literal["left", "right"] | None = None
    """Side from which a text is truncated. Default: left, which keeps the last tokens; with late interaction: right."""
    priority: Int32 | None = None
    """Lower values run first. Requires the priority scheduling policy."""
    cache_salt: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    """Cached prefixes are shared only between requests with the same salt."""
    request_id: Label | None = None
    """Becomes part of the answer's id. Default: the X-Request-Id header, or else a random id."""
    user: str | None = None
    """Identifier of the end user. The users of an API key take turns."""
    prompt_name: Annotated[str, Meta(max_length=256)] | None = None
    """Name of a prompt in the model's files, such as query or document: it precedes texts. Default: the files'
    default prompt, if they have one; an empty name: none."""


class EmbeddingRequest(PoolingRequest, kw_only=True):
    """Body of POST /v1/embeddings: ``input``, or ``messages`` with the template fields of chat completions."""

    input: str | list[str | int | list[int]] | None = None
    """A text, several texts, a list of token ids, or several such lists."""
    messages: Annotated[list[ChatMessage | list[ChatMessage]], Meta(min_length=1)] | None = None
    """A conversation, or a list of conversations."""
    encoding_format: Literal["float", "base64"] | None = None
    """``base64`` encodes the bytes of the numbers, which is smaller and faster."""
    dimensions: PositiveCount | None = None
    """Truncate vectors to this length, then normalise them to length 1. For models trained for this (Matryoshka).
    Default: the length in the model's files, if they have one."""
    use_activation: bool | None = None
    """Normalise vectors to length 1. Default: the server's setting."""
    normalize: bool | None = None
    """Old name of ``use_activation``."""
    embed_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Number type for ``base64``. Default: float32."""
    endianness: Literal["native", "little", "big"] | None = None
    """Byte order for ``base64``. Default: native, that of the server, which is little-endian."""
    task: Annotated[str, Meta(max_length=256)] | None = None
    """A task of the model, such as ``retrieval.query``: it is computed with the task's adapter, and with its prompt
    unless ``prompt_name`` is given."""
    add_special_tokens: bool | None = None
    """Add the tokenizer's special tokens, such as the start token. Default: true for ``input``, false for ``messages``,
    whose template writes them."""
    add_generation_prompt: bool | None = None
    """End the prompt with the header of an assistant message. Default: false."""
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: JsonObject | None = None
    documents: list[JsonObject] | None = None
    reasoning_effort: str | None = None


class ClassifyRequest(PoolingRequest, kw_only=True):
    """Body of POST /classify: ``input``, or ``messages``."""

    input: str | list[str | int | list[int]] | None = None
    """A text, several texts, a list of token ids, or several such lists."""
    messages: Annotated[list[ChatMessage | list[ChatMessage]], Meta(min_length=1)] | None = None
    """A conversation, or a list of conversations."""
    use_activation: bool | None = None
    """Turn logits into probabilities. Default: true."""
    activation: bool | None = None
    """Old name of ``use_activation``."""
    add_special_tokens: bool | None = None
    """As in embeddings."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: JsonObject | None = None
    documents: list[JsonObject] | None = None
    reasoning_effort: str | None = None


class PoolRequest(EmbeddingRequest, kw_only=True):
    """Body of POST /pooling: as for embeddings."""

    task: Literal["embed", "classify", "score", "token_embed", "token_classify"] | None = None
    """What to compute: vectors of texts or of their tokens, or what the model's classifier says. Default: classify or
    token_classify if the model has a classifier, otherwise embed."""


class ScoreRequest(PoolingRequest, kw_only=True):
    """Body of POST /score: compares one query with each document, or each query with its own document.

    The queries and the documents can each be given under several names, of which exactly one is required.
    """

    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    items: str | list[str] | None = None
    """Alias of ``documents``."""
    text_1: str | list[str] | None = None
    """Alias of ``queries``."""
    text_2: str | list[str] | None = None
    """Alias of ``documents``."""
    data_1: str | list[str] | None = None
    """Alias of ``queries``."""
    data_2: str | list[str] | None = None
    """Alias of ``documents``."""
    max_tokens_per_query: Limit | None = None
    """Use at most this many leading tokens of a query; 0: all, or as many as the files of a late interaction model
    say."""
    max_tokens_per_doc: Limit | None = None
    """Use at most this many leading tokens of a document, not counting special tokens of the tokenizer, which late
    interaction counts; 0: all, or as many as the files of a late interaction model say."""
    add_special_tokens: bool | None = None
    """Add the tokenizer's special tokens, such as the start token. Default: true."""
    instruction: str | None = None
    """What counts as relevant, for models whose prompts have a place for it."""
    use_activation: bool | None = None
    """Turn a cross-encoder's logits into scores. Default: true."""


class RerankDocument(msgspec.Struct, kw_only=True):
    text: str


class RerankRequest(PoolingRequest, kw_only=True):
    """Body of POST /rerank, in the format shared by Jina and Cohere."""

    query: str
    documents: Annotated[list[str | RerankDocument], Meta(min_length=1)]
    top_n: Limit | None = None
    """Return only this many documents, the most relevant ones; 0: all."""
    return_documents: bool | None = None
    """Return the texts of the documents. Default: true."""
    max_tokens_per_query: Limit | None = None
    """Use at most this many leading tokens of the query; 0: all, or as many as the files of a late interaction model
    say."""
    max_tokens_per_doc: Limit | None = None
    """Use at most this many leading tokens of a document, not counting special tokens of the tokenizer, which late
    interaction counts; 0: all, or as many as the files of a late interaction model say."""
    add_special_tokens: bool | None = None
    """Add the tokenizer's special tokens, such as the start token. Default: true."""
    instruction: str | None = None
    """What counts as relevant, for models whose prompts have a place for it."""
    use_activation: bool | None = None
    """Turn a cross-encoder's logits into scores. Default: true."""


# ---------------------------------------------------------------------------------------------------------
# Answers


class PoolingUsage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    """Tokens of all texts, each counted once."""
    total_tokens: int


class Embedding(msgspec.Struct, kw_only=True):
    index: int
    object: str = "embedding"
    embedding: list[float] | str
    """The numbers, or their bytes in base64."""


class EmbeddingResponse(msgspec.Struct, kw_only=True):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Embedding]
    usage: PoolingUsage


class Classification(msgspec.Struct, kw_only=True):
    index: int
    label: str
    """The label with the largest number."""
    probs: list[float]
    """A number for each label, in the model's order."""
    num_classes: int


class ClassifyResponse(msgspec.Struct, kw_only=True):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Classification]
    usage: PoolingUsage


class Pooled(msgspec.Struct, kw_only=True):
    index: int
    object: str = "pooling"
    data: list[float | list[float]] | str
    """The numbers, for each token if the task asks for them, or their bytes in base64."""


class PoolResponse(msgspec.Struct, kw_only=True):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Pooled]
    usage: PoolingUsage


class Score(msgspec.Struct, kw_only=True):
    index: int
    object: str = "score"
    score: float
    """Cosine similarity, from -1 to 1, or what the model's files name; of a cross-encoder, its score."""


class ScoreResponse(msgspec.Struct, kw_only=True):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Score]
    usage: PoolingUsage


class RerankResult(msgspec.Struct, kw_only=True):
    index: int
    """Index of the document in the request."""
    document: RerankDocument | UnsetType = UNSET
    relevance_score: float
    """Cosine similarity, from -1 to 1, or what the model's files name; of a cross-encoder, its score."""


class RerankResponse(msgspec.Struct, kw_only=True):
    id: str
    model: str
    usage: PoolingUsage
    results: list[RerankResult]
    """Most relevant first; documents with equal scores in the order of the request."""
