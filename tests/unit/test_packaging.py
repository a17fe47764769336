"""What is installed: the wheel, the editable install, and the name ``octavo``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from api.version import VERSION

ROOT = Path(__file__).resolve().parents[2]
TOP_LEVEL = {"api", "engine_core", "executor", "octavo", "ops"}
CODE = """\
import octavo, sys
sys.exit(f"torch is loaded by {octavo}" if "torch" in sys.modules else 0) if sys.argv[1:] else None
import api, engine_core, executor
assert octavo.__all__ == api.__all__ and all(getattr(octavo, name) is getattr(api, name) for name in api.__all__)
assert set(api.__all__) <= set(dir(octavo))
from octavo import LLM, SamplingParams
assert LLM.__module__.startswith("api.") and SamplingParams(max_tokens=3).max_tokens == 3
print(*(module.__file__ for module in (octavo, api, engine_core, executor)), sep="\\n")
"""


def python(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(path or "")}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what packages are built from: building leaves folders behind."""
    tree = tmp_path_factory.mktemp("packaging") / "tree"
    for name in TOP_LEVEL - {"octavo"}:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    return tree


def build(tree: Path, kind: str) -> Path:
    """Builds a wheel and unpacks it, as an installer would."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('../{kind}'))"
    result = python("-W", "ignore", "-c", code, cwd=tree)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(tree.parent / kind / result.stdout.split()[-1]) as archive:
        archive.extractall(tree.parent / f"{kind}_site")
    return tree.parent / f"{kind}_site"


@pytest.fixture(scope="module")
def site(tree: Path) -> Path:
    """The folder that the wheel is installed into."""
    return build(tree, "wheel")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with an ``api`` and an ``ops`` of its own."""
    for name in ("api", "ops"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    return tmp_path


def test_the_wheel_holds_the_packages_once(site: Path) -> None:
    assert {path.name for path in site.iterdir()} == TOP_LEVEL | {f"octavo-{VERSION}.dist-info"}
    assert not (site / "api" / "octavo").exists()
    assert all((site / name / "py.typed").exists() for name in TOP_LEVEL)
    for folder in ("api/web", "ops/cpu/csrc"):
        wanted = {path.name for path in (ROOT / folder).iterdir()} - {"__pycache__"}
        assert {path.name for path in (site / folder).iterdir()} == wanted


def test_octavo_is_api_also_in_a_project_that_has_an_api(site: Path, project: Path) -> None:
    result = python("-c", CODE, cwd=project, path=site)
    assert result.returncode == 0, result.stderr
    assert all(Path(line).is_relative_to(site) for line in result.stdout.split())
    result = python("-c", f"import api\n{CODE}", cwd=project, path=site)
    assert f"imported {project / 'api' / '__init__.py'} as api" in result.stderr.splitlines()[-1]


def test_octavo_alone_loads_no_torch(site: Path, tmp_path: Path) -> None:
    result = python("-c", CODE, "only", cwd=tmp_path, path=site)
    assert result.returncode == 0, result.stderr


def test_the_command(site: Path, project: Path) -> None:
    """A console script's folder comes first in its module search path; a file ``octavo`` there is no module."""
    points = (site / f"octavo-{VERSION}.dist-info" / "entry_points.txt").read_text()
    assert points.split() == ["[console_scripts]", "octavo", "=", "api.__main__:main"]
    script = project / "bin" / "octavo"
    script.parent.mkdir()
    script.write_text("import sys, octavo\nfrom api.__main__ import main\nsys.exit(main())\n")
    for command in ([str(script)], ["-m", "octavo"]):
        result = python(*command, "--version", cwd=project, path=site)
        assert (result.stdout.strip(), result.returncode) == (VERSION, 0), result.stderr


def test_the_editable_install_finds_all_of_them(tree: Path) -> None:
    site = build(tree, "editable")
    code = (
        f"import importlib.util as u, site; site.addsitedir({str(site)!r})\n"
        f"for name in {sorted(TOP_LEVEL)}: print(u.find_spec(name).origin)"
    )
    result = python("-I", "-S", "-c", code, cwd=tree.parent)
    assert result.returncode == 0, result.stderr
    homes = [tree / ("api/octavo" if name == "octavo" else name) for name in sorted(TOP_LEVEL)]
    assert result.stdout.split() == [str(home / "__init__.py") for home in homes]


def test_octavo_in_the_source_tree() -> None:
    import api
    from api import octavo

    assert octavo.__all__ == api.__all__ and octavo.SamplingParams is api.SamplingParams
    with pytest.raises(AttributeError, match="'api.octavo' has no attribute 'nothing'"):
        octavo.nothing  # noqa: B018
