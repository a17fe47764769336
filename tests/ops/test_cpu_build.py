"""Compiling the kernels: the cache, what happens without a compiler, and how a capability is chosen."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ops.cpu import build, library
from tests.ops.cpu import NEEDS_KERNELS

ROOT = Path(__file__).resolve().parents[2]
ALL_SOURCES = build.SOURCES
PORTABLE = build.CAPABILITIES["portable"]

FAKE_COMPILER = """#!/bin/sh
[ "$1" = --version ] && {{ echo fake 1.0; exit; }}
echo "$@" >> {log}
while [ $# -gt 0 ]; do
    [ "$1" = -o ] && echo object > "$2"
    shift
done
sleep 0.02
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes its command lines to a file, which is returned. There are a few sources."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("dot.cpp", "norm.h", "panel.cpp", "ranks.cpp"):
        shutil.copy(build.SOURCES / name, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    log, script = tmp_path / "log", tmp_path / "fake c++"
    script.write_text(FAKE_COMPILER.format(log=log))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path / "cache"))
    return log


def test_a_library_is_compiled_once(compiler: Path, tmp_path: Path) -> None:
    first = build.build(PORTABLE)
    assert first.is_relative_to(tmp_path / "cache")
    commands = compiler.read_text().splitlines()
    assert len(commands) == 1 + len(list(build.SOURCES.glob("*.cpp")))
    assert all("-ffp-contract=off" in command and "-ffast-math" not in command for command in commands[:-1])
    assert not any(" -m" in command for command in commands), "the portable path takes no flags of a CPU"
    assert build.build(PORTABLE) == first
    assert len(compiler.read_text().splitlines()) == len(commands)
    others = {build.build(capability) for capability in build.CAPABILITIES.values()}
    assert len(others) == len(build.CAPABILITIES)


def test_the_key_holds_sources_and_compiler(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.build(PORTABLE)
    sources = tmp_path / "csrc"
    sources.mkdir()
    for path in build.SOURCES.iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "SOURCES", sources)
    assert build.build(PORTABLE) == before
    header = next(sources.glob("*.h"))
    header.write_text(header.read_text() + "// changed\n")
    assert build.build(PORTABLE) != before


def test_several_builders_at_once(compiler: Path) -> None:
    results: list[Path] = []
    builders = [threading.Thread(target=lambda: results.append(build.build(PORTABLE))) for _ in range(4)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(set(results)) == 1
    assert len(results) == 4
    assert len(compiler.read_text().splitlines()) == 1 + len(list(build.SOURCES.glob("*.cpp")))


def test_a_cache_that_cannot_be_written(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path / "file"))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    # Each process stands for one life of a worker.
    code = "from ops.cpu import build; print(build.build(build.CAPABILITIES['portable']))"
    paths = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(temporary)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for _ in range(2)
    ]
    assert paths[0] == paths[1] and Path(paths[0]).exists()
    assert len(compiler.read_text().splitlines()) == 1 + len(list(ALL_SOURCES.glob("*.cpp")))
    (folder,) = temporary.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_temporary_folder_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    name = tmp_path / f"octavo-kernels-{os.getuid()}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    name.symlink_to(elsewhere)
    assert build._users_folder() is None
    name.unlink()
    name.mkdir(mode=0o700)
    assert build._users_folder() == name
    name.chmod(0o777)
    assert build._users_folder() is None


def test_what_a_killed_builder_left_is_removed(compiler: Path) -> None:
    library = build.build(PORTABLE)
    library.unlink()
    left = library.with_name(f"{library.name}.building")
    left.mkdir()
    (left / "dot.o").touch()
    assert build.build(PORTABLE) == library
    assert not left.exists()


def test_a_full_disk_is_no_fault_of_the_compiler(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next folder is tried; kernels would otherwise be given up for plain torch."""
    monkeypatch.setattr(build, "_users_folder", lambda: tmp_path / "other")
    script = Path(os.environ["CXX"])
    full = (
        'case "$*" in *cache*) echo "fatal error: error writing to x.s: No space left on device" >&2; exit 1;; esac\n'
    )
    script.write_text(script.read_text().replace('echo "$@"', full + 'echo "$@"'))
    assert build.build(PORTABLE).is_relative_to(tmp_path / "other")


def test_a_compiler_that_fails(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(os.environ["CXX"])
    script.write_text("#!/bin/sh\necho 'it is broken' >&2\nexit 1\n")
    with pytest.raises(build.BuildError, match="it is broken"):
        build.build(PORTABLE)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.build(PORTABLE)


def choose(**environment: str) -> tuple[str, str]:
    """The capability that another process chooses, and what it says about that."""
    code = (
        "import logging; logging.basicConfig(level='WARNING')\n"
        "import torch; from ops.cpu import library\n"
        "import ops; ops.add(torch.ones(2, 2), torch.ones(2, 2))\n"
        "ops.add(torch.ones(2, 2), torch.ones(2, 2))\n"
        "kernels = library.chosen(); print(kernels.capability if kernels else 'none')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip(), result.stderr


@NEEDS_KERNELS
def test_the_environment_chooses() -> None:
    assert choose()[0] == build.available()[0].name or build.configured()
    assert choose(OCTAVO_CPU_CAPABILITY="portable")[0] == "portable"
    assert choose(OCTAVO_CPU_CAPABILITY="reference") == ("none", "")
    name, messages = choose(OCTAVO_CPU_CAPABILITY="z80")
    assert name == "none"
    assert "unknown capability 'z80'" in messages


def test_without_a_compiler_there_is_one_warning(tmp_path: Path) -> None:
    name, messages = choose(CXX="no-such-compiler", OCTAVO_CACHE_DIR=str(tmp_path))
    assert name == "none"
    assert messages.count("no CPU kernels") == 1
    assert "no-such-compiler" in messages


def test_capabilities_need_what_their_flags_use(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, Callable[[str], bool]]] = [
        ("amx", lambda flag: True),
        ("avx512bf16", lambda flag: "amx" not in flag),
        ("avx512vnni", lambda flag: "amx" not in flag and "bf16" not in flag),
        ("avx512", lambda flag: "amx" not in flag and "bf16" not in flag and "vnni" not in flag),
        ("avxvnni", lambda flag: "512" not in flag and "amx" not in flag),
        ("avx2", lambda flag: "512" not in flag and "amx" not in flag and "vnni" not in flag),
        ("portable", lambda flag: False),
    ]
    everything = frozenset().union(*(capability.needs for capability in build.CAPABILITIES.values()))
    monkeypatch.setattr(build, "cpu_vendor", lambda: "AuthenticAMD")
    for name, has in order:
        monkeypatch.setattr(build, "cpu_flags", lambda has=has: frozenset(filter(has, everything)))
        assert build.available()[0].name == name


def test_intel_cpus_without_amx_multiply_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of Golden Cove and later do twice as many float products; Cooper Lake, without AVX-VNNI, does not."""

    def names(vendor: str, lacks: str) -> list[str]:
        monkeypatch.setattr(build, "cpu_vendor", lambda: vendor)
        monkeypatch.setattr(build, "cpu_flags", lambda: frozenset(flag for flag in everything if lacks not in flag))
        return [capability.name for capability in build.available()]

    everything = frozenset().union(*(capability.needs for capability in build.CAPABILITIES.values()))
    rest = ["avx512", "avxvnni", "avx2", "portable"]
    assert names("GenuineIntel", "amx") == ["avx512vnni", "avx512bf16", *rest]
    assert names("GenuineIntel", "no such flag")[0] == "amx"
    assert names("GenuineIntel", "avx_vnni")[:2] == ["amx", "avx512bf16"]
    assert names("AuthenticAMD", "amx") == ["avx512bf16", "avx512vnni", *rest]


def test_unknown_capability() -> None:
    with pytest.raises(build.BuildError, match="unknown capability"):
        library.load("sse")
