"""Chooses parsers by the chat template, for ``--tool-call-parser auto`` and ``--reasoning-parser auto``.

A template writes the calls and the reasoning of earlier turns as the model wrote them, so it has the marks of the
format in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

AUTO: Final = "auto"
"""The name that stands for the choice."""

_Rules: TypeAlias = Sequence[tuple[str, tuple[str, ...]]]
"""Parsers and the texts that a template for each of them has, the most specific first."""

_TOOLS: Final[_Rules] = (
    ("harmony", ("<|channel|>", "to=", "functions.")),
    ("gemma4", ("<|tool_call>call:",)),
    ("functiongemma", ("<start_function_call>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("cohere_command3", ("<|START_ACTION|>",)),
    ("deepseek_v3", ("<｜tool▁call▁begin｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁call▁begin｜>",)),
    ("deepseek_v32", ("｜DSML｜", "function_calls>")),
    ("deepseek_v4", ("｜DSML｜", "tool_calls>")),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("seed_oss", ("<seed:tool_call>",)),
    ("internlm", ("<|action_start|>",)),
    ("longcat", ("<longcat_tool_call>",)),
    ("glm45", ("<tool_call>", "<arg_key>")),
    ("qwen3_coder", ("<tool_call>", "<function=", "<parameter=")),
    ("olmo3", ("<function_calls>",)),
    ("lfm2", ("<|tool_call_start|>",)),
    ("lfm2", ("<|tool_list_start|>",)),
    ("phi4_mini_json", ("functools",)),
    ("phi4_mini_json", ("<|tool|>",)),
    ("granite", ("<|tool_call|>",)),
    ("llama_nemotron_json", ("<TOOLCALL>",)),
    ("apriel", ("<tool_calls>", "Here are my reasoning steps")),
    ("granite-20b-fc", ("<function_call>",)),
    ("jamba", ("<tool_calls>",)),
    ("hermes", ("<tool_call>", '"name')),
    ("llama3_json", ('"parameters": dictionary of argument name',)),
    ("llama4_pythonic", ("<|python_start|>",)),
    ("lfm2", ("List of tools: [",)),
)
_REASONING: Final[_Rules] = (
    ("harmony", ("<|channel|>analysis",)),
    ("gemma4", ("<|channel>",)),
    ("mistral", ("[THINK]",)),
    ("cohere_command3", ("<|START_THINKING|>",)),
    ("seed_oss", ("<seed:think>",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>", "<think>")),
    ("minimax_m2", ("<minimax:tool_call>",)),  # its tool results are a <response>
    ("granite", ("<response></response>",)),
    ("granite", ("Here is my thought process:",)),
    ("apriel", ("Here are my reasoning steps",)),
    ("hunyuan_a13b", ("<think>", "<answer>")),
    ("ernie45", ("<think>", "<response>")),
    ("qwen3", ("</think>",)),
    ("qwen3", ("<think>",)),
)


def detect_tool_parser(template: str | Mapping[str, str] | None) -> str | None:
    """The name of the tool parser for a chat template, or for several by name; None if no format is known."""
    return _detect(_TOOLS, template)


def detect_reasoning_parser(template: str | Mapping[str, str] | None) -> str | None:
    """The name of the reasoning parser for a chat template, or for several by name; None if no format is known."""
    return _detect(_REASONING, template)


def _detect(rules: _Rules, template: str | Mapping[str, str] | None) -> str | None:
    source = template or ""
    text = source if isinstance(source, str) else "\n".join(source.values())
    return next((name for name, marks in rules if all(mark in text for mark in marks)), None)
