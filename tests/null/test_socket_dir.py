"""The folder of a server's sockets does not outlive it for long."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from api.engine.socket_dir import LOCK, PREFIX, SocketDir

ROOT = Path(__file__).resolve().parents[2]
HOLD = "from api.engine.socket_dir import SocketDir; d = SocketDir(); print(d.path, flush=True); input()"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # sockets need short paths
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def hold() -> tuple[subprocess.Popen[str], Path]:
    """Another process with a folder of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_folder_lives_as_long_as_it_is_used(temporary: Path) -> None:
    folder = SocketDir()
    path = Path(folder.path)
    assert path.parent == temporary and stat.S_IMODE(path.stat().st_mode) == 0o700
    (path / "api").touch()
    folder.close()
    assert not path.exists()
    folder.close()


def test_the_next_start_removes_what_a_killed_server_left(temporary: Path) -> None:
    process, path = hold()
    (path / "1").mkdir()
    (path / "1" / "socket").touch()
    second = SocketDir()
    assert path.exists(), "its server lives"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert path.exists()
    third = SocketDir()
    assert not path.exists()
    assert {item.name for item in temporary.iterdir()} == {Path(second.path).name, Path(third.path).name}
    second.close()
    third.close()


def test_what_is_not_certainly_stale_stays(temporary: Path, tmp_path: Path) -> None:
    """Folders of other programs, links, and folders that are only being made."""
    (temporary / f"{PREFIX}without-lock").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / LOCK).touch()
    (temporary / f"{PREFIX}link").symlink_to(other)
    (temporary / f"{PREFIX}file").touch()
    os.mkfifo(temporary / f"{PREFIX}pipe")
    inner = temporary / f"{PREFIX}linked-lock"
    inner.mkdir()
    (inner / LOCK).symlink_to(other / LOCK)
    before = {item.name for item in temporary.iterdir()}
    SocketDir().close()
    assert {item.name for item in temporary.iterdir()} == before and (other / LOCK).exists()


def test_many_start_at_once(temporary: Path) -> None:
    others = [hold() for _ in range(4)]
    try:
        assert all(path.exists() for _, path in others)
        assert len({path for _, path in others}) == 4
    finally:
        for process, _ in others:
            end(process)
