"""Bodies of requests and answers, types only. Names are OpenAI's and, where it has more, vLLM's.

Unknown fields of a request are ignored. A field of type ``Later`` belongs to a feature that does not exist yet:
``refusals.py`` says what is refused, as silence would give the client something else than it asked for.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

from api.generation.usage import Usage
from api.params.sampling import RepetitionDetectionParams
from api.params.structured import StructuredOutputsParams

MAX_INT32 = (1 << 31) - 1
Int32 = Annotated[int, Meta(ge=-(1 << 31), le=MAX_INT32)]
Label = Annotated[str, Meta(pattern=r"^[!-~]{1,128}$")]
Later = Annotated[Any, Meta(extra_json_schema={"type": "null"})]

# Ranges that are checked with a message of their own are in the document only.
Penalty = Annotated[float, Meta(extra_json_schema={"minimum": -2, "maximum": 2})]
Share = Annotated[float, Meta(extra_json_schema={"minimum": 0, "maximum": 1})]
Temperature = Annotated[float, Meta(extra_json_schema={"minimum": 0, "maximum": 2})]
Count = Annotated[int, Meta(le=MAX_INT32, extra_json_schema={"minimum": 0})]
PositiveCount = Annotated[int, Meta(le=MAX_INT32, extra_json_schema={"minimum": 1})]
CacheSalt = Annotated[str, Meta(min_length=1, max_length=1024)]
OffOrCount = Annotated[int, Meta(le=MAX_INT32, extra_json_schema={"minimum": -1})]

JsonObject: TypeAlias = dict[str, Any]
Tools: TypeAlias = list[Annotated[JsonObject, Meta(extra_json_schema={"$ref": "#/components/schemas/ChatTool"})],]
"""``ChatTool``s, kept as they came for the chat template."""
ToolChoice: TypeAlias = Annotated[JsonObject, Meta(extra_json_schema={"required": ["type"]})]


# ---------------------------------------------------------------------------------------------------------
# Requests


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    """End the stream with a chunk that has no choices but the token usage."""
    continuous_usage_stats: bool | None = None
    """Every chunk has the usage so far."""


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    name: str | None = None
    """Not read."""
    description: str | None = None
    """Not read."""
    schema: JsonObject | bool | None = None
    """A JSON schema."""
    strict: bool | None = None
    """Not read: answers always keep to the schema."""


class ResponseFormat(msgspec.Struct, kw_only=True):
    """The form of an answer."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["text", "json_object", "json_schema"]})]
    json_schema: JsonSchemaFormat | None = None
    """With the type json_schema."""


class SamplingFields(msgspec.Struct, kw_only=True):
    """What means the same in every protocol of OpenAI's, whatever an answer looks like."""

    stream_interval: PositiveCount | None = None
    """Tokens of a choice in each chunk of a stream, but for the first and the last one. Default: the server's."""

    # How tokens are chosen. None: the server's default, then SamplingParams'.
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

    # When it ends.
    stop: str | list[str] | None = None
    stop_regex: str | list[str] | None = None
    """Regular expressions that end it like stop strings. No look-around, no ``$``."""
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    """No end token and no stop string before this many tokens."""
    repetition_detection: RepetitionDetectionParams | None = None
    """End a completion that is caught in a loop, with the finish reason ``repetition``."""

    thinking_token_budget: Count | None = None
    """Tokens after which thinking is ended; needs a server with a reasoning parser."""

    structured_outputs: StructuredOutputsParams | None = None
    """What language it is in."""

    # What is reported.
    return_tokens_as_token_ids: bool | None = None
    """Spell tokens in log probabilities as ``token_id:17``. Default: the server's."""
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None

    # How it is scheduled and cached.
    priority: Int32 | None = None
    """Lower runs first; needs a server with that policy."""
    cache_salt: CacheSalt | None = None
    """Requests share cached prompts with those of the same salt only."""


class GenerationRequest(SamplingFields, kw_only=True):
    """What completions and chat completions have in common."""

    model: str | None = None
    """None: the model that is served."""
    n: PositiveCount | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    use_beam_search: bool | None = None
    """Search for the ``n`` most likely sequences; not in a stream."""
    length_penalty: float | None = None
    """Of beam search: above 0 longer sequences score better. Default: 1."""

    # What language it is in: at most one of these and ``structured_outputs``.
    response_format: ResponseFormat | None = None
    guided_json: JsonObject | str | None = None
    """Older name of ``structured_outputs.json``, and so on."""
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    grammar: Later = None
    json_schema: Later = None
    format: Annotated[Any, Meta(extra_json_schema={"enum": [None, ""]})] = None

    # What is reported.
    prompt_logprobs: OffOrCount | None = None
    """Log probabilities of this many tokens at each place of the prompt; not in a stream."""
    logprob_token_ids: list[int] | None = None
    """Report these tokens instead of the most likely ones."""
    return_token_ids: bool | None = None
    """Add ``token_ids`` and ``prompt_token_ids``."""
    return_token_offsets: bool | None = None
    """Add ``prompt_token_offsets``: where each token of the prompt begins and ends in its text, in characters."""

    # The prompt.
    add_special_tokens: bool | None = None
    """Let the tokenizer add its start token. Default: for a prompt, not for messages, whose template has it."""
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=MAX_INT32)] | None = None
    """Keep so many tokens of a longer prompt, with those that the tokenizer adds; -1: as many as leave room
    for the output."""
    truncation_side: Literal["left", "right"] | None = None
    """Where tokens are cut off. Default: left, the last tokens stay."""

    request_id: Label | None = None
    """Becomes part of the answer's id. Default: the X-Request-Id header, else a random one."""
    user: str | None = None
    """Who the request is for: users of an API key take turns."""
    safety_identifier: str | None = None
    """Newer name of ``user``."""

    # Refused, see refusals.py.
    prompt_embeds: Later = None
    logits_processors: Later = None
    watermarking: Later = None
    kv_transfer_params: Later = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    """A text, several texts, token ids, or several lists of token ids."""
    echo: bool | None = None
    """The completion's text begins with the prompt."""
    logprobs: OffOrCount | None = None
    """Report log probabilities of this many most likely tokens; with ``echo`` of the prompt, too."""
    max_tokens: Count | None = None
    """None: 16. 0 only with ``echo``."""

    best_of: PositiveCount | None = None
    """Generate so many and return the ``n`` with the highest log probability; not more than ``n`` in a stream."""
    suffix: Later = None


class FunctionDefinition(msgspec.Struct, kw_only=True):
    """A function that the model may call."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    description: str | None = None
    parameters: JsonObject | bool | None = None
    """JSON schema of the arguments. None: there are none."""
    strict: bool | None = None
    """Not read: arguments follow the schema whenever calls are forced."""


class ChatTool(msgspec.Struct, kw_only=True):
    """A tool. Chat templates see more fields, if there are more."""

    type: Literal["function"]
    function: FunctionDefinition


class ChatMessage(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One message of a conversation, as the chat template sees it."""

    role: str
    content: str | list[str | JsonObject] | None = None
    """A text, or parts such as ``{"type": "text", "text": "..."}``."""
    name: str | None = None
    tool_calls: list[JsonObject] | None = None
    tool_call_id: str | None = None
    function_call: JsonObject | None = None
    """Older form of ``tool_calls``, with one call; the role of its result is ``function``."""
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    is_error: bool | None = None
    """Of a tool's result: the call failed. The text begins with "Error: ", unless the template reads this itself."""


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: PositiveCount | None = None
    """None: what the context has room for."""
    max_tokens: PositiveCount | None = None
    """Older name of ``max_completion_tokens``."""
    logprobs: bool | None = None
    top_logprobs: OffOrCount | None = None
    """Most likely tokens to report at each place; needs ``logprobs``."""
    echo: bool | None = None
    """The answer begins with the last message, if that has the answer's role."""

    return_prompt_text: bool | None = None
    """Add ``prompt_text``: the conversation as the chat template wrote it."""

    add_generation_prompt: bool | None = None
    """End with the header of an assistant message. Default: yes, unless ``continue_final_message``."""
    continue_final_message: bool | None = None
    """The model goes on with the last message."""
    chat_template: str | None = None
    """A template of the request's own; needs a server that trusts such templates."""
    chat_template_kwargs: JsonObject | None = None
    """More variables for the template."""
    documents: list[JsonObject] | None = None
    """Documents for templates that know retrieval."""
    reasoning_effort: str | None = None
    """A variable for the template."""

    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    """Default: auto with tools. A grammar forces calls if it is ``required`` or names a function."""
    parallel_tool_calls: bool | None = None
    """False: at most one call. Default: any number."""
    include_reasoning: bool | None = None
    """Whether the answer shows the model's reasoning. Default: yes."""

    functions: Later = None
    function_call: Annotated[Any, Meta(extra_json_schema={"enum": [None, "none"]})] = None
    modalities: Annotated[Any, Meta(extra_json_schema={"enum": [None, ["text"]]})] = None
    audio: Later = None
    web_search_options: Later = None
    return_assistant_tokens_mask: Annotated[Any, Meta(extra_json_schema={"enum": [None, False]})] = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /tokenize: a prompt, or messages with what chat completions take to render them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    """Default: for a prompt, not for messages."""
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: JsonObject | None = None
    documents: list[JsonObject] | None = None
    reasoning_effort: str | None = None
    tools: Tools | None = None


class TokenizerInfo(msgspec.Struct, kw_only=True):
    """Answer of GET /tokenizer_info: what ``tokenizer_config.json`` holds, and always these two."""

    tokenizer_class: str
    chat_template: str | dict[str, str] | None
    """The template in use, or several by name."""


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]


# ---------------------------------------------------------------------------------------------------------
# Answers


class PromptLogprob(msgspec.Struct, kw_only=True):
    logprob: float
    rank: int
    """1: the most likely token of all."""
    decoded_token: str


TokenOffsets: TypeAlias = list[tuple[int, int]]

PromptLogprobs: TypeAlias = list[dict[int, PromptLogprob] | None]
"""By place in the prompt, then by token id. The first token has none."""


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Columns with an entry for each token."""

    text_offset: list[int] = msgspec.field(default_factory=list)
    """Where the token begins in the choice's text, in characters."""
    token_logprobs: list[float | None] = msgspec.field(default_factory=list)
    tokens: list[str] = msgspec.field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = msgspec.field(default_factory=list)


class CompletionChoice(msgspec.Struct, kw_only=True):
    """A completion, or what one chunk of a stream adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    """stop, length or abort; None while it goes on."""
    stop_reason: int | str | None = None
    """The stop string or the one of ``stop_token_ids`` that ended it."""
    token_ids: list[int] | None | UnsetType = UNSET
    """This and what follows are null in whole answers and absent in chunks, unless they were asked for."""
    prompt_token_ids: list[int] | None | UnsetType = UNSET
    prompt_token_offsets: TokenOffsets | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | None | UnsetType = UNSET


class CompletionResponse(msgspec.Struct, kw_only=True):
    """A completion, or a chunk of a stream of them."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | None | UnsetType = UNSET
    """In a stream: only if it was asked for, and then null in all chunks but the last."""


class TopLogprob(msgspec.Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    """A token may be a part of a character."""
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    content: list[ChatLogprob] = msgspec.field(default_factory=list)
    refusal: None = None


class FunctionCall(msgspec.Struct, kw_only=True):
    name: str
    arguments: str
    """JSON, as the model wrote it: it may be cut off."""


class ChatToolCall(msgspec.Struct, kw_only=True):
    id: str
    type: str = "function"
    function: FunctionCall


class AssistantMessage(msgspec.Struct, kw_only=True):
    role: str
    content: str | None
    """None if there are only reasoning or calls."""
    refusal: str | None = None
    reasoning: str | UnsetType = UNSET
    """What the model thought before it answered."""
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
    """What a chunk adds to a call; the first of a call has its id, type and name."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta


class ChatDelta(msgspec.Struct, kw_only=True):
    role: str | UnsetType = UNSET
    """In the first chunk of a choice."""
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
    """What older clients expect to find."""

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


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "octavo"
    root: str
    """The first name; others are aliases."""
    parent: str | None = None
    max_model_len: int
    permission: list[ModelPermission]


class ModelList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[ModelCard]
