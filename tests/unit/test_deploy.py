"""What goes beside the code: container, service, board, shell completion, the torch that is installed."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from pathlib import Path

import pytest

from api.cli import COMMANDS, main
from api.config import ServerConfig
from api.engine.metrics import EngineMetrics
from api.flags import options
from api.http.traffic import Traffic
from api.server.service_manager import notify
from executor.device.cpu import TESTED_TORCH, about_torch

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "scripts" / "deploy"


def test_every_metric_of_the_board_exists() -> None:
    metrics = EngineMetrics("model")
    Traffic(metrics.registry)
    known: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(family.type, ("",))
        labels = {label for sample in family.samples for label in sample.labels}
        for suffix in suffixes:
            known[family.name + suffix] = labels
    board = json.loads((DEPLOY / "grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [variable["definition"] for variable in board["templating"]["list"] if "definition" in variable]
    used = {name for query in queries for name in re.findall(r"(?:vllm|octavo|http|process):?[a-z0-9_:]+", query)}
    assert used and used <= set(known), sorted(used - set(known))
    for query in queries:
        for name in re.findall(r"((?:vllm|octavo):[a-z0-9_]+)\{", query):
            assert not known[name] or "model_name" in known[name], name
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_image_copies_what_the_wheel_is_made_of() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M) for word in line.split()[:-1]}
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept and all((ROOT / name).exists() for name in copied)
    assert {"api", "engine_core", "executor", "ops", "pyproject.toml"} <= copied
    assert re.search(r"^USER 10001:10001$", text, re.M) and "HEALTHCHECK" in text


def test_the_service_names_flags_and_codes_that_exist() -> None:
    text = (DEPLOY / "octavo.service").read_text()
    assert "RestartPreventExitStatus=2 78" in text and "Type=notify" in text
    timeout = next(option.default for option in options(ServerConfig) if option.name == "shutdown_timeout")
    match = re.search(r"^TimeoutStopSec=(\d+)$", text, re.M)
    assert match is not None and int(match[1]) > timeout
    (version,) = re.findall(r"torch==([\d.]+)", text)
    assert f"torch=={version}\n" in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("abstract", [False, True])
def test_notify(tmp_path: Path, abstract: bool) -> None:
    address = f"octavo-test-{tmp_path.name}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0" + address if abstract else address)
        receiver.settimeout(10)
        notify("READY=1", {"NOTIFY_SOCKET": "@" + address if abstract else address})
        assert receiver.recv(100) == b"READY=1"
    notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "gone")})
    notify("READY=1", {})


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name in COMMANDS:
        assert name in script
    for flag in ("max-model-len", "tool-call-parser", "input-file", "base-url"):
        assert flag in script
    assert "swap-space" not in script, "flags that are hidden in the help stay so"


def complete(words: str) -> list[str]:
    """What bash offers for the last word."""
    code = (
        "source <(python -m api completion bash); COMP_WORDS=($1); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))\n"
        '[ "${1: -1}" = " " ] && { COMP_WORDS+=(""); COMP_CWORD=$((COMP_CWORD + 1)); }\n'
        '_shtab_octavo; printf "%s\\n" "${COMPREPLY[@]}"'
    ).replace("python", __import__("sys").executable)
    result = subprocess.run(["bash", "-c", code, "bash", words], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_bash_completes() -> None:
    assert "serve" in complete("octavo se")
    assert set(complete("octavo serve --scheduling-pol")) == {"--scheduling-policy"}
    assert {"fcfs", "priority"} <= set(complete("octavo serve --scheduling-policy "))


def test_the_series_of_torch_is_the_one_that_is_pinned() -> None:
    assert f"torch=={TESTED_TORCH}." in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize(
    ("version", "cuda", "expected"),
    [
        (f"{TESTED_TORCH}.0+cpu", None, None),
        (f"{TESTED_TORCH}.1", None, None),
        (f"{TESTED_TORCH}.0", "13.0", "built for CUDA 13.0"),
        (f"{TESTED_TORCH}0.1", None, "not of the series"),
        ("2.6.0+cpu", None, "not of the series"),
    ],
)
def test_a_torch_that_nobody_wants(version: str, cuda: str | None, expected: str | None) -> None:
    said = about_torch(version, cuda)
    assert said is None if expected is None else said is not None and expected in said and "\n" not in said
