"""Chat templates: rendering, limits of the sandbox, and messages in the form that templates expect."""

from __future__ import annotations

import json
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import pytest

from api.model.chat_template import (
    ChatTemplate,
    TemplateError,
    load_chat_template,
)
from tests.work import count_calls

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMING = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
PARTS = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }};{% endif %}{% endfor %}{% endfor %}"
)
TEXT_OR_PARTS = (
    "{% for message in messages %}{% if message.content is string %}T:{{ message.content }}"
    "{% else %}{% for part in message.content %}P:{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)
USER = [{"role": "user", "content": "Hi"}]


def render(source: str, messages: Any = USER, **kwargs: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages, **kwargs)


def test_chatml() -> None:
    assert render(CHATML) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"


def test_special_tokens_and_further_variables() -> None:
    source = "{{ bos_token }}{{ enable_thinking }}{{ messages[0].content }}{{ eos_token }}"
    assert render(source, enable_thinking=False) == "<s>FalseHi</s>"
    assert render(source, bos_token="<b>", enable_thinking=1) == "<b>1Hi</s>"
    # Variables whose names mean something to Python or to the renderer.
    template = ChatTemplate("{{ other }}{{ messages | length }}")
    assert template.render(USER, self=1, messages=[], other=2) == "21"


def test_lines_of_blocks_are_trimmed() -> None:
    source = "{% if true %}\n    {% for i in range(2) %}\n    {{ i }}\n    {% endfor %}\n{% endif %}\n"
    assert render(source) == "    0\n    1\n"


def test_tojson_keeps_order_and_characters() -> None:
    tool = {"type": "function", "function": {"name": "f", "z": "é<>&'", "a": [1, 2.5, None, True]}}
    assert render("{% for t in tools %}{{ t | tojson }}{% endfor %}", tools=[tool]) == json.dumps(
        tool, ensure_ascii=False
    )
    assert render("{{ tools | tojson(indent=2) }}", tools=[tool]) == json.dumps([tool], ensure_ascii=False, indent=2)


class FixedTime(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> FixedTime:
        return cls(2031, 2, 3, 4, 5)


def test_what_templates_of_transformers_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.model.chat_template.datetime", FixedTime)
    assert render("{{ strftime_now('%d %b %Y, %H:%M') }}") == "03 Feb 2031, 04:05"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% generation %}{% set x = 1 %}a{{ x }}{% endgeneration %}b{{ x is defined }}") == "a1bFalse"
    assert render("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = 5 %}{% endfor %}{{ ns.n }}") == "5"
    with pytest.raises(TemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_no_tools_are_none() -> None:
    source = "{{ tools is none }}{{ documents is none }}"
    assert render(source) == render(source, tools=[], documents=[]) == "TrueTrue"
    assert render(source, tools=[{"a": 1}], documents=[{"text": "x"}]) == "FalseFalse"


def test_named_templates() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools", "rag": "rag"})
    assert template.render(USER) == "plain"
    assert template.render(USER, tools=[{"type": "function"}]) == "tools"
    assert ChatTemplate({"other": "only"}).render(USER) == "only"
    with pytest.raises(TemplateError, match=r"\['a', 'b'\]"):
        ChatTemplate({"a": "1", "b": "2"}).render(USER)
    with pytest.raises(TemplateError):
        ChatTemplate({})


def test_text_before_a_call_joins_the_reasoning_where_a_template_takes_one_of_them() -> None:
    """As gpt-oss's template, which writes either as analysis."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    message = {"role": "assistant", "reasoning": "why", "content": "I look.", "tool_calls": [call]}
    source = (
        "{% for m in messages %}{% if m.content and m.thinking %}"
        "{{ raise_exception('Cannot pass both content and thinking in an assistant message with tool calls!') }}"
        "{% endif %}{{ m.thinking }}|{{ m.content }}|{{ m.tool_calls[0].function.arguments | tojson }}{% endfor %}"
    )
    assert ChatTemplate(source).render([message]) == 'why\n\nI look.||{"a": 1}'
    other = source.replace("Cannot pass both content and thinking", "No")
    with pytest.raises(TemplateError, match="No in an assistant message"):
        ChatTemplate(other).render([message])


def test_empty_fields_are_left_out_and_reasoning_has_its_names() -> None:
    message = {"role": "assistant", "content": None, "name": None, "reasoning": "why"}
    source = (
        "{% set m = messages[0] %}{{ messages[1].content is defined }}{{ m.name is defined }}"
        "{{ m.reasoning_content }}{{ m.thinking }}"
    )
    assert render(source, [message, {"role": "user", "content": None}]) == "FalseFalsewhywhy"
    assert message == {"role": "assistant", "content": None, "name": None, "reasoning": "why"}


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        (CHATML, "The answer is", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nThe answer is"),
        (CHATML, "trailing  ", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\ntrailing  "),
        (TRIMMING, "trailing  ", "[user] Hi\n[assistant] trailing"),
        (TRIMMING, "none", "[user] Hi\n[assistant] none"),
        (PARTS, [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "Hi;a;b"),
    ],
)
def test_continue_final_message(source: str, content: Any, expected: str) -> None:
    messages = [*USER, {"role": "assistant", "content": content}]
    text = render(source, messages, add_generation_prompt=False, continue_final_message=True)
    assert text == expected
    assert messages[1]["content"] == content


def test_continue_final_message_refusals() -> None:
    with pytest.raises(TemplateError, match="cannot both be true"):
        render(CHATML, continue_final_message=True)
    with pytest.raises(TemplateError, match="no text to continue"):
        render(CHATML, [{"role": "assistant"}], add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(TemplateError, match="drops the last message"):
        render("nothing", add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ range(10 ** 9) }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ [0] * 10 ** 10 }}",
        "{{ 10 ** 100000 }}",
        "{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{% set ns = namespace(_x=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ lipsum(n=10000) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].nothing.more }}",
        "{{ messages[0] + 1 }}",
        "{{ undefined_value | tojson }}",
    ],
)
def test_hostile_and_broken_templates(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        count_calls(lambda: render(source), most=1_000_000)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ 'a }}",
        "{% unknown %}",
        "{{" + "(" * 5000 + "}}",
        "{{ x" + "|trim" * 5000 + "}}",
        "{% include 'x' %",
    ],
)
def test_templates_that_are_no_jinja(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source)


def test_a_template_sees_json_values_only() -> None:
    with pytest.raises(TemplateError, match="must be JSON values, not bytes"):
        render(CHATML, [{"role": "user", "content": b"x"}])
    with pytest.raises(TemplateError, match="messages must be objects"):
        render(CHATML, ["text"])
    with pytest.raises(TemplateError, match="messages must not be empty"):
        render(CHATML, [])


def test_text_is_wrapped_for_templates_that_only_know_parts() -> None:
    assert render(PARTS) == "Hi;"
    assert render(TEXT_OR_PARTS) == "T:Hi"
    assert render(TEXT_OR_PARTS, [{"role": "user", "content": [{"type": "text", "text": "x"}]}]) == "P:x"


# --chat-template


def test_load_chat_template(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(CHATML, encoding="utf-8")
    assert load_chat_template(str(file)) == CHATML
    assert load_chat_template(CHATML) == CHATML
    saved = tmp_path / "chat_template.json"
    saved.write_text(json.dumps({"chat_template": CHATML}), encoding="utf-8")
    assert load_chat_template(str(saved)) == CHATML
    saved.write_text("[]", encoding="utf-8")
    for argument in (str(tmp_path / "missing.jinja"), str(tmp_path), str(saved), "just text", "a\0b", "x" * 5000):
        with pytest.raises(ValueError, match="chat"):
            load_chat_template(argument)
