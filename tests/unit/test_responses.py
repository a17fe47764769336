"""/v1/responses, by hand and with the openai package."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import openai
import pydantic
import pytest

from api.config import ServerConfig
from api.engine.request_state import RequestState
from api.engine.submission import Submission
from api.openai.protocol import ChatMessage
from api.responses.convert import input_messages, output_messages, to_chat_request
from api.responses.protocol import (
    FunctionCallItem,
    OutputMessage,
    OutputText,
    ReasoningConfig,
    ReasoningItem,
    ReasoningText,
    ResponseObject,
    ResponsesRequest,
    TextConfig,
)
from api.responses.store import ResponseStore, StoredResponse
from engine_core.messages import ResolvedParams
from tests.fakes import CHAT_TEMPLATE, MODEL, FakeServer, says
from tests.scripted import EOS, ScriptedModel
from tests.unit.conftest import Api, LoopClock, error_of
from tests.unit.test_openai_stream import until
from tests.unit.test_openai_tools import CITY, client_of

PATH = "/v1/responses"
TOOLS: list[Any] = [
    {"type": "function", "name": "weather", "description": "Tells it.", "parameters": CITY, "strict": True},
    {"type": "function", "name": "time", "parameters": None},
]
BOTH = ServerConfig(enable_auto_tool_choice=True, tool_call_parser="hermes", reasoning_parser="qwen3")
TEXT = (
    "<think>\nHm.\n</think>\n\nLet me look.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Löwen"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)


def talker(text: str = TEXT, config: ServerConfig = BOTH, template: str = CHAT_TEMPLATE) -> Api:
    return Api(FakeServer(config, script=says(text), chat_template=template))


def events_in(text: str) -> list[Any]:
    """The events of a stream, whose names and numbers are checked."""
    events = []
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    first = events[0]["sequence_number"]
    assert [event["sequence_number"] for event in events] == list(range(first, first + len(events)))
    return events


async def streamed(api: Api, **fields: Any) -> list[Any]:
    response = await api.post(PATH, {"input": "hi", "stream": True, **fields})
    assert response.status_code == 200, response.text
    return events_in(response.text)


def prompt_of(api: Api, number: int = -1) -> str:
    ids = memoryview(api.server.engine.submitted[number].prompt_token_ids).cast("i").tolist()
    return api.server.model.tokenizer.decode(ids, False)


def without_ids(response: Any) -> Any:
    """What two runs of a request have in common."""
    plain = {**response, "id": "", "created_at": 0, "completed_at": 0}
    plain["output"] = [{**item, "id": "", "call_id": ""} for item in response["output"]]
    return plain


# -- answers


async def test_a_response() -> None:
    api = talker("Hello.")
    answer = await api.ok(PATH, {"input": "hi", "model": "fake-model", "metadata": {"a": "b"}, "max_output_tokens": 30})
    assert answer["id"].startswith("resp_") and answer["object"] == "response"
    assert (answer["status"], answer["model"], answer["metadata"]) == ("completed", "fake-model", {"a": "b"})
    assert answer["error"] is answer["incomplete_details"] is None
    assert (answer["store"], answer["background"], answer["temperature"], answer["top_p"]) == (True, False, 1.0, 1.0)
    assert answer["text"]["format"]["type"] == "text"
    (item,) = answer["output"]
    assert item.pop("id").startswith("msg_")
    text = {"type": "output_text", "text": "Hello.", "annotations": [], "logprobs": []}
    assert item == {"type": "message", "status": "completed", "role": "assistant", "content": [text]}
    usage = answer["usage"]
    assert usage["output_tokens"] == 7 and usage["total_tokens"] == usage["input_tokens"] + 7
    assert usage["input_tokens_details"]["cached_tokens"] == usage["output_tokens_details"]["reasoning_tokens"] == 0


async def test_items() -> None:
    answer = await talker().ok(PATH, {"input": "hi", "tools": TOOLS})
    reasoning, message, weather, time = answer["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}] and reasoning["summary"] == []
    assert message["content"][0]["text"] == "Let me look.\n"
    assert (weather["type"], weather["name"], weather["arguments"]) == ("function_call", "weather", '{"city": "Löwen"}')
    assert weather["call_id"].startswith("call_") and weather["id"].startswith("fc_")
    assert (time["name"], time["arguments"], time["status"]) == ("time", "{}", "completed")
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert answer["tools"] == TOOLS


async def test_a_stream() -> None:
    api = talker()
    events = await streamed(api, tools=TOOLS)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:2] == ["created", "in_progress"] and kinds[-1] == "completed"
    assert events[0]["response"]["output"] == [] and events[0]["response"]["status"] == "in_progress"
    shown = [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before][2:-1]
    text = ["content_part.added", "X.delta", "X.done", "content_part.done"]
    call = ["function_call_arguments.delta", "function_call_arguments.done"]
    expected = []
    for parts in (
        [part.replace("X", "reasoning_text") for part in text],
        [p.replace("X", "output_text") for p in text],
        call,
        call,
    ):
        expected += ["output_item.added", *parts, "output_item.done"]
    assert shown == expected
    final = events[-1]["response"]
    whole = await api.ok(PATH, {"input": "hi", "tools": TOOLS})
    assert without_ids(final) == without_ids(whole)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == final["output"]
    for index, item in enumerate(final["output"]):
        pieces = [event["delta"] for event in events if event.get("output_index") == index and "delta" in event]
        assert "".join(pieces) == (item["arguments"] if "arguments" in item else item["content"][0]["text"])
    ids = [item["id"] for item in final["output"]]
    assert all(event["item_id"] == ids[event["output_index"]] for event in events if "item_id" in event)


async def test_answers_that_are_cut_off() -> None:
    api = talker("Hello.")
    answer = await api.ok(PATH, {"input": "hi", "max_output_tokens": 3})
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["status"] == "incomplete" and answer["completed_at"] is None
    events = await streamed(api, max_output_tokens=3)
    assert events[-1]["type"] == "response.incomplete" and events[-1]["response"]["status"] == "incomplete"
    empty = await talker("").ok(PATH, {"input": "hi"})
    assert (empty["status"], empty["output"]) == ("completed", [])


async def test_json_that_is_closed_early_does_not_fill_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine closes JSON in time, which may leave tokens over."""
    api = talker("Hello.")
    submit = api.server.engine.submit

    def early(channel: Any, choice: int, submission: Submission, **fields: Any) -> RequestState:
        assert isinstance(submission.params, ResolvedParams)
        params = msgspec.structs.replace(submission.params, max_tokens=submission.params.max_tokens - 2)
        return submit(channel, choice, msgspec.structs.replace(submission, params=params), **fields)

    monkeypatch.setattr(api.server.engine, "submit", early)
    answer = await api.ok(PATH, {"input": "hi", "max_output_tokens": 5})
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    message = await api.ok(
        "/v1/messages", {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    )
    assert message["stop_reason"] == "max_tokens"


async def test_logprobs() -> None:
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    api = talker("Hi!")
    (part,) = (await api.ok(PATH, {"input": "hi", **fields}))["output"][0]["content"]
    assert [entry["token"] for entry in part["logprobs"][:3]] == ["H", "i", "!"]
    assert len(part["logprobs"][0]["top_logprobs"]) == 1
    events = await streamed(api, **fields)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == part["logprobs"][:3]
    assert (await api.ok(PATH, {"input": "hi"}))["output"][0]["content"][0]["logprobs"] == []


async def test_structured_outputs() -> None:
    api = talker('{"city": "x"}')
    wanted = {"type": "json_schema", "name": "place", "schema": CITY, "strict": True}
    answer = await api.ok(PATH, {"input": "hi", "text": {"format": wanted}})
    assert answer["text"]["format"]["schema"] == CITY
    grammar = api.server.engine.submitted[0].grammar
    assert grammar is not None and json.loads(grammar.text) == {**CITY, "additionalProperties": False}
    bare = {"format": {"type": "json_schema"}}
    assert (await api.error(PATH, {"input": "hi", "text": bare}))["param"] == "text.format"


# -- conversations


def messages_of(items: Any) -> Any:
    return msgspec.to_builtins(input_messages(items))


def test_input() -> None:
    assert messages_of("hi") == [{"role": "user", "content": "hi"}]
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "id": "fc_1", "status": "completed"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "y"}]},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]

    def call(id: str, name: str) -> Any:
        return {"id": id, "type": "function", "function": {"name": name, "arguments": "{}"}}

    assert messages_of(items) == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b", "reasoning": "t", "tool_calls": [call("1", "f"), call("2", "g")]},
        {"role": "tool", "content": "x", "tool_call_id": "1", "name": "f"},
        {"role": "tool", "content": [{"type": "text", "text": "y"}], "tool_call_id": "2", "name": "g"},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]


def test_output_goes_back_as_one_message() -> None:
    items: list[OutputMessage | ReasoningItem | FunctionCallItem] = [
        ReasoningItem(id="1", content=[ReasoningText(text="t")]),
        OutputMessage(id="2", content=[OutputText(text="b")]),
        FunctionCallItem(id="3", call_id="c", name="f", arguments="{}"),
    ]
    (message,) = output_messages(items)
    assert (message.reasoning, message.content) == ("t", "b")
    assert message.tool_calls is not None and message.tool_calls[0]["id"] == "c"


def test_tools_and_choices() -> None:
    chosen = {"type": "function", "name": "time"}
    chat = to_chat_request(ResponsesRequest(input="hi", tools=TOOLS, tool_choice=chosen))
    assert chat.tools is not None
    assert chat.tools[0]["function"] == {
        "name": "weather",
        "description": "Tells it.",
        "parameters": CITY,
        "strict": True,
    }
    assert chat.tools[1] == {"type": "function", "function": {"name": "time"}}
    assert chat.tool_choice == {"type": "function", "function": {"name": "time"}}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [chosen]}
    chat = to_chat_request(ResponsesRequest(input="hi", tools=TOOLS, tool_choice=allowed))
    assert chat.tool_choice == {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "time"}}]},
    }
    assert to_chat_request(ResponsesRequest(input="hi", tools=[], tool_choice="auto")).tools is None


async def test_a_conversation_that_goes_on() -> None:
    api = talker("Yes.")
    first = await api.ok(PATH, {"input": "a", "instructions": "S"})
    assert prompt_of(api).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na")
    second = await api.ok(PATH, {"input": "b", "previous_response_id": first["id"]})
    begun = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nb<|im_end|>\n"
    assert prompt_of(api) == begun + "<|im_start|>assistant\n", "instructions are not remembered"
    assert second["previous_response_id"] == first["id"]
    events = await streamed(api, input="c", previous_response_id=second["id"])
    assert prompt_of(api).startswith(begun)
    third = events[-1]["response"]["id"]
    assert (await api.get(f"{PATH}/{third}")).json()["status"] == "completed"


async def test_what_is_not_stored_is_not_there() -> None:
    api = talker("Yes.")
    answer = await api.ok(PATH, {"input": "a", "store": False})
    assert answer["store"] is False
    error = error_of(await api.get(f"{PATH}/{answer['id']}"), 404)
    assert (error["type"], error["param"]) == ("not_found_error", "response_id")
    error = await api.error(PATH, {"input": "b", "previous_response_id": answer["id"]}, 404)
    assert error["param"] == "previous_response_id"
    none = talker("Yes.", ServerConfig(max_stored_responses=0))
    assert (await none.ok(PATH, {"input": "a"}))["store"] is False
    assert (await none.error(PATH, {"input": "a", "background": True}))["param"] == "background"


async def test_retrieve_and_delete() -> None:
    api = talker("Yes.")
    answer = await api.ok(PATH, {"input": "a"})
    path = f"{PATH}/{answer['id']}"
    assert (await api.get(path)).json() == answer
    assert error_of(await api.get(f"{path}?stream=true"), 400)["param"] == "stream"
    assert error_of(await api.post(f"{path}/cancel"), 400)["param"] == "response_id"
    deleted = (await api._client.delete(path)).json()
    assert deleted == {"id": answer["id"], "object": "response", "deleted": True}
    for response in (await api.get(path), await api._client.delete(path), await api.post(f"{path}/cancel")):
        error_of(response, 404)


# -- in the background


async def status_of(api: Api, response_id: str) -> Any:
    return (await api.get(f"{PATH}/{response_id}")).json()


async def finished(api: Api, response_id: str) -> Any:
    task = api.server.app.state.responses.get(response_id).task
    assert task is not None
    await asyncio.wait([task])
    return await status_of(api, response_id)


async def test_background() -> None:
    api = talker("Hello.")
    answer = await api.ok(PATH, {"input": "a", "background": True})
    assert (answer["status"], answer["background"], answer["output"]) == ("queued", True, [])
    error = await api.error(PATH, {"input": "b", "previous_response_id": answer["id"]})
    assert error["param"] == "previous_response_id"
    response = await finished(api, answer["id"])
    assert (response["status"], response["output"][0]["content"][0]["text"]) == ("completed", "Hello.")
    assert response["usage"]["output_tokens"] == 7
    await api.ok(PATH, {"input": "b", "previous_response_id": answer["id"]})
    assert "Hello." in prompt_of(api)
    # To cancel what is complete changes nothing.
    assert (await api.post(f"{PATH}/{answer['id']}/cancel")).json() == response


async def test_background_in_an_engine_that_does_not_exist() -> None:
    headers = {"X-data-parallel-rank": "one"}
    answer = await talker("Hello.").post(PATH, {"input": "a", "background": True}, headers=headers)
    assert error_of(answer, 400)["param"] == "X-data-parallel-rank"


async def test_background_is_cancelled() -> None:
    api = Api(FakeServer())
    api.server.engine.steps_left = 5
    answer = await api.ok(PATH, {"input": "hello", "background": True, "stream": False})
    await until(lambda: api.server.engine.steps_left == 0)
    assert (await status_of(api, answer["id"]))["status"] == "in_progress"
    cancelled = (await api.post(f"{PATH}/{answer['id']}/cancel")).json()
    assert cancelled["status"] == "cancelled"
    assert len(api.server.engine.aborted) == 1 and not api.server.engine.num_unfinished
    assert await status_of(api, answer["id"]) == cancelled
    answer = await api.ok(PATH, {"input": "hello", "background": True})
    await api._client.delete(f"{PATH}/{answer['id']}")
    assert len(api.server.engine.aborted) == 2 and not api.server.engine.num_unfinished


async def test_background_fails() -> None:
    api = Api(FakeServer())
    api.server.engine.steps_left = 5
    answer = await api.ok(PATH, {"input": "hello", "background": True})
    api.server.engine.fail("bad logits")
    response = await finished(api, answer["id"])
    assert (response["status"], response["error"]) == ("failed", {"code": "server_error", "message": "bad logits"})
    error = await api.error(PATH, {"input": "x" * 600, "background": True})
    assert "maximum context length" in error["message"]
    api.server.engine.max_queued = 0
    await api.error(PATH, {"input": "x", "background": True}, 429)
    assert len(api.server.app.state.responses) == 1


async def test_background_is_streamed_and_read_again() -> None:
    api = talker("Hello.")
    events = await streamed(api, background=True)
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["response.created", "response.queued", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    path = f"{PATH}/{events[0]['response']['id']}"
    for after in range(-1, len(events)):
        response = await api.get(f"{path}?stream=true&starting_after={after}")
        assert response.headers["content-type"].startswith("text/event-stream")
        assert (events_in(response.text) if response.text else []) == events[after + 1 :]
    assert events_in((await api.get(f"{path}?stream=true")).text) == events
    assert error_of(await api.get(f"{path}?stream=true&starting_after=x"), 400)["param"] == "starting_after"


async def test_a_silent_stream_has_comments(clock: LoopClock) -> None:
    api = Api(FakeServer(ServerConfig(sse_keep_alive_interval=1000)))
    api.server.engine.steps_left = 3
    answer = await api.ok(PATH, {"input": "a", "background": True})
    stream = asyncio.create_task(streamed_text(api, answer["id"]))
    assert error_of(await stream, 400)["param"] == "stream"
    begun = asyncio.create_task(api.post(PATH, {"input": "hello", "background": True, "stream": True}))
    for _ in range(100):  # until it follows the events, of which none is left
        await asyncio.sleep(0)
    clock.advance(1001)
    await asyncio.sleep(0)
    api.server.engine.fail("over")
    assert ": keep-alive\n\n" in (await begun).text


async def streamed_text(api: Api, response_id: str) -> Any:
    return await api.get(f"{PATH}/{response_id}?stream=true")


# -- the store


def stored(number: int, text: str = "", status: Any = "completed") -> StoredResponse:
    response = ResponseObject(
        id=str(number),
        created_at=0,
        model="m",
        store=True,
        temperature=1,
        top_p=1,
        text=TextConfig(),
        reasoning=ReasoningConfig(),
        status=status,
    )
    return StoredResponse(response, [ChatMessage(role="user", content=text)])


def kept(store: ResponseStore) -> list[int]:
    return [number for number in range(20) if str(number) in store._stored]


def test_the_store_is_bounded() -> None:
    store = ResponseStore(3, 100_000)
    for number in range(5):
        store.add(stored(number))
    assert kept(store) == [2, 3, 4]
    store.add(stored(5, "x" * 95_000))
    assert kept(store) == [4, 5] or kept(store) == [5]
    store.add(stored(6, "x" * 200_000))
    assert kept(store) == [] and store.num_bytes == 0
    running = [stored(number, status="queued") for number in range(7, 10)]
    for each in running:
        store.add(each)
    store.add(stored(10))
    assert kept(store) == [7, 8, 9], "what is being generated stays"
    with pytest.raises(ValueError, match="still in progress"):
        store.add(stored(11, status="queued"))
    running[0].response.status = "completed"
    store.update(running[0], [ChatMessage(role="user", content="x" * 50_000)])
    assert store.num_bytes == sum(each.size for each in running) > 50_000
    store.remove("7")
    assert store.num_bytes == sum(each.size for each in running[1:])


# -- errors


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "body.input"),
        ({"input": 1}, "body.input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"background": True, "store": False}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "nope"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 9}, "temperature"),
        ({"text": {"format": {"type": "xml"}}}, "body.text.format.type"),
    ],
)
async def test_bad_requests(fields: dict[str, Any], param: str) -> None:
    api = talker()
    error = await api.error(PATH, {"input": "hi", **fields})
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert not api.server.engine.submitted


# -- the client


async def test_the_client() -> None:
    options: dict[str, Any] = {"model": "fake-model", "input": "hi", "tools": TOOLS}
    async with client_of(talker()) as client:
        whole = await client.responses.create(**options)
        async with client.responses.stream(**options) as stream:
            kinds = {event.type async for event in stream}
            folded = await stream.get_final_response()
        assert {"response.output_text.delta", "response.function_call_arguments.done"} <= kinds
        assert whole.output_text == folded.output_text == "Let me look.\n"
        assert [item.type for item in folded.output] == ["reasoning", "message", "function_call", "function_call"]
        again = await client.responses.retrieve(folded.id)
        assert again.output_text == folded.output_text
        await client.responses.delete(folded.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(folded.id)


async def test_the_client_s_parsed_text() -> None:
    class Place(pydantic.BaseModel):
        city: str

    async with client_of(talker('{"city": "Löwen"}')) as client:
        options: dict[str, Any] = {"model": "fake-model", "input": "hi", "text_format": Place}
        assert (await client.responses.parse(**options)).output_parsed == Place(city="Löwen")
        async with client.responses.stream(**options) as stream:
            async for _ in stream:
                pass
            assert (await stream.get_final_response()).output_parsed == Place(city="Löwen")


async def test_the_client_in_the_background() -> None:
    async with client_of(talker("Hello.")) as client:
        events = await client.responses.create(model="fake-model", input="hi", background=True, stream=True)
        seen = [event async for event in events]
        first = seen[0]
        assert first.type == "response.created"
        rest = await client.responses.retrieve(first.response.id, stream=True, starting_after=4)
        assert [event async for event in rest] == seen[5:]
        response = await client.responses.cancel(first.response.id)
        assert response.status == "completed"


@pytest.mark.parametrize("stream", [False, True])
async def test_every_token_of_a_text_has_its_log_probability(stream: bool) -> None:
    """Tokens that settle no text by themselves: parts of a character, and text that may begin a stop string."""
    model = ScriptedModel()
    emoji = [bytes([byte]) for byte in "😀".encode()]
    marker = model.says("emoji", "a", *emoji, "S", "T", "x", EOS)
    body = {"input": marker, "stop": ["STOP"], "include": ["message.output_text.logprobs"], "stream": stream}
    api = Api(model.fake())
    if stream:
        response = await api.post(PATH, body)
        deltas = [event for event in events_in(response.text) if event["type"] == "response.output_text.delta"]
        entries = [entry for delta in deltas for entry in delta["logprobs"]]
    else:
        answer = await api.ok(PATH, body)
        entries = answer["output"][0]["content"][0]["logprobs"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == "a😀STx"
    assert len(entries) == 8
