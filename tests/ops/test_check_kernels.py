"""Kernels of GPUs compiled ahead of time, a small part of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ops.test_cpu_build import ROOT

pytest.importorskip("triton", reason="Triton is not installed")
SCRIPT = ROOT / "scripts" / "check_kernels.py"


def check(tmp_path: Path, kernels: str, *targets: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit status, output and findings of the script."""
    file = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPT), "--kernels", kernels, "--targets", *targets, "--json", str(file)]
    command += ["--jobs", "1", "--kept", str(tmp_path / "kept"), "--registers", str(tmp_path / "registers.json")]
    command += [] if file.exists() else ["--keep-registers"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert file.exists(), done.stderr
    return done.returncode, done.stdout, json.loads(file.read_text())


def test_kernels_fit_their_targets(tmp_path: Path) -> None:
    status, output, lines = check(tmp_path, r"^(gemm qkv m=(8|128)|rms_norm 4096 bfloat16)$", "sm_90", "gfx942")
    assert status == 0, output
    assert len(lines) == 6 and output.splitlines()[-1].startswith("6 compiled, 0 failed, triton ")
    products = {line["target"]: line for line in lines if line["kernel"] == "gemm"}
    assert products["sm_90"]["instruction"].startswith("wgmma.mma_async")
    assert products["gfx942"]["instruction"].startswith("v_mfma")
    assert all(line["registers"] > 16 and not line["spills"] and line["min_load"] == 16 for line in lines)
    kept = list((tmp_path / "kept").iterdir())
    assert len(kept) == 6
    kept[0].write_text(kept[0].read_text().replace('"spills": 0', '"spills": 8'))
    found = json.loads(kept[1].read_text())
    before, found["registers"] = found["registers"], int(1.2 * found["registers"]) + 9
    kept[1].write_text(json.dumps(found))
    status, output, again = check(tmp_path, r"^(gemm qkv m=(8|128)|rms_norm 4096 bfloat16)$", "sm_90", "gfx942")
    assert status == 1 and len(again) == 6
    assert output.splitlines()[-1].startswith("6 compiled, 2 failed")  # what is known is not compiled again
    assert "FAIL: spills registers" in output and f"FAIL: {before} registers became {found['registers']}" in output


def test_nothing_to_compile_is_a_failure(tmp_path: Path) -> None:
    status, output, _ = check(tmp_path, "no such kernel", "sm_90")
    assert status == 1 and "0 compiled" in output
