"""Every environment variable that the code reads is in the one table, and nothing else is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from api.config import ENVIRONMENT, ServerConfig, variables_of
from api.flags import options

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("api", "engine_core", "executor", "ops")
MAPPINGS = {"os.environ", "environ", "environment"}
"""What the environment is called; other mappings are not called so."""
INHERITED = {"LC_ALL"}
"""Only set, for children."""


def constants(tree: ast.Module) -> dict[str, str]:
    """Names of the module that stand for a text."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def keys(tree: ast.Module) -> Iterator[ast.expr]:
    """What is looked up in the environment."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in MAPPINGS:
            yield node.slice
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            mapping, _, method = function.rpartition(".")
            if function == "os.getenv" or (mapping in MAPPINGS and method in ("get", "pop", "setdefault")):
                yield node.args[0]


def read_in_python() -> dict[str, list[Path]]:
    trees = {path: ast.parse(path.read_text()) for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))}
    names: dict[str, str] = {}
    for tree in trees.values():
        names |= constants(tree)
    found: dict[str, list[Path]] = {}
    for path, tree in trees.items():
        for key in keys(tree):
            name = key.value if isinstance(key, ast.Constant) else names.get(ast.unparse(key))
            if name is None:  # a variable of the program, which goes through the names of the table
                assert path.parent.name in ("api", "commands"), f"{path}: {ast.unparse(key)} cannot be looked up here"
                continue
            assert isinstance(name, str)
            found.setdefault(name, []).append(path)
    return found


def test_what_is_read_is_in_the_table() -> None:
    read = read_in_python()
    assert {"CXX", "OCTAVO_CACHE_DIR", "OCTAVO_CONFIG", "NOTIFY_SOCKET"} <= set(read), "the search finds them"
    unknown = {name: paths for name, paths in read.items() if name not in ENVIRONMENT and name not in INHERITED}
    assert not unknown, f"add a line to ENVIRONMENT in api/config.py: {unknown}"
    unread = {name for name, variable in ENVIRONMENT.items() if variable.option is None} - set(read)
    assert not unread, f"nothing reads {unread}"


def test_kernels_read_no_variable() -> None:
    for path in (ROOT / "ops").rglob("*.[ch]*"):
        if path.suffix in (".cpp", ".h"):
            assert "getenv" not in path.read_text(), path


def test_names_of_ours_in_the_code_are_in_the_table() -> None:
    pattern = re.compile(r"\b(?:OCTAVO|VLLM)_[A-Z_]+\b")
    macros = {"OCTAVO_AMX", "OCTAVO_AMX_EMULATION", "OCTAVO_VNNI_EMULATION"}  # of the C++ compiler
    for floor in FLOORS:
        for path in sorted((ROOT / floor).rglob("*.py")):
            named = set(pattern.findall(path.read_text())) - macros
            assert named <= set(ENVIRONMENT), f"{path.relative_to(ROOT)}: {sorted(named - set(ENVIRONMENT))}"


def test_options_of_the_table_exist() -> None:
    known = {option.name for option in options(ServerConfig)}
    assert {variable.option for variable in ENVIRONMENT.values()} - {None} <= known
    assert variables_of("api_key") == ["OCTAVO_API_KEY", "VLLM_API_KEY"]


def test_the_document_has_the_same_table() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.+) \|$", (ROOT / "docs" / "serving.md").read_text(), re.M)
    assert rows == [(name, variable.meaning) for name, variable in ENVIRONMENT.items()]
