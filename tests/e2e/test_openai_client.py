"""The openai package, unmodified, against the real server with the demo model."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.server import PATIENCE, Server

MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of Japan?"}]
MODEL = "demo"


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[Server]:
    with Server("--model", str(demo_model), "--served-model-name", MODEL, "--api-key", "secret") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=16)
    assert answer.choices[0].message.content is not None
    assert "Tokyo" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens < 16


def test_chat_streamed_is_chat(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_prefix_cache_shows_in_the_usage(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Tell me about the river Thames. " * 10}]
    for _ in range(2):
        answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=4)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) >= 64


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["The sky is", "Grass is"], n=2, seed=3, max_tokens=6, logprobs=2, temperature=0.7
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    streamed = list(client.completions.create(model=MODEL, prompt="The sky is", seed=3, max_tokens=6, stream=True))
    again = client.completions.create(model=MODEL, prompt="The sky is", seed=3, max_tokens=6)
    assert "".join(chunk.choices[0].text for chunk in streamed) == again.choices[0].text


def test_stop_strings_span_tokens(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="The sky is", temperature=0, max_tokens=24).choices[0].text
    stop = whole[9:16]
    options: dict[str, Any] = {"model": MODEL, "prompt": "The sky is", "temperature": 0, "max_tokens": 24, "stop": stop}
    answer = client.completions.create(**options)
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert "".join(c.choices[0].text for c in client.completions.create(**options, stream=True)) == (
        answer.choices[0].text
    )


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_errors_are_the_client_s_own(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model=MODEL, prompt="word " * 9000)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=MESSAGES)
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


async def test_64_calls_at_once(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:

        async def ask(number: int) -> tuple[str, str]:
            options: dict[str, Any] = {
                "model": MODEL,
                "messages": [{"role": "user", "content": f"Count from {number}."}],
                "temperature": 0,
                "max_tokens": 8,
            }
            if number % 2:
                stream = await client.chat.completions.create(**options, stream=True)
                return "", "".join([c.choices[0].delta.content or "" async for c in stream])
            answer = await client.chat.completions.create(**options)
            return answer.id, answer.choices[0].message.content or ""

        answers = await asyncio.gather(*(ask(number) for number in range(64)))
    assert all(text for _, text in answers)


def test_a_client_that_goes_away_frees_its_blocks(server: Server) -> None:
    """Streaming and not, mid-prompt and mid-answer: soon nothing runs and no block is in use."""
    for stream in (True, False):
        for delay in (0.0, 0.05, 0.5):
            connection = socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0))
            body = json.dumps(
                {"prompt": "word " * 500, "max_tokens": 2000, "ignore_eos": True, "stream": stream, "n": 2, "seed": 1}
            )
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            time.sleep(delay)
            connection.close()
    deadline = time.monotonic() + PATIENCE
    while server.metric("vllm:num_requests_running") or server.metric("vllm:kv_cache_usage_perc"):
        assert time.monotonic() < deadline
        # A step must pass before the numbers show; this request makes some.
        server.post(
            "/v1/completions", {"prompt": "x", "max_tokens": 2}, headers={"Authorization": "Bearer secret"}
        ).raise_for_status()
