"""The folder of a server's sockets; also removes the folders of servers that were killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "octavo-"
MAX_SOCKET_PATH = 100
"""Maximum bytes of a socket's path, with some margin (the kernel's limit is 107)."""
LOCK = "lock"


class SocketDir:
    """A folder that only this user can access, with a path short enough for sockets.

    Its lock file is locked while the folder is in use, and the kernel releases the lock however the process ends. So
    the folders of dead servers can be recognised even across containers, which process ids do not allow.
    """

    def __init__(self) -> None:
        """Creates the folder, and removes those of dead servers next to it."""
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
    """Locks a folder. Its lock file gets its final name only once locked, so no process sees it unlocked."""
    descriptor = os.open(folder / f"{LOCK}.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):  # on a file system without locks, the folder never counts as stale
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(folder / f"{LOCK}.new", folder / LOCK)
    return descriptor


def remove_stale(parent: Path) -> None:
    """Removes folders of this user whose server is dead. Folders that cannot be removed stay."""
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
