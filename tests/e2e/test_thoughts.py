"""Constraints that begin after the thought, over a real engine: models that think, never stop to, or do not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.e2e.server import Server
from tests.routes import CHATS, Reply, reply_of, request
from tests.scripted import ScriptedModel

TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if enable_thinking is false %}<think></think>{% elif opens %}<think>{% endif %}"
)
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
TOOL = {"name": "f", "parameters": NUMBER}
SAMPLED: dict[str, Any] = {"temperature": 1.5, "seed": 5, "max_tokens": 60}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model that thinks "Hm." and then would say "No"; after "well" it never stops to think."""
    model = ScriptedModel(special=["<think>", "</think>"], chat_template=TEMPLATE)
    model.says("think", "<think>", "Hm", ".", "</think>", "No")
    model.says("loop", "<think>")
    model.says("well", "well", "well", after="well")
    folder = model.checkpoint(tmp_path_factory.mktemp("thinker"))
    flags = ("--reasoning-parser", "qwen3", "--max-model-len", "256", "--max-num-seqs", "16")
    with Server("--model", str(folder), "--served-model-name", "fake-model", *flags) as running:
        yield running


def wants_number(route: str) -> dict[str, Any]:
    schema = {"type": "json_schema", "schema": NUMBER}
    if route == "chat":
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": NUMBER}}}
    return {"text": {"format": {"name": "n", **schema}}} if route == "responses" else {"output_format": schema}


def ask(server: Server, route: str, prompt: str, *, stream: bool = False, **fields: Any) -> Reply:
    path, body = request(route, prompt, stream=stream, **fields)
    response = server.post(path, body)
    assert response.status_code == 200, response.text
    return reply_of(route, response.text, stream=stream)


@pytest.mark.parametrize("route", CHATS)
@pytest.mark.parametrize("stream", [False, True])
def test_it_thinks_and_then_obeys(server: Server, route: str, stream: bool) -> None:
    reply = ask(server, route, "<say:think>", stream=stream, **wants_number(route))
    assert reply.reasoning == "Hm." and isinstance(json.loads(reply.text)["n"], int)
    choice: Any = {"type": "any"} if route == "messages" else "required"
    reply = ask(server, route, "<say:think>", stream=stream, tools=[TOOL], tool_choice=choice, max_tokens=150)
    assert reply.reasoning == "Hm." and not reply.text
    assert reply.calls and all(isinstance(json.loads(arguments)["n"], int) for _, arguments in reply.calls)


@pytest.mark.parametrize("stream", [False, True])
def test_a_thought_without_end_is_ended_in_time(server: Server, stream: bool) -> None:
    for max_tokens in (12, 20, 40):
        fields = {**wants_number("chat"), "max_tokens": max_tokens, "stream": stream}
        begun = [{"role": "assistant", "content": "<think>well"}]
        body = {"messages": begun, "continue_final_message": True, "temperature": 0, **fields}
        response = server.post("/v1/chat/completions", body)
        reply = reply_of("chat", response.text, stream=stream)
        assert set(reply.reasoning.replace("well", "+")) == {"+"} and reply.finish == "length"
        assert isinstance(json.loads(reply.text)["n"], int)
        budget = reply_of(
            "chat", server.post("/v1/chat/completions", {**body, "thinking_token_budget": 2}).text, stream=stream
        )
        assert budget.reasoning == "wellwell" and isinstance(json.loads(budget.text)["n"], int)
    response = server.post("/v1/chat/completions", {**body, "max_tokens": 3})
    assert response.status_code == 400 and response.json()["error"]["param"] == "max_tokens"


def test_without_a_thought_the_first_token_obeys(server: Server) -> None:
    off: Any = {"chat_template_kwargs": {"enable_thinking": False}}
    at_once: Any = {"structured_outputs": {"enable_in_reasoning": True}, "chat_template_kwargs": {"opens": True}}
    both: Any = {"structured_outputs": {"enable_in_reasoning": True}}
    setups: list[dict[str, Any]] = [off, at_once, both]
    for fields in setups:
        reply = ask(server, "chat", "<say:think>", **wants_number("chat"), **fields)
        assert not reply.reasoning and isinstance(json.loads(reply.text)["n"], int)
    reply = ask(server, "chat", "hello", **wants_number("chat"), **{**SAMPLED, "chat_template_kwargs": {"opens": True}})
    assert reply.reasoning.startswith("Hm.") and isinstance(json.loads(reply.text)["n"], int)


def test_the_same_beside_others_and_over_a_restart(server: Server) -> None:
    """Also when the engine core dies in the middle of a thought."""

    def body(number: int, **fields: Any) -> dict[str, Any]:
        begun = [{"role": "assistant", "content": "<think>well"}]
        return {
            "messages": begun,
            "continue_final_message": True,
            **wants_number("chat"),
            **SAMPLED,
            "seed": number,
            **fields,
        }

    def one(number: int) -> Reply:
        return reply_of("chat", server.post("/v1/chat/completions", body(number)).text)

    alone = [one(number) for number in range(3)]
    assert all(reply.reasoning and isinstance(json.loads(reply.text)["n"], int) for reply in alone)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(one, range(3))) == alone
    for number, expected in enumerate(alone[:1]):
        url = f"{server.url}/v1/chat/completions"
        lines = []
        with httpx.stream("POST", url, json=body(number, stream=True), timeout=120) as response:
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) == 20:
                    assert "well" in "".join(lines) and "content" not in lines[-2]
                    server.child("octavo engine_core").kill()
        assert reply_of("chat", "\n".join(lines), stream=True) == expected
