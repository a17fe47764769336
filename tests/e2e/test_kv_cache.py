"""A KV cache that outlives workers and servers, and sleep, over HTTP."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.server import PATIENCE, Server

KEY = {"Authorization": "Bearer admin"}
BODY = {
    "prompt": [(i * i) % 250 + 3 for i in range(300)],
    "max_tokens": 30,
    "ignore_eos": True,
    "temperature": 0,
    "return_token_ids": True,
}


def ask(server: Server) -> tuple[list[int], int]:
    """The answer's tokens, and how many of the prompt were cached."""
    answer = server.post("/v1/completions", BODY)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body["choices"][0]["token_ids"], body["usage"]["prompt_tokens_details"]["cached_tokens"]


def wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + PATIENCE
    while server.get("/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.timeout(300)
def test_prefixes_outlive_workers_sleep_and_servers(tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--model", str(tiny_model), "--kv-cache-memory", "64MiB", "--max-model-len", "512"]
    flags += ["--kv-cache-dir", str(tmp_path), "--admin-api-key", "admin", "--enable-prompt-tokens-details"]
    with Server(*flags) as server:
        tokens, num_cached = ask(server)
        assert num_cached == 0
        server.child("octavo worker 0").kill()
        assert ask(server) == (tokens, 288)  # without reading files: they are there for an empty cache
        wait_until_ready(server)

        assert server.post("/sleep", None).status_code == 401
        assert "level" in server.post("/sleep?level=3", None, headers=KEY).json()["error"]["message"]
        assert server.post("/sleep?level=2", None, headers=KEY).json() == {"is_sleeping": True}
        has_no_workers(server)
        assert server.get("/is_sleeping").json() == {"is_sleeping": True}
        refused = server.post("/v1/completions", BODY)
        assert refused.status_code == 503 and "sleeps" in refused.text
        assert server.get("/readyz").status_code == 503
        assert server.post("/wake_up?tags=weights", None, headers=KEY).json() == {"is_sleeping": False}
        assert ask(server) == (tokens, 288)  # from files: the cache is empty
    assert list(tmp_path.glob("*/0/*"))
    with Server(*flags) as server:
        assert ask(server) == (tokens, 288)


def has_no_workers(server: Server) -> None:
    """Waits until the workers have ended."""
    deadline = time.monotonic() + PATIENCE
    while any("octavo worker" in title for title in titles(server)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def titles(server: Server) -> Iterator[str]:
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            yield " ".join(process.cmdline())
