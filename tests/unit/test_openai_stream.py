"""What happens to a stream beside its tokens: clients that leave, faults, silence, the end of the server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest

from api.config import ServerConfig
from api.http import stream
from api.openai.protocol import ChatCompletionChunk, CompletionResponse
from tests.fakes import Connection, FakeServer
from tests.unit.conftest import Api, LoopClock, error_of

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
INTERVAL = 1000.0
"""Seconds between comments."""
ENDLESS = {"prompt": ["a", "b"], "max_tokens": 400, "ignore_eos": True, "n": 2, "seed": 1}


async def until(condition: Callable[[], Any]) -> None:
    """Lets others run until something holds."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not come about")


def has_events(connection: Connection, number: int) -> bool:
    return len(data_of(connection)) == number


def data_of(connection: Connection) -> list[str]:
    return [line for line in connection.body.decode().split("\n\n") if line]


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 20])
async def test_a_client_that_leaves_aborts_its_requests(server: FakeServer, is_streamed: bool, steps: int) -> None:
    server.engine.steps_left = steps
    connection = Connection(server.app, COMPLETIONS, {**ENDLESS, "stream": is_streamed})
    await until(lambda: server.engine.num_unfinished == 4 and not server.engine.steps_left)
    connection.leave()
    await connection.task
    assert server.engine.num_unfinished == 0
    assert len(server.engine.aborted) == 4
    assert server.traffic.num_open == 0
    assert not is_streamed or b"[DONE]" not in connection.body


async def test_leaving_is_noticed_within_a_turn(server: FakeServer) -> None:
    server.engine.steps_left = 3
    connection = Connection(server.app, COMPLETIONS, {**ENDLESS, "stream": True})
    await until(lambda: server.engine.num_unfinished == 4 and not server.engine.steps_left)
    connection.leave()
    for _ in range(3):
        await asyncio.sleep(0)
    assert server.engine.num_unfinished == 0
    await connection.task


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_cancelled_handler_aborts_its_requests(server: FakeServer, is_streamed: bool) -> None:
    server.engine.steps_left = 5
    connection = Connection(server.app, COMPLETIONS, {**ENDLESS, "stream": is_streamed})
    await until(lambda: server.engine.num_unfinished == 4 and not server.engine.steps_left)
    connection.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connection.task
    assert server.engine.num_unfinished == 0
    assert server.traffic.num_open == 0


async def test_a_client_that_does_not_read_aborts_when_it_leaves(server: FakeServer) -> None:
    """The task is stuck in send(), not in waiting for tokens."""
    connection = Connection(server.app, COMPLETIONS, {**ENDLESS, "stream": True})
    stuck = asyncio.Event()

    async def send(message: Any) -> None:
        connection.sent.append(message)
        if len(connection.sent) == 3:
            await stuck.wait()

    connection.send = send
    await until(lambda: len(connection.sent) == 3)
    connection.leave()
    await until(lambda: server.engine.num_unfinished == 0)
    stuck.set()
    await connection.task


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_an_error_after_the_head_is_an_event(server: FakeServer, path: str) -> None:
    server.engine.steps_left = 3
    prompt = {"prompt": "x"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x"}]}
    connection = Connection(server.app, path, {**prompt, "max_tokens": 50, "stream": True})
    await until(lambda: len(connection.sent) > 2)
    server.engine.fail("the model produced logits that are not numbers")
    await connection.task
    assert connection.status == 200
    *_, error = data_of(connection)
    assert json.loads(error.removeprefix("data: ")) == {
        "error": {
            "message": "the model produced logits that are not numbers",
            "type": "InternalServerError",
            "param": None,
            "code": 500,
        }
    }


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_an_error_before_the_first_token_has_its_status(server: FakeServer, is_streamed: bool) -> None:
    server.engine.steps_left = 0
    connection = Connection(server.app, COMPLETIONS, {**ENDLESS, "stream": is_streamed})
    await until(lambda: server.engine.num_unfinished == 4)
    server.engine.fail("no")
    await connection.task
    assert connection.status == 500
    assert json.loads(connection.body)["error"]["message"] == "no"
    assert (b"x-should-retry", b"false") in connection.sent[0]["headers"]
    assert server.engine.num_unfinished == 0


async def test_one_choice_that_fails_ends_the_others(server: FakeServer) -> None:
    server.engine.steps_left = 4
    connection = Connection(server.app, COMPLETIONS, {**ENDLESS, "stream": True})
    await until(lambda: server.engine.num_unfinished == 4 and not server.engine.steps_left)
    server.engine.fail_one("row went wrong")
    await connection.task
    assert b"row went wrong" in connection.body
    assert b"[DONE]" not in connection.body  # half of an answer must not look like a whole one
    assert server.engine.num_unfinished == 0


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_the_end_of_the_server(server: FakeServer, is_streamed: bool) -> None:
    server.engine.steps_left = 3
    connection = Connection(server.app, COMPLETIONS, {**ENDLESS, "stream": is_streamed})
    await until(lambda: server.engine.num_unfinished == 4 and not server.engine.steps_left)
    server.engine.fail_all("the server is shutting down")
    await connection.task
    error = (
        json.loads(data_of(connection)[-1].removeprefix("data: ")) if is_streamed else json.loads(connection.body)
    )["error"]
    assert (error["type"], error["code"]) == ("ServiceUnavailableError", 503)
    assert is_streamed or connection.status == 503


async def test_a_fault_of_ours_after_the_head_ends_the_stream(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.engine.steps_left = 2
    connection = Connection(server.app, COMPLETIONS, {"prompt": "x", "max_tokens": 50, "stream": True})
    await until(lambda: len(connection.sent) > 2)
    monkeypatch.setattr("api.openai.completions.CompletionReply.event", lambda self, delta: 1 / 0)
    server.engine.steps_left = None
    await connection.task
    *_, error = data_of(connection)
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "InternalServerError"
    assert "division" not in error
    assert server.engine.num_unfinished == 0


async def test_comments_while_nothing_comes(clock: LoopClock) -> None:
    server = FakeServer(ServerConfig(sse_keep_alive_interval=INTERVAL))
    server.engine.steps_left = 0
    connection = Connection(server.app, COMPLETIONS, {"prompt": "x", "max_tokens": 3, "stream": True})
    await until(lambda: server.engine.num_unfinished)
    for number in range(1, 4):
        clock.advance(INTERVAL)
        await until(partial(has_events, connection, number))
    assert connection.status == 200
    assert set(data_of(connection)) == {": keep-alive"}
    server.engine.steps_left = None
    await connection.task
    assert data_of(connection)[-1] == "data: [DONE]"


async def test_no_comments_while_tokens_come(clock: LoopClock) -> None:
    server = FakeServer(ServerConfig(sse_keep_alive_interval=INTERVAL))
    server.engine.steps_left = 1
    connection = Connection(server.app, COMPLETIONS, {"prompt": "x", "max_tokens": 12, "stream": True})
    for _ in range(12):
        await until(lambda: not server.engine.steps_left)
        clock.advance(0.6 * INTERVAL)
        server.engine.steps_left = 1
    await connection.task
    assert b"keep-alive" not in connection.body


async def test_no_comments_if_unwanted(clock: LoopClock) -> None:
    server = FakeServer(ServerConfig(sse_keep_alive_interval=0))
    server.engine.steps_left = 0
    connection = Connection(server.app, COMPLETIONS, {"prompt": "x", "max_tokens": 3, "stream": True})
    await until(lambda: server.engine.num_unfinished)
    clock.advance(1000 * INTERVAL)
    for _ in range(10):
        await asyncio.sleep(0)
    assert connection.sent == []
    server.engine.steps_left = None
    await connection.task


async def test_headers_of_a_stream(api: Api) -> None:
    response = await api.post(COMPLETIONS, {"prompt": "x", "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers


async def test_events_that_are_ready_together_go_out_together(server: FakeServer) -> None:
    """But each token keeps an event of its own."""
    connection = Connection(server.app, COMPLETIONS, {"prompt": "x", "max_tokens": 20, "stream": True})
    held = asyncio.Event()

    async def send(message: Any) -> None:
        connection.sent.append(message)
        if len(connection.sent) == 2:
            await held.wait()

    connection.send = send
    await until(lambda: server.engine.num_unfinished == 0 and len(connection.sent) == 2)
    held.set()
    await connection.task
    assert len(connection.sent) == 3
    assert len(data_of(connection)) == 21


@pytest.mark.parametrize(("path", "kind"), [(COMPLETIONS, CompletionResponse), (CHAT, ChatCompletionChunk)])
@pytest.mark.parametrize("include_usage", [True, False])
async def test_plain_events_are_what_the_types_say(
    api: Api, path: str, kind: type[msgspec.Struct], include_usage: bool
) -> None:
    """Events that are put together from constant parts are those that encoding the whole would give."""
    text = 'quote " backslash \\ newline \n tab \t nul \0 é 🦁 \u2028'
    body = {"prompt": text, "messages": [{"role": "user", "content": text}], "max_tokens": 90, "stream": True}
    body["stream_options"] = {"include_usage": include_usage}
    response = await api.post(path, body)
    lines = response.text.split("\n\n")[:-2]
    assert len(lines) >= 90
    for line in lines:
        data = line.removeprefix("data: ").encode()
        assert msgspec.json.encode(msgspec.json.decode(data, type=kind)) == data


async def test_draining(api: Api) -> None:
    """Open requests go on, new ones are refused, and are told to close the connection."""
    server = api.server
    server.engine.steps_left = 2
    connection = Connection(server.app, COMPLETIONS, {"prompt": "x", "max_tokens": 9, "stream": True})
    await until(lambda: len(connection.sent) > 2)
    server.traffic.is_draining = True
    assert not await server.traffic.wait_idle(0.01)
    response = await api.post(COMPLETIONS, {"prompt": "x"})
    assert error_of(response, 503)["type"] == "ServiceUnavailableError"
    assert response.headers["connection"] == "close"
    assert (await api.get("/health")).status_code == 503
    assert (await api.get("/metrics")).status_code == 200
    server.engine.steps_left = None
    assert await server.traffic.wait_idle(5)
    await connection.task
    assert data_of(connection)[-1] == "data: [DONE]"


def test_the_mark_is_never_part_of_a_chunk() -> None:
    before, after = stream.split_at_mark(stream.event(b'{"a":"\\u0000","b":1}'))
    assert (before, after) == (b'data: {"a":', b',"b":1}\n\n')
