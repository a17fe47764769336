"""Two ranks or two stages that share a model: whichever dies or stops, streams go on with the tokens of one rank."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from engine_core.messages import WorkersLost
from tests.e2e.rank_harness import Ranks, ranks
from tests.e2e.server import Server
from tests.e2e.test_faults import NUM_STREAMS, again, run_streams

pytestmark = pytest.mark.alone  # ranks wait for each other

KILL, STOP = (signal.SIGKILL, "ended with exit code -9"), (signal.SIGSTOP, "has been stopped for")


def check_faults(two: Ranks, one_rank: list[list[int]], *faults: tuple[tuple[signal.Signals, str], int]) -> None:
    """Kills or stops ranks, one after another."""
    assert two.generate() == one_rank
    assert len(two.workers.worker_pids()) == 2 and not two.messages(WorkersLost)
    for number, ((what, reason), rank) in enumerate(faults, start=1):
        before = two.workers.worker_pids()
        assert two.generate(lambda: os.kill(before[rank], what)) == one_rank  # noqa: B023
        lost = two.messages(WorkersLost)
        assert len(lost) == number and f"worker {rank} (pid {before[rank]}) {reason}" in lost[-1].reason
        assert not set(two.workers.worker_pids()) & set(before)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_core.worker_watch.STOPPED_TIMEOUT", 1.5)


@pytest.mark.timeout(300)
def test_either_rank_may_die_or_stop(one_rank: list[list[int]], tiny_model: Path, tmp_path: Path) -> None:
    with ranks(tiny_model, tmp_path, 2) as two:
        check_faults(two, one_rank, (KILL, 0), (STOP, 1))


@pytest.mark.timeout(300)
def test_a_stage_may_die(one_rank: list[list[int]], tiny_model: Path, tmp_path: Path) -> None:
    with ranks(tiny_model, tmp_path, 1, 2) as two:
        check_faults(two, one_rank, (KILL, 1))


@pytest.mark.timeout(300)
def test_streams_of_a_server_survive_either_rank(tiny_model: Path) -> None:
    flags = ["--model", str(tiny_model), "--dtype", "float32", "--kv-cache-memory", "64MiB", "--max-model-len", "512"]
    with Server(*flags, "--num-threads", "1", "-tp", "2") as server:
        undisturbed = asyncio.run(run_streams(server))
        assert len(undisturbed) == NUM_STREAMS
        streams = again(partial(run_streams, server, signal.SIGKILL, "octavo worker 1", "octavo worker 0"))
        assert [stream.tokens for stream in streams] == [stream.tokens for stream in undisturbed]
        server.restarted(1)  # two deaths at once are one restart
        assert 1 <= server.metric("octavo:engine_restarts_total") <= server.num_kills
