"""A server that gets far more requests than it can serve: who is refused hears so, the others are served alike."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_overload.py"


@pytest.mark.alone  # whoever gets fewer tokens could blame other tests
@pytest.mark.parametrize("by", ["key", "user"])
def test_ten_times_the_requests(tmp_path: Path, by: str) -> None:
    target = tmp_path / "figures.json"
    times = ["--baseline", "1", "--warmup", "2", "--duration", "4"]
    device = ["--slots", "4", "--step-us", "10000", "--output-len", "8", "--by", by]
    command = [sys.executable, str(SCRIPT), *times, *device, "--json", str(target), "--", "--max-num-queued-reqs", "32"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    figures = json.loads(target.read_text())["summary"]
    assert set(figures["statuses"]) == {"200", "429"} and not figures["lost"], result.stdout
    assert figures["statuses"]["429"] > figures["statuses"]["200"]
    assert figures["jain"] >= 0.95, figures["tokens"]
