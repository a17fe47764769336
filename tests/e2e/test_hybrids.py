"""Servers of models with recurrent layers: neither killed processes nor cached prefixes change a token."""

from __future__ import annotations

import asyncio
from functools import partial

import httpx
import pytest

from tests import tiny
from tests.e2e.server import Server
from tests.e2e.test_faults import Stream, again, body, under_way

NUM_STREAMS = 4
MAX_TOKENS = 300
PROMPT = [(i * i) % 250 + 3 for i in range(600)]
CACHED = 576
"""Tokens of the prompt to which the last state is kept: whole blocks of 32, before its last 8 tokens."""


async def run(server: Server, title: str = "") -> list[list[int]]:
    """The tokens of all streams. Once these are under way, kills a process."""
    streams = [Stream() for _ in range(NUM_STREAMS)]
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        requests = [body(i, max_tokens=MAX_TOKENS) for i in range(NUM_STREAMS)]
        requests[0]["prompt"] = PROMPT  # computed in several steps
        tasks = [
            asyncio.create_task(each.read(client, request)) for each, request in zip(streams, requests, strict=True)
        ]
        if title:
            await under_way(streams, tasks, 15)
            server.kill(title)
        await asyncio.gather(*tasks)
    assert all(each.finish_reason == "length" for each in streams)
    return [each.tokens for each in streams]


def turn(server: Server, prompt: list[int], salt: str | None = None) -> tuple[list[int], int]:
    """The tokens of an answer, and how many of the prompt's were cached."""
    fields = {"max_tokens": 20, "stream": False, "cache_salt": salt}
    answer = server.post("/v1/completions", body(1, **fields) | {"prompt": prompt}).json()
    return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "title"), [("mamba2", "octavo worker 0"), ("qwen3_next", "octavo engine_core")])
def test_deaths_and_cached_prefixes_change_no_token(kind: str, title: str) -> None:
    folder = tiny.checkpoint(kind, max_position_embeddings=1024)
    flags = ["--model", str(folder), "--kv-cache-memory", "64MiB", "--max-model-len", "1024"]
    flags += ["--max-num-batched-tokens", "128", "--enable-prompt-tokens-details"]
    with Server(*flags) as server:
        alone, num_cached = turn(server, PROMPT, "nobody else's")
        assert num_cached == 0
        undisturbed = asyncio.run(run(server))
        assert again(partial(run, server, title)) == undisturbed
        server.restarted(1)

        assert turn(server, PROMPT) == (alone, CACHED)
        longer = PROMPT + alone + PROMPT[:200]
        expected, num_cached = turn(server, longer, "another's")
        assert num_cached == 0
        assert turn(server, longer) == (expected, CACHED)
        assert turn(server, longer) == (expected, 800)
