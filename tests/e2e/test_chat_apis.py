"""The three ways to talk with a model, by the clients' own packages, with the demo model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pydantic
import pytest

from tests.e2e.server import PATIENCE, Server

MODEL = "demo"
QUESTION = "What is the capital of Japan?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]


class Weather(pydantic.BaseModel):
    """Tells the weather of a city."""

    city: Literal["Paris", "London"]
    days: Literal[1, 2, 3]


class Time(pydantic.BaseModel):
    """Tells the time."""


class Capital(pydantic.BaseModel):
    country: Literal["France", "Spain"]
    capital: Literal["Paris", "Madrid"]


CHAT_TOOLS: list[Any] = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Time)]


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[Server]:
    flags = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"]
    with Server("--model", str(demo_model), "--served-model-name", MODEL, "--api-key", "secret", *flags) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Weather"}}])
def test_calls_that_are_forced(client: openai.OpenAI, choice: Any) -> None:
    """Whatever the model would like to say: a call that fits its schema, the same streamed and whole."""
    options: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "tools": CHAT_TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 100,
    }
    whole = client.chat.completions.parse(**options)
    with client.chat.completions.stream(**options) as stream:
        folded = stream.get_final_completion()
    for completion in (whole, folded):
        calls = completion.choices[0].message.tool_calls
        assert calls is not None and len(calls) == 1
        assert all(isinstance(call.function.parsed_arguments, (Weather, Time)) for call in calls)
        if choice != "required":
            assert [call.function.name for call in calls] == ["Weather"]
    one, other = (
        [call.function.arguments for call in completion.choices[0].message.tool_calls or ()]
        for completion in (whole, folded)
    )
    assert one == other


def test_auto_leaves_plain_answers_alone(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 16}
    plain = client.chat.completions.create(**options)
    with_tools = client.chat.completions.create(**options, tools=CHAT_TOOLS)
    assert with_tools.choices[0].message.content == plain.choices[0].message.content
    assert with_tools.choices[0].message.tool_calls is None


def test_messages(claude: anthropic.Anthropic) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 16, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(**options)
    assert whole.content[0].type == "text" and "Tokyo" in whole.content[0].text
    assert whole.stop_reason == "end_turn"
    with claude.messages.stream(**options) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens
    count = claude.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens
    assert count == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    tools: Any = [{"name": "weather", "input_schema": Weather.model_json_schema()}]
    called = claude.messages.create(**{**options, "max_tokens": 60}, tools=tools, tool_choice={"type": "any"})
    assert called.stop_reason == "tool_use" and called.content[0].type == "tool_use"
    Weather.model_validate(called.content[0].input)
    parsed = claude.messages.parse(**{**options, "max_tokens": 60}, output_format=Capital)
    assert isinstance(parsed.parsed_output, Capital)


def test_responses(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 16}
    first = client.responses.create(input=QUESTION, **options)
    assert "Tokyo" in first.output_text and first.status == "completed"
    with client.responses.stream(input=QUESTION, **options) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == first.output_text
    second = client.responses.create(input="Why?", previous_response_id=first.id, **options)
    assert second.usage is not None and first.usage is not None
    assert second.usage.input_tokens > first.usage.total_tokens
    parsed = client.responses.parse(input=QUESTION, text_format=Capital, model=MODEL, max_output_tokens=60)
    assert isinstance(parsed.output_parsed, Capital)
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(input="Why?", previous_response_id=first.id, **options)


def test_responses_in_the_background(server: Server, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "input": "Tell me a story.", "background": True}
    response = client.responses.create(**options, max_output_tokens=8)
    deadline = time.monotonic() + PATIENCE
    while response.status in ("queued", "in_progress") and time.monotonic() < deadline:
        time.sleep(0.05)
        response = client.responses.retrieve(response.id)
    assert response.status == "incomplete" and response.output_text
    long = client.responses.create(**options, extra_body={"ignore_eos": True})
    assert client.responses.cancel(long.id).status == "cancelled"
    events = client.responses.create(**options, stream=True, max_output_tokens=8)
    seen = list(events)
    assert seen[0].type == "response.created" and seen[-1].type == "response.incomplete"
    again = client.responses.retrieve(seen[0].response.id, stream=True, starting_after=3)
    assert list(again) == seen[4:]
