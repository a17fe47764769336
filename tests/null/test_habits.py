"""Files for tools agree with each other: versions of Python, of the tools, of the package; links lead to files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()  # tomllib comes with Python 3.11


def load_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def test_ci_runs_every_python_that_the_package_names() -> None:
    jobs = load_yaml(".github/workflows/ci.yml")["jobs"]
    versions = jobs["test"]["strategy"]["matrix"]["python"]
    assert versions == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert f'requires-python = ">={versions[0]}"' in PYPROJECT
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands == {"check": ["scripts/check"], "test": [".ci/run"]}
    assert all((ROOT / command).stat().st_mode & 0o100 for (command,) in commands.values())


def test_hooks_use_the_tools_that_ci_uses() -> None:
    pinned = dict(re.findall(r"^([a-z-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    schema = re.search(r"/schemas/([\d.]+)/", (ROOT / "biome.json").read_text())
    assert schema is not None
    (repository,) = load_yaml(".pre-commit-config.yaml")["repos"]
    checks = (ROOT / "scripts" / "check").read_text()
    for hook in repository["hooks"]:
        tool = hook["entry"].split()[0]
        assert re.search(rf"\b{tool}\b", checks), f"scripts/check does not run {tool}"
        wanted = f"@biomejs/biome@{schema[1]}" if tool == "biome" else f"{tool}=={pinned[tool]}"
        assert [name.replace("[toml]", "") for name in hook["additional_dependencies"]] == [wanted]
    assert f"clang-format {pinned['clang-format']}," in (ROOT / ".clang-format").read_text()


def test_forms_for_issues() -> None:
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"):
        form = load_yaml(str(path))
        assert {"name", "description", "body"} <= set(form), path
        kinds = {field["type"] for field in form["body"]}
        assert kinds <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}, path
        names = [field["id"] for field in form["body"] if field["type"] != "markdown"]
        assert len(set(names)) == len(names), path


def test_the_version_is_in_one_place() -> None:
    assert 'dynamic = ["version"]' in PYPROJECT and 'version = { attr = "api.version.VERSION" }' in PYPROJECT
    assert not re.search(r'^version = "', PYPROJECT, re.M)


def test_documents_link_to_files_that_exist() -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"


def test_the_map_names_files_that_exist() -> None:
    """Each path, or the last part of one, is that of a file."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    floors = ("api", "engine_core", "executor", "ops", "tests", "scripts", "docs")
    paths = {str(path.relative_to(ROOT)) for floor in floors for path in (ROOT / floor).rglob("*.*")}
    ends = {path[place:] for path in paths for place in [0, *(match.end() for match in re.finditer("/", path))]}
    named = set(re.findall(r"(?<![\w./])[\w./]*\w\.(?:py|h|cpp)\b", text)) - {"llama.cpp"}  # an engine
    assert named and named <= ends, f"no such files: {', '.join(sorted(named - ends))}"
