"""The files in docs/deploy are what the tools that read them accept, by their schemas (``tests/schemas``), and bash."""

from __future__ import annotations

import copy
import json
import lzma
import os
import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "docs" / "deploy"
CUSTOM = ("LeaderWorkerSet", "RayJob")


@cache
def schema(name: str) -> dict[str, Any]:
    """A vendored schema."""
    with lzma.open(ROOT / "tests" / "schemas" / f"{name}.json.xz") as file:
        found: dict[str, Any] = json.load(file)
    return found


def of_kubernetes(kind: str) -> dict[str, Any]:
    return schema("kubernetes") | {"$ref": f"#/$defs/{kind}"}


def check(value: Any, own: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError with the most telling of the errors."""
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(own).iter_errors(value))
    if error is not None:
        raise error


def check_object(value: dict[str, Any]) -> None:
    """Checks an object of Kubernetes as ``kubectl apply`` does."""
    kind = value["kind"]
    check(value, schema(kind) if kind in CUSTOM else of_kubernetes(kind))
    check(value["metadata"], of_kubernetes("ObjectMeta"))


@pytest.mark.parametrize("name", ["kuberay.yaml", "leaderworkerset.yaml"])
def test_kubernetes_accepts_the_objects(name: str) -> None:
    objects = list(yaml.safe_load_all((DEPLOY / name).read_text()))
    assert objects and objects[0]["kind"] in CUSTOM
    for value in objects:
        check_object(value)


def test_compose_accepts_the_file() -> None:
    check(yaml.safe_load((DEPLOY / "compose.yaml").read_text()), schema("compose-spec"))


def container_of(value: Any) -> Any:
    return value["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda value: value["spec"].update(replica=1), "replica"),
        (lambda value: value.update(apiVersion="leaderworkerset.x-k8s.io/v2"), "v2"),
        (lambda value: value["spec"]["leaderWorkerTemplate"].update(restartPolicy="Never"), "Never"),
        (lambda value: container_of(value).update(resource={}), "resource"),
        (lambda value: container_of(value)["resources"]["limits"].update(memory="24 GB"), "24 GB"),
        (lambda value: container_of(value).pop("name"), "name"),
        (lambda value: value["metadata"].update(label={}), "label"),
    ],
)
def test_mistakes_are_found(change: Callable[[Any], object], named: str) -> None:
    value = copy.deepcopy(next(yaml.safe_load_all((DEPLOY / "leaderworkerset.yaml").read_text())))
    change(value)
    with pytest.raises(jsonschema.ValidationError, match=re.escape(named)):
        check_object(value)


def test_a_mistake_for_compose_is_found() -> None:
    value = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    value["services"]["leader"]["healthchecks"] = {}
    with pytest.raises(jsonschema.ValidationError, match="healthchecks"):
        check(value, schema("compose-spec"))


DIRECTIVES = {"nodes": r"=[1-9]\d*", "ntasks-per-node": "=1", "exclusive": "", "no-kill": ""}
"""Options of sbatch, as its manual has them, and the form of their values."""


def test_directives_of_slurm() -> None:
    lines = (DEPLOY / "slurm.sh").read_text().splitlines()
    assert lines[0].startswith("#!"), "sbatch asks for an interpreter"
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [(number, line) for number, line in enumerate(lines) if "#SBATCH" in line]
    assert all(number < first_command for number, _ in directives), "sbatch ignores those that follow a command"
    for _, line in directives:
        found = re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", line)
        assert found is not None and re.fullmatch(DIRECTIVES[found[1]], found[2] or ""), line


STAND_INS = {
    "srun": """while [ "$1" != bash ]; do echo "srun $1" >> "$LOG"; shift; done; exec "$@" """,
    "octavo": """echo "octavo $*" >> "$LOG"; read -r code < "$CODES"; sed -i 1d "$CODES"; exit "$code" """,
    "scancel": """echo "scancel $*" >> "$LOG"; kill "$PPID" """,
    "sleep": "",
}


@pytest.mark.parametrize(("node", "codes"), [("0", (1, 137, 0)), ("0", (78,)), ("0", (2,)), ("1", (0, 78, 1, 99))])
def test_slurm_starts_again_what_ends(tmp_path: Path, node: str, codes: tuple[int, ...]) -> None:
    """Until the server on the first machine ends as it should, or cannot be started. Other machines are always needed:
    here they end with the codes, since there is nothing else that would end the script."""
    for name, script in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    log, left = tmp_path / "log", tmp_path / "codes"
    left.write_text("".join(f"{code}\n" for code in codes))
    if node != "0":
        (tmp_path / "sleep").write_text('#!/usr/bin/env bash\n[ -s "$CODES" ] || kill "$PPID"\n')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "CODES": str(left)}
    slurm = {"SLURM_NNODES": "2", "SLURM_NODEID": node, "SLURM_JOB_ID": "7"}
    command = ["bash", str(DEPLOY / "slurm.sh"), "a/model"]
    subprocess.run(command, env=environment | slurm, timeout=60, check=False, capture_output=True)
    lines = log.read_text().splitlines()
    assert lines[:2] == ["srun --no-kill", "srun --kill-on-bad-exit=0"]
    served = [line for line in lines if line.startswith("octavo serve a/model --pipeline-parallel-size 2 ")]
    assert len(served) == len(codes) and not left.read_text()
    assert lines[2 + len(codes) :] == (["scancel 7"] if node == "0" else [])
