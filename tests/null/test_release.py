"""The release script: what it refuses, and what a release changes."""

from __future__ import annotations

import datetime
import subprocess
import zipfile
from pathlib import Path

import pytest
import release

ROOT = Path(__file__).resolve().parents[2]
CHANGELOG = """\
# Changelog

## Unreleased

Words about it.

### Added

* One thing,
  in two lines.
* Another.

### Fixed

* A third.

## 0.1.0 - 2026-01-02

### Removed

* Long ago.
"""


def test_the_section_of_the_next_release() -> None:
    assert release.unreleased(CHANGELOG) == {"Added": ["One thing,", "Another."], "Fixed": ["A third."]}
    assert release.unreleased((ROOT / "CHANGELOG.md").read_text())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("## Unreleased", "## Next", "is missing"),
        ("### Added", "### News", "unknown group 'News'; choose from Added, Changed"),
        ("### Fixed", "### Added", "occurs twice"),
        ("### Added\n\n", "", "'One thing,' is in no group"),
        ("## Unreleased\n", "## Unreleased\n\n## 0.1.1 - 2026-01-03\n", "no unreleased changes"),
    ],
)
def test_changelogs_that_are_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(release.ReleaseError, match=message):
        release.unreleased(CHANGELOG.replace(old, new, 1))


def test_a_release_dates_its_section() -> None:
    text = release.dated(CHANGELOG, "0.1.1", datetime.date(2026, 3, 4))
    assert text.startswith("# Changelog\n\n## Unreleased\n\n## 0.1.1 - 2026-03-04\n\nWords about it.\n\n### Added\n")
    assert text.endswith(CHANGELOG[CHANGELOG.index("## 0.1.0") :])
    with pytest.raises(release.ReleaseError, match="no unreleased changes"):
        release.unreleased(text)


@pytest.mark.parametrize("text", ["1.0", "v1.0.0", "1.0.0rc1", "01.0.0", "1.0.-1", ""])
def test_versions_have_three_numbers(text: str) -> None:
    with pytest.raises(release.ReleaseError, match="expected three numbers"):
        release.parse_version(text)


@pytest.mark.parametrize(
    ("old", "new", "groups", "problem"),
    [
        ("0.1.0", "0.1.1", "Added Fixed", None),
        ("0.1.0", "0.2.0", "Changed", None),
        ("0.1.0", "0.1.1", "Changed", "Changed: use 0.2.0"),
        ("0.1.0", "0.1.1", "Deprecated Removed", "Deprecated and Removed: use 0.2.0"),
        ("0.1.0", "1.0.0", "Removed", None),
        ("1.2.3", "1.3.0", "Changed", None),
        ("1.2.3", "1.3.0", "Removed", "Removed: use 2.0.0"),
        ("1.2.3", "2.0.0", "Removed", None),
        ("1.2.3", "1.2.3", "Fixed", "after 1.2.3 comes one of 1.2.4, 1.3.0, 2.0.0"),
        ("1.2.3", "1.2.5", "Fixed", "comes one of"),
        ("1.2.3", "1.3.1", "Fixed", "comes one of"),
    ],
)
def test_the_version_follows_from_the_changes(old: str, new: str, groups: str, problem: str | None) -> None:
    def check() -> None:
        changes = {group: ["something"] for group in groups.split()}
        release.check_step(release.parse_version(old), release.parse_version(new), changes, is_first=False)

    if problem is None:
        check()
        return
    with pytest.raises(release.ReleaseError, match=problem):
        check()


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that may be released, and whose packages need no building."""
    root = tmp_path / "tree"
    (root / "api").mkdir(parents=True)
    (root / "api" / "version.py").write_text('"""The version."""\n\nVERSION = "0.1.0"\n')
    (root / "CHANGELOG.md").write_text(CHANGELOG)
    (root / "pyproject.toml").write_text('[project.urls]\nSource = "https://example.org/some/octavo"\n')
    (root / ".gitignore").write_text("dist/\n")
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "A")
        monkeypatch.setenv(f"{name}_EMAIL", "a@b.c")
    git(root, "init", "--quiet", "--initial-branch", "main")
    git(root, "remote", "add", "origin", "git@example.org:some/octavo.git")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "All")
    git(root, "tag", "v0.1.0")

    def build(version: str, changes: dict[str, str], folder: Path) -> tuple[Path, ...]:
        packages = tuple(folder / f"octavo-{version}.{ending}" for ending in ("tar.gz", "whl"))
        for package in packages:
            package.write_text(changes["api/version.py"])
        return packages

    monkeypatch.setattr(release, "ROOT", root)
    monkeypatch.setattr(release, "build", build)
    return root


def test_a_dry_run_changes_nothing(project: Path) -> None:
    head = git(project, "rev-parse", "HEAD")
    report = release.release("0.1.1", is_dry=True)
    assert report[0] == "Octavo 0.1.1, after 0.1.0: 2 Added, 1 Fixed" and "dry run" in report[-1]
    assert git(project, "rev-parse", "HEAD") == head and git(project, "tag") == "v0.1.0"
    assert git(project, "status", "--porcelain") == "" and not (project / "dist").exists()


def test_a_release_is_a_commit_and_a_tag(project: Path) -> None:
    release.release("0.1.1", is_dry=False)
    assert git(project, "log", "-1", "--format=%s") == "Octavo 0.1.1"
    assert git(project, "describe") == "v0.1.1" and git(project, "status", "--porcelain") == ""
    assert release.version_of((project / "api" / "version.py").read_text()) == "0.1.1"
    assert "## Unreleased\n\n## 0.1.1 - 20" in (project / "CHANGELOG.md").read_text()
    assert sorted(path.name for path in (project / "dist").iterdir()) == ["octavo-0.1.1.tar.gz", "octavo-0.1.1.whl"]


def test_trees_that_are_refused(project: Path) -> None:
    def refused(version: str, message: str) -> None:
        with pytest.raises(release.ReleaseError, match=message):
            release.release(version, is_dry=True)

    (project / "new.py").touch()
    refused("0.1.1", r"uncommitted changes:\n\?\? new.py")
    (project / "new.py").unlink()
    git(project, "tag", "v0.1.1")
    refused("0.1.1", "the tag v0.1.1 exists")
    git(project, "remote", "set-url", "origin", "https://example.org/other/octavo")
    refused("0.2.0", "pyproject.toml says https://example.org/some/octavo")
    git(project, "switch", "--quiet", "--create", "topic")
    refused("0.2.0", "on the branch main, this is topic")


def test_wheels_are_looked_into(tmp_path: Path) -> None:
    def wheel(*names: str, version: str = "0.1.1") -> Path:
        path = tmp_path / "octavo.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("octavo.dist-info/METADATA", f"Name: octavo\nVersion: {version}\n\nVersion: 0.1.1\n")
            for name in names:
                archive.writestr(name, "")
        return path

    needed = ["api/web/index.html", "ops/cpu/csrc/octavo.h", *(f"{name}/py.typed" for name in release.TOP_LEVEL)]
    release.check_wheel(wheel(*needed), "0.1.1")
    for names, version, problem in (
        (needed, "0.1.0", "does not say that it is version 0.1.1"),
        (needed[1:], "0.1.1", "lacks api/web/index.html"),
        ([*needed, "tests/tiny.py"], "0.1.1", "holds tests"),
    ):
        with pytest.raises(release.ReleaseError, match=problem):
            release.check_wheel(wheel(*names, version=version), "0.1.1")
