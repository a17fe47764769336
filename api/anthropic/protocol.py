"""Types of request and response bodies of Anthropic's Messages API. Unknown fields of a request are ignored."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from api.openai.protocol import MAX_INT32, CacheSalt, JsonObject, OffOrCount, Share
from api.params.lora import AdapterFields

Effort: TypeAlias = Literal["low", "medium", "high", "xhigh", "max"]

# ---------------------------------------------------------------------------------------------------------
# Requests


class TextBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="text"):
    """Text, in a request or an answer."""

    text: str


class ThinkingBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="thinking"):
    """The model's reasoning, in a request or an answer."""

    thinking: str
    signature: str = ""
    """A digest of the text. Ignored in requests."""


class RedactedThinkingBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="redacted_thinking"):
    """Encrypted reasoning, which is omitted from the conversation."""


class ToolUseBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="tool_use"):
    """A tool call, in a request or an answer."""

    id: str
    name: str
    input: JsonObject


class ToolResultBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="tool_result"):
    """The result of a tool call."""

    tool_use_id: str
    content: str | list[TextBlock | ImageBlock | DocumentBlock] | None = None
    is_error: bool | None = None
    """Whether the call failed. The text is prefixed with "Error: " unless the chat template uses this field."""


class PlainTextSource(msgspec.Struct, kw_only=True, tag_field="type", tag="text"):
    data: str


class Base64Source(msgspec.Struct, kw_only=True, tag_field="type", tag="base64"):
    """Content of an image; not supported in documents."""

    media_type: str = ""
    data: str = ""


class UrlSource(msgspec.Struct, kw_only=True, tag_field="type", tag="url"):
    """Address of an image; not supported in documents."""

    url: str = ""


class ImageBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="image"):
    """An image, for models that see."""

    source: Base64Source | UrlSource


class DocumentBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="document"):
    """A document; only plain text is supported."""

    source: PlainTextSource | Base64Source | UrlSource
    title: str | None = None


InputBlock: TypeAlias = (
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock | ImageBlock | DocumentBlock
)


class InputMessage(msgspec.Struct, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[InputBlock]


class InputTool(msgspec.Struct, kw_only=True):
    """A function that the model may call."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    description: str | None = None
    input_schema: JsonObject | None = None
    type: str | None = None
    """None or ``custom``. Server-side tools are not supported."""


class InputToolChoice(msgspec.Struct, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    """Name of the tool, for type ``tool``."""
    disable_parallel_tool_use: bool | None = None
    """Allow at most one call."""


class Thinking(msgspec.Struct, kw_only=True):
    type: Literal["enabled", "adaptive", "disabled"]
    """Sets the template variable ``enable_thinking``. ``disabled`` also omits any reasoning that the model still
    generates."""
    budget_tokens: Annotated[int, Meta(ge=1, le=MAX_INT32)] | None = None
    """Maximum number of reasoning tokens."""


class OutputFormat(msgspec.Struct, kw_only=True):
    type: Literal["json_schema"]
    schema: JsonObject


class OutputConfig(msgspec.Struct, kw_only=True):
    format: OutputFormat | None = None
    """Schema of the answer, which is JSON."""
    effort: Effort | None = None
    """Sets the template variable ``reasoning_effort``."""


class ConversationRequest(AdapterFields, kw_only=True):
    """Body of POST /v1/messages/count_tokens."""

    model: str
    messages: Annotated[list[InputMessage], Meta(min_length=1)]
    """If the last message is from the assistant, the model continues it."""
    system: str | list[TextBlock] | None = None
    tools: list[InputTool] | None = None
    tool_choice: InputToolChoice | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: JsonObject | None = None
    """Additional variables for the chat template. They override those set by ``thinking``."""
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    """Old name of ``output_config.format``."""


class RequestMetadata(msgspec.Struct, kw_only=True):
    """Metadata of a request."""

    user_id: str | None = None
    """Identifier of the end user. The users of an API key take turns."""


class MessagesRequest(ConversationRequest, kw_only=True):
    """Body of POST /v1/messages."""

    max_tokens: Annotated[int, Meta(ge=1, le=MAX_INT32)]
    """Maximum number of tokens to generate. The answer ends earlier if the context is full."""
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Share | None = None
    top_k: OffOrCount | None = None
    top_p: Share | None = None
    metadata: RequestMetadata | None = None
    cache_salt: CacheSalt | None = None
    """Cached prefixes are shared only between requests with the same salt."""


# ---------------------------------------------------------------------------------------------------------
# Answers

OutputBlock: TypeAlias = TextBlock | ThinkingBlock | ToolUseBlock
StopReason: TypeAlias = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class MessageOutputDetails(msgspec.Struct, kw_only=True):
    thinking_tokens: int


class MessageUsage(msgspec.Struct, kw_only=True):
    input_tokens: int
    """Number of prompt tokens not found in the prefix cache."""
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    """Number of prompt tokens found in the prefix cache."""
    output_tokens: int
    output_tokens_details: MessageOutputDetails | None = None
    """Present if the server has a reasoning parser."""


class Message(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    role: str = "assistant"
    model: str
    content: list[OutputBlock]
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    """The stop sequence that ended the message, if any."""
    usage: MessageUsage


class MessageTokensCount(msgspec.Struct, kw_only=True):
    input_tokens: int


class MessageStart(msgspec.Struct, kw_only=True, tag_field="type", tag="message_start"):
    message: Message


class Ping(msgspec.Struct, kw_only=True, tag_field="type", tag="ping"):
    pass


class ContentBlockStart(msgspec.Struct, kw_only=True, tag_field="type", tag="content_block_start"):
    index: int
    content_block: OutputBlock


class TextDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="text_delta"):
    text: str


class ThinkingDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="thinking_delta"):
    thinking: str


class SignatureDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="signature_delta"):
    signature: str


class InputJsonDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="input_json_delta"):
    partial_json: str


BlockDelta: TypeAlias = TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class ContentBlockDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="content_block_delta"):
    index: int
    delta: BlockDelta


class ContentBlockStop(msgspec.Struct, kw_only=True, tag_field="type", tag="content_block_stop"):
    index: int


class StopDetails(msgspec.Struct, kw_only=True):
    stop_reason: StopReason
    stop_sequence: str | None = None


class MessageDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="message_delta"):
    delta: StopDetails
    usage: MessageUsage


class MessageStop(msgspec.Struct, kw_only=True, tag_field="type", tag="message_stop"):
    pass


class AnthropicError(msgspec.Struct, kw_only=True):
    type: str
    message: str


class AnthropicErrorResponse(msgspec.Struct, kw_only=True, tag_field="type", tag="error"):
    """The body of an error response, and the last event of a stream that fails."""

    error: AnthropicError


StreamEvent: TypeAlias = (
    MessageStart
    | Ping
    | ContentBlockStart
    | ContentBlockDelta
    | ContentBlockStop
    | MessageDelta
    | MessageStop
    | AnthropicErrorResponse
)
