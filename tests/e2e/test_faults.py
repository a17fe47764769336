"""Processes die; streams do not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest

from engine_core.restart import MAX_DEATHS
from tests.e2e.poison.sitecustomize import POISON
from tests.e2e.server import PATIENCE, ROOT, Server
from tests.ports import free_port

T = TypeVar("T")

pytestmark = pytest.mark.alone  # streams must not be over before their process is killed

NUM_STREAMS = 8
MAX_TOKENS = 400
STILL_SECONDS = 15.0
"""Longer than anything may hang."""


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


class TooShortError(Exception):
    """Streams were over before anything could happen to them."""


def again(run: Callable[[], Awaitable[T]]) -> T:
    """Runs streams until they are long enough: a process that waits for a CPU hears of many tokens at once."""
    for _ in range(20):
        with contextlib.suppress(TooShortError):
            return asyncio.run(run())  # type: ignore[arg-type]
    raise AssertionError("the streams are too short for this test")


async def under_way(streams: list[Stream], tasks: list[asyncio.Task[None]], least: int = 20) -> None:
    """Waits until each stream has so many tokens.

    Raises:
        TooShortError: One of them ended first.
    """
    while min(len(stream.tokens) for stream in streams) < least:
        ended = [task.result() for task in tasks if task.done()]
        if len(ended) == len(tasks):
            break
        await asyncio.sleep(0.01)
    if any(task.done() for task in tasks):
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise TooShortError


async def run_streams(server: Server, kill: signal.Signals = signal.SIGKILL, *titles: str) -> list[Stream]:
    """Runs the streams; once they are under way, kills processes one after another.

    Raises:
        TooShortError: They ended before that.
    """
    streams = [Stream() for _ in range(NUM_STREAMS)]
    async with httpx.AsyncClient(base_url=server.url, timeout=240) as client:
        tasks = [asyncio.create_task(stream.read(client, body(i))) for i, stream in enumerate(streams)]
        for title in titles:
            await under_way(streams, tasks, min(len(stream.tokens) for stream in streams) + 20)
            server.kill(title, kill)
        await asyncio.gather(*tasks)
    return streams


@pytest.fixture(scope="module")
def flags(tiny_model: Path) -> list[str]:
    return ["--model", str(tiny_model), "--dtype", "float32", "--kv-cache-memory", "64MiB", "--max-model-len", "512"]


@pytest.fixture(scope="module")
def server(flags: list[str]) -> Iterator[Server]:
    with Server(*flags) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[Stream]:
    return asyncio.run(run_streams(server))


@pytest.mark.timeout(600)
def test_streams_survive_the_death_of_every_process_behind_the_api(server: Server, undisturbed: list[Stream]) -> None:
    num_restarts, num_kills = server.metric("octavo:engine_restarts_total"), server.num_kills
    for titles in (
        ("octavo engine_core",),
        ("octavo worker 0",),
        ("octavo worker 0", "octavo engine_core", "octavo worker 0") * 2,
    ):
        streams = again(partial(run_streams, server, signal.SIGKILL, *titles))
        for before, after in zip(undisturbed, streams, strict=True):
            assert after.tokens == before.tokens
            assert after.text == before.text
            assert after.finish_reason == before.finish_reason == "length"
            assert after.usage is not None and after.usage["completion_tokens"] == MAX_TOKENS
    server.restarted(num_restarts + 5)  # two deaths at once are one restart
    assert server.metric("octavo:engine_restarts_total") - num_restarts <= server.num_kills - num_kills
    server.rests()
    assert server.get("/health").status_code == 200


@pytest.mark.timeout(300)
@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_requests_that_come_during_a_restart_are_served(flags: list[str], cache: str) -> None:
    with Server(*flags, "--kv-cache-dtype", cache) as server:
        request = {**body(3), "stream": False}
        expected = server.post("/v1/completions", request).json()["choices"][0]["text"]
        server.child("octavo engine_core" if cache == "auto" else "octavo worker 0").kill()
        answer = server.post("/v1/completions", request)
        assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == expected


def poisonous(what: str) -> dict[str, str]:
    """The environment of a server that ``POISON`` does something to."""
    path = os.pathsep.join([str(ROOT / "tests/e2e/poison"), str(ROOT)])
    return {"PYTHONPATH": path, "OCTAVO_TEST_POISON": what}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", ["worker", "core"])
def test_a_poison_request_is_found_among_others(flags: list[str], what: str) -> None:
    async def run(server: Server) -> tuple[list[Stream], httpx.Response]:
        streams = [Stream() for _ in range(NUM_STREAMS)]
        async with httpx.AsyncClient(base_url=server.url, timeout=240) as client:
            tasks = [asyncio.create_task(stream.read(client, body(i))) for i, stream in enumerate(streams)]
            await under_way(streams, tasks)
            answer = await client.post("/v1/completions", json={"prompt": POISON, "max_tokens": 5})
            assert not any(task.done() for task in tasks), "the streams were too short for this test"
            await asyncio.gather(*tasks)
        return streams, answer

    with Server(*flags, env=poisonous(what)) as server:
        undisturbed = asyncio.run(run_streams(server))
        streams, answer = again(partial(run, server))
        for before, after in zip(undisturbed, streams, strict=True):
            assert (after.tokens, after.text, after.finish_reason) == (before.tokens, before.text, "length")
        assert answer.status_code == 500 and "10 minutes" in answer.json()["error"]["message"]
        assert server.metric("octavo:engine_restarts_total") == MAX_DEATHS
        refused = server.post("/v1/completions", {"prompt": POISON, "max_tokens": 5, "seed": 3})
        assert refused.status_code == 422 and int(refused.headers["retry-after"]) > 500
        assert server.metric("octavo:engine_restarts_total") == MAX_DEATHS


@pytest.mark.timeout(300)
def test_processes_that_hang_are_replaced(server: Server, undisturbed: list[Stream]) -> None:
    num_restarts = server.metric("octavo:engine_restarts_total")
    readiness: set[int] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            readiness.add(server.get("/readyz").status_code)
            assert server.get("/livez").status_code == 200

    with ThreadPoolExecutor(1) as threads:
        watching = threads.submit(watch)
        try:
            for title in ("octavo worker 0", "octavo engine_core"):
                before = server.metric("octavo:engine_restarts_total")
                while server.metric("octavo:engine_restarts_total") == before:  # one that is idle is awaited by nobody
                    streams = again(partial(run_streams, server, signal.SIGSTOP, title))
                    assert [stream.tokens for stream in streams] == [stream.tokens for stream in undisturbed]
        finally:
            stop.set()
        watching.result()
    assert server.metric("octavo:engine_restarts_total") >= num_restarts + 2
    assert readiness == {200, 503}


@pytest.mark.timeout(300)
def test_a_machine_that_stands_still_is_not_hung(server: Server, undisturbed: list[Stream]) -> None:
    num_restarts = server.metric("octavo:engine_restarts_total")
    tree = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]

    async def run() -> list[Stream]:
        streams = [Stream() for _ in range(NUM_STREAMS)]
        async with httpx.AsyncClient(base_url=server.url, timeout=240) as client:
            tasks = [asyncio.create_task(stream.read(client, body(i))) for i, stream in enumerate(streams)]
            await under_way(streams, tasks)
            for process in tree:
                process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(STILL_SECONDS)
            for process in tree:
                process.send_signal(signal.SIGCONT)
            await asyncio.gather(*tasks)
        return streams

    streams = again(run)
    assert [stream.tokens for stream in streams] == [stream.tokens for stream in undisturbed]
    assert server.metric("octavo:engine_restarts_total") == num_restarts


@pytest.mark.timeout(300)
def test_a_core_that_is_killed_while_the_model_loads_first(flags: list[str]) -> None:
    """What answers meanwhile says so."""
    port = free_port()
    killed: list[int] = []
    seen: set[tuple[str, int]] = set()

    def disturb() -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for path in ("/livez", "/readyz", "/startupz"):
                with contextlib.suppress(httpx.HTTPError):
                    seen.add((path, httpx.get(f"http://127.0.0.1:{port}{path}").status_code))
            if ("/startupz", 200) in seen:
                return
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if not killed and seen and "octavo engine_core" in " ".join(child.cmdline()):
                        child.kill()
                        killed.append(child.pid)
            time.sleep(0.02)

    with ThreadPoolExecutor(1) as threads:
        disturbing = threads.submit(disturb)
        with Server(*flags, "--port", str(port)) as server:
            assert server.post("/v1/completions", {**body(1), "stream": False}).status_code == 200
            disturbing.result()
    assert killed
    assert {("/livez", 200), ("/readyz", 503), ("/startupz", 503), ("/startupz", 200)} <= seen
    assert ("/livez", 503) not in seen


@pytest.mark.timeout(300)
def test_no_child_outlives_the_api(flags: list[str]) -> None:
    server = Server(*flags)
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(children) == 2
    os.kill(server.process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=60)
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
