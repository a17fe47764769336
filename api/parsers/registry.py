"""Registry of parsers by format. A parser is one file and one line here."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from api.parsers.base import MakeId, ReasoningParserClass, Tool, ToolParserClass
from api.parsers.chain import ParserChain
from api.parsers.ids import new_id
from api.parsers.tools.json_forced import JsonForcedParser

REASONING_PARSERS: dict[str, str] = {
    "apriel": "api.parsers.reasoning.think:APRIEL",
    "cohere_command3": "api.parsers.reasoning.think:COHERE_COMMAND",
    "cohere_command4": "api.parsers.reasoning.think:COHERE_COMMAND",
    "deepseek_r1": "api.parsers.reasoning.think:DEEPSEEK_R1",
    "deepseek_v3": "api.parsers.reasoning.think:THINK",
    "ernie45": "api.parsers.reasoning.think:ANSWER",
    "gemma4": "api.parsers.reasoning.think:GEMMA4",
    "glm45": "api.parsers.reasoning.think:THINK",
    "glm47": "api.parsers.reasoning.think:THINK",
    "granite": "api.parsers.reasoning.think:GRANITE",
    "harmony": "api.parsers.reasoning.harmony:HARMONY",
    "hunyuan_a13b": "api.parsers.reasoning.think:ANSWER",
    "kimi_k2": "api.parsers.reasoning.think:KIMI_K2",
    "minimax_m2": "api.parsers.reasoning.think:DEEPSEEK_R1",
    "mistral": "api.parsers.reasoning.think:MISTRAL",
    "nemotron_v3": "api.parsers.reasoning.think:THINK",
    "olmo3": "api.parsers.reasoning.think:THINK",
    "openai_gptoss": "api.parsers.reasoning.harmony:HARMONY",
    "qwen3": "api.parsers.reasoning.think:THINK",
    "seed_oss": "api.parsers.reasoning.think:SEED_OSS",
    "step3": "api.parsers.reasoning.think:DEEPSEEK_R1",
}
TOOL_PARSERS: dict[str, str] = {
    "apriel": "api.parsers.tools.json_tags:JAMBA",
    "cohere_command3": "api.parsers.tools.json_tags:COHERE_COMMAND",
    "cohere_command4": "api.parsers.tools.json_tags:COHERE_COMMAND",
    "deepseek_v3": "api.parsers.tools.named_json:DEEPSEEK",
    "deepseek_v31": "api.parsers.tools.named_json:DEEPSEEK",
    "deepseek_v32": "api.parsers.tools.xml_calls:DEEPSEEK_V32",
    "deepseek_v4": "api.parsers.tools.xml_calls:DEEPSEEK_V4",
    "functiongemma": "api.parsers.tools.gemma:FUNCTION_GEMMA",
    "gemma4": "api.parsers.tools.gemma:GEMMA4",
    "glm45": "api.parsers.tools.glm45:Glm45Parser",
    "glm47": "api.parsers.tools.glm45:Glm45Parser",
    "granite": "api.parsers.tools.json_tags:GRANITE",
    "granite-20b-fc": "api.parsers.tools.json_tags:GRANITE_20B_FC",
    "granite4": "api.parsers.tools.json_tags:HERMES",
    "harmony": "api.parsers.tools.harmony:HarmonyParser",
    "hermes": "api.parsers.tools.json_tags:HERMES",
    "hunyuan_a13b": "api.parsers.tools.json_tags:JAMBA",
    "internlm": "api.parsers.tools.json_tags:INTERNLM",
    "jamba": "api.parsers.tools.json_tags:JAMBA",
    "kimi_k2": "api.parsers.tools.named_json:KIMI_K2",
    "lfm2": "api.parsers.tools.pythonic:LFM2",
    "llama3_json": "api.parsers.tools.llama3_json:Llama3JsonParser",
    "llama4_json": "api.parsers.tools.llama3_json:Llama3JsonParser",
    "llama4_pythonic": "api.parsers.tools.pythonic:PYTHONIC",
    "llama_nemotron_json": "api.parsers.tools.json_tags:NEMOTRON",
    "longcat": "api.parsers.tools.json_tags:LONGCAT",
    "minimax_m2": "api.parsers.tools.xml_calls:MINIMAX_M2",
    "mistral": "api.parsers.tools.mistral:MistralParser",
    "nemotron_json": "api.parsers.tools.json_tags:NEMOTRON",
    "olmo3": "api.parsers.tools.pythonic:OLMO3",
    "openai": "api.parsers.tools.harmony:HarmonyParser",
    "phi4_mini_json": "api.parsers.tools.json_tags:PHI4_MINI_JSON",
    "pythonic": "api.parsers.tools.pythonic:PYTHONIC",
    "qwen3_coder": "api.parsers.tools.xml_calls:QWEN3_CODER",
    "qwen3_xml": "api.parsers.tools.xml_calls:QWEN3_CODER",
    "seed_oss": "api.parsers.tools.xml_calls:SEED_OSS",
    "xlam": "api.parsers.tools.json_tags:XLAM",
}

FORCED: dict[str, str] = {"json_forced": "api.parsers.tools.json_forced:JsonForcedParser"}
"""The format of forced calls (``forced.py``): no model has it, so nobody chooses it."""


def resolve_reasoning_parser(name: str) -> ReasoningParserClass:
    """The reasoning parser of that name.

    Raises:
        ValueError: The name is unknown; the message lists the known ones.
    """
    result: ReasoningParserClass = _resolve(REASONING_PARSERS, "reasoning parser", name)
    return result


def resolve_tool_parser(name: str) -> ToolParserClass:
    """The tool parser of that name.

    Raises:
        ValueError: The name is unknown; the message lists the known ones.
    """
    result: ToolParserClass = _resolve(FORCED if name in FORCED else TOOL_PARSERS, "tool parser", name)
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
    """Creates the parser of one choice.

    Args:
        reasoning: Name of the reasoning parser; None for answers without reasoning.
        tool: Name of the tool parser; None for answers without calls.
        tools: The tools of the request, whose schemas determine the types of values. Calls of other tools are reported
            as well: only the client can tell whether that is a mistake.
        forced: The text follows the grammar of ``forced_calls_schema``, not the model's own format. The tool parser, if
            any, only sets the format of ids.
        prompt_opened: Whether the prompt has opened the reasoning (True) or closed it as well (False); None: neither.
            See ``prompt_opens_reasoning``.
        needs_mark: A grammar ensures that an answer without the opening mark has no reasoning, unless the prompt has
            opened it.
        make_id: Creates ids of calls, instead of the tool parser.

    Raises:
        ValueError: A name is unknown; the message lists the known ones.
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
    """Whether a prompt ends inside reasoning: its last mark decides.

    Args:
        reasoning: Name of the reasoning parser.
        turn: The part of the prompt that belongs to the model's current turn, as rendered. Earlier turns do not count:
            they may contain the marks as text.

    Returns:
        True: reasoning is open; False: it is closed; None: neither.

    Raises:
        ValueError: The name is unknown.
    """
    return resolve_reasoning_parser(reasoning).opened_by(turn)


def is_last_turn_needed(reasoning: str, prompt: str) -> bool:
    """Whether a prompt has marks whose turn must be determined. A mark at the very end decides by itself."""
    marks = resolve_reasoning_parser(reasoning).special_tokens
    return any(mark in prompt for mark in marks) and not prompt.rstrip().endswith(marks)


def _resolve(registry: dict[str, str], kind: str, name: str) -> Any:
    if name not in registry:
        raise ValueError(f"unknown {kind} {name!r}; choose from {', '.join(sorted(registry))}")
    module, _, attribute = registry[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
