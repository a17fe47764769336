"""Types of OpenAI request and response bodies, without logic.

Fields are named as in OpenAI's API; those that vLLM adds are named as in vLLM. Unknown fields of a request are ignored.
Fields of type ``Later`` belong to features that are not implemented. ``refusals.py`` rejects them: ignoring one would
silently give the client something that it did not ask for.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

from api.generation.usage import Usage
from api.params.lora import AdapterFields
from api.params.sampling import RepetitionDetectionParams
from api.params.structured import StructuredOutputsParams

MAX_INT32 = (1 << 31) - 1
Int32 = Annotated[int, Meta(ge=-(1 << 31), le=MAX_INT32)]
Label = Annotated[str, Meta(pattern=r"^[!-~]{1,128}$")]
Later = Annotated[Any, Meta(extra_json_schema={"type": "null"})]

# These ranges only appear in the OpenAPI document; the server checks them elsewhere, with better error messages.
Penalty = Annotated[float, Meta(extra_json_schema={"minimum": -2, "maximum": 2})]
Share = Annotated[float, Meta(extra_json_schema={"minimum": 0, "maximum": 1})]
Temperature = Annotated[float, Meta(extra_json_schema={"minimum": 0, "maximum": 2})]
Count = Annotated[int, Meta(le=MAX_INT32, extra_json_schema={"minimum": 0})]
PositiveCount = Annotated[int, Meta(le=MAX_INT32, extra_json_schema={"minimum": 1})]
CacheSalt = Annotated[str, Meta(min_length=1, max_length=1024)]
OffOrCount = Annotated[int, Meta(le=MAX_INT32, extra_json_schema={"minimum": -1})]

JsonObject: TypeAlias = dict[str, Any]
Tools: TypeAlias = list[Annotated[JsonObject, Meta(extra_json_schema={"$ref": "#/components/schemas/ChatTool"})],]
"""``ChatTool`` objects, passed to the chat template unchanged."""
ToolChoice: TypeAlias = Annotated[JsonObject, Meta(extra_json_schema={"required": ["type"]})]


# ---------------------------------------------------------------------------------------------------------
# Requests


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    """End the stream with a chunk that has the token usage and no choices."""
    continuous_usage_stats: bool | None = None
    """Include the usage so far in every chunk. Requires ``include_usage``."""


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    name: str | None = None
    """Ignored."""
    description: str | None = None
    """Ignored."""
    schema: JsonObject | bool | None = None
    """A JSON schema."""
    strict: bool | None = None
    """Ignored: the schema is always enforced."""


class ResponseFormat(msgspec.Struct, kw_only=True):
    """The format of an answer."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["text", "json_object", "json_schema"]})]
    json_schema: JsonSchemaFormat | None = None
    """Required for type ``json_schema``."""


class SamplingFields(AdapterFields, kw_only=True):
    """Fields that are the same in completions, chat completions and responses."""

    stream_interval: PositiveCount | None = None
    """Tokens per chunk of a choice in a stream, except the first and the last chunk. Default: the server's setting."""

    # Sampling. None: the server's default, or else that of SamplingParams.
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: OffOrCount | None = None
    min_p: Share | None = None
    seed: int | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(extra_json_schema={"minimum": 1e-20, "maximum": 1e20})] | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None

    # Stop conditions.
    stop: str | list[str] | None = None
    stop_regex: str | list[str] | None = None
    """Regular expressions that act like stop strings. Look-around and ``$`` are not supported."""
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    """Minimum number of tokens: until then, end tokens and stop strings do not end the completion."""
    repetition_detection: RepetitionDetectionParams | None = None
    """End a completion that repeats itself, with finish reason ``repetition``."""

    num_speculative_tokens: Count | None = None
    """Maximum draft tokens that a step verifies; 0 turns speculation off. It changes no token."""

    thinking_token_budget: Count | None = None
    """Maximum number of reasoning tokens, after which reasoning is ended. Requires a reasoning parser."""

    structured_outputs: StructuredOutputsParams | None = None
    """Constraint on the output."""

    # Output.
    return_tokens_as_token_ids: bool | None = None
    """Write tokens in log probabilities as ``token_id:17``. Default: the server's setting."""
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None

    # Scheduling and caching.
    priority: Int32 | None = None
    """Lower values run first. Requires the priority scheduling policy."""
    cache_salt: CacheSalt | None = None
    """Cached prefixes are shared only between requests with the same salt."""


class GenerationRequest(SamplingFields, kw_only=True):
    """Common fields of completions and chat completions."""

    model: str | None = None
    """Name of the model. None: the served model."""
    n: PositiveCount | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    use_beam_search: bool | None = None
    """Search for the ``n`` most likely sequences. Not supported with ``stream``."""
    length_penalty: float | None = None
    """For beam search: values above 0 favour longer sequences. Default: 1."""

    # Constraint on the output: at most one of these fields and ``structured_outputs``.
    response_format: ResponseFormat | None = None
    guided_json: JsonObject | str | None = None
    """Old name of ``structured_outputs.json``; likewise for the other ``guided`` fields."""
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    grammar: Later = None
    json_schema: Later = None
    format: Annotated[Any, Meta(extra_json_schema={"enum": [None, ""]})] = None

    # Output.
    prompt_logprobs: OffOrCount | None = None
    """Number of most likely tokens to return per prompt position. Not supported with ``stream``."""
    logprob_token_ids: list[int] | None = None
    """Return the log probabilities of these tokens instead of the most likely ones."""
    return_token_ids: bool | None = None
    """Add ``token_ids`` and ``prompt_token_ids`` to the answer."""
    return_token_offsets: bool | None = None
    """Add ``prompt_token_offsets`` to the answer: start and end of each prompt token in its text, in characters."""

    # The prompt.
    add_special_tokens: bool | None = None
    """Add the tokenizer's special tokens, such as the start token. Default: true for a prompt, false for messages,
    whose template writes them."""
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=MAX_INT32)] | None = None
    """Truncate the prompt to this many tokens, including special tokens that the tokenizer adds. -1: as many as leave
    room for the output."""
    truncation_side: Literal["left", "right"] | None = None
    """Side from which the prompt is truncated. Default: left, which keeps the last tokens."""

    request_id: Label | None = None
    """Becomes part of the answer's id. Default: the X-Request-Id header, or else a random id."""
    user: str | None = None
    """Identifier of the end user. The users of an API key take turns."""
    safety_identifier: str | None = None
    """New name of ``user``."""

    # Not supported; see refusals.py.
    prompt_embeds: Later = None
    logits_processors: Later = None
    watermarking: Later = None
    kv_transfer_params: Later = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    """A text, several texts, a list of token ids, or several such lists."""
    echo: bool | None = None
    """Start the completion's text with the prompt."""
    logprobs: OffOrCount | None = None
    """Number of most likely tokens to return per position; with ``echo``, for the prompt as well."""
    max_tokens: Count | None = None
    """Default: 16. 0 is allowed only with ``echo``."""

    best_of: PositiveCount | None = None
    """Generate this many completions and return the ``n`` with the highest log probability. With ``stream``, at most
    ``n``."""
    suffix: Later = None


class FunctionDefinition(msgspec.Struct, kw_only=True):
    """A function that the model may call."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    description: str | None = None
    parameters: JsonObject | bool | None = None
    """JSON schema of the arguments. None: the function has no arguments."""
    strict: bool | None = None
    """Ignored: the schema is enforced whenever calls are forced."""


class ChatTool(msgspec.Struct, kw_only=True):
    """A tool. Additional fields are passed to the chat template."""

    type: Literal["function"]
    function: FunctionDefinition


class ChatMessage(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A message of a conversation, as passed to the chat template."""

    role: str
    content: str | list[str | JsonObject] | None = None
    """A text, or a list of parts such as ``{"type": "text", "text": "..."}``."""
    name: str | None = None
    tool_calls: list[JsonObject] | None = None
    tool_call_id: str | None = None
    function_call: JsonObject | None = None
    """Old form of ``tool_calls``, for a single call; the message with its result has the role ``function``."""
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    is_error: bool | None = None
    """For a tool's result: whether the call failed. The text is prefixed with "Error: " unless the template uses this
    field."""


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: PositiveCount | None = None
    """Default: what fits in the context."""
    max_tokens: PositiveCount | None = None
    """Old name of ``max_completion_tokens``."""
    logprobs: bool | None = None
    top_logprobs: OffOrCount | None = None
    """Number of most likely tokens to return per position. Requires ``logprobs``."""
    echo: bool | None = None
    """Start the answer with the last message, if that message has the role of the answer."""

    return_prompt_text: bool | None = None
    """Add ``prompt_text`` to the answer: the conversation as rendered by the chat template."""

    add_generation_prompt: bool | None = None
    """End the prompt with the header of an assistant message. Default: the opposite of ``continue_final_message``."""
    continue_final_message: bool | None = None
    """Continue the last message instead of starting a new one."""
    chat_template: str | None = None
    """Chat template for this request. Requires a server that trusts templates of requests."""
    chat_template_kwargs: JsonObject | None = None
    """Additional variables for the chat template."""
    documents: list[JsonObject] | None = None
    """Documents for chat templates that support retrieval."""
    reasoning_effort: str | None = None
    """Variable for the chat template."""

    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    """Default: ``auto`` if there are tools. ``required`` or a named function forces calls with a grammar."""
    parallel_tool_calls: bool | None = None
    """False: at most one call. Default: any number of calls."""
    include_reasoning: bool | None = None
    """Return the model's reasoning. Default: true."""

    functions: Later = None
    function_call: Annotated[Any, Meta(extra_json_schema={"enum": [None, "none"]})] = None
    modalities: Annotated[Any, Meta(extra_json_schema={"enum": [None, ["text"]]})] = None
    audio: Later = None
    web_search_options: Later = None
    return_assistant_tokens_mask: Annotated[Any, Meta(extra_json_schema={"enum": [None, False]})] = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /tokenize: a prompt, or messages with the template fields of chat completions."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    """Default: true for a prompt, false for messages."""
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: JsonObject | None = None
    documents: list[JsonObject] | None = None
    reasoning_effort: str | None = None
    tools: Tools | None = None


class TokenizerInfo(msgspec.Struct, kw_only=True):
    """Answer of GET /tokenizer_info: the contents of ``tokenizer_config.json``, and always these two fields."""

    tokenizer_class: str
    chat_template: str | dict[str, str] | None
    """The template in use, or several templates by name."""


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]


# ---------------------------------------------------------------------------------------------------------
# Answers


class PromptLogprob(msgspec.Struct, kw_only=True):
    logprob: float
    rank: int
    """Rank by probability; 1 is the most likely token."""
    decoded_token: str


TokenOffsets: TypeAlias = list[tuple[int, int]]

PromptLogprobs: TypeAlias = list[dict[int, PromptLogprob] | None]
"""One dictionary per prompt position, by token id; None for the first position."""


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Log probabilities as columns, with one entry per token."""

    text_offset: list[int] = msgspec.field(default_factory=list)
    """Start of the token in the choice's text, in characters."""
    token_logprobs: list[float | None] = msgspec.field(default_factory=list)
    tokens: list[str] = msgspec.field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = msgspec.field(default_factory=list)


class CompletionChoice(msgspec.Struct, kw_only=True):
    """A completion, or the part of it in one chunk of a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    """``stop``, ``length``, ``repetition`` or ``abort``; None while it is being generated."""
    stop_reason: int | str | None = None
    """The stop string, or the token of ``stop_token_ids``, that ended the completion."""
    token_ids: list[int] | None | UnsetType = UNSET
    """Like the fields below, returned on request. Otherwise null in whole answers and absent from chunks."""
    prompt_token_ids: list[int] | None | UnsetType = UNSET
    prompt_token_offsets: TokenOffsets | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | None | UnsetType = UNSET


class CompletionResponse(msgspec.Struct, kw_only=True):
    """The completions of a request, or one chunk of their stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | None | UnsetType = UNSET
    """In a stream, present only if requested, and null in all chunks except the last."""


class TopLogprob(msgspec.Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    """UTF-8 bytes of the token, which may be only part of a character."""
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    content: list[ChatLogprob] = msgspec.field(default_factory=list)
    refusal: None = None


class FunctionCall(msgspec.Struct, kw_only=True):
    name: str
    arguments: str
    """JSON as the model wrote it, which may be incomplete."""


class ChatToolCall(msgspec.Struct, kw_only=True):
    id: str
    type: str = "function"
    function: FunctionCall


class AssistantMessage(msgspec.Struct, kw_only=True):
    role: str
    content: str | None
    """None if the message consists of reasoning or tool calls only."""
    refusal: str | None = None
    reasoning: str | UnsetType = UNSET
    """The model's reasoning before the answer."""
    tool_calls: list[ChatToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletionResponse(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_token_ids: list[int] | None = None
    prompt_token_offsets: TokenOffsets | UnsetType = UNSET
    prompt_text: str | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | None = None


class FunctionDelta(msgspec.Struct, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str
    """The next piece of the JSON."""


class ToolCallDelta(msgspec.Struct, kw_only=True):
    """The part of a call in one chunk. The first chunk of a call has its id, type and name."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta


class ChatDelta(msgspec.Struct, kw_only=True):
    role: str | UnsetType = UNSET
    """Present in the first chunk of a choice."""
    content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_token_offsets: TokenOffsets | UnsetType = UNSET
    prompt_text: str | UnsetType = UNSET
    usage: Usage | None | UnsetType = UNSET


class TokenizeResponse(msgspec.Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(msgspec.Struct, kw_only=True):
    prompt: str


class ModelPermission(msgspec.Struct, kw_only=True):
    """Permissions that old clients expect."""

    id: str
    object: str = "model_permission"
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: str | None = None
    is_blocking: bool = False


class ModelCapabilities(msgspec.Struct, kw_only=True):
    vision: bool
    """Messages may have images."""


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "octavo"
    root: str
    """The model as given on the command line: a path or a hub name."""
    parent: str | None = None
    """Of an adapter: the name of the model that it changes."""
    lora_id: int | UnsetType = UNSET
    """Of an adapter: its number in a request's ``lora``."""
    max_model_len: int
    capabilities: ModelCapabilities
    """What the model takes beside text."""
    permission: list[ModelPermission]


class ModelList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[ModelCard]
