"""Reasoning parsers, alone and before tool parsers."""

from __future__ import annotations

import pytest

from api.parsers import (
    REASONING_PARSERS,
    collect,
    create_parser,
    is_last_turn_needed,
    prompt_opens_reasoning,
    resolve_reasoning_parser,
)
from tests.null.test_tool_parsers import parse


@pytest.mark.parametrize(
    ("name", "prompt_opened", "text", "reasoning", "content"),
    [
        ("deepseek_r1", None, "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("deepseek_r1", None, "Hm.\n\nSo.\n</think>\n\nYes.\n", "Hm.\n\nSo.", "Yes.\n"),
        ("deepseek_r1", True, "Hm.</think>Yes.", "Hm.", "Yes."),
        ("deepseek_r1", True, "<think>Hm.</think>Yes.", "Hm.", "Yes."),
        ("deepseek_r1", False, "Yes, <think> is a tag.", "", "Yes, <think> is a tag."),
        ("deepseek_r1", None, "I never get", "I never get", ""),
        ("deepseek_r1", None, "I never get\n</think", "I never get\n</think", ""),
        ("deepseek_r1", None, " <th", " <th", ""),
        ("deepseek_r1", None, "", "", ""),
        ("deepseek_r1", None, "</think>Yes.", "", "Yes."),
        ("deepseek_r1", None, "a < b </ think> c</think>a </think> b", "a < b </ think> c", "a </think> b"),
        ("qwen3", None, "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("qwen3", None, "\n <think>\n\n</think>\n\nYes.", "", "Yes."),
        ("qwen3", None, "Yes.\n", "", "Yes.\n"),
        ("qwen3", None, "  Yes, <think> is a tag.", "", "  Yes, <think> is a tag."),
        ("qwen3", None, " <thin", "", " <thin"),
        ("qwen3", None, "<think>\n\nHm.\n\n", "Hm.\n\n", ""),
        ("qwen3", True, "\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("qwen3", False, "\nYes, <think>.", "", "\nYes, <think>."),
        ("qwen3", None, "<think>Hm.</think>  \n Yes.", "Hm.", "  \n Yes."),
        ("glm45", None, "\n<think>Hm.</think>\nYes.", "Hm.", "Yes."),
        ("gemma4", None, "<|channel>thought\nHm.\n<channel|>Yes.", "Hm.", "Yes."),
        ("gemma4", None, "<|channel>thoughts\n<channel|>Yes.", "thoughts", "Yes."),
        ("gemma4", None, "<|channel>thought\n<channel|>Yes.", "", "Yes."),
        ("gemma4", None, "<|channel>thou", "thou", ""),
        ("gemma4", None, "<|channel>thought\nHm.<|tool_call>call:f{}", "Hm.", "<|tool_call>call:f{}"),
        ("gemma4", False, "Yes.", "", "Yes."),
        ("mistral", None, "[THINK]Hm.[/THINK]Yes.", "Hm.", "Yes."),
        ("mistral", None, "[THINK]Hm.[TOOL_CALLS]f[ARGS]{}", "Hm.", "[TOOL_CALLS]f[ARGS]{}"),
        ("harmony", True, "Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.", "Hm.", "Yes."),
        ("harmony", False, "Yes.<|return|>", "", "Yes."),
        ("kimi_k2", None, "<think>Hm.<|tool_calls_section_begin|>x", "Hm.", "<|tool_calls_section_begin|>x"),
        ("apriel", True, "\nHm.\n[BEGIN FINAL RESPONSE]\nYes.", "Hm.", "Yes."),
        ("apriel", True, "Hm.[BEGIN FINAL RESPONSE]Yes.[END FINAL RESPONSE]", "Hm.", "Yes."),
        ("apriel", None, "Here are my reasoning steps:\nHm.\n<tool_calls>[]", "Hm.", "<tool_calls>[]"),
        ("apriel", None, "Here are my reasons", "", "Here are my reasons"),
        ("granite", None, "<think>Hm.</think><response>Yes.</response>", "Hm.", "Yes."),
        ("granite", None, "<think>Hm.</think>\n <response> Yes.</resp", "Hm.", " Yes.</resp"),
        ("granite", None, "Here is my thought process:\n\nHm.\n\nHere is my response:\n\nYes.", "Hm.", "Yes."),
        ("granite", None, "Here's my thought process:Hm.Here's my response:Yes.", "Hm.", "Yes."),
        ("granite", None, "Here is my idea: <response> is a tag.", "", "Here is my idea: <response> is a tag."),
        ("granite", None, " \n<res", "", " \n<res"),
        (
            "cohere_command3",
            None,
            "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|>",
            "Hm.",
            "Yes.",
        ),
        ("cohere_command3", False, "<|START_RESPONSE|>Yes.<|END_RESPONSE|>", "", "Yes."),
        ("cohere_command4", True, "Hm.<|END_THINKING|><|START_TEXT|>Yes.<|END_TEXT|>", "Hm.", "Yes."),
        ("cohere_command4", True, "Hm.<|START_ACTION|>[]", "Hm.", "<|START_ACTION|>[]"),
        ("seed_oss", None, "<seed:think>Hm.</seed:think>Yes.", "Hm.", "Yes."),
        ("hunyuan_a13b", None, "<think>\nHm.\n</think>\n<answer>\nYes.\n</answer>", "Hm.", "Yes.\n"),
    ],
)
def test_reasoning(name: str, prompt_opened: bool | None, text: str, reasoning: str, content: str) -> None:
    events = parse(None, text, reasoning=name, prompt_opened=prompt_opened)
    parsed = collect(events)
    assert (parsed.reasoning, parsed.content, parsed.tool_calls) == (reasoning, content, [])
    assert parse(None, list(text), reasoning=name, prompt_opened=prompt_opened) == events
    for cut in range(1, len(text)):
        pieces = (text[:cut], text[cut:])
        assert parse(None, pieces, reasoning=name, prompt_opened=prompt_opened) == events, pieces


def test_tool_calls_are_not_looked_for_in_reasoning() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    parsed = collect(parse("hermes", f"<think>\nI might {call}.\n</think>\n\n{call}", reasoning="qwen3"))
    assert parsed.reasoning == f"I might {call}."
    assert parsed.content == ""
    assert [(tool_call.name, tool_call.complete) for tool_call in parsed.tool_calls] == [("f", True)]


def test_reasoning_is_streamed() -> None:
    parser = create_parser("qwen3", "hermes")
    assert not parser.is_reasoning
    assert parser.feed("<think>") == []
    assert parser.is_reasoning
    assert [len(parser.feed(piece)) for piece in ("Hm", ",", " well", "\n", ".", "</", "p", "</think", ">")] == [
        *(1, 1, 1, 0, 1),
        *(0, 1, 0, 0),
    ]
    assert not parser.is_reasoning
    assert len(parser.feed("\n\nYes")) == 1


def test_is_reasoning() -> None:
    assert create_parser("deepseek_r1").is_reasoning
    assert create_parser("qwen3", prompt_opened=True).is_reasoning
    assert not create_parser("deepseek_r1", prompt_opened=False).is_reasoning
    assert not create_parser(None, "hermes").is_reasoning


@pytest.mark.parametrize("name", REASONING_PARSERS)
def test_what_the_prompt_says(name: str) -> None:
    start, end = resolve_reasoning_parser(name).special_tokens[:2]
    assert prompt_opens_reasoning(name, f"<|User|>Hi {start}<|Assistant|>{start}\n") is True
    assert prompt_opens_reasoning(name, f"<|im_start|>assistant\n{start}\n\n{end}\n\n") is False
    assert prompt_opens_reasoning(name, f"<|im_start|>assistant\n{end}") is False
    assert prompt_opens_reasoning(name, f"{start}\nOkay,") is True
    assert prompt_opens_reasoning(name, f"{start}\nHm\n{end}\nYes, ") is False
    assert prompt_opens_reasoning(name, "Yes, ") is None
    assert is_last_turn_needed(name, f"What is {start}?<|im_end|>\n<|im_start|>assistant\n")
    assert is_last_turn_needed(name, f"<|im_start|>assistant\n{start}\nOkay,")
    assert not is_last_turn_needed(name, f"<|im_start|>assistant\n{start}\n")
    assert not is_last_turn_needed(name, "<|im_start|>assistant\n")


def test_names() -> None:
    for name in REASONING_PARSERS:
        resolve_reasoning_parser(name)
    with pytest.raises(ValueError, match="'none_such'.*deepseek_r1.*qwen3"):
        create_parser("none_such")
