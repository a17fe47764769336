"""Client packages as their authors publish them, through ``scripts/check_clients.py``.

Here are those that take seconds; the others (litellm, langchain, instructor, lm-eval) are run by hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.server import ROOT, Server


def test_openai_python(demo_model: Path) -> None:
    """Typed answers, tool calls, streams with events, many calls at once, with the package that tests have anyway."""
    flags = ["--model", str(demo_model), "--served-model-name", "demo", "--max-model-len", "2048"]
    with Server(*flags, "--enable-auto-tool-choice", "--tool-call-parser", "hermes") as server:
        variables = {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "none", "OCTAVO_MODEL": "demo"}
        result = subprocess.run(
            [sys.executable, ROOT / "scripts" / "clients" / "openai_python.py"],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.timeout(600)
@pytest.mark.parametrize("client", ["openai_node", "schemathesis"])
def test_in_an_environment_of_its_own(client: str, demo_model: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "check_clients.py", "--folder", tmp_path, client],
        env={**os.environ, "OCTAVO_EXAMPLES": "10"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    reason = result.stdout.partition("skipped: ")[2].strip()
    if reason:
        pytest.skip(reason)
    assert "passed" in result.stdout
