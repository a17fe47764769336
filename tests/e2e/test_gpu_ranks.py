"""Ranks with devices of their own: GPUs without hardware, whose group is one of gloo."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from engine_core.messages import EngineReady, WorkersLost
from tests.e2e.rank_harness import ranks
from tests.e2e.server import ROOT

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
def test_stages_of_ranks(one_rank: list[list[int]], tiny_model: Path, tmp_path: Path) -> None:
    with ranks(tiny_model, tmp_path, 2, 2, device="fake-gpu") as four:
        assert four.generate(max_tokens=MAX_TOKENS) == [tokens[:MAX_TOKENS] for tokens in one_rank]
        assert not four.messages(WorkersLost)
