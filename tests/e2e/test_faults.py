"""Processes die; streams do not."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.server import Server

NUM_STREAMS = 8
MAX_TOKENS = 300


def body(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "prompt": [(number * 7 + i * i) % 250 + 3 for i in range(20 + number)],
        "max_tokens": MAX_TOKENS,
        "ignore_eos": True,
        "seed": number,
        "temperature": 0.8 if number % 2 else 0,
        "stream": True,
        "return_token_ids": True,
        **fields,
    }


class Stream:
    """One open stream: its tokens so far."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None

    async def read(self, client: httpx.AsyncClient, request: dict[str, Any]) -> None:
        request = {**request, "stream_options": {"include_usage": True}}
        async with client.stream("POST", "/v1/completions", json=request) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                assert "error" not in event, event
                if event["choices"]:
                    choice = event["choices"][0]
                    self.tokens += choice["token_ids"]
                    self.text += choice["text"]
                    self.finish_reason = choice["finish_reason"]
                else:
                    self.usage = event["usage"]


async def run_streams(server: Server, kill: signal.Signals | None = None, *titles: str) -> list[Stream]:
    """Runs the streams; once they are under way, kills processes one after another."""
    streams = [Stream() for _ in range(NUM_STREAMS)]
    async with httpx.AsyncClient(base_url=server.url, timeout=240) as client:
        tasks = [asyncio.create_task(stream.read(client, body(i))) for i, stream in enumerate(streams)]
        for number, title in enumerate(titles):
            least = 20 * (number + 1)
            while any(len(stream.tokens) < least for stream in streams):
                for task in tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.01)
            assert not any(task.done() for task in tasks), "the streams were too short for this test"
            assert kill is not None
            server.child(title).send_signal(kill)
        await asyncio.gather(*tasks)
    return streams


@pytest.fixture(scope="module")
def flags(tiny_model: Path) -> list[str]:
    return ["--model", str(tiny_model), "--dtype", "float32", "--kv-cache-memory", "64MiB", "--max-model-len", "512"]


@pytest.mark.timeout(600)
def test_streams_survive_the_death_of_every_process_behind_the_api(flags: list[str]) -> None:
    with Server(*flags) as server:
        undisturbed = asyncio.run(run_streams(server))
        for titles in (
            ("octavo engine_core",),
            ("octavo worker 0",),
            ("octavo worker 0", "octavo engine_core", "octavo worker 0"),
        ):
            streams = asyncio.run(run_streams(server, signal.SIGKILL, *titles))
            for before, after in zip(undisturbed, streams, strict=True):
                assert after.tokens == before.tokens
                assert after.text == before.text
                assert after.finish_reason == before.finish_reason == "length"
                assert after.usage is not None and after.usage["completion_tokens"] == MAX_TOKENS
        assert server.metric("octavo:engine_restarts_total") == 5
        assert server.metric("vllm:num_requests_running") == 0
        assert server.metric("vllm:kv_cache_usage_perc") == 0
        assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.timeout(300)
def test_requests_that_come_during_a_restart_are_served(flags: list[str]) -> None:
    with Server(*flags) as server:
        request = {**body(3), "stream": False}
        expected = server.post("/v1/completions", request).json()["choices"][0]["text"]
        server.child("octavo engine_core").kill()
        answer = server.post("/v1/completions", request)
        assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == expected


@pytest.mark.timeout(300)
def test_no_child_outlives_the_api(flags: list[str]) -> None:
    server = Server(*flags)
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(children) == 2
    os.kill(server.process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    server.stop()


@pytest.mark.timeout(300)
def test_process_titles(flags: list[str]) -> None:
    with Server(*flags) as server:
        processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
        titles = {" ".join(process.cmdline()).strip() for process in processes}
        assert titles == {"octavo api", "octavo engine_core", "octavo worker 0"}


@pytest.mark.timeout(300)
def test_open_streams_finish_after_sigterm(flags: list[str]) -> None:
    with Server(*flags) as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body(1), timeout=120) as response:
            lines = response.iter_lines()
            next(lines)
            for title in ("octavo engine_core", "octavo worker 0"):  # as service managers do
                server.child(title).send_signal(signal.SIGTERM)
            server.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        assert server.stop() == 0
