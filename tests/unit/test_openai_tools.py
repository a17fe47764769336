"""Tools in chat completions and /tokenize."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from api.config import ServerConfig, check_config
from api.flags import ConfigError
from tests.fakes import CHAT_TEMPLATE, IM_END, IM_START, FakeServer, says
from tests.unit.conftest import Api
from tests.unit.test_openai_chat import prompt_of

PATH = "/v1/chat/completions"
HI: list[Any] = [{"role": "user", "content": "hi"}]
CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
TOOLS = [WEATHER, TIME]
AUTO = ServerConfig(enable_auto_tool_choice=True, tool_call_parser="hermes")
TEMPLATE = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHAT_TEMPLATE
CALLS = (
    "Let me look.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Löwen"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)


def caller(text: str = CALLS, config: ServerConfig = AUTO, template: str = TEMPLATE) -> Api:
    return Api(FakeServer(config, script=says(text), chat_template=template))


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": HI, "tools": TOOLS, **fields}


def calls_of(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]


async def test_calls() -> None:
    (choice,) = (await caller().ok(PATH, body()))["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "Let me look.\n"
    assert "reasoning" not in message
    assert calls_of(message) == [("weather", {"city": "Löwen"}), ("time", {})]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in message["tool_calls"])


async def test_calls_alone_have_no_content() -> None:
    (choice,) = (await caller(CALLS.partition("\n")[2]).ok(PATH, body()))["choices"]
    assert choice["message"]["content"] is None
    (choice,) = (await caller("No need.").ok(PATH, body()))["choices"]
    assert choice["message"] == {"role": "assistant", "content": "No need.", "refusal": None}
    assert choice["finish_reason"] == "stop"


async def test_streamed_calls() -> None:
    chunks = await caller().stream(PATH, body())
    changes = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert changes[0] == {"role": "assistant", "content": ""}
    assert "".join(change.get("content", "") for change in changes) == "Let me look.\n"
    calls = [call for change in changes for call in change.get("tool_calls", [])]
    starts = [call for call in calls if "id" in call]
    assert [(call["index"], call["type"], call["function"]["name"]) for call in starts] == [
        (0, "function", "weather"),
        (1, "function", "time"),
    ]
    for index, arguments in enumerate(('{"city": "Löwen"}', "{}")):
        pieces = [call for call in calls if call["index"] == index]
        assert "".join(piece["function"]["arguments"] for piece in pieces) == arguments
        assert all(set(piece) == {"index", "function"} for piece in pieces[1:])
    assert len(calls) > 8, "arguments come as they are written"
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert all(set(change) & {"content", "tool_calls"} for change in changes), "nothing is sent while text is held"


@pytest.mark.parametrize("fields", [{}, {"logprobs": True}, {"return_token_ids": True}, {"n": 2, "seed": 1}])
async def test_streamed_is_whole(fields: dict[str, Any]) -> None:
    async with client_of(caller()) as client:
        options: dict[str, Any] = {"model": "fake-model", "messages": HI, "tools": TOOLS}
        extra = {"return_token_ids": fields.pop("return_token_ids")} if "return_token_ids" in fields else None
        whole = await client.chat.completions.create(**options, **fields, extra_body=extra)
        async with client.chat.completions.stream(**options, **fields, extra_body=extra) as stream:
            folded = await stream.get_final_completion()
    for one, other in zip(whole.choices, folded.choices, strict=True):
        calls = other.message.tool_calls or []
        assert [call.function.arguments for call in calls] == ['{"city": "Löwen"}', "{}"]
        assert one.finish_reason == other.finish_reason == "tool_calls"
        assert one.message.content == other.message.content
        assert (one.logprobs is None) == (other.logprobs is None)
        if one.logprobs is not None and other.logprobs is not None:
            assert one.logprobs.content == other.logprobs.content


async def test_a_call_that_is_cut_off() -> None:
    text = CALLS[: CALLS.index("wen")]
    api = caller(CALLS)
    (choice,) = (await api.ok(PATH, body(max_tokens=len(text.encode()))))["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Lö'


async def test_one_call_at_most() -> None:
    api = caller()
    message = (await api.ok(PATH, body(parallel_tool_calls=False)))["choices"][0]["message"]
    assert calls_of(message) == [("weather", {"city": "Löwen"})]
    chunks = await api.stream(PATH, body(parallel_tool_calls=False))
    assert all(call["index"] == 0 for c in chunks for call in c["choices"][0]["delta"].get("tool_calls", []))


async def test_none_leaves_the_text_alone() -> None:
    (choice,) = (await caller().ok(PATH, body(tool_choice="none")))["choices"]
    assert choice["message"]["content"] == CALLS
    assert choice["finish_reason"] == "stop"
    assert "tool_calls" not in choice["message"]


async def test_the_template_shows_the_tools() -> None:
    shown = json.dumps(TOOLS)
    assert (await prompt_of(caller(), tools=TOOLS)).startswith(shown)
    assert (await prompt_of(caller(), tools=TOOLS, tool_choice="none")).startswith(shown)
    assert (await prompt_of(caller())).startswith("<|im_start|>")
    hiding = ServerConfig(exclude_tools_when_tool_choice_none=True)
    assert (await prompt_of(caller(config=hiding), tools=TOOLS, tool_choice="none")).startswith("<|im_start|>")
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named("time")]}}
    assert (await prompt_of(caller(), tools=TOOLS, tool_choice=allowed)).startswith(json.dumps([TIME]))
    # Fields that we know nothing of get there, too.
    wordy = {"type": "function", "function": {"name": "f", "return": {"type": "string"}}}
    assert '"return"' in await prompt_of(caller(), tools=[wordy])


async def test_tokenize_shows_the_tools() -> None:
    api = caller()
    tokens = (await api.ok("/tokenize", {"messages": HI, "tools": TOOLS}))["tokens"]
    answer = await api.ok(PATH, body(max_tokens=1, return_token_ids=True))
    assert tokens == answer["prompt_token_ids"]
    bads: list[list[dict[str, Any]]] = [[{}], [{"type": "function", "function": {}}]]
    for bad in bads:
        assert (await api.error("/tokenize", {"messages": HI, "tools": bad}))["param"] == "tools"


async def test_results_come_back_in_the_conversation() -> None:
    template = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}"
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    lines = (await prompt_of(caller(template=template), messages=messages)).splitlines()
    said, result = json.loads(lines[1]), json.loads(lines[2])
    assert said["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Paris"}}
    assert said["content"] == ""  # templates may add it to other text
    assert result == {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "other", "function": {"name": "f"}}]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]}, "tools"),
        ({"tools": TOOLS, "tool_choice": named("nope")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "other"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "perhaps"}, "body.tool_choice"),
        ({"tools": {}}, "body.tools"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
async def test_bad_tools(fields: dict[str, Any], param: str) -> None:
    api = caller()
    error = await api.error(PATH, {"messages": HI, **fields})
    assert error["param"] == param
    assert not api.server.engine.submitted


async def test_auto_needs_a_parser() -> None:
    for fields in ({}, {"tool_choice": "auto"}):
        error = await caller(config=ServerConfig()).error(PATH, body(**fields))
        assert error["param"] == "tool_choice" and "--enable-auto-tool-choice" in error["message"]
    parser_only = ServerConfig(tool_call_parser="hermes")
    assert "--enable-auto" in (await caller(config=parser_only).error(PATH, body()))["message"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ServerConfig(tool_call_parser="nope"),
            "--tool-call-parser: unknown parser 'nope'; choose from auto, apriel, cohere_command3",
        ),
        (
            ServerConfig(reasoning_parser="nope"),
            "--reasoning-parser: unknown parser 'nope'; choose from auto, apriel, cohere_command3",
        ),
        (
            ServerConfig(tool_call_parser="json_forced"),
            "--tool-call-parser: unknown parser 'json_forced'; choose from auto, apriel, cohere_command3",
        ),
    ],
)
def test_bad_flags(config: ServerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(config)


async def test_markers_that_are_special_tokens() -> None:
    """They are part of the text for the parser, and other special tokens are not."""
    api = caller("")
    tokenizer = api.server.model.tokenizer
    texts = {"<tool_call>": IM_START, "</tool_call>": IM_END}
    tokenizer.token_to_id = lambda token: texts.get(token)  # type: ignore[method-assign]
    assert api.server.model.special_ids(["<tool_call>", "</tool_call>", "<think>"]) == {IM_START, IM_END}
    await api.ok(PATH, body())
    (request,) = api.server.engine.submitted
    assert request.sampling_params is not None
    api.server.engine.script = lambda prompt, params: iter([IM_START, IM_END, 0, 1])
    (choice,) = (await api.ok(PATH, body(ignore_eos=True, max_tokens=4)))["choices"]
    assert choice["message"]["content"] == "<|im_start|><|im_end|>", "only those that the parser looks for"
    (choice,) = (await api.ok(PATH, {"messages": HI, "ignore_eos": True, "max_tokens": 4}))["choices"]
    assert choice["message"]["content"] == ""


# -- calls that are forced


def schema_of(api: Api) -> Any:
    """The grammar that the first request asked for; the fake engine's script obeys it by itself."""
    grammar = api.server.engine.submitted[0].grammar
    assert grammar is not None and grammar.kind == "json"
    return json.loads(grammar.text)


@pytest.mark.parametrize("config", [ServerConfig(), AUTO, ServerConfig(reasoning_parser="deepseek_r1")])
async def test_required(config: ServerConfig) -> None:
    text = '[{"name": "weather", "parameters": {"city": "x"}}, {"name": "time", "parameters": {}}]'
    api = caller(text, config)
    (choice,) = (await api.ok(PATH, body(tool_choice="required")))["choices"]
    assert calls_of(choice["message"]) == [("weather", {"city": "x"}), ("time", {})]
    assert choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"
    schema = schema_of(api)
    assert schema["type"] == "array" and len(schema["items"]["anyOf"]) == 2
    chunks = await api.stream(PATH, body(tool_choice="required"))
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_function_by_name() -> None:
    api = caller('{"name": "weather", "parameters": {"city": "x"}}', ServerConfig())
    (choice,) = (await api.ok(PATH, body(tool_choice=named("weather"))))["choices"]
    assert calls_of(choice["message"]) == [("weather", {"city": "x"})]
    assert choice["finish_reason"] == "stop"
    parameters = {**CITY, "additionalProperties": False}
    assert schema_of(api)["properties"] == {"name": {"const": "weather"}, "parameters": parameters}


async def test_required_without_parallel_calls() -> None:
    api = caller('{"name": "time", "parameters": {}}', ServerConfig())
    fields = {"tool_choice": "required", "parallel_tool_calls": False}
    (choice,) = (await api.ok(PATH, body(**fields)))["choices"]
    assert calls_of(choice["message"]) == [("time", {})]
    assert choice["finish_reason"] == "tool_calls"
    assert "anyOf" in schema_of(api)


async def test_a_schema_that_is_too_deep(api: Api) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    error = await api.error(PATH, {"messages": HI, "tools": [tool], "tool_choice": "required"})
    assert error["param"] == "tools"


async def test_an_error_in_one_of_the_schemas_names_its_tool(api: Api) -> None:
    bad = {"type": "function", "function": {"name": "bad", "parameters": {"type": "object", "minProperties": 2}}}
    error = await api.error(PATH, {"messages": HI, "tools": [WEATHER, bad, TIME], "tool_choice": "required"})
    assert error["param"] == "tools" and error["message"].endswith("(in 'bad')")


# -- the client


def client_of(api: Api) -> openai.AsyncOpenAI:
    http_client: Any = api._client  # openai may bring an httpx of its own
    return openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="x", http_client=http_client, max_retries=0)


async def test_the_client_s_parsed_tools() -> None:
    import pydantic

    class Weather(pydantic.BaseModel):
        """Tells the weather."""

        city: str

    text = '<tool_call>\n{"name": "Weather", "arguments": {"city": "Löwen"}}\n</tool_call>'
    tool = openai.pydantic_function_tool(Weather)
    options: dict[str, Any] = {"model": "fake-model", "messages": HI, "tools": [tool]}
    async with client_of(caller(text)) as client:
        answer = await client.chat.completions.parse(**options)
        async with client.chat.completions.stream(**options) as stream:
            kinds = {event.type async for event in stream}
            folded = await stream.get_final_completion()
    for choice in (answer.choices[0], folded.choices[0]):
        assert choice.message.tool_calls is not None
        assert choice.message.tool_calls[0].function.parsed_arguments == Weather(city="Löwen")
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [PATH, "/v1/messages", "/v1/responses"])
async def test_a_template_that_ignores_tools_is_told(path: str, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The model cannot know them, so the client should: by a header, and once in the log."""
    fields: dict[str, Any] = {"messages": HI, "tools": TOOLS}
    if path == "/v1/messages":
        fields["tools"] = [{"name": "weather", "input_schema": CITY}]
        fields |= {"model": "fake-model", "max_tokens": 8}
    elif path == "/v1/responses":
        fields = {
            "input": "What is the weather?",
            "tools": [{"type": "function", "name": "weather", "parameters": CITY}],
        }
    for template, ignores in ((TEMPLATE, False), (CHAT_TEMPLATE, True)):
        api = caller("Sunny.", template=template)
        for _ in range(2):
            response = await api.post(path, {**fields, "stream": stream})
            assert response.status_code == 200, response.text
            assert ("ignores tools" in response.headers.get("x-octavo-warning", "")) == ignores
        assert caplog.text.count("ignores tools") == ignores
        without = await api.post(PATH, {"messages": HI})
        assert "x-octavo-warning" not in without.headers
