"""Keeps a server under mixed load for a while and reports how the memory of each of its processes grows.

    python scripts/soak.py                             # half an hour on the demo model, four clients
    python scripts/soak.py --minutes 5 --json soak.json
    python scripts/soak.py -- --model folder --max-num-seqs 64

Chats and completions, streamed and not, with log probabilities, stops, schemas, forced tools and several choices;
embeddings, responses that go on, token counts; clients that leave, requests that are wrong, bodies that are refused.
The memory of a process is what it has in use (RSS). Its slope is fitted over the second half of the run. The KV cache,
whose pages are touched as they are first used, is small enough to be full by then. Linux only. Everything that is
started here is stopped here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from processes import Server, descendants, resident_bytes, signals_as_exceptions

KV_CACHE = "256MiB"
"""By default gigabytes, which fill for half an hour and would hide any other growth."""
WORDS = ["river", "stone", "light", "paper", "number", "answer", "garden", "window", "engine", "letter", "music"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}
Action = Callable[["Client"], Awaitable[None]]


class Client:
    """Sends random requests one after another."""

    def __init__(self, url: str, seed: int, pause: float, statuses: Counter[str]) -> None:
        self._pause = pause
        self.random = random.Random(seed)
        self._http = httpx.AsyncClient(base_url=url, timeout=120)
        self._statuses = statuses

    def text(self, most: int = 60) -> str:
        return " ".join(self.random.choices(WORDS, k=self.random.randint(1, most)))

    def chat_body(self, **fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": self.text()} for _ in range(self.random.randint(1, 3))]
        return {"messages": messages, "max_tokens": self.random.randint(1, 48), "temperature": 0.8, **fields}

    async def post(self, path: str, body: Any) -> Any:
        response = await self._http.post(path, json=body)
        self._statuses[f"{path} {response.status_code}"] += 1
        return response.json()

    async def stream(self, path: str, body: dict[str, Any], most_lines: int | None = None) -> None:
        """Reads a stream, or leaves it after some lines."""
        async with self._http.stream("POST", path, json={**body, "stream": True}) as response:
            number = 0
            async for _ in response.aiter_lines():
                number += 1
                if most_lines is not None and number > most_lines:
                    break
            self._statuses[f"{path} {response.status_code} {'left' if most_lines is not None else 'streamed'}"] += 1

    async def run(self, end: float) -> None:
        """Runs until the given time."""
        async with self._http:
            while time.monotonic() < end:
                await self.random.choice(ACTIONS)(self)
                if self._pause:
                    await asyncio.sleep(self.random.uniform(0, 2 * self._pause))


async def _responses(client: Client) -> None:
    first = await client.post("/v1/responses", {"input": client.text(), "max_output_tokens": 16})
    body = {"input": client.text(), "max_output_tokens": 16, "previous_response_id": first.get("id")}
    await client.post("/v1/responses", body)


async def _bad(client: Client) -> None:
    bodies: list[Any] = [
        {"messages": []},
        client.chat_body(temperature=9),
        client.chat_body(logit_bias={"x": 1}),
        client.chat_body(structured_outputs={"regex": f"({client.random.random()}"}),
        {"messages": [{"role": "user", "content": "x" * 400_000}]},
        {"messages": [{"role": "user", "content": "x"}] * 20_000},
    ]
    await client.post("/v1/chat/completions", client.random.choice(bodies))


ACTIONS: tuple[Action, ...] = (
    lambda client: client.stream("/v1/chat/completions", client.chat_body()),
    lambda client: client.stream("/v1/chat/completions", client.chat_body(n=3, logprobs=True, top_logprobs=5)),
    lambda client: client.stream("/v1/chat/completions", client.chat_body(max_tokens=200), most_lines=6),
    lambda client: client.post("/v1/chat/completions", client.chat_body(stop=["a", "the"])),
    lambda client: client.post(
        "/v1/chat/completions",
        client.chat_body(
            max_tokens=64, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        ),
    ),
    lambda client: client.post(
        "/v1/chat/completions",
        client.chat_body(max_tokens=64, structured_outputs={"regex": f"[a-z]{{{client.random.randint(2, 40)}}}"}),
    ),
    lambda client: client.post(
        "/v1/chat/completions", client.chat_body(max_tokens=64, tools=[TOOL], tool_choice="required")
    ),
    lambda client: client.post("/v1/completions", {"prompt": client.text(200), "max_tokens": 8, "echo": True}),
    lambda client: client.post("/v1/embeddings", {"input": [client.text() for _ in range(5)]}),
    lambda client: client.stream("/v1/messages", {"model": "soak", **client.chat_body()}),
    lambda client: client.post("/tokenize", {"prompt": client.text(2000)}),
    _responses,
    _bad,
)


async def load(url: str, clients: int, pause: float, seconds: float, sample: Callable[[], None]) -> Counter[str]:
    """Runs the clients and takes samples of memory meanwhile."""
    statuses: Counter[str] = Counter()
    end = time.monotonic() + seconds
    tasks = [asyncio.create_task(Client(url, seed, pause, statuses).run(end)) for seed in range(clients)]
    try:
        while time.monotonic() < end:
            sample()
            await asyncio.sleep(5)
            for task in tasks:
                if task.done():
                    task.result()
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return statuses


def named_pids(pid: int) -> dict[str, int]:
    """The processes of a server by their titles."""
    pids = {"api": pid}
    for child, _ in sorted(descendants(pid)):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[0].decode("utf-8", "replace")
            pids[title if title not in pids else f"{title} {child}"] = child
    return pids


def report(samples: list[tuple[float, dict[str, int]]]) -> dict[str, dict[str, float]]:
    """For each process: memory after a tenth of its life and at its end in MiB, and the slope of its second half."""
    figures = {}
    for name in sorted({name for _, memory in samples for name in memory}):
        times = np.array([moment for moment, _ in samples]) / 60
        sizes = np.array([memory.get(name, np.nan) for _, memory in samples]) / 2**20
        is_there = ~np.isnan(sizes)  # helpers come and go
        times, sizes = times[is_there], sizes[is_there]
        half = times >= (times[0] + times[-1]) / 2
        slope = float(np.polyfit(times[half], sizes[half], 1)[0]) if half.sum() > 2 else 0.0
        begin = float(sizes[len(sizes) // 10])
        figures[name] = {"begin_mib": begin, "end_mib": float(sizes[-1]), "slope_mib_per_minute": slope}
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description="Mixed load, and the memory of each process.")
    parser.add_argument("--minutes", type=float, default=30.0, metavar="M")
    parser.add_argument("--clients", type=int, default=4, metavar="N")
    parser.add_argument(
        "--pause", type=float, default=0.0, metavar="S", help="pause between a client's requests in seconds"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("server", nargs="*", metavar="FLAG", help="flags of octavo serve, after --")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "api", "serve", "--port", "{port}", "--served-model-name", "soak"]
    command += ["--kv-cache-memory-bytes", KV_CACHE]
    samples: list[tuple[float, dict[str, int]]] = []
    with signals_as_exceptions(), contextlib.closing(_Stopped(Server([*command, *arguments.server]))) as running:
        server = running.server
        server.wait_ready()
        started = time.monotonic()

        def sample() -> None:
            memory = {name: resident_bytes(pid) for name, pid in named_pids(server.pid).items()}
            samples.append((time.monotonic() - started, memory))

        statuses = asyncio.run(load(server.url, arguments.clients, arguments.pause, arguments.minutes * 60, sample))
        sample()
        log = server.log()
    figures = report(samples)
    for name, row in figures.items():
        print(
            f"{name:28} {row['begin_mib']:8.1f} MiB  ->  {row['end_mib']:8.1f} MiB   "
            f"{row['slope_mib_per_minute']:+.3f} MiB a minute in the second half"
        )
    for what, count in sorted(statuses.items()):
        print(f"{count:8} {what}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"figures": figures, "samples": samples, "statuses": statuses}, indent=1))
    is_bad = any(" 5" in what for what in statuses)
    if is_bad:
        print(log)
    return int(is_bad)


class _Stopped:
    """A server that ends with a block."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def close(self) -> None:
        self.server.stop()


if __name__ == "__main__":
    sys.exit(main())
