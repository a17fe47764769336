"""Imports go down only, and the processes that need no torch have none."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FORBIDDEN = {
    "api": {"executor", "ops", "torch", "triton"},
    "engine_core": {"api", "ops", "torch", "triton", "asyncio", "starlette"},
    "executor": {"api", "engine_core"},
    "ops": {"api", "engine_core", "executor"},
}
CONTRACTS = {
    "api": {"engine_core": {"messages", "config", "launch", "restart", "hashing"}},
    "engine_core": {
        "executor": {
            "messages",
            "config",
            "base",
            "device",
            "log",
            "multiproc",
            "simulated",
            "process",
            "registry",
            "liveness",
            "helper",
            "files",
            "supported",
        }
    },
}
"""What a floor may import of the one below."""
TORCH_FREE = [
    "messages",
    "config",
    "base",
    "device.base",
    "log",
    "multiproc",
    "simulated",
    "pooling",
    "files",
    "supported",
    "process",
    "registry",
    "liveness",
    "helper",
    "helper_process",
]
NO_PICKLE = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "multiprocessing"}


def modules(floor: str) -> list[Path]:
    return sorted((ROOT / floor).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("floor", FORBIDDEN)
def test_imports_go_down_only(floor: str) -> None:
    for path in modules(floor):
        for name in imports(path):
            top, *rest = name.split(".")
            assert top not in FORBIDDEN[floor], f"{path.relative_to(ROOT)} imports {name}"
            allowed = CONTRACTS.get(floor, {}).get(top)
            if allowed is not None:
                assert rest and rest[0] in allowed, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("floor", FORBIDDEN)
def test_nothing_unpickles(floor: str) -> None:
    for path in modules(floor):
        for name in imports(path):
            assert name.split(".")[0] not in NO_PICKLE, f"{path.relative_to(ROOT)} imports {name}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"send_pyobj", "recv_pyobj"}, path
                whole = ast.unparse(node)
                assert whole != "torch.load", f"{path.relative_to(ROOT)} calls torch.load"


@pytest.mark.parametrize(
    "module",
    [
        "api.server.app",
        "api.server.run",
        "engine_core.core",
        "engine_core.__main__",
        *(f"executor.{name}" for name in TORCH_FREE),
    ],
)
def test_processes_without_torch(module: str) -> None:
    heavy = "{'torch', 'transformers', 'triton'}"
    code = f"import {module}, sys; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_public_names() -> None:
    import api

    assert api.__all__ == ["LLM", "BeamSearchParams", "PoolingParams", "SamplingParams", "StructuredOutputsParams"]


def test_files_stay_short() -> None:
    for floor in (*FORBIDDEN, "tests", "scripts"):
        for path in modules(floor):
            assert len(path.read_text().splitlines()) <= 800, f"{path.relative_to(ROOT)} is longer than 800 lines"
