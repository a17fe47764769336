"""/v1/messages, by hand and with the anthropic package."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx2
import msgspec
import pytest

from api.anthropic.convert import to_chat_request
from api.anthropic.protocol import MessagesRequest
from api.config import ServerConfig
from tests.fakes import CHAT_TEMPLATE, MAX_MODEL_LEN, Connection, FakeServer, says
from tests.unit.conftest import Api
from tests.unit.test_openai_stream import until

PATH = "/v1/messages"
MODEL = "fake-model"
HI: list[Any] = [{"role": "user", "content": "hi"}]
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [{"name": "weather", "description": "Tells it.", "input_schema": SCHEMA}, {"name": "time"}]
BOTH = ServerConfig(enable_auto_tool_choice=True, tool_call_parser="hermes", reasoning_parser="qwen3")
TEXT = (
    "<think>\nHm.\n</think>\n\nLet me look.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Löwen"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)
TEMPLATE = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}{{ tools | tojson }}\n{{ enable_thinking }}"


def talker(text: str = TEXT, config: ServerConfig = BOTH, template: str = CHAT_TEMPLATE) -> Api:
    return Api(FakeServer(config, script=says(text), chat_template=template))


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": HI, "max_tokens": 300, **fields}


def client_of(api: Api, **options: Any) -> anthropic.AsyncAnthropic:
    transport = httpx2.ASGITransport(app=api.server.app)
    http_client = httpx2.AsyncClient(transport=transport, base_url="http://localhost")
    options = {"api_key": "x", **options}
    return anthropic.AsyncAnthropic(base_url="http://localhost", http_client=http_client, max_retries=0, **options)


async def events_of(api: Api, request: dict[str, Any]) -> list[Any]:
    """The events of a stream, whose names are checked."""
    response = await api.post(PATH, {**request, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        events.append(value)
    return events


async def conversation_of(**fields: Any) -> tuple[list[Any], Any, str]:
    """The messages, the tools and the variable that the template saw."""
    api = talker("x", template=TEMPLATE)
    await api.ok(PATH, body(**{"max_tokens": 1, **fields}))
    (request,) = api.server.engine.submitted
    ids = memoryview(request.prompt_token_ids).cast("i").tolist()
    *messages, tools, thinking = api.server.model.tokenizer.decode(ids, False).split("\n")
    return [json.loads(line) for line in messages], json.loads(tools), thinking


# -- answers


async def test_an_answer() -> None:
    answer = await talker("Hello.").ok(PATH, body())
    assert answer["id"].startswith("msg_")
    usage = answer.pop("usage")
    assert usage["output_tokens"] == 7 and usage["input_tokens"] > 4
    assert usage["cache_read_input_tokens"] == usage["cache_creation_input_tokens"] == 0
    assert {key: value for key, value in answer.items() if key != "id"} == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": "Hello."}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }


async def test_blocks() -> None:
    answer = await talker().ok(PATH, body(tools=TOOLS))
    thinking, text, weather, time = answer["content"]
    assert thinking["type"] == "thinking" and thinking["thinking"] == "Hm." and len(thinking["signature"]) == 64
    assert text == {"type": "text", "text": "Let me look.\n"}
    assert (weather["type"], weather["name"], weather["input"]) == ("tool_use", "weather", {"city": "Löwen"})
    assert (time["name"], time["input"]) == ("time", {})
    assert weather["id"] != time["id"]
    assert answer["stop_reason"] == "tool_use"
    assert answer["usage"]["output_tokens_details"]["thinking_tokens"] > 0


async def test_a_stream() -> None:
    start, ping, *events, end, stop = await events_of(talker(), body(tools=TOOLS))
    assert start["type"] == "message_start"
    assert start["message"]["content"] == [] and start["message"]["stop_reason"] is None
    assert start["message"]["usage"]["output_tokens"] == 0 and start["message"]["usage"]["input_tokens"] > 4
    assert ping == {"type": "ping"}
    assert stop == {"type": "message_stop"}
    assert end["type"] == "message_delta"
    assert end["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert end["usage"]["output_tokens"] == len(TEXT.encode()) + 1
    kinds: list[str] = []
    is_open = False
    for event in events:
        assert event["index"] == len(kinds) - (event["type"] != "content_block_start")
        if event["type"] == "content_block_start":
            assert not is_open
            kinds.append(event["content_block"]["type"])
        else:
            assert is_open
        is_open = event["type"] != "content_block_stop"
    assert kinds == ["thinking", "text", "tool_use", "tool_use"] and not is_open
    arguments = [event["delta"].get("partial_json", "") for event in events if "delta" in event and event["index"] == 2]
    assert "".join(arguments) == '{"city": "Löwen"}' and len(arguments) > 5


async def test_an_empty_answer() -> None:
    assert (await talker("").ok(PATH, body()))["content"] == []
    assert [event["type"] for event in await events_of(talker(""), body())] == [
        "message_start",
        "ping",
        "message_delta",
        "message_stop",
    ]


async def test_how_an_answer_ends() -> None:
    api = talker("one, two, three")
    answer = await api.ok(PATH, body(stop_sequences=["four", " two"]))
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", " two")
    assert answer["content"][0]["text"] == "one,"
    assert (await api.ok(PATH, body(max_tokens=3)))["stop_reason"] == "max_tokens"
    # More than the context has room for is no error: clients ask for what their own models could do.
    endless = Api(FakeServer())
    answer = await endless.ok(PATH, body(max_tokens=100_000))
    assert answer["stop_reason"] == "model_context_window_exceeded"
    assert answer["usage"]["input_tokens"] + answer["usage"]["output_tokens"] == MAX_MODEL_LEN
    cut = await talker().ok(PATH, body(tools=TOOLS, max_tokens=TEXT.encode().index(b"wen")))
    assert cut["stop_reason"] == "max_tokens"
    assert cut["content"][-1]["type"] == "text"
    assert cut["content"][-1]["text"].endswith('<tool_call>\n{"name": "weather", "arguments": {"city": "Lö')


async def test_cached_tokens() -> None:
    api = talker("x")
    api.server.engine.num_cached_tokens = 5
    usage = (await api.ok(PATH, body()))["usage"]
    whole = (await api.ok(f"{PATH}/count_tokens", {"model": MODEL, "messages": HI}))["input_tokens"]
    assert (usage["cache_read_input_tokens"], usage["input_tokens"]) == (5, whole - 5)
    start = (await events_of(api, body()))[0]
    assert start["message"]["usage"]["cache_read_input_tokens"] == 5


async def test_sampling_parameters() -> None:
    api = talker("x")
    await api.ok(PATH, body(temperature=0.5, top_p=0.25, top_k=7, metadata={"user_id": "u"}, max_tokens=9))
    (request,) = api.server.engine.submitted
    params = request.sampling_params
    assert params is not None
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.25, 7, 9)


# -- conversations


async def test_a_conversation() -> None:
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "redacted_thinking", "data": "d"},
                {"type": "text", "text": "c"},
                {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "x"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "d"}]},
                {"type": "tool_result", "tool_use_id": "2", "is_error": True},
                {"type": "text", "text": "e", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    request = msgspec.convert(body(messages=messages, system="S", tools=TOOLS[1:]), MessagesRequest)
    chat = to_chat_request(request)
    assert msgspec.to_builtins(chat.messages) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": "c",
            "reasoning": "t",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "x"}'}}
            ],
        },
        {"role": "tool", "name": "weather", "content": [{"type": "text", "text": "d"}], "tool_call_id": "1"},
        {"role": "tool", "content": "", "tool_call_id": "2", "is_error": True},
        {"role": "user", "content": [{"type": "text", "text": "e"}]},
    ]
    parameters = {"type": "object", "properties": {}}
    assert chat.tools == [{"type": "function", "function": {"name": "time", "parameters": parameters}}]
    assert chat.chat_template_kwargs is None


async def test_what_the_template_sees() -> None:
    call = {"type": "tool_use", "id": "1", "name": "time", "input": {"zone": "x"}}
    messages: list[Any] = [
        *HI,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "d"}]},
    ]
    seen, tools, thinking = await conversation_of(messages=messages)
    assert seen == [
        *HI,
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "time", "arguments": {"zone": "x"}}}],
            "content": "",
        },
        {"role": "tool", "content": "d", "tool_call_id": "1", "name": "time"},
    ]
    assert tools is None and thinking == ""


async def test_system_prompts_and_documents() -> None:
    system = [{"type": "text", "text": "x-anthropic-billing-header: 17"}, {"type": "text", "text": "S"}]
    document = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}}
    seen, tools, _ = await conversation_of(system=system, messages=[{"role": "user", "content": [document]}], tools=[])
    assert seen == [{"role": "system", "content": "S"}, {"role": "user", "content": "T\nD"}]
    assert tools is None


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("x-anthropic-billing-header: cc_version=2.1; cch=1;\nBe brief.\n\nAlways.", "Be brief.\n\nAlways."),
        ([{"type": "text", "text": "x-anthropic-billing-header: 17\n\nBe brief."}], "Be brief."),
        ("x-anthropic-billing-header is what clients send.", "x-anthropic-billing-header is what clients send."),
        ("Never send\nx-anthropic-billing-header: 17", "Never send\nx-anthropic-billing-header: 17"),
        ("x-anthropic-billing-header: 17", None),
    ],
)
async def test_a_clients_note_is_one_line(system: Any, expected: str | None) -> None:
    seen, _, _ = await conversation_of(system=system)
    assert [message["content"] for message in seen if message["role"] == "system"] == [expected][: expected is not None]


async def test_the_answer_goes_on_with_a_message_of_the_assistant() -> None:
    api = talker("ris.")
    answer = await api.ok(PATH, body(messages=[*HI, {"role": "assistant", "content": "It is Pa"}]))
    assert answer["content"] == [{"type": "text", "text": "ris."}]
    ids = memoryview(api.server.engine.submitted[0].prompt_token_ids).cast("i").tolist()
    assert api.server.model.tokenizer.decode(ids, False).endswith("<|im_start|>assistant\nIt is Pa")


async def test_thinking() -> None:
    assert (await conversation_of(thinking={"type": "enabled", "budget_tokens": 1024}))[2] == "True"
    assert (await conversation_of(thinking={"type": "disabled"}))[2] == "False"
    answer = await talker("<think>Hm.</think>Yes.").ok(PATH, body(thinking={"type": "disabled"}))
    assert answer["content"] == [{"type": "text", "text": "Yes."}]


async def test_one_call_at_most() -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    answer = await talker().ok(PATH, body(tools=TOOLS, tool_choice=choice))
    assert [block["type"] for block in answer["content"]] == ["thinking", "text", "tool_use"]
    answer = await talker().ok(PATH, body(tools=TOOLS, tool_choice={"type": "none"}))
    assert [block["type"] for block in answer["content"]] == ["thinking", "text"]


async def test_count_tokens() -> None:
    api = talker("x", config=ServerConfig(), template="{{ tools | tojson }}" + CHAT_TEMPLATE)
    count = f"{PATH}/count_tokens"
    plain = (await api.ok(count, {"model": MODEL, "messages": HI}))["input_tokens"]
    assert plain == (await api.ok(PATH, body()))["usage"]["input_tokens"]
    more = (await api.ok(count, {"model": MODEL, "messages": HI, "tools": TOOLS, "system": "S"}))["input_tokens"]
    assert more > plain + 40
    long = [{"role": "user", "content": "x" * 5000}]
    assert (await api.ok(count, {"model": MODEL, "messages": long}))["input_tokens"] > 5000


# -- errors


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]},
            "messages: images are not supported by this model",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "url", "url": "x"}}]}]},
            "messages[0].content[0]: a document",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]},
            "'tool_use'",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "1"}]}]},
            "'tool_result'",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "nope"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"temperature": 3}, "temperature"),
        ({"stop_sequences": [""]}, "stop"),
    ],
)
async def test_bad_requests(fields: dict[str, Any], named: str) -> None:
    api = talker()
    response = await api.post(PATH, body(**fields))
    assert response.status_code == 400, response.text
    answer = response.json()
    assert answer["type"] == "error" and answer["error"]["type"] == "invalid_request_error"
    assert named in answer["error"]["message"]
    assert not api.server.engine.submitted


async def test_the_shape_of_errors() -> None:
    server = FakeServer(ServerConfig(api_key=["secret"], max_body_size=1000))
    api = Api(server)
    response = await api.post(PATH, body())
    assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")
    key = {"x-api-key": "secret"}
    response = await api.post(PATH, body(model="other"), headers=key)
    assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")
    response = await api.post(PATH, body(system="x" * 2000), headers=key)
    assert (response.status_code, response.json()["error"]["type"]) == (413, "request_too_large")
    server.engine.max_queued = 0
    response = await api.post(PATH, body(), headers=key)
    assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")
    assert response.headers["retry-after"] == "7"
    server.traffic.is_draining = True
    response = await api.post(PATH, body(), headers=key)
    assert (response.status_code, response.json()["error"]["type"]) == (503, "overloaded_error")
    # Other endpoints have theirs.
    assert "param" in (await api.get("/v1/models")).json()["error"]


async def test_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("secret")

    api = talker()
    monkeypatch.setattr(api.server.model, "submit", fail)
    response = await api.post(PATH, body())
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "api_error" and "secret" not in response.text


async def test_an_error_after_the_head_is_an_event() -> None:
    server = talker().server
    server.engine.steps_left = 3
    connection = Connection(server.app, PATH, body(stream=True))
    await until(lambda: b"message_start" in connection.body)
    server.engine.fail("bad logits")
    await connection.task
    name, data = connection.body.decode().split("\n\n")[-2].split("\n")
    assert name == "event: error"
    error = {"type": "api_error", "message": "bad logits"}
    assert json.loads(data.removeprefix("data: ")) == {"type": "error", "error": error}


# -- the client


async def test_the_client() -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": HI, "max_tokens": 300, "tools": TOOLS}
    async with client_of(talker()) as client:
        whole = await client.messages.create(**options)
        async with client.messages.stream(**options) as stream:
            kinds = {event.type async for event in stream}
            folded = await stream.get_final_message()
        counted = await client.messages.count_tokens(model=MODEL, messages=HI)
    assert {"text", "thinking", "signature", "input_json", "content_block_stop", "message_stop"} <= kinds

    def without_ids(message: anthropic.types.Message) -> Any:
        dumped = json.loads(message.to_json())
        dumped.pop("stop_details", None)
        for value in (dumped, *dumped["content"]):
            value.pop("id", None)
        return dumped

    assert without_ids(folded) == without_ids(whole)
    assert whole.content[2].type == "tool_use" and whole.content[2].input == {"city": "Löwen"}
    assert counted.input_tokens == whole.usage.input_tokens


async def test_keys_of_the_client() -> None:
    api = talker("x", ServerConfig(api_key=["secret"]))
    options: dict[str, Any] = {"model": MODEL, "messages": HI, "max_tokens": 3}
    for good in ({"api_key": "secret"}, {"api_key": None, "auth_token": "secret"}):
        async with client_of(api, **good) as client:
            assert (await client.messages.create(**options)).stop_reason == "end_turn"
    async with client_of(api, api_key="wrong") as client:
        with pytest.raises(anthropic.AuthenticationError):
            await client.messages.create(**options)
    async with client_of(api, api_key="secret") as client:
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(**{**options, "model": "other"})
