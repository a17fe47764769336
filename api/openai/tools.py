"""The tools of a request: which are in the prompt, and how calls are parsed or forced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from api.admission import MAX_TOOLS, check_number
from api.config import ServerConfig
from api.errors import RequestError
from api.openai.protocol import ChatCompletionRequest, ChatTool, JsonObject
from api.params.structured import StructuredOutputsParams, grammar_spec
from api.parsers import Tool, forced_calls_schema, forced_tools, is_single
from engine_core.messages import GrammarSpec

MAX_TOOLS_TRIED = 64
"""Tools that are looked at to find the one whose schema is at fault."""


class ToolUse(msgspec.Struct, frozen=True):
    """How the tools of a request are used."""

    prompt_tools: Sequence[Tool] | None = None
    """Tools for the chat template."""
    parser: str | None = None
    """Parser that finds calls in text, or sets the id format of forced calls."""
    schema: JsonObject | None = None
    """JSON schema of an output that consists of calls only. None: the model decides."""
    is_single: bool = False
    """Drop calls after the first."""
    is_named: bool = False
    """The client chose the function, so the finish reason is ``stop``."""

    @property
    def is_parsed(self) -> bool:
        """Whether the answer may contain calls."""
        return self.parser is not None or self.schema is not None


def resolve_tools(request: ChatCompletionRequest, config: ServerConfig) -> ToolUse:
    """Decides how a request's tools are used.

    Raises:
        RequestError: The tools are malformed, conflict with ``tool_choice``, or need other server flags.
    """
    choice = request.tool_choice
    if not request.tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice requires tools", "tool_choice")
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
        if config.enable_auto_tool_choice and config.tool_call_parser is None:
            raise RequestError(
                'tool_choice "auto", the default with tools: --tool-call-parser auto knows no parser for the model\'s '
                'chat template; start the server with the name of one, or use "required" or a named function',
                "tool_choice",
            )
        if not config.enable_auto_tool_choice or config.tool_call_parser is None:
            raise RequestError(
                'tool_choice "auto", the default with tools, requires a server started with '
                '--enable-auto-tool-choice; "required" and a named function do not',
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
    """The tools that ``allowed_tools`` permits; for any other choice, all."""
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return tools
    required = {**choice, "allowed_tools": {**choice["allowed_tools"], "mode": "required"}}
    return forced_tools(tools, required) or tools


def check_tools(tools: list[JsonObject]) -> None:
    """Checks that tools are a list of function definitions.

    Raises:
        RequestError: They are not; the error names the place.
    """
    check_number(len(tools), MAX_TOOLS, "tools", "tools")
    try:
        msgspec.convert(tools, list[ChatTool])
    except msgspec.ValidationError as error:
        text = str(error).replace("`", "").replace("at $", "at tools")
        raise RequestError(f"tools: {text}", "tools") from None


def forced_grammar(schema: JsonObject) -> GrammarSpec:
    """The grammar of the schema of ``forced_calls_schema``.

    Raises:
        RequestError: The parameters of a tool cannot be used as they are; the message names the tool.
    """
    try:
        return grammar_spec(StructuredOutputsParams(json=schema), "tools")
    except RequestError as error:
        calls = schema.get("items", schema)
        for call in calls.get("anyOf", ())[:MAX_TOOLS_TRIED]:
            try:
                grammar_spec(StructuredOutputsParams(json=call), "tools")
            except RequestError:
                raise RequestError(f"{error.message} (in {call['title']!r})", "tools") from None
        raise
