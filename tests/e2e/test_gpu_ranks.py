"""Ranks with devices of their own: GPUs without hardware, whose group is one of gloo."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from engine_core.messages import EngineReady, WorkersLost
from executor.nodes.key_files import create_key_file
from tests import tiny
from tests.e2e.rank_harness import Agent, ranks
from tests.e2e.server import ROOT
from tests.ports import free_port

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find the device."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests/plugins"), str(ROOT)]))
    monkeypatch.setenv("TRITON_INTERPRET", "1")


MAX_TOKENS = 24


@pytest.mark.timeout(300)
def test_a_rank_may_die(one_rank: list[list[int]], tiny_model: Path, tmp_path: Path) -> None:
    with ranks(tiny_model, tmp_path, 2, device="fake-gpu") as two:
        two.run_until(lambda: bool(two.messages(EngineReady)))
        before = two.workers.worker_pids()
        found = two.generate(lambda: os.kill(before[1], signal.SIGKILL), MAX_TOKENS)
        assert found == [tokens[:MAX_TOKENS] for tokens in one_rank]
        (lost,) = two.messages(WorkersLost)
        assert len(before) == 2 and f"worker 1 (pid {before[1]}) ended with exit code -9" in lost.reason
        assert not set(two.workers.worker_pids()) & set(before)


@pytest.mark.timeout(300)
def test_stages_of_ranks_on_machines(tmp_path: Path) -> None:
    """Each of two stages has two ranks of one machine, with whole experts."""
    model = tiny.checkpoint("mixtral")
    with ranks(model, tmp_path) as one:
        expected = one.generate(max_tokens=MAX_TOKENS)
    create_key_file(tmp_path / "key")
    place = {"nnodes": 2, "master_addr": "127.0.0.1", "master_port": free_port(), "private_interface": "lo"}
    place["cluster_key"] = str(tmp_path / "key")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in place.items()]
    shape = ["-tp", "2", "-pp", "2", "--device", "fake-gpu"]
    agent = Agent("--model", str(model), *shape, "--node-rank", "1", *flags)
    try:
        with ranks(model, tmp_path, 2, 2, device="fake-gpu", enable_expert_parallel=True, **place) as four:
            assert four.generate(max_tokens=MAX_TOKENS) == expected
            assert not four.messages(WorkersLost)
    finally:
        agent.kill()
