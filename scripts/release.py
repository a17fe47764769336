#!/usr/bin/env python3
"""Makes a release: checks the tree, dates the section of the changelog, builds, tags.

scripts/release.py 0.2.0            # a dry run: checks and builds in a temporary folder, changes nothing
scripts/release.py 0.2.0 --execute  # writes version and changelog, commits, tags, leaves the packages in dist/

Nothing is pushed or uploaded: the last lines say which commands do that.

The rule of the changelog: what users can see has a line in the section ``Unreleased``, in one of the groups of Keep a
Changelog. A release gives the section its version and date; an empty one is no release. Before 1.0 a release with lines
in ``Changed``, ``Deprecated`` or ``Removed`` is at least a minor one, from then on one with ``Removed`` is a major one.
"""

from __future__ import annotations

import argparse
import datetime
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
VERSION_FILE = "api/version.py"
CHANGELOG = "CHANGELOG.md"
GROUPS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
UNRELEASED = "## Unreleased"
TOP_LEVEL = ("api", "engine_core", "executor", "octavo", "ops")
URL = re.compile(r"^Source = \"([^\"]*)\"$", re.MULTILINE)

Version = tuple[int, int, int]


class ReleaseError(Exception):
    """Why there can be no release; the message says what to do."""


def parse_version(text: str) -> Version:
    """``"1.2.3"`` -> (1, 2, 3).

    Raises:
        ReleaseError: It is none.
    """
    match = re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", text)
    if match is None:
        raise ReleaseError(f"version {text!r}: expected three numbers such as 0.2.0")
    return int(match[1]), int(match[2]), int(match[3])


def version_of(source: str) -> str:
    """The version that the content of ``api/version.py`` states."""
    match = re.search(r"^VERSION = \"(.*)\"$", source, re.MULTILINE)
    if match is None:
        raise ReleaseError(f'{VERSION_FILE}: expected a line VERSION = "..."')
    return match[1]


def unreleased(changelog: str) -> dict[str, list[str]]:
    """First lines of the entries in the section ``Unreleased``, by group.

    Raises:
        ReleaseError: The section is missing or empty, or a group has a name that no changelog has.
    """
    _, found, rest = changelog.partition(f"{UNRELEASED}\n")
    if not found:
        raise ReleaseError(f"{CHANGELOG}: the section {UNRELEASED!r} is missing")
    section = rest.split("\n## ", 1)[0]
    groups: dict[str, list[str]] = {}
    group: str | None = None
    for line in section.splitlines():
        if line.startswith("### "):
            group = line[4:].strip()
            if group not in GROUPS:
                raise ReleaseError(f"{CHANGELOG}: unknown group {group!r}; choose from {', '.join(GROUPS)}")
            if group in groups:
                raise ReleaseError(f"{CHANGELOG}: the group {group} occurs twice")
            groups[group] = []
        elif line.startswith("* "):
            if group is None:
                raise ReleaseError(f"{CHANGELOG}: {line[2:60]!r} is in no group; choose from {', '.join(GROUPS)}")
            groups[group].append(line[2:])
    if not any(groups.values()):
        raise ReleaseError(f"{CHANGELOG}: no unreleased changes")
    return {name: entries for name, entries in groups.items() if entries}


def check_step(old: Version, new: Version, groups: dict[str, list[str]], *, is_first: bool) -> None:
    """Checks that a version may follow another one with these changes.

    Args:
        old: The version in the tree.
        new: The version to release.
        groups: Of ``unreleased``.
        is_first: Nothing was released yet, so that ``new`` may be ``old``.

    Raises:
        ReleaseError: It may not.
    """
    if is_first and new == old:
        return
    following = ((old[0], old[1], old[2] + 1), (old[0], old[1] + 1, 0), (old[0] + 1, 0, 0))
    if new not in following:
        raise ReleaseError(f"after {_text(old)} comes one of {', '.join(map(_text, following))}")
    breaking = [name for name in ("Changed", "Deprecated", "Removed") if name in groups]
    if old[0] == 0 and breaking and new == following[0]:
        raise ReleaseError(f"{CHANGELOG} has {' and '.join(breaking)}: use {_text(following[1])}")
    if old[0] > 0 and "Removed" in groups and new != following[2]:
        raise ReleaseError(f"{CHANGELOG} has Removed: use {_text(following[2])}")


def dated(changelog: str, version: str, day: datetime.date) -> str:
    """The changelog with the section ``Unreleased`` as that of a version, below a new one that is empty."""
    return changelog.replace(f"{UNRELEASED}\n", f"{UNRELEASED}\n\n## {version} - {day.isoformat()}\n", 1)


def check_wheel(wheel: Path, version: str) -> None:
    """Looks into a wheel.

    Raises:
        ReleaseError: It lacks something or has what it must not have.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = archive.read(metadata).decode().split("\n\n", 1)[0].splitlines()
    if f"Version: {version}" not in fields:
        raise ReleaseError(f"{wheel.name} does not say that it is version {version}")
    needed = [f"{name}/py.typed" for name in TOP_LEVEL] + ["api/web/index.html", "ops/cpu/csrc/octavo.h"]
    if missing := [name for name in needed if name not in names]:
        raise ReleaseError(f"{wheel.name} lacks {', '.join(missing)}")
    if extra := sorted({name.split("/")[0] for name in names} & {"tests", "scripts", "docs"}):
        raise ReleaseError(f"{wheel.name} holds {', '.join(extra)}")


def _text(version: Version) -> str:
    return ".".join(map(str, version))


def _run(*command: str, folder: Path | None = None) -> str:
    result = subprocess.run(command, cwd=folder or ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ReleaseError(f"{' '.join(command)} failed: {(result.stderr or result.stdout).strip()[-1000:]}")
    return result.stdout.strip()


def check_tree(version: str) -> None:
    """Checks that what would be released is what was committed.

    Raises:
        ReleaseError: It is not, or the version already exists.
    """
    if changed := _run("git", "status", "--porcelain"):
        raise ReleaseError(f"the tree has uncommitted changes:\n{changed}")
    if (branch := _run("git", "branch", "--show-current")) != "main":
        raise ReleaseError(f"releases are made on the branch main, this is {branch or 'no branch'}")
    if _run("git", "tag", "--list", f"v{version}"):
        raise ReleaseError(f"the tag v{version} exists")
    source = URL.search((ROOT / "pyproject.toml").read_text())
    if source is None:
        raise ReleaseError("pyproject.toml: [project.urls] has no Source")
    origin = _run("git", "remote", "get-url", "origin") if "origin" in _run("git", "remote").split() else ""
    if origin.removesuffix(".git").replace(":", "/").split("/")[-2:] != source[1].split("/")[-2:]:
        raise ReleaseError(f"the remote origin is {origin or 'not set'}, but pyproject.toml says {source[1]}")


def build(version: str, changes: dict[str, str], folder: Path) -> tuple[Path, ...]:
    """Builds the packages from the last commit with some files changed.

    Args:
        version: Of the release.
        changes: Contents by path.
        folder: For the work and the result.

    Returns:
        Source distribution, and the wheel that is built from it.
    """
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    _unpack(io.BytesIO(archive), folder / "tree")
    for name, content in changes.items():
        (folder / "tree" / name).write_text(content)
    _run(
        sys.executable, "-c", "from setuptools import build_meta as b; b.build_sdist('../dist')", folder=folder / "tree"
    )
    (source,) = (folder / "dist").glob("*.tar.gz")
    with source.open("rb") as file:
        _unpack(file, folder / "source")
    (tree,) = (folder / "source").iterdir()
    _run(sys.executable, "-c", "from setuptools import build_meta as b; b.build_wheel('../../dist')", folder=tree)
    (wheel,) = (folder / "dist").glob("*.whl")
    check_wheel(wheel, version)
    return source, wheel


def _unpack(file: IO[bytes], folder: Path) -> None:
    with tarfile.open(fileobj=file) as archive:
        archive.extractall(folder, filter="data")


def release(version: str, *, is_dry: bool) -> list[str]:
    """Makes a release, or only what can be checked of it.

    Returns:
        What was done, and what is left to do.

    Raises:
        ReleaseError: Something stands in the way; nothing was changed.
    """
    new = parse_version(version)
    source, changelog = (ROOT / VERSION_FILE).read_text(), (ROOT / CHANGELOG).read_text()
    old = version_of(source)
    groups = unreleased(changelog)
    is_first = not _run("git", "tag", "--list", "v*")
    check_step(parse_version(old), new, groups, is_first=is_first)
    check_tree(version)
    changes = {
        VERSION_FILE: source.replace(f'"{old}"', f'"{version}"'),
        CHANGELOG: dated(changelog, version, datetime.datetime.now(datetime.timezone.utc).date()),
    }
    counts = ", ".join(f"{len(entries)} {name}" for name, entries in groups.items())
    report = [f"Octavo {version}, {'the first release' if is_first else f'after {old}'}: {counts}"]
    with tempfile.TemporaryDirectory(prefix="octavo-release-") as folder:
        packages = build(version, changes, Path(folder))
        report += [f"built {package.name}" for package in packages]
        if is_dry:
            return [*report, "a dry run: nothing was changed; --execute makes the release"]
        (ROOT / "dist").mkdir(exist_ok=True)
        for package in packages:
            shutil.move(package, ROOT / "dist" / package.name)
    for name, content in changes.items():
        (ROOT / name).write_text(content)
    _run("git", "commit", "--quiet", "--all", "--message", f"Octavo {version}")
    _run("git", "tag", "--annotate", f"v{version}", "--message", f"Octavo {version}")
    names = " ".join(f"dist/{package.name}" for package in packages)
    return [*report, "committed and tagged. Then:", "  git push --follow-tags", f"  twine upload {names}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("version", help="such as 0.2.0")
    parser.add_argument("--execute", action="store_true", help="do it; otherwise only what would be done is checked")
    options = parser.parse_args()
    try:
        print("\n".join(release(options.version, is_dry=not options.execute)))
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
