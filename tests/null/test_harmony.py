"""The format of gpt-oss: messages with channels."""

from __future__ import annotations

import pytest

from api.parsers import collect
from tests.null.test_tool_parsers import check, parse

ANALYSIS = "<|channel|>analysis<|message|>Hm.<|end|>"
HARMONY_CALL = (
    '<|start|>assistant<|channel|>commentary to=functions.edit <|constrain|>json<|message|>{"path": "a"}<|call|>'
)


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        (f"{ANALYSIS}<|start|>assistant<|channel|>final<|message|>Yes.<|return|>", "Hm.", "Yes.", []),
        (f"{ANALYSIS}<|start|>assistant<|channel|>final<|message|>Yes.", "Hm.", "Yes.", []),
        ("<|channel|>final<|message|>Yes.", "", "Yes.", []),
        (f"{ANALYSIS}{HARMONY_CALL}", "Hm.", "", [("edit", '{"path": "a"}')]),
        (f"{ANALYSIS}{HARMONY_CALL}".removesuffix("<|call|>"), "Hm.", "", [("edit", '{"path": "a"}')]),
        (" to=functions.get_time<|channel|>commentary json<|message|>{}", "", "", [("get_time", "{}")]),
        ('<|channel|>analysis to=python code<|message|>{"code": 1}<|call|>', "", "", [("python", '{"code": 1}')]),
        (
            f"{ANALYSIS}<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>{HARMONY_CALL}"
            "<|start|>assistant<|channel|>analysis<|message|> So.<|end|>",
            "Hm. So.",
            "I look.",
            [("edit", '{"path": "a"}')],
        ),
        ("<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>Yes.", "Hm.", "Yes.", []),
        ("<|channel|>analysis<|message|>Hm", "Hm", "", []),
        ("Yes, <|message|> is a mark.", "", "Yes, <|message|> is a mark.", []),
        ("<|channel|>commentary to=functions.edit<|message|>no object", "", None, []),
        ("<|channel|>" + 600 * "x" + "<|message|>Yes.", "", None, []),
    ],
)
def test_harmony(text: str, reasoning: str, content: str | None, calls: list[tuple[str, str]]) -> None:
    expected = parse("harmony", text, reasoning="harmony")
    parsed = collect(expected)
    assert parsed.reasoning == reasoning
    assert content is None or parsed.content == content
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == calls
    assert all(call.complete for call in parsed.tool_calls)
    assert parse("harmony", list(text), reasoning="harmony") == expected
    for cut in range(len(text)):
        assert parse("harmony", [text[:cut], text[cut:]], reasoning="harmony") == expected


def test_harmony_without_a_reasoning_parser() -> None:
    final = f"{ANALYSIS}<|start|>assistant<|channel|>final<|message|>Yes.<|return|>"
    check("harmony", final, f"{ANALYSIS}Yes.")
    check("harmony", HARMONY_CALL + HARMONY_CALL, ("edit", {"path": "a"}), ("edit", {"path": "a"}))
