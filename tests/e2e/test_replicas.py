"""Several engines behind one API: requests spread, and go on in another engine when theirs dies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from executor.nodes.key_files import create_key_file
from tests.e2e.rank_harness import Agent
from tests.e2e.server import PATIENCE, Server
from tests.e2e.test_faults import MAX_TOKENS, NUM_STREAMS, Stream, body
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]


async def run_streams(server: Server, *disturbances: str | Callable[[], None]) -> list[Stream]:
    """Runs the streams; kills each process, or does something else, once 40 tokens more have come."""
    streams = [Stream() for _ in range(NUM_STREAMS)]
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        tasks = [asyncio.create_task(stream.read(client, body(i))) for i, stream in enumerate(streams)]
        for disturbance in disturbances:
            num_tokens = sum(len(stream.tokens) for stream in streams)
            while sum(len(stream.tokens) for stream in streams) < num_tokens + 40:
                ended = [task.result() for task in tasks if task.done()]
                if len(ended) == len(tasks):
                    break
                await asyncio.sleep(0.001)
            if isinstance(disturbance, str):
                find(server, disturbance).kill()
            else:
                disturbance()
        await asyncio.gather(*tasks)
    return streams


def find(server: Server, title: str) -> psutil.Process:
    """An engine core by its title, or the worker of one: ``worker of TITLE``."""
    core = server.child(title.removeprefix("worker of "))
    if not title.startswith("worker of "):
        return core
    deadline = time.monotonic() + PATIENCE
    while not (workers := core.children()):  # it has just been started itself
        assert time.monotonic() < deadline, "".join(server.errors)
        time.sleep(0.01)
    return workers[0]


@pytest.mark.timeout(300)
def test_streams_go_on_in_another_engine(tiny_model: Path) -> None:
    flags = ["--model", str(tiny_model), "--dtype", "float32", "--kv-cache-memory", "64MiB", "--max-model-len", "512"]
    slow = {"OCTAVO_CPU_CAPABILITY": "reference"}  # so that the api and this process hear of tokens before the last
    with Server(*flags, "--data-parallel-size", "2", env=slow) as server:
        undisturbed = asyncio.run(run_streams(server))
        num_kills = 0
        for title in ("octavo engine_core 0", "worker of octavo engine_core 1"):
            moved = server.metric("octavo:streams_moved_total")
            while server.metric("octavo:streams_moved_total") == moved:  # its streams may have ended before it died
                streams = asyncio.run(run_streams(server, title))
                server.restarted(num_kills := num_kills + 1)
                for before, after in zip(undisturbed, streams, strict=True):
                    assert after.tokens == before.tokens
                    assert after.text == before.text
                    assert after.usage is not None and after.usage["completion_tokens"] == MAX_TOKENS
        server.rests()
        answers = [
            server.post("/v1/completions", {**body(1), "stream": False}, headers={"X-data-parallel-rank": rank})
            for rank in ("0", "1", "2", "x")
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 400, 400]
        assert {answer.json()["choices"][0]["text"] for answer in answers[:2]} == {undisturbed[1].text}
        assert "ranks 0 to 1" in answers[2].json()["error"]["message"]
        assert server.get("/load").json() == {"server_load": 0}
        text = server.get("/metrics").text
        for engine in "01":
            assert f'vllm:request_success_total{{engine="{engine}",finished_reason="length"' in text
        shares = [find(server, f"worker of octavo engine_core {rank}").cpu_affinity() for rank in range(2)]
        cores = set(psutil.Process().cpu_affinity())
        assert set(shares[0]) | set(shares[1]) == cores
        assert len(cores) < 2 or not set(shares[0]) & set(shares[1])


@pytest.mark.timeout(300)
def test_engines_of_two_machines(tiny_model: Path, tmp_path: Path) -> None:
    """Played by processes of this one; the other is lost."""
    key = tmp_path / "key"
    create_key_file(key)
    port = free_port()
    both = ["--model", str(tiny_model), "--dtype", "float32", "--data-parallel-size", "2", "--cluster-key", str(key)]
    both += ["--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(port)]
    slow = {"OCTAVO_CPU_CAPABILITY": "reference"}  # so that the api and this process hear of tokens before the last
    others = [*both, "--headless", "--data-parallel-start-rank", "1", "--num-threads", "1"]
    flags = [*both, "--data-parallel-size-local", "1", "--kv-cache-memory", "64MiB", "--max-model-len", "512"]
    agents = [Agent(*others, env=slow)]
    try:
        with Server(*flags, "--num-threads", "1", env=slow) as server:
            undisturbed = asyncio.run(run_streams(server))

            def kill_machine() -> None:
                agents[-1].kill()
                agents.append(Agent(*others, env=slow))

            while not server.metric("octavo:streams_moved_total"):  # its streams may have ended before it died
                restarts = server.metric("octavo:engine_restarts_total")
                streams = asyncio.run(run_streams(server, kill_machine))
                server.restarted(int(restarts) + 1)
                for before, after in zip(undisturbed, streams, strict=True):
                    assert (after.tokens, after.text) == (before.tokens, before.text)
            answer = server.post("/v1/completions", {**body(1), "stream": False}, headers={"X-data-parallel-rank": "1"})
            assert answer.json()["choices"][0]["text"] == undisturbed[1].text
        assert agents[-1].wait() == 0, "the server has said goodbye"
    finally:
        for agent in agents:
            agent.kill()


@pytest.mark.timeout(300)
def test_engines_on_machines_that_ray_provides(tiny_model: Path) -> None:
    """Through a stand-in for Ray; all processes but its own are real."""
    flags = ["--model", str(tiny_model), "--dtype", "float32", "--kv-cache-memory", "64MiB", "--max-model-len", "512"]
    flags += ["--data-parallel-size", "2", "--data-parallel-backend", "ray", "--num-threads", "1"]
    port = str(free_port())
    stand_ins = {"PYTHONPATH": str(ROOT / "tests" / "stand_ins")}
    with Server(*flags, "--data-parallel-rpc-port", port, env=stand_ins) as server:
        ask = partial(server.post, "/v1/completions", {**body(1), "stream": False})
        answers = [ask(headers={"X-data-parallel-rank": rank}).json() for rank in "01"]
        assert answers[0]["choices"][0]["text"] == answers[1]["choices"][0]["text"]
        server.child("octavo engines 1-1")
