"""What templates do with a conversation, and conversations in the form that they want."""

from __future__ import annotations

from typing import Any

import pytest

from api.model.chat_template import ChatTemplate
from api.model.history import normalize_messages
from api.model.template_renderer import render_inline
from api.model.template_uses import TemplateUses
from tests.null.test_chat_template import CHATML, PARTS, TEXT_OR_PARTS, TRIMMING, USER

STRING = TemplateUses()
OPENAI = TemplateUses(content_format="openai", tool_content_format="openai")
TEXT_ARGUMENTS = TemplateUses(arguments_format="text")

CALLS = "{% for m in messages %}{% for c in m.tool_calls %}BODY{% endfor %}{% endfor %}"
DEEPSEEK = (
    "{% for message in messages %}{% if message['role'] == 'assistant' and message['tool_calls'] is defined %}"
    "{%- for tool in message['tool_calls'] %}{{ '<call>' + tool['type'] + '<sep>' + tool['function']['name'] "
    "+ '\\n```json\\n' + tool['function']['arguments'] + '\\n```<end>' }}{% endfor %}"
    "{% elif message['role'] == 'tool' %}{{ '<out>' + message['content'] + '<end>' }}"
    "{% else %}{{ '<' + message['role'] + '>' + message['content'] }}{% endif %}{% endfor %}"
)


def uses_of(source: str) -> TemplateUses:
    return ChatTemplate(source).uses(has_tools=False)


def render(source: str, *messages: dict[str, Any]) -> str:
    return render_inline(ChatTemplate(source), messages, "auto", {"add_generation_prompt": False}, {})


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}


def arguments_of(messages: list[dict[str, Any]]) -> Any:
    return messages[0]["tool_calls"][0]["function"]["arguments"]


# What templates do


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, "string"),
        (TRIMMING, "string"),
        (PARTS, "openai"),
        (TEXT_OR_PARTS, "openai"),
        (
            "{% for m in messages %}{% set c = m.content %}{% for p in c | list %}{{ p }}{% endfor %}{% endfor %}",
            "openai",
        ),
        (
            "{% for m in messages %}{% set c = m.content if m.content else [] %}{% for p in c %}{% endfor %}"
            "{% endfor %}",
            "openai",
        ),
        (
            "{% macro show(c) %}{% for p in c %}{{ p }}{% endfor %}{% endmacro %}{{ show(messages[0].content) }}",
            "openai",
        ),
        ("{% for line in messages[0].content.split('x') %}{{ line }}{% endfor %}", "string"),
        ("{% for m in messages[1:] %}{% for call in m.tool_calls %}{{ call }}{% endfor %}{% endfor %}", "string"),
    ],
)
def test_content_format(source: str, expected: str) -> None:
    assert uses_of(source).content_format == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("{{ c.function.arguments | tojson }}", "object"),
        ("{{ '{' + c['function']['arguments'] | tojson + '}' }}", "object"),
        ("{% for k, v in c.function.arguments.items() %}{{ k }}{% endfor %}", "object"),
        ("{% for k, v in c.function.arguments | items %}{{ k }}{% endfor %}", "object"),
        ("{% for k in c.arguments %}{{ k ~ c.arguments[k] }}{% endfor %}", "object"),
        ("{{ c.function.arguments.city }}", "object"),
        ("{% set a = c.arguments %}{% if a is mapping %}{{ a | tojson }}{% else %}{{ a }}{% endif %}", "object"),
        ("{% if c.arguments is string %}{{ c.arguments }}{% else %}{{ c.arguments | tojson }}{% endif %}", "object"),
        ("{{ c | tojson }}", "object"),
        ("{{ c.function }}", "object"),
        ("{% if c.arguments is defined %}{{ c.name }}{% endif %}", "object"),
        ("{{ '<' + c['function']['arguments'] + '>' }}", "text"),
        ("{{ '<' ~ c.function.arguments ~ '>' }}", "text"),
        ("{{ c.function.arguments }}", "text"),
        ("{{- c.function.arguments | trim -}}", "text"),
        ("{{ c.arguments.strip() }}", "text"),
        ("{{ (c.arguments or '{}') + '>' }}", "text"),
        ("{% set a = c.function %}{% set b = a.arguments | default('') %}{{ '<' + b }}", "text"),
        ("{% set ns = namespace() %}{% set ns.a = c.arguments %}{{ ns.a + '>' }}", "text"),
        ("{% macro show(a) %}{{ a }}{% endmacro %}{{ show(c.arguments) }}", "text"),
        ("{% macro show(n, a) %}{{ a | tojson }}{% endmacro %}{{ show(c.name, a=c.arguments) }}", "object"),
    ],
)
def test_arguments_format(body: str, expected: str) -> None:
    assert uses_of(CALLS.replace("BODY", body)).arguments_format == expected


@pytest.mark.parametrize(
    ("branch", "expected"),
    [
        ("{{ m.content + '!' }}", "string"),
        ("{{ '<' ~ m['content'] | string }}", "string"),
        ("{% set c = m.content | trim %}{{ c }}", "string"),
        ("{% for p in m.content %}{{ p.text }}{% endfor %}", "openai"),
        ("{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].output }}{% endif %}", "string"),
        ("{{ show(m.content) }}", "openai"),
    ],
)
@pytest.mark.parametrize("test", ["m.role == 'tool'", "m['role'] in ['tool', 'ipython']", "x or 'tool' == m.role"])
def test_results_of_calls_have_a_format_of_their_own(test: str, branch: str, expected: str) -> None:
    source = (
        "{% macro show(c) %}{% for p in c %}{{ p.text }}{% endfor %}{% endmacro %}"
        f"{{% for m in messages %}}{{% if {test} %}}{branch}{{% else %}}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    uses = uses_of(source)
    assert (uses.content_format, uses.tool_content_format) == ("openai", expected)


def test_a_result_is_a_text_where_it_is_printed() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ '<' + m.content + '>' }}{% else %}"
        "{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}"
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for result in (parts, "a\nb"):
        assert render(source, {"role": "user", "content": parts}, {"role": "tool", "content": result}) == "[a][b]<a\nb>"


def test_a_result_is_a_text_where_the_template_takes_both() -> None:
    """GLM's templates take results in parts, but not parts of text."""
    source = (
        "{% macro show(c) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}[{{ p.text }}]{% endfor %}{% endif %}"
        "{% endmacro %}{% for m in messages %}{% if m.role == 'tool' %}{% if m.content is string %}<{{ m.content }}>"
        "{% else %}{% for r in m.content %}<{{ r.output if r.output is defined else r }}>{% endfor %}{% endif %}"
        "{% else %}{{ show(m.content) }}{% endif %}{% endfor %}"
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render(source, {"role": "user", "content": parts}, {"role": "tool", "content": parts}) == "[a][b]<a\nb>"


def test_roles_and_errors_that_a_template_knows() -> None:
    assert uses_of("{% if messages[0].role in ['system', 'developer'] %}{% endif %}").knows_developer
    assert uses_of("{% if messages[0]['role'] == 'developer' %}{% endif %}").knows_developer
    assert not uses_of("You talk to a developer.{{ messages[0].role }}").knows_developer
    assert uses_of("{{ messages[0].is_error }}").reads_is_error
    assert uses_of("{{ messages[0]['is_error'] }}").reads_is_error
    assert not uses_of("{{ messages[0] | tojson }}").reads_is_error


def test_each_named_template_has_its_own_uses() -> None:
    text, value = (CALLS.replace("BODY", body) for body in ("{{ c.arguments }}", "{{ c.arguments | tojson }}"))
    template = ChatTemplate({"default": value, "tool_use": text})
    assert template.uses(has_tools=False).arguments_format == "object"
    assert template.uses(has_tools=True).arguments_format == "text"


# Conversations


def test_normalize_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}, {"text": "d"}]
    message = {"role": "user", "content": parts, "name": None}
    assert normalize_messages([message], STRING) == [{"role": "user", "content": "a\nb\nc\nd"}]
    assert normalize_messages([message], OPENAI) == [
        {"role": "user", "content": [{"type": "text", "text": text} for text in "abcd"]}
    ]
    for uses in (STRING, OPENAI):
        assert normalize_messages(USER, uses) == USER
        assert normalize_messages([{"role": "user", "content": None}], uses) == [{"role": "user"}]
        for silent in ({"role": "assistant", "content": None}, {"role": "assistant"}):
            assert normalize_messages([silent], uses) == [{"role": "assistant", "content": ""}]
    assert normalize_messages([{"role": "user", "content": []}], STRING) == [{"role": "user", "content": ""}]


def test_normalize_tool_arguments() -> None:
    assert arguments_of(normalize_messages([call('{"x": 1}')], STRING)) == {"x": 1}
    assert arguments_of(normalize_messages([call("")], STRING)) == {}
    assert arguments_of(normalize_messages([call({"x": 1})], STRING)) == {"x": 1}
    for text in ('{"x": ', "[1]", "3"):
        assert arguments_of(normalize_messages([call(text)], STRING)) == text
    original = call('{"x": 1}')
    normalize_messages([original], STRING)
    assert arguments_of([original]) == '{"x": 1}'


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ({"content": "x"}, "messages[1] must be"),
        ("text", "messages[1] must be"),
        ({"role": "user", "content": 5}, "messages[1].content must be"),
        (
            {"role": "user", "content": ["a", {"type": "image_url", "image_url": {}}]},
            "messages[1].content[1]: .*image_url",
        ),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[1].content[0]: .*input_audio"),
        ({"role": "user", "content": [{"type": ["x"]}]}, "messages[1].content[0]: "),
        ({"role": "user", "content": [5]}, "messages[1].content[0] must be"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "messages[1].content[0].text must be"),
        ({"role": "assistant", "tool_calls": {}}, "messages[1].tool_calls must be"),
        ({"role": "assistant", "tool_calls": ["x"]}, "messages[1].tool_calls[0] must be"),
    ],
)
def test_malformed_messages_are_named(message: Any, place: str) -> None:
    with pytest.raises(ValueError, match=place.replace("[", r"\[").replace("]", r"\]")):
        normalize_messages([*USER, message], STRING)


# History


def test_text_of_arguments_is_the_clients_own() -> None:
    for text in ('{"x":1,  "é":"\\u00e9"}', '{"x": ', "[1]"):
        assert arguments_of(normalize_messages([call(text)], TEXT_ARGUMENTS)) == text
        assert render(DEEPSEEK, call(text)) == f"<call>function<sep>f\n```json\n{text}\n```<end>"
    nothings: tuple[Any, ...] = ("", None, {})
    for nothing in nothings:
        assert arguments_of(normalize_messages([call(nothing)], TEXT_ARGUMENTS)) == "{}"
        assert arguments_of(normalize_messages([call(nothing)], STRING)) == {}
    assert arguments_of(normalize_messages([call({"é": [1, None]})], TEXT_ARGUMENTS)) == '{"é": [1, null]}'


def test_no_calls_are_left_out() -> None:
    message = {"role": "assistant", "content": "a", "tool_calls": []}
    assert normalize_messages([message], STRING) == [{"role": "assistant", "content": "a"}]
    source = "{% for m in messages %}{{ 'calls' if m.tool_calls is defined else m.content }}{% endfor %}"
    assert render(source, message) == "a"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("no such file", "Error: no such file"),
        ("Error: no such file", "Error: no such file"),
        ("\nerror 5", "\nerror 5"),
        ("", "Error"),
        (None, "Error"),
        ([], "Error"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "Error: a\nb"),
    ],
)
def test_a_failed_call_is_told_in_words(content: Any, expected: str) -> None:
    message = {"role": "tool", "content": content, "is_error": True}
    assert normalize_messages([message], STRING) == [{"role": "tool", "content": expected}]
    in_parts = normalize_messages([message], OPENAI)[0]["content"]
    assert in_parts == expected or "\n".join(part["text"] for part in in_parts) == expected
    reading = TemplateUses(reads_is_error=True)
    assert normalize_messages([{**message, "content": "x"}], reading) == [{**message, "content": "x"}]
    assert normalize_messages([{**message, "content": "x", "is_error": False}], STRING)[0]["content"] == "x"


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("roles", "unknown", "known"),
    [
        ("Du", "S=D u", "D u"),
        ("DSu", "S=D\n\nS u", "D S u"),
        ("SDu", "S=S\n\nD u", "S D u"),
        ("SSDu", "S=S\n\nS\n\nD u", "S=S\n\nS D u"),
        ("uDu", "u S=D u", "u D u"),
        ("SuSSu", "S u S S u", "S u S S u"),
        ("SuDSu", "S u S=D S u", "S u D S u"),
    ],
)
def test_developers(roles: str, unknown: str, known: str) -> None:
    """One letter a message. ``S=D``: a message of the system with the developer's text."""
    names = {"S": "system", "D": "developer", "u": "user"}
    messages = [said(names[role], role) for role in roles]
    for uses, expected in ((STRING, unknown), (TemplateUses(knows_developer=True), known)):
        pairs = [item.partition("=") for item in expected.split(" ")]
        assert normalize_messages(messages, uses) == [said(names[role], text or role) for role, _, text in pairs]


def test_systems_in_parts_become_one() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [said("system", parts), said("developer", "c"), said("system", []), said("system", parts), *USER]
    (system, user) = normalize_messages(messages, OPENAI)
    assert [part["text"] for part in system["content"]] == ["a", "b", "\n\nc", "\n\na", "b"]
    assert user == USER[0]
    assert normalize_messages(messages, STRING)[0] == said("system", "a\nb\n\nc\n\na\nb")
    assert normalize_messages([{"role": "system"}, {"role": "developer"}], STRING) == [said("system", "")]


@pytest.mark.parametrize("source", [CHATML, TRIMMING])
def test_a_template_of_one_system_hears_all_instructions(source: str) -> None:
    only_first = "{% if messages[1].role == 'system' %}{{ raise_exception('only one') }}{% endif %}"
    text = render(only_first + source, said("system", "A"), said("developer", "B"), *USER)
    assert "A\n\nB" in text and "developer" not in text


# The older form of calls


def test_function_calls_become_tool_calls() -> None:
    conversation: list[dict[str, Any]] = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "f", "content": "r"},
    ]
    _, asked, told = normalize_messages(conversation, STRING)
    (called,) = asked["tool_calls"]
    assert "function_call" not in asked and called["type"] == "function"
    assert called["function"] == {"name": "f", "arguments": {"a": 1}}
    assert told == {"role": "tool", "name": "f", "content": "r", "tool_call_id": called["id"]}
    assert len(called["id"]) == 9 and called["id"].isalnum()


def test_tool_calls_win_over_a_function_call() -> None:
    both = call({"a": 1}) | {"function_call": {"name": "g", "arguments": "{}"}}
    assert normalize_messages([both], STRING) == normalize_messages([call({"a": 1})], STRING)


def test_the_result_of_no_function() -> None:
    with pytest.raises(ValueError, match=r"messages\[0\] has the role 'function'"):
        normalize_messages([{"role": "function", "name": "f", "content": "r"}], STRING)


FIRST_CALL = (
    "{% for m in messages %}{% if m.tool_calls %}{{ m.thinking }}<{{ m.content }}"
    "{% set call = m.tool_calls[0].function %}{{ call.name ~ ' ' ~ call.arguments | tojson }}>"
    "{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("ids", "order"),
    [(["1", "2", "3"], "abc"), (["3", "1", "2"], "bca"), ([None, None, None], "abc"), (["x", "2", "y"], "abc")],
)
def test_a_template_of_one_call_sees_all(ids: list[str | None], order: str) -> None:
    """The others would be lost, and their results be taken for those of the first."""
    calls = [{"id": str(n), "function": {"name": f"f{n}", "arguments": f'{{"n": {n}}}'}} for n in (1, 2, 3)]
    results = [{"role": "tool", "tool_call_id": each, "content": text} for each, text in zip(ids, "abc", strict=True)]
    asks = {"role": "assistant", "content": "!", "thinking": "hm", "tool_calls": calls}
    first, second, third = (f"[{each}]" for each in order)
    expected = f'[hi]hm<!f1 {{"n": 1}}>{first}<f2 {{"n": 2}}>{second}<f3 {{"n": 3}}>{third}[so]'
    before, after = ({"role": "user", "content": text} for text in ("hi", "so"))
    assert render(FIRST_CALL, before, asks, *results, after) == expected
    assert uses_of(FIRST_CALL).has_one_call
    assert uses_of("{{ m.tool_calls[0].id if m.tool_calls | length == 1 }}").has_one_call


@pytest.mark.parametrize(
    "rest",
    [
        "{% for c in m.tool_calls %}{{ c }}{% endfor %}",
        "{% for c in m.tool_calls[1:] %}{{ c }}{% endfor %}",
        "{% for i in range(m.tool_calls | length) %}{{ m.tool_calls[i].id }}{% endfor %}",
        "{{ m.tool_calls | tojson }}",
        "{{ m.tool_calls | map(attribute='function') | list }}",
        "{% set calls = m.tool_calls %}{{ calls }}",
        "{{ m.tool_calls[1].id }}",
    ],
)
def test_a_template_that_also_reads_the_first_call(rest: str) -> None:
    """It writes the others, too, and sees the message as it is."""
    assert not uses_of("{% if m.tool_calls[0].id %}" + rest + "{% endif %}").has_one_call
