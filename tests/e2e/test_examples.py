"""The programs in docs/examples, each as it is."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server import ROOT, Server

FOLDER = ROOT / "docs" / "examples"
SHOWS = {
    "chat": r".*\bTokyo\b.*\n\(\d+ tokens, finish_reason: (stop|length)\)\n",
    "streaming": r"(?s).*\b(2|two)\b.*\n\(\d+ \+ \d+ tokens\)\n",
    "structured_output": r"name: .+\ncountry: .+\ninhabitants: \d+\ncontinent: (Africa|America|Asia|Europe|Oceania)\n",
    "tools": r"called weather\(\{'city': '(\w+)'\}\) -> It is sunny in \1, 21 degrees\.\n(?s:answer: .+)",
    "rag": r"(?s).+\nsources: [\w/]+\.(?:py|md)(?:, [\w/]+\.(?:py|md))*\n",
    "embeddings": r"How do I bake bread\?\n(?:[ -]\d\.\d{3}  .+\n){3}",
}
"""What they print: a small model is right about little else."""


def execute(*arguments: str | Path) -> str:
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def run(example: str, *arguments: str) -> str:
    return execute(FOLDER / f"{example}.py", *arguments)


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[Server]:
    flags = ["--model", str(demo_model), "--max-model-len", "1024", "--kv-cache-memory", "256MiB"]
    with Server(*flags, "--enable-auto-tool-choice", "--tool-call-parser", "hermes") as running:
        yield running


@pytest.mark.parametrize("example", SHOWS)
def test_examples_with_a_server(server: Server, example: str) -> None:
    output = run(example, server.url)
    assert re.fullmatch(SHOWS[example], output), output


def test_files_may_be_empty(server: Server, tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "cheese.md").write_text("Cheese is made of milk.")
    output = run("rag", server.url, str(tmp_path), "What is cheese made of?")
    assert output.endswith("\nsources: cheese.md\n"), output


def test_errors_are_shown(server: Server) -> None:
    with pytest.raises(AssertionError, match=r"404: Not Found \(param: None\)"):
        run("chat", f"{server.url}/nowhere")


def test_the_offline_example(demo_model: Path) -> None:
    """Under the name that the package is installed by."""
    code = (
        "import runpy, sys; from api import octavo; sys.modules['octavo'] = octavo; del sys.argv[0]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    output = execute("-c", code, FOLDER / "offline_batch.py", demo_model)
    assert re.fullmatch(r"'The capital of France is' -> '.*Paris.*'\n(?:'.+' -> .+\n){2}", output), output


def test_every_example_is_tested_and_described() -> None:
    names = {path.stem for path in FOLDER.glob("*.py")}
    assert names == {*SHOWS, "offline_batch"}
    table = (FOLDER / "README.md").read_text()
    assert all(f"[{name}.py]({name}.py)" in table for name in names)
