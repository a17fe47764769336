"""What uses a part of the api loads no more than that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HTTP = ("starlette", "uvicorn", "sse_starlette")


@pytest.mark.parametrize("statement", ["from api import LLM", "import api.generation.generation"])
def test_no_http_without_a_server(statement: str) -> None:
    code = f"{statement}; import sys; sys.exit(' '.join(sorted(set({HTTP}) & set(sys.modules))) or 0)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
