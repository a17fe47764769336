"""Parsers that split a model's text into reasoning, content and tool calls."""

from api.parsers.base import (
    Content,
    Event,
    Parsed,
    Parser,
    Reasoning,
    Tool,
    ToolCall,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    collect,
    merge,
)
from api.parsers.chain import ParserChain
from api.parsers.forced import forced_calls_schema, forced_tools, is_single
from api.parsers.registry import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    create_parser,
    is_last_turn_needed,
    prompt_opens_reasoning,
    resolve_reasoning_parser,
    resolve_tool_parser,
)

__all__ = [
    "REASONING_PARSERS",
    "TOOL_PARSERS",
    "Content",
    "Event",
    "Parsed",
    "Parser",
    "ParserChain",
    "Reasoning",
    "Tool",
    "ToolCall",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
    "collect",
    "create_parser",
    "forced_calls_schema",
    "forced_tools",
    "is_last_turn_needed",
    "is_single",
    "merge",
    "prompt_opens_reasoning",
    "resolve_reasoning_parser",
    "resolve_tool_parser",
]
