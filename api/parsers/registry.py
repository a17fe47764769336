"""Which class parses which format. A parser is one file and one line here."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from api.parsers.base import MakeId, ReasoningParserClass, Tool, ToolParserClass
from api.parsers.chain import ParserChain
from api.parsers.ids import new_id
from api.parsers.tools.json_forced import JsonForcedParser

REASONING_PARSERS: dict[str, str] = {
    "deepseek_r1": "api.parsers.reasoning.think:DeepSeekR1Parser",
    "qwen3": "api.parsers.reasoning.think:Qwen3Parser",
}
TOOL_PARSERS: dict[str, str] = {
    "hermes": "api.parsers.tools.hermes:HermesParser",
    "json_forced": "api.parsers.tools.json_forced:JsonForcedParser",
    "llama3_json": "api.parsers.tools.llama3_json:Llama3JsonParser",
    "mistral": "api.parsers.tools.mistral:MistralParser",
    "pythonic": "api.parsers.tools.pythonic:PythonicParser",
    "qwen3_coder": "api.parsers.tools.qwen3_coder:Qwen3CoderParser",
}


def resolve_reasoning_parser(name: str) -> ReasoningParserClass:
    """The reasoning parser of that name.

    Raises:
        ValueError: There is none; the text lists those that there are.
    """
    result: ReasoningParserClass = _resolve(REASONING_PARSERS, "reasoning parser", name)
    return result


def resolve_tool_parser(name: str) -> ToolParserClass:
    """The tool parser of that name.

    Raises:
        ValueError: There is none; the text lists those that there are.
    """
    result: ToolParserClass = _resolve(TOOL_PARSERS, "tool parser", name)
    return result


def create_parser(
    reasoning: str | None = None,
    tool: str | None = None,
    tools: Sequence[Tool] = (),
    *,
    forced: bool = False,
    prompt_opened: bool | None = None,
    needs_mark: bool = False,
    make_id: MakeId | None = None,
) -> ParserChain:
    """Makes the parser of one choice.

    Args:
        reasoning: The name of the reasoning parser, None for an answer without reasoning.
        tool: The name of the tool parser, None for an answer without calls.
        tools: The tools of the request, whose schemas give values their types. A call of another tool is reported like
            any: only the client can tell whether that is a mistake, and it sees what the model wrote.
        forced: The text follows the grammar of ``forced_calls_schema``, whatever the format is that the model is used
            to. The tool parser, if there is one, only gives ids their form.
        prompt_opened: Whether the prompt has begun the reasoning (True) or has ended it, too (False); None if it has
            done neither. See ``prompt_opens_reasoning``.
        needs_mark: An answer that does not begin with the mark of reasoning has none, unless the prompt has begun it,
            whatever the model is used to: a grammar sees to that.
        make_id: Makes the ids of calls, instead of the tool parser.

    Raises:
        ValueError: There is no parser of that name; the text lists those that there are.
    """
    reasoning_class = None if reasoning is None else resolve_reasoning_parser(reasoning)
    tool_class = None if tool is None else resolve_tool_parser(tool)
    if make_id is None:
        make_id = new_id if tool_class is None else tool_class.new_id
    if forced:
        tool_class = JsonForcedParser
    return ParserChain(
        None if reasoning_class is None else reasoning_class(prompt_opened, needs_mark=needs_mark),
        None if tool_class is None else tool_class(tools, make_id),
    )


def prompt_opens_reasoning(reasoning: str, turn: str) -> bool | None:
    """Whether a prompt leaves the model in the middle of reasoning: its last mark decides.

    Args:
        reasoning: The name of the reasoning parser.
        turn: What the prompt has of the turn that the model goes on with, as the template made it. What stands before,
            others have said, who may use the marks as words.

    Returns:
        True: reasoning has begun; False: it has ended; None: neither.

    Raises:
        ValueError: There is no parser of that name.
    """
    return resolve_reasoning_parser(reasoning).opened_by(turn)


def is_last_turn_needed(reasoning: str, prompt: str) -> bool:
    """Whether a prompt has marks, of which it must be known in whose turn they are. A mark at its end is the last."""
    marks = resolve_reasoning_parser(reasoning).special_tokens
    return any(mark in prompt for mark in marks) and not prompt.rstrip().endswith(marks)


def _resolve(registry: dict[str, str], kind: str, name: str) -> Any:
    if name not in registry:
        raise ValueError(f"there is no {kind} {name!r}, but {', '.join(sorted(registry))}")
    module, _, attribute = registry[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
