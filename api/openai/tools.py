"""The tools of a request: what the prompt shows, and how calls are recognised or forced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from api.admission import MAX_TOOLS, check_number
from api.config import ServerConfig
from api.errors import RequestError
from api.openai.protocol import ChatCompletionRequest, ChatTool, JsonObject
from api.parsers import Tool, forced_calls_schema, forced_tools, is_single


class ToolUse(msgspec.Struct, frozen=True):
    """What becomes of the tools of one request."""

    prompt_tools: Sequence[Tool] | None = None
    """Those that the chat template is given."""
    parser: str | None = None
    """Which parser finds calls in free text, or gives the ids of forced calls their form."""
    schema: JsonObject | None = None
    """JSON schema of an output that is nothing but calls. None: the model decides."""
    is_single: bool = False
    """Calls after the first are left out."""
    is_named: bool = False
    """The client chose the function: its call ends a choice with ``stop``."""

    @property
    def is_parsed(self) -> bool:
        """Whether the text of an answer may hold calls."""
        return self.parser is not None or self.schema is not None


def resolve_tools(request: ChatCompletionRequest, config: ServerConfig) -> ToolUse:
    """Decides how a request's tools are used.

    Raises:
        RequestError: They are malformed, contradict ``tool_choice``, or need a server with other flags.
    """
    choice = request.tool_choice
    if not request.tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools, and there are none", "tool_choice")
        return ToolUse()
    check_tools(request.tools)
    if choice == "none":
        return ToolUse(prompt_tools=None if config.exclude_tools_when_tool_choice_none else request.tools)
    tools: list[Tool] = list(request.tools)
    try:
        chosen = forced_tools(tools, choice)
        allowed = _allowed(tools, choice)
    except ValueError as error:
        raise RequestError(f"tool_choice: {error}", "tool_choice") from None
    single = is_single(choice, parallel_tool_calls=request.parallel_tool_calls is not False)
    if chosen is None:
        if not config.enable_auto_tool_choice or config.tool_call_parser is None:
            raise RequestError(
                'the tool_choice "auto", which is the default with tools, needs a server started with '
                '--enable-auto-tool-choice and --tool-call-parser; "required" and a function by name do not',
                "tool_choice",
            )
        return ToolUse(prompt_tools=allowed, parser=config.tool_call_parser, is_single=single)
    try:
        schema = forced_calls_schema(chosen, single=single)
    except ValueError as error:
        raise RequestError(f"tools: {error}", "tools") from None
    named = isinstance(choice, dict) and choice.get("type") == "function"
    return ToolUse(
        prompt_tools=allowed, parser=config.tool_call_parser, schema=schema, is_single=single, is_named=named
    )


def _allowed(tools: list[Tool], choice: Any) -> list[Tool]:
    """The tools that ``allowed_tools`` leaves, which are all there are for any other choice."""
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return tools
    required = {**choice, "allowed_tools": {**choice["allowed_tools"], "mode": "required"}}
    return forced_tools(tools, required) or tools


def check_tools(tools: list[JsonObject]) -> None:
    """Refuses what is no list of function definitions.

    Raises:
        RequestError: It names the place.
    """
    check_number(len(tools), MAX_TOOLS, "tools", "tools")
    try:
        msgspec.convert(tools, list[ChatTool])
    except msgspec.ValidationError as error:
        text = str(error).replace("`", "").replace("at $", "at tools")
        raise RequestError(f"tools: {text}", "tools") from None
