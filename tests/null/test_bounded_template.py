"""What templates may cost: little where others wait for it, and limits in the helper process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from api.model.bounded_template import BeyondBoundsError
from api.model.chat_template import ChatTemplate, TemplateError
from api.model.template_renderer import TemplateRenderer

USER = [{"role": "user", "content": "hi"}]


def repeated(body: str, start: str = "'a'", times: int = 60) -> str:
    """A template that applies something to ``ns.x`` many times."""
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range({times}) %}}{body}{{% endfor %}}"
        "{{ ns.x }}{{ ns.x|tojson }}"
    )


CHANGING = {
    "doubled by +": "{% set ns.x = ns.x + ns.x %}",
    "doubled by ~": "{% set ns.x = ns.x ~ ns.x %}",
    "doubled by *": "{% set ns.x = ns.x * 2 %}",
    "replaced": "{% set ns.x = ns.x|replace('a', 'aa') %}",
    "replaced by a method": "{% set ns.x = ns.x.replace('a', 'aa') %}",
    "joined": "{% set ns.x = (ns.x ~ 'b')|join(ns.x) %}",
    "joined by a method": "{% set ns.x = (ns.x ~ 'b').join(ns.x ~ 'c') %}",
    "listed": "{% set ns.x = [ns.x, ns.x] %}",
    "a dictionary": "{% set ns.x = dict(a=ns.x, b=ns.x) %}",
    "a literal": "{% set ns.x = {'a': ns.x, 'b': ns.x} %}",
}
HOSTILE = {
    "center": "{{ 'a'|center(3000000000) }}",
    "center mapped": "{{ ['a']|map('center', 3000000000)|list }}",
    "ljust": "{{ 'a'.ljust(3000000000) }}",
    "zfill": "{{ '1'.zfill(3000000000) }}",
    "percent": "{{ '%2900000000d' % 1 }}",
    "percent filter": "{{ '%2900000000d'|format(1) }}",
    "format": "{{ '{:2900000000d}'.format(1) }}",
    "nested ranges": "{% for i in range(3000)|list %}{% for j in range(3000)|list %}{% for k in range(3000)|list %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "nested list": "{% set l = range(3000)|list %}{% for i in l %}{% for j in l %}{% for k in l %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "caller": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 16
    + "x" * 100
    + "{% endcall %}" * 16,
    "block": "{% block a %}x{{ self.a() }}{{ self.a() }}{% endblock %}",
    "indented JSON": "{{ [1]|tojson(indent=1000000000) }}",
    "separated JSON": "{{ [1, 2, 3]|tojson(separators=('x' * 100, 'y')) }}",
    "slice": "{{ [1]|slice(1000000000)|list }}",
    "batch": "{{ [1]|batch(1000000000, 1)|list }}",
    "indent": "{{ 'a\nb'|indent(1000000000) }}",
    "wordwrap": "{{ 'a b'|wordwrap(1, true, 'x' * 100000) }}",
    "captured": "{% set x %}aaaaaaaaaaaaaaaaa{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40 + "{{ x }}",
    "recursive loop": "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "squared": repeated("{% set ns.x = ns.x * ns.x %}", "99999", 20),
    **{name: repeated(body) for name, body in CHANGING.items()},
}
ORDINARY = [
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role']|upper + '] ' ~ m['content']|trim }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + loop.index0 * 2 %}{% endfor %}"
    "{{ ns.n }} {{ messages|length }} {{ messages|selectattr('role', 'equalto', 'user')|list|length }}",
    "{% macro show(m, by=', ') %}{{ m|join(by) }}|{{ m.items()|list }}{% endmacro %}{{ show(messages[0]) }}",
    "{{ tools|tojson }}{{ tools|tojson(indent=2) }}{{ messages|map(attribute='content')|join('+') }}",
    "{% set text %}{% for m in messages %}{{ m.content.split('a') }}{% endfor %}{% endset %}"
    "{{ text|replace('b', 'cc') }}",
    "{{ messages[0].content.replace('a', 'bb').strip().upper() }}{{ messages[0] }}{{ (1, 2.5, none, true) }}",
    "{% for k, v in tools[0].items() if k != 'x' %}{{ k }}={{ v|string }};{{ loop.last }}{% endfor %}{{ 7 % 4 }}",
    "{% for i in range(3) %}{{ i }}{% if i == 1 %}{% break %}{% endif %}{% else %}none{% endfor %}{{ missing }}",
    "{%- for m in messages -%}{%- generation -%}{{ m.content | indent(2) }}{%- endgeneration -%}{%- endfor -%}",
    "{{ raise_exception('no ' ~ messages[0].role) }}",
    "{{ messages[0].content[1:3] }}{{ [messages[0].role, 'x'] + ['y'] }}{{ 'n' in messages[0].content }}{{ 2 ** 5 }}",
]


@pytest.fixture
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    renderer.close()


def result(template: ChatTemplate) -> str:
    chat = [{"role": "user", "content": " banana "}, {"role": "assistant", "content": "a\nb"}]
    try:
        return template.render(chat, tools=[{"name": "t", "x": 1, "deep": {"list": [1, "two"]}}])
    except TemplateError as error:
        return f"error: {error}"


@pytest.mark.parametrize("source", ORDINARY)
def test_bounds_change_no_text(source: str) -> None:
    tokens = {"bos_token": "<s>"}
    assert result(ChatTemplate(source, tokens, is_bounded=True)) == result(ChatTemplate(source, tokens))


@pytest.mark.parametrize("name", HOSTILE)
def test_what_costs_much_is_not_rendered_where_others_wait(name: str) -> None:
    template = ChatTemplate(HOSTILE[name], is_bounded=True)
    with pytest.raises(BeyondBoundsError):
        template.render(USER)


async def test_hostile_templates_end_and_the_loop_goes_on(renderer: TemplateRenderer) -> None:
    names = ["center", "nested list", "indented JSON", "listed"]
    with ThreadPoolExecutor(1) as threads:

        async def render(source: ChatTemplate | str, **options: Any) -> str:
            return await renderer.render(
                source, USER, "auto", {}, options, is_short=True, special_tokens={}, threads=threads
            )

        ticks = 0

        async def count() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.01)

        counter = asyncio.create_task(count())
        for name in names:
            source = HOSTILE[name]
            for template in (source, ChatTemplate(source, is_bounded=True)) if name == "center" else (source,):
                with pytest.raises(TemplateError, match=r"MiB of memory|CPU time|large|exceeds"):
                    await render(template)
        counter.cancel()
        assert ticks > 20
        assert await render("{{ messages[0].content ~ x }}", x=" é") == "hi é"
        with pytest.raises(TemplateError, match="lone surrogate"):
            await render("{{ x }}", x="\ud800")
        with pytest.raises(TemplateError, match="line 1"):
            await render("{% if %}")


async def test_long_conversations_are_rendered_in_the_helper(renderer: TemplateRenderer) -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content|upper }}{% endfor %}{{ bos_token }}", {"bos_token": "<s>"}
    )
    chat = [{"role": "user", "content": "long " * 100_000}]
    with ThreadPoolExecutor(1) as threads:
        text = await renderer.render(
            template, chat, "auto", {}, {}, is_short=False, special_tokens={"bos_token": "<s>"}, threads=threads
        )
    assert text == "LONG " * 100_000 + "<s>"
    bounded = ChatTemplate(template.source, template.special_tokens, is_bounded=True)
    assert renderer.render_blocking(bounded, chat, {}, {}) == text
