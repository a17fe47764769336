"""Constraints that begin after the thought, over every route: what the engine is told, and what the client reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.config import ServerConfig, StructuredOutputsConfig
from engine_core.messages import Thought
from tests.fakes import CHAT_TEMPLATE, VOCAB_SIZE, FakeServer, says, tiny_tokenizer, tokens_of
from tests.routes import CHATS, Reply, ask
from tests.unit.conftest import Api

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOLS: list[Any] = [{"name": "f", "parameters": SCHEMA}]
TAGS = ("<think>", "</think>")
START, END = (tuple(tiny_tokenizer(*TAGS).encode(tag, False)) for tag in TAGS)
OPEN = Thought(b"</think>", END, START, is_open=True)
FREE = Thought(b"</think>", END, START)
HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n"
TURNS = CHAT_TEMPLATE.partition("{% if")[0]
OPENS = CHAT_TEMPLATE + "<think>\n"
FIELDS: dict[str, list[dict[str, Any]]] = {
    "chat": [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": SCHEMA},
    ],
    "responses": [{"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}],
    "messages": [
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        {"output_format": {"type": "json_schema", "schema": SCHEMA}},
    ],
}
EVERYWHERE = pytest.mark.parametrize(
    ("route", "stream", "parser"),
    [(route, stream, parser) for route in CHATS for stream in (False, True) for parser in ("qwen3", "deepseek_r1")],
)


def thinker(text: str, template: str = OPENS, parser: str = "qwen3", **config: Any) -> Api:
    server = FakeServer(
        ServerConfig(reasoning_parser=parser, **config),
        script=says(text),
        chat_template=template,
        tokenizer=tiny_tokenizer(*TAGS),
        vocab_size=VOCAB_SIZE + len(TAGS),
    )
    return Api(server)


def thought_of(api: Api) -> Thought | None:
    """What the engine was told of the last request's thought."""
    grammar = api.server.engine.submitted[-1].grammar
    assert grammar is not None
    return grammar.thought


@EVERYWHERE
async def test_the_thought_comes_first(route: str, stream: bool, parser: str) -> None:
    for fields in FIELDS[route]:
        for template, text, thought in (
            (OPENS, 'Hm.</think>\n\n{"a": 1}', OPEN),
            (CHAT_TEMPLATE, '<think>Hm.</think>{"a": 1}', FREE),
        ):
            api = thinker(text, template, parser)
            reply = await ask(api, route, "hi", stream=stream, **fields)
            assert reply == Reply('{"a": 1}', "Hm.", [], "stop")
            assert thought_of(api) == thought


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_of_gpt_oss_comes_in_the_channel_for_it(stream: bool) -> None:
    marks = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
    tokenizer = tiny_tokenizer(*marks)
    text = '<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>{"a": 1}'
    server = FakeServer(
        ServerConfig(reasoning_parser="harmony"),
        script=says(text),
        chat_template=CHAT_TEMPLATE,
        tokenizer=tokenizer,
        vocab_size=VOCAB_SIZE + len(marks),
    )
    api = Api(server)
    reply = await ask(api, "chat", "hi", stream=stream, max_tokens=100, **FIELDS["chat"][0])
    assert reply == Reply('{"a": 1}', "Hm.", [], "stop")
    start, end = (tuple(tokenizer.encode(f"<|channel|>{name}<|message|>", False)) for name in ("analysis", "final"))
    assert thought_of(api) == Thought(b"<|channel|>final<|message|>", end, start)


@EVERYWHERE
async def test_an_answer_may_begin_at_once_unless_the_prompt_has_begun_a_thought(
    route: str, stream: bool, parser: str
) -> None:
    for template, thought in ((CHAT_TEMPLATE, FREE), (CHAT_TEMPLATE + "<think>\n\n</think>\n\n", None)):
        api = thinker('{"a": 1}', template, parser)
        assert await ask(api, route, "hi", stream=stream, **FIELDS[route][0]) == Reply('{"a": 1}', finish="stop")
        assert thought_of(api) == thought


@EVERYWHERE
async def test_forced_calls_come_after_the_thought(route: str, stream: bool, parser: str) -> None:
    choice: Any = {"type": "any"} if route == "messages" else "required"
    api = thinker('I call f.</think>[{"name": "f", "parameters": {"a": 1}}]', OPENS, parser)
    reply = await ask(api, route, "hi", stream=stream, tools=TOOLS, tool_choice=choice, max_tokens=100)
    assert reply.reasoning == "I call f." and not reply.text
    assert [(name, json.loads(arguments)) for name, arguments in reply.calls] == [("f", {"a": 1})]
    assert thought_of(api) == OPEN


@pytest.mark.parametrize("parser", ["qwen3", "deepseek_r1"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TURNS + HEADER + "<think>\nOkay,{% endif %}", True),
        (CHAT_TEMPLATE + "<think>\nOkay,", True),
        (TURNS + HEADER + "<think>\nOkay.</think>So{% endif %}", False),
        (CHAT_TEMPLATE + "<think>\n\n</think>\n\n", False),
        (CHAT_TEMPLATE, None),
        (CHAT_TEMPLATE.replace("message['content']", "message['content'] | upper"), None),
        ("{% if messages[0].content|length > 40 %}{{ raise_exception('long') }}{% endif %}" + CHAT_TEMPLATE, None),
    ],
)
async def test_the_last_mark_of_the_template_decides(template: str, expected: bool | None, parser: str) -> None:
    """Not those that the user speaks of."""
    for content in ("hi", "What is <think>?", "Why </think>? <think>", "<think>a</think>"):
        api = thinker("x</think>y", template, parser)
        reply = await ask(api, "chat", content, structured_outputs={"regex": ".*"})
        assert thought_of(api) == {True: OPEN, False: None, None: FREE}[expected]
        assert reply == (Reply("y", "x", [], "stop") if expected else Reply("x</think>y", finish="stop"))


REASONING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("parser", ["qwen3", "deepseek_r1"])
@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ({"content": "<think>t</think>The answer is"}, False),
        ({"content": "The answer is", "reasoning_content": "t"}, False),
        ({"content": "<think>t"}, True),
        ({"content": "<think>t</think>So <think>"}, True),
        ({"content": "The answer is"}, None),
    ],
)
async def test_a_last_message_that_goes_on(last: dict[str, str], expected: bool | None, parser: str) -> None:
    for before in ([], [{"role": "user", "content": "What is <think>?"}]):
        api = thinker("x</think>y", REASONING_TEMPLATE, parser)
        body = {
            "messages": [*before, {"role": "assistant", **last}],
            "continue_final_message": True,
            "add_generation_prompt": False,
            "structured_outputs": {"regex": ".*"},
        }
        (choice,) = (await api.ok("/v1/chat/completions", body))["choices"]
        assert thought_of(api) == {True: OPEN, False: None, None: FREE}[expected]
        assert choice["message"]["content"] == ("y" if expected else "x</think>y")


async def test_thoughts_without_a_constraint_are_filed_by_the_same_rule() -> None:
    begun = [{"role": "assistant", "content": "The answer is", "reasoning_content": "t"}]
    body = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    for parser in ("qwen3", "deepseek_r1"):
        (choice,) = (await thinker(" 42", REASONING_TEMPLATE, parser).ok("/v1/chat/completions", body))["choices"]
        assert choice["message"] == {"role": "assistant", "content": " 42", "refusal": None}
        reply = await ask(thinker("so</think>42", OPENS + "Okay, ", parser), "chat", "<think></think>")
        assert (reply.reasoning, reply.text) == ("so", "42")


@pytest.mark.parametrize("parser", ["qwen3", "deepseek_r1"])
async def test_the_old_way(parser: str) -> None:
    """The constraint holds from the first token on."""
    at_once = StructuredOutputsConfig(enable_in_reasoning=True)
    for config, when in ((None, True), (at_once, None), (at_once, True)):
        api = thinker('{"a": 1}', OPENS, parser, **({} if config is None else {"structured_outputs_config": config}))
        own: dict[str, Any] = {} if when is None else {"structured_outputs": {"enable_in_reasoning": when}}
        reply = await ask(api, "chat", "hi", **FIELDS["chat"][0], **own)
        assert reply == Reply('{"a": 1}', finish="stop") and thought_of(api) is None
        if when is None:
            reply = await ask(api, "messages", "hi", **FIELDS["messages"][0])
            assert reply == Reply('{"a": 1}', finish="stop") and thought_of(api) is None
    api = thinker('t</think>{"a": 1}', OPENS, parser, structured_outputs_config=at_once)
    reply = await ask(api, "chat", "hi", structured_outputs={"json": SCHEMA, "enable_in_reasoning": False})
    assert reply == Reply('{"a": 1}', "t", [], "stop") and thought_of(api) == OPEN


async def test_the_thinking_budget_goes_with_the_thought() -> None:
    api = thinker('t</think>{"a": 1}')
    await ask(api, "chat", "hi", **FIELDS["chat"][0], thinking_token_budget=7)
    thought = thought_of(api)
    assert thought is not None and thought.max_tokens == 7
    params = api.server.engine.submitted[-1].sampling_params
    assert params is not None and params.thinking_budget is None


async def test_completions_think_if_their_prompt_does() -> None:
    """Nobody tells their thoughts from their answers."""
    for parser in ("qwen3", "deepseek_r1"):
        api = thinker("x", parser=parser)
        fields = {"structured_outputs": {"json": SCHEMA}}
        for prompt, thought in (("x", None), ("x<think>\n", OPEN), ("<think>a</think>", None), ("<think>so", OPEN)):
            await api.complete(prompt, **fields)
            assert thought_of(api) == thought
        await api.complete(["<think>", "x"], **fields)
        assert [message.grammar.thought for message in api.server.engine.submitted[-2:] if message.grammar] == [
            OPEN,
            None,
        ]
        await api.complete("<think>", structured_outputs={"json": SCHEMA, "enable_in_reasoning": True})
        assert thought_of(api) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": tokens_of('{"a":1}')}, "allowed_token_ids"),
        ({"bad_words": ["</think>"]}, "bad_words"),
        ({"stop_token_ids": list(END)}, "stop_token_ids"),
    ],
)
async def test_a_thought_must_be_able_to_end(fields: dict[str, Any], param: str) -> None:
    api = thinker("x")
    body = {"messages": [{"role": "user", "content": "hi"}], **FIELDS["chat"][0], **fields}
    error = await api.error("/v1/chat/completions", body)
    assert error["param"] == param and "enable_in_reasoning" in error["message"]
    assert not api.server.engine.submitted
    await api.ok("/v1/chat/completions", {**body, "structured_outputs": {"enable_in_reasoning": True}, "max_tokens": 4})
    api = thinker("x", CHAT_TEMPLATE)
    await api.ok("/v1/chat/completions", {**body, "max_tokens": 4})
    assert thought_of(api) is None, "none begins that could not end"


async def test_no_thought_begins_with_half_a_marker() -> None:
    """Where the marker is several tokens, its first one may as well begin other markup, such as <tool_call>."""
    server = FakeServer(ServerConfig(reasoning_parser="qwen3"), script=says('{"a": 1}'))
    api = Api(server)
    await api.ok("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **FIELDS["chat"][0]})
    assert thought_of(api) is None


async def test_nothing_changes_without_a_reasoning_parser() -> None:
    api = Api(FakeServer(script=says('{"a": 1}'), chat_template=OPENS))
    assert await ask(api, "chat", "<think>", **FIELDS["chat"][0]) == Reply('{"a": 1}', finish="stop")
    assert thought_of(api) is None


async def test_when_alone_names_no_language() -> None:
    api = thinker("x")
    await ask(api, "chat", "hi", structured_outputs={"enable_in_reasoning": True})
    assert api.server.engine.submitted[-1].grammar is None
    body = {"messages": [{"role": "user", "content": "hi"}], "structured_outputs": {}}
    assert (await api.error("/v1/chat/completions", body))["param"] == "structured_outputs"


async def test_white_space_may_be_left_out_by_the_server() -> None:
    api = thinker("x", structured_outputs_config=StructuredOutputsConfig(disable_any_whitespace=True))
    await ask(api, "chat", "hi", **FIELDS["chat"][0])
    grammar = api.server.engine.submitted[-1].grammar
    assert grammar is not None and grammar.disable_any_whitespace
