"""What is refused before any work, and work that ends with its client."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from api.admission import MAX_MESSAGES, MAX_OFFSET_CHARS, MAX_TEXT_CHARS, MAX_TOOLS, Turns
from api.engine.channel import MAX_TAKEN, Channel, Delta
from api.errors import RequestError
from api.generation import generation, served_model
from api.http.stream import FOLDED_AT_ONCE
from api.openai import structured
from api.openai.completions import CompletionReply
from api.openai.prompts import MAX_TEMPLATE_KWARGS
from api.params import sampling as params
from api.params.sampling import MAX_BAD_WORD_CHARS, MAX_LOGIT_BIAS, MAX_STOP_CHARS, SamplingParams
from api.server.middleware import WhileConnected
from tests.fakes import FakeServer
from tests.unit.conftest import Api

MESSAGE = {"role": "user", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REFUSED: list[tuple[str, dict[str, Any], str, int]] = [
    (CHAT, {"messages": [MESSAGE] * (MAX_MESSAGES + 1)}, "messages", MAX_MESSAGES),
    ("/tokenize", {"messages": [MESSAGE] * (MAX_MESSAGES + 1)}, "messages", MAX_MESSAGES),
    ("/v1/responses", {"input": [MESSAGE] * (MAX_MESSAGES + 1)}, "input", MAX_MESSAGES),
    (CHAT, {"messages": [MESSAGE], "tools": [TOOL] * (MAX_TOOLS + 1)}, "tools", MAX_TOOLS),
    ("/tokenize", {"messages": [MESSAGE], "tools": [TOOL] * (MAX_TOOLS + 1)}, "tools", MAX_TOOLS),
    (COMPLETIONS, {"prompt": "x", "stop": "x" * (MAX_STOP_CHARS + 1)}, "stop", MAX_STOP_CHARS),
    (COMPLETIONS, {"prompt": "x", "stop": ["x" * (MAX_STOP_CHARS // 2)] * 3}, "stop", MAX_STOP_CHARS),
    (COMPLETIONS, {"prompt": "x", "bad_words": ["x" * 1000] * 128}, "bad_words", MAX_BAD_WORD_CHARS),
    (
        COMPLETIONS,
        {"prompt": "x", "logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1)},
        "logit_bias",
        MAX_LOGIT_BIAS,
    ),
    (
        COMPLETIONS,
        {"prompt": "x", "n": 16384, "logit_bias": dict.fromkeys(range(1025), 1)},
        "logit_bias",
        1024,
    ),
    (COMPLETIONS, {"prompt": "x", "n": 16384, "allowed_token_ids": [1] * 1025}, "allowed_token_ids", 1024),
]


@pytest.mark.parametrize(("path", "body", "field", "bound"), REFUSED)
async def test_errors_name_field_and_bound(api: Api, path: str, body: dict[str, Any], field: str, bound: int) -> None:
    error = await api.error(path, {"max_tokens": 1, **body})
    assert error["param"] == field
    assert f"at most {bound}" in error["message"]
    assert not api.server.engine.submitted


async def test_messages_of_anthropic_are_counted_too(api: Api) -> None:
    body = {"model": "fake-model", "max_tokens": 1, "messages": [MESSAGE] * (MAX_MESSAGES + 1)}
    response = await api.post("/v1/messages", body)
    assert response.status_code == 400
    assert f"at most {MAX_MESSAGES}" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/detokenize", "/v1/embeddings", "/v1/responses", "/v1/messages"])
async def test_bodies_that_take_long_to_decode_are_refused(api: Api, path: str) -> None:
    body = b'{"unknown": [' + b"1," * 600_000 + b"1]}"
    response = await api.raw(path, body)
    assert response.status_code == 413
    assert "split it into smaller requests" in response.json()["error"]["message"]


async def test_a_body_within_all_bounds_is_served(api: Api) -> None:
    await api.complete(
        logit_bias=dict.fromkeys(range(200), 1),
        stop=["y" * (MAX_STOP_CHARS // 64)] * 64,
        bad_words=["zz"] * 128,
        allowed_token_ids=[*range(200)] * 1000,
    )


def test_values_of_a_refused_list_are_not_repeated() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(logit_bias=dict.fromkeys(range(100_000), 1.0))
    assert len(str(caught.value)) < 200


# -- resolved once ----------------------------------------------------------------------------------------------


def count_calls(monkeypatch: pytest.MonkeyPatch, *places: tuple[Any, str]) -> dict[str, int]:
    """Counts the calls of functions, by their names."""
    counts: dict[str, int] = {}
    for module, name in places:
        function = getattr(module, name)
        counts[name] = 0

        def counted(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return counts


SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}


@pytest.mark.parametrize(("path", "prompt"), [(CHAT, {"messages": [MESSAGE]}), (COMPLETIONS, {"prompt": "hi"})])
@pytest.mark.parametrize("n", [1, 700])
async def test_a_request_is_resolved_once(
    api: Api, monkeypatch: pytest.MonkeyPatch, path: str, prompt: dict[str, Any], n: int
) -> None:
    counts = count_calls(
        monkeypatch,
        (structured, "grammar_spec"),
        (served_model, "grammar_spec"),
        (params, "grammar_spec"),
        (served_model, "resolve_shared_params"),
        (served_model, "resolve_max_tokens"),
    )
    fields = {"response_format": SCHEMA, "logit_bias": {"5": 1}, "bad_words": ["abc"], "max_tokens": 1, "n": n}
    answer = await api.ok(path, {**prompt, **fields})
    assert len(answer["choices"]) == n
    assert counts == {"grammar_spec": 1, "resolve_shared_params": 1, "resolve_max_tokens": 1}


async def test_children_share_all_but_their_seeds(api: Api) -> None:
    await api.complete([5, 6, 7], n=600, logit_bias={"5": 1}, bad_words=["abc"], guided_choice=["a"], seed=7)
    messages = api.server.engine.submitted
    assert len(messages) == 600
    assert len({id(message.sampling_params.logit_bias) for message in messages if message.sampling_params}) == 1
    assert len({id(message.grammar) for message in messages}) == 1
    seeds = [message.sampling_params.seed for message in messages if message.sampling_params]
    assert seeds == [params.child_seed(7, child) for child in range(600)]
    assert len({message.request_id for message in messages}) == 600


async def test_others_have_their_turns_while_children_are_submitted(api: Api) -> None:
    engine = api.server.engine
    seen = set()

    async def watch() -> None:
        while len(engine.submitted) < 4000:
            seen.add(len(engine.submitted))
            await asyncio.sleep(0)

    watcher = asyncio.ensure_future(watch())
    await api.complete([5, 6, 7], n=4000, max_tokens=1)
    await asyncio.wait_for(watcher, 30)
    assert len(seen) > 10


async def test_what_has_started_ends_when_the_client_goes_halfway(server: FakeServer) -> None:
    server.engine.steps_left = 0
    connection = Connection(json.dumps({"prompt": [5, 6], "n": 4000, "max_tokens": 4}).encode())
    task = asyncio.ensure_future(server.app(post_scope(COMPLETIONS), connection.receive, connection.send))
    while not server.engine.submitted:  # noqa: ASYNC110
        await asyncio.sleep(0)
    connection.goes.set()
    await asyncio.wait_for(task, 30)
    assert len(server.engine.submitted) < 4000
    assert not server.engine.num_unfinished
    assert not connection.sent


async def test_arguments_of_calls_that_take_long_to_decode_are_refused(api: Api) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" + "1," * 600_000 + "1]"}}
    body = {"messages": [MESSAGE, {"role": "assistant", "tool_calls": [call]}, MESSAGE], "max_tokens": 1}
    error = await api.error(CHAT, body, 413)
    assert "values per request" in error["message"]


async def test_variables_of_templates_are_counted(api: Api) -> None:
    kwargs = {f"a{number}": number for number in range(MAX_TEMPLATE_KWARGS + 1)}
    error = await api.error(CHAT, {"messages": [MESSAGE], "chat_template_kwargs": kwargs})
    assert error["param"] == "chat_template_kwargs" and f"at most {MAX_TEMPLATE_KWARGS}" in error["message"]


# -- long inputs -------------------------------------------------------------------------------------------------


async def test_long_lists_of_ids_become_the_same_text(api: Api) -> None:
    tokenizer = api.server.model.tokenizer
    ids = [token for token in range(256) if token not in tokenizer.all_special_ids] * 40
    answer = await api.ok("/detokenize", {"tokens": ids})
    assert answer["prompt"] == tokenizer.decode(ids, False)
    error = await api.error("/detokenize", {"tokens": [*ids, 1 << 40]})
    assert error["param"] == "tokens"


async def test_long_texts_become_the_same_tokens(api: Api) -> None:
    tokenizer = api.server.model.tokenizer
    text = "Grüße aus Köln, " * 4000
    answer = await api.ok("/tokenize", {"prompt": text, "return_token_strs": True})
    ids = tokenizer.encode(text)
    assert answer["tokens"] == ids and answer["count"] == len(ids)
    assert answer["token_strs"] == [tokenizer.id_to_token(token) for token in ids]
    assert (await api.ok("/tokenize", {"prompt": "ab"}))["token_strs"] is None


async def test_texts_of_any_length_have_a_bound(api: Api) -> None:
    error = await api.error("/tokenize", {"prompt": "x" * (MAX_TEXT_CHARS + 1)})
    assert error["param"] == "prompt" and f"at most {MAX_TEXT_CHARS}" in error["message"]


@pytest.mark.parametrize("side", ["left", "right"])
async def test_offsets_of_a_truncated_prompt(api: Api, side: str) -> None:
    text = "one two three " * 1000
    fields = {"return_token_offsets": True, "truncate_prompt_tokens": 7, "truncation_side": side}
    answer = await api.complete(text, **fields)
    offsets = api.server.model.tokenizer.offsets(text)
    expected = [offsets[0], *offsets[-6:]] if side == "left" else offsets[:7]
    assert answer["choices"][0]["prompt_token_offsets"] == [list(pair) for pair in expected]


async def test_offsets_in_a_very_long_text_are_refused(api: Api) -> None:
    fields = {"return_token_offsets": True, "truncate_prompt_tokens": 7}
    error = await api.error(COMPLETIONS, {"prompt": "x" * (MAX_OFFSET_CHARS + 1), **fields})
    assert error["param"] == "prompt" and f"at most {MAX_OFFSET_CHARS}" in error["message"]


async def test_a_prompt_that_does_not_fit_is_not_echoed(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(api.server.model), "detokenize", None)
    body = {"prompt": [5] * (api.server.model.limits.max_model_len + 1), "echo": True, "max_tokens": 1}
    error = await api.error(COMPLETIONS, body)
    assert "maximum context length" in error["message"]


async def test_answers_in_one_piece_are_folded_in_turns(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    fold = CompletionReply.fold

    def counted(self: CompletionReply, deltas: Any) -> None:
        sizes.append(len(deltas))
        fold(self, deltas)

    monkeypatch.setattr(CompletionReply, "fold", counted)
    answer = await api.complete("ab", n=900, max_tokens=3)
    assert [choice["index"] for choice in answer["choices"]] == list(range(900))
    assert answer["usage"]["completion_tokens"] == 2700
    assert len(sizes) > 1 and max(sizes) <= FOLDED_AT_ONCE


async def test_answers_in_one_piece_are_written_down_in_turns(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = await api.complete("ab", n=40, max_tokens=3, logprobs=2, seed=1)
    turns: list[Turns] = []

    def short_turns(budget: object) -> Turns:
        turns.append(Turns(1))
        return turns[-1]

    monkeypatch.setattr(generation, "Turns", short_turns)
    spend = Turns.spend
    costs = []

    async def counted(self: Turns, cost: int) -> None:
        if self in turns:
            costs.append(cost)
        await spend(self, cost)

    monkeypatch.setattr(Turns, "spend", counted)
    answer = await api.complete("ab", n=40, max_tokens=3, logprobs=2, seed=1)
    assert answer["choices"] == plain["choices"]
    assert len(costs) == 42  # the choices, and what is around them


async def test_what_waits_for_a_slow_reader_is_taken_in_pieces() -> None:
    channel = Channel(asyncio.get_running_loop())
    for number in range(3 * MAX_TAKEN + 1):
        channel.push(Delta(number))
    sizes, turns = [], 0
    taken: list[int] = []

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counter = asyncio.create_task(count())
    while len(taken) < 3 * MAX_TAKEN + 1:
        deltas = await channel.take()
        sizes.append(len(deltas))
        taken += [delta.choice for delta in deltas]
    counter.cancel()
    assert sizes == [MAX_TAKEN] * 3 + [1] and taken == list(range(3 * MAX_TAKEN + 1))
    assert turns >= 3, "others had their turns between them"


# -- the client is gone ------------------------------------------------------------------------------------------


class Connection:
    """The server's side of one request: its body comes, then the client goes when it is told to."""

    def __init__(self, body: bytes) -> None:
        self.goes = asyncio.Event()
        self.sent: list[Message] = []
        self._messages: list[Message] = [
            {"type": "http.request", "body": body[:10], "more_body": True},
            {"type": "http.request", "body": body[10:], "more_body": False},
        ]

    async def receive(self) -> Message:
        if self._messages:
            return self._messages.pop(0)
        await self.goes.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)


def post_scope(path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        "client": None,
        "server": None,
    }


async def test_work_before_the_answer_ends_when_the_client_goes(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client goes while its prompt is tokenised; nothing is submitted afterwards."""
    begun, may_end = threading.Event(), threading.Event()
    encode = server.model.tokenizer.encode

    def slow_encode(text: str, add_special_tokens: bool = True) -> list[int]:
        begun.set()
        assert may_end.wait(30)
        return encode(text, add_special_tokens)

    monkeypatch.setattr(server.model.tokenizer, "encode", slow_encode)
    body = json.dumps({"prompt": "word " * 1000, "max_tokens": 1, "truncate_prompt_tokens": 4}).encode()
    connection = Connection(body)
    task = asyncio.ensure_future(server.app(post_scope(COMPLETIONS), connection.receive, connection.send))
    assert await asyncio.get_running_loop().run_in_executor(None, begun.wait, 30)
    connection.goes.set()
    await asyncio.wait_for(task, 30)  # although the tokenizer is not done
    may_end.set()
    assert not connection.sent
    assert not server.engine.submitted


async def test_an_answer_that_waits_for_the_end_of_the_connection_is_told() -> None:
    told = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request":
            pass
        told.append(message)

    connection = Connection(b"{}")
    connection.goes.set()
    await WhileConnected(app)({"type": "http"}, connection.receive, connection.send)
    assert told == [{"type": "http.disconnect"}]


async def test_only_the_end_of_the_connection_is_taken_for_it() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await receive()
        await asyncio.Event().wait()

    connection = Connection(b"{}" * 10)
    task = asyncio.ensure_future(WhileConnected(app)({"type": "http"}, connection.receive, connection.send))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    connection = Connection(b"{}" * 10)
    connection.goes.set()
    with pytest.raises(ClientDisconnect):
        await WhileConnected(app)({"type": "http"}, connection.receive, connection.send)
