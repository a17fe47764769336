"""Types of request and response bodies of OpenAI's Responses API. Unknown fields of a request are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from api.openai.protocol import (
    ChatLogprob,
    JsonObject,
    Later,
    OffOrCount,
    PositiveCount,
    SamplingFields,
)

Status: TypeAlias = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus: TypeAlias = Literal["in_progress", "completed", "incomplete"]

# ---------------------------------------------------------------------------------------------------------
# Requests


class ReasoningConfig(msgspec.Struct, kw_only=True):
    effort: str | None = None
    """Variable for the chat template."""
    summary: str | None = None
    """Ignored: reasoning is returned in full."""


class TextFormat(msgspec.Struct, kw_only=True):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: JsonObject | None = None
    """JSON schema of the text, for ``json_schema``."""
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct, kw_only=True):
    format: TextFormat = msgspec.field(default_factory=TextFormat)
    verbosity: str | None = None
    """Ignored."""


class FunctionTool(msgspec.Struct, kw_only=True):
    """A function that the model may call."""

    type: Literal["function"]
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class ResponsesRequest(SamplingFields, kw_only=True):
    """Body of POST /v1/responses."""

    model: str | None = None
    """Name of the model. None: the served model."""
    input: str | Annotated[list[JsonObject], Meta(min_length=1)]
    """A user message as text, or a list of items: messages, function_call, function_call_output, reasoning."""
    instructions: str | None = None
    """System prompt, placed before the conversation but not stored with it."""
    previous_response_id: str | None = None
    """Continue the conversation of a stored response."""
    store: bool | None = None
    """Store the response for later requests. Default: true. Old responses are evicted to make room."""
    background: bool | None = None
    """Return immediately and generate in the background. The response must be stored."""
    stream: bool | None = None

    max_output_tokens: PositiveCount | None = None
    """Default: what fits in the context."""

    tools: list[JsonObject] | None = None
    """List of ``FunctionTool`` objects."""
    tool_choice: Literal["none", "auto", "required"] | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[str] | None = None
    """``message.output_text.logprobs`` adds log probabilities."""
    top_logprobs: OffOrCount | None = None
    truncation: Literal["auto", "disabled"] | None = None
    """Ignored: a conversation that is too long is rejected."""
    metadata: dict[str, str] | None = None
    """Returned with the response."""
    user: str | None = None
    """Identifier of the end user, returned with the response. The users of an API key take turns."""
    safety_identifier: str | None = None
    """New name of ``user``."""

    include_reasoning: bool | None = None
    """Return the model's reasoning. Default: true."""
    chat_template: str | None = None
    """Chat template for this request. Requires a server that trusts templates of requests."""
    chat_template_kwargs: JsonObject | None = None
    """Additional variables for the chat template."""

    # Not supported.
    conversation: Later = None
    prompt: Later = None


class InputPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    """A data URL, for type ``input_image``."""
    detail: str | None = None
    """For type ``input_image``: auto, low or high."""


class InputMessage(msgspec.Struct, kw_only=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputPart]


class InputFunctionCall(msgspec.Struct, kw_only=True):
    call_id: str
    name: str
    arguments: str


class InputFunctionCallOutput(msgspec.Struct, kw_only=True):
    call_id: str
    output: str | list[InputPart]


class ReasoningText(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning_text"):
    text: str


class InputReasoning(msgspec.Struct, kw_only=True):
    content: list[ReasoningText] | None = None


# ---------------------------------------------------------------------------------------------------------
# Answers


class OutputText(msgspec.Struct, kw_only=True, tag_field="type", tag="output_text"):
    text: str = ""
    annotations: list[Any] = msgspec.field(default_factory=list)
    logprobs: list[ChatLogprob] = msgspec.field(default_factory=list)


class OutputMessage(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    status: ItemStatus = "in_progress"
    role: str = "assistant"
    content: list[OutputText] = msgspec.field(default_factory=list)


class ReasoningItem(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning"):
    id: str
    status: ItemStatus = "in_progress"
    summary: list[Any] = msgspec.field(default_factory=list)
    content: list[ReasoningText] = msgspec.field(default_factory=list)
    encrypted_content: str | None = None


class FunctionCallItem(msgspec.Struct, kw_only=True, tag_field="type", tag="function_call"):
    id: str
    status: ItemStatus = "in_progress"
    call_id: str
    """Id by which the function's output refers to this call."""
    name: str
    arguments: str = ""


OutputItem: TypeAlias = OutputMessage | ReasoningItem | FunctionCallItem


class InputTokensDetails(msgspec.Struct, kw_only=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, kw_only=True):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, kw_only=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct, kw_only=True):
    reason: str = "max_output_tokens"


class ResponseError(msgspec.Struct, kw_only=True):
    code: str
    message: str


class ResponseObject(msgspec.Struct, kw_only=True):
    """A response: its parameters, status and output."""

    id: str
    object: str = "response"
    created_at: int
    completed_at: int | None = None
    status: Status = "in_progress"
    background: bool = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    model: str
    output: list[OutputItem] = msgspec.field(default_factory=list)
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    reasoning: ReasoningConfig
    service_tier: str = "default"
    store: bool
    temperature: float
    text: TextConfig
    tool_choice: str | JsonObject = "auto"
    tools: list[JsonObject] = msgspec.field(default_factory=list)
    top_logprobs: int = 0
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None


class DeletedResponse(msgspec.Struct, kw_only=True):
    id: str
    object: str = "response"
    deleted: bool = True


# ---------------------------------------------------------------------------------------------------------
# Stream events. ``sequence_number`` comes last, so that everything before the text of a delta event is constant.


class ResponseCreated(msgspec.Struct, kw_only=True, tag_field="type", tag="response.created"):
    response: ResponseObject
    sequence_number: int


class ResponseQueued(msgspec.Struct, kw_only=True, tag_field="type", tag="response.queued"):
    response: ResponseObject
    sequence_number: int


class ResponseInProgress(msgspec.Struct, kw_only=True, tag_field="type", tag="response.in_progress"):
    response: ResponseObject
    sequence_number: int


class ResponseCompleted(msgspec.Struct, kw_only=True, tag_field="type", tag="response.completed"):
    response: ResponseObject
    sequence_number: int


class ResponseIncomplete(msgspec.Struct, kw_only=True, tag_field="type", tag="response.incomplete"):
    response: ResponseObject
    sequence_number: int


class ResponseFailed(msgspec.Struct, kw_only=True, tag_field="type", tag="response.failed"):
    response: ResponseObject
    sequence_number: int


class OutputItemAdded(msgspec.Struct, kw_only=True, tag_field="type", tag="response.output_item.added"):
    output_index: int
    item: OutputItem
    sequence_number: int


class OutputItemDone(msgspec.Struct, kw_only=True, tag_field="type", tag="response.output_item.done"):
    output_index: int
    item: OutputItem
    sequence_number: int


class ContentPartAdded(msgspec.Struct, kw_only=True, tag_field="type", tag="response.content_part.added"):
    item_id: str
    output_index: int
    content_index: int = 0
    part: OutputText | ReasoningText
    sequence_number: int


class ContentPartDone(msgspec.Struct, kw_only=True, tag_field="type", tag="response.content_part.done"):
    item_id: str
    output_index: int
    content_index: int = 0
    part: OutputText | ReasoningText
    sequence_number: int


class OutputTextDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="response.output_text.delta"):
    item_id: str
    output_index: int
    content_index: int = 0
    logprobs: list[ChatLogprob] = msgspec.field(default_factory=list)
    delta: str
    sequence_number: int


class OutputTextDone(msgspec.Struct, kw_only=True, tag_field="type", tag="response.output_text.done"):
    item_id: str
    output_index: int
    content_index: int = 0
    logprobs: list[ChatLogprob] = msgspec.field(default_factory=list)
    text: str
    sequence_number: int


class ReasoningTextDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="response.reasoning_text.delta"):
    item_id: str
    output_index: int
    content_index: int = 0
    delta: str
    sequence_number: int


class ReasoningTextDone(msgspec.Struct, kw_only=True, tag_field="type", tag="response.reasoning_text.done"):
    item_id: str
    output_index: int
    content_index: int = 0
    text: str
    sequence_number: int


class ArgumentsDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="response.function_call_arguments.delta"):
    item_id: str
    output_index: int
    delta: str
    sequence_number: int


class ArgumentsDone(msgspec.Struct, kw_only=True, tag_field="type", tag="response.function_call_arguments.done"):
    item_id: str
    output_index: int
    name: str
    arguments: str
    sequence_number: int


ResponseEvent: TypeAlias = (
    ResponseCreated
    | ResponseQueued
    | ResponseInProgress
    | ResponseCompleted
    | ResponseIncomplete
    | ResponseFailed
    | OutputItemAdded
    | OutputItemDone
    | ContentPartAdded
    | ContentPartDone
    | OutputTextDelta
    | OutputTextDone
    | ReasoningTextDelta
    | ReasoningTextDone
    | ArgumentsDelta
    | ArgumentsDone
)
