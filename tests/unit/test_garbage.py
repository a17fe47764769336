"""Requests leave nothing for the garbage collector, which stops the whole server while it runs."""

from __future__ import annotations

import gc

import pytest

from api.server.garbage import MAX_BUSY_TIME, Collector
from tests.fakes import Connection, FakeServer

BODY = {"prompt": "hi there", "max_tokens": 3}


@pytest.mark.parametrize("kind", ["whole", "streamed", "refused"])
async def test_no_circle_is_left(server: FakeServer, kind: str) -> None:
    async def ask() -> None:
        connection = Connection(server.app, "/v1/completions", {**BODY, "stream": kind == "streamed"})
        await connection.task
        assert connection.status == (429 if kind == "refused" else 200)

    server.engine.max_queued = 0 if kind == "refused" else None
    await ask()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            await ask()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = {f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    # What the test's own connection consists of is a circle.
    assert not [name for name in left if name.startswith(("api.", "starlette.")) or "frame" in name], left


def test_everything_is_looked_at_in_quiet_moments() -> None:
    num_open, now = 0, 0.0
    collector = Collector(lambda: num_open, lambda: now)
    assert not collector.look(), "nothing happened"
    num_open = 3
    assert not collector.look()
    num_open = 0
    assert collector.look() and not collector.look(), "once"
    num_open = 3
    now = MAX_BUSY_TIME / 2
    assert not collector.look()
    now = 2 * MAX_BUSY_TIME
    assert collector.look() and not collector.look(), "it has waited for long"
    num_open = 0
    assert collector.look()
