"""The folder of a server's sockets, and of servers that were killed before they could remove theirs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "octavo-"
MAX_SOCKET_PATH = 100
"""Bytes that a socket's path may have, with some room (the kernel's bound is 107)."""
LOCK = "lock"


class SocketDir:
    """A folder that only this user can enter, with a path short enough for sockets.

    While it is in use its lock file is locked, and the kernel unlocks it however the process ends. That tells dead
    owners from living ones, in other containers too, which process ids would not.
    """

    def __init__(self) -> None:
        """Makes the folder, and removes those of dead servers beside it."""
        folder = tempfile.mkdtemp(prefix=PREFIX)
        if len(folder) > MAX_SOCKET_PATH - 20:
            os.rmdir(folder)
            folder = tempfile.mkdtemp(prefix=PREFIX, dir="/tmp")
        self.path = folder
        self._lock = _lock_new(Path(folder))
        remove_stale(Path(folder).parent)

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _lock_new(folder: Path) -> int:
    """Locks a folder. Its lock file has its name only when it is locked, so nobody sees it free."""
    descriptor = os.open(folder / f"{LOCK}.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):  # a file system without locks: nobody takes the folder for stale then
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(folder / f"{LOCK}.new", folder / LOCK)
    return descriptor


def remove_stale(parent: Path) -> None:
    """Removes folders of this user whose server has died. Whatever cannot be removed stays."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
