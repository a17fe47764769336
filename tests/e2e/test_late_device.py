"""Servers on a device whose results come late: streams have the tokens of a CPU, whatever happens to them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.server import ROOT, Server
from tests.e2e.test_faults import Stream, again, body, under_way

NUM_STREAMS = 7
MAX_TOKENS = 90
GRAMMARS: list[dict[str, Any]] = [
    {"regex": "[A-Z][a-z]+ [0-9]{3}(-[0-9]+)?"},
    {"choice": ["red", "dark red", "green"]},
    {"json": {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}},
]
EXTRAS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"logprobs": 2, "bad_words": ["e", " a"]},
    {"logit_bias": {"40": 3}, "min_tokens": 20},
]


def requests() -> list[dict[str, Any]]:
    """Plain ones, constrained ones, and some that look at what they have generated."""
    fields: list[dict[str, Any]] = [{}] * (NUM_STREAMS - 6)
    fields += [{"structured_outputs": grammar} for grammar in GRAMMARS] + EXTRAS
    return [body(number, max_tokens=MAX_TOKENS, **more) for number, more in enumerate(fields)]


async def run(server: Server, *, kill: str = "", leave: tuple[int, ...] = ()) -> list[Stream]:
    """All requests at once. When they are under way, kills a process, or leaves some of them."""
    streams = [Stream() for _ in requests()]
    async with httpx.AsyncClient(base_url=server.url, timeout=240) as client:
        tasks = [
            asyncio.create_task(stream.read(client, request))
            for stream, request in zip(streams, requests(), strict=True)
        ]
        if kill or leave:
            long = [place for place in range(NUM_STREAMS) if "structured_outputs" not in requests()[place]]
            await under_way([streams[place] for place in long], [tasks[place] for place in long], 15)
        if kill:
            server.child(kill).kill()
        for place in leave:
            tasks[place].cancel()
        await asyncio.gather(*(task for place, task in enumerate(tasks) if place not in leave))
    return streams


def told(streams: list[Stream]) -> list[tuple[list[int], str, str | None]]:
    return [(stream.tokens, stream.text, stream.finish_reason) for stream in streams]


@pytest.fixture(scope="module")
def flags(tiny_model: Path) -> list[str]:
    return ["--model", str(tiny_model), "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "5"]


@pytest.fixture(scope="module")
def expected(flags: list[str]) -> list[tuple[list[int], str, str | None]]:
    """What a CPU says, with the same ops."""
    with Server(*flags, env={"OCTAVO_CPU_CAPABILITY": "reference"}) as server:
        return told(asyncio.run(run(server)))


@pytest.fixture(scope="module", params=["late", "fake-gpu"])
def late(flags: list[str], request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server on such a device; the second one has graphs, as a GPU has."""
    if request.param == "fake-gpu":
        pytest.importorskip("triton", reason="Triton is not installed")
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests/plugins"), str(ROOT)]), "TRITON_INTERPRET": "1"}
    with Server(*flags, "--device", request.param, "--num-gpu-blocks-override", "16", env=env) as server:
        yield server


@pytest.mark.timeout(300)
def test_streams_have_the_tokens_of_a_cpu_even_if_preempted(late: Server, expected: list[Any]) -> None:
    assert told(asyncio.run(run(late))) == expected
    assert late.metric("vllm:num_preemptions_total") > 0
    late.rests()


@pytest.mark.timeout(300)
def test_streams_that_are_left_disturb_nobody(late: Server, expected: list[Any]) -> None:
    left = (0, 5)
    streams = told(again(partial(run, late, leave=left)))
    for place, stream in enumerate(streams):
        if place in left:
            assert expected[place][0][: len(stream[0])] == stream[0]
        else:
            assert stream == expected[place]
    late.rests()


@pytest.mark.timeout(300)
def test_streams_survive_the_death_of_the_worker(late: Server, expected: list[Any]) -> None:
    assert told(again(partial(run, late, kill="octavo worker 0"))) == expected
    late.restarted(1)
    late.rests()
