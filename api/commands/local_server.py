"""A server of one's own, on a Unix socket that only this user can reach. It ends with the process that started it."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from engine_core.launch import child_environment

ROOT = str(Path(__file__).resolve().parents[2])
MAX_SOCKET_PATH = 100
"""Bytes that a socket's path may have, with some room (the kernel's bound is 107)."""
LOG_LINES = 400
STOP_TIMEOUT = 10.0
_PROGRESS = re.compile(r"([^:|]{1,60}): +(\d+)%\|")
"""A progress bar of tqdm: what goes on, and how far it is."""
_PR_SET_PDEATHSIG = 1
_START = (
    "import sys; _, parent, root, *arguments = sys.argv; sys.path = [root, *filter(None, sys.path)]; "
    "from api.commands.local_server import follow_parent; follow_parent(int(parent)); "
    "from api.cli import main; sys.exit(main(['serve', *arguments]))"
)
"""What the child runs. The empty entry of the path is the current folder, whose files are not ours."""


class LocalServer:
    """``octavo serve`` as a child process."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str] | None = None) -> None:
        """Starts the process.

        Args:
            arguments: Those of ``octavo serve``, without an address.
            environment: Variables to set beside the present ones.
        """
        self._folder = _make_folder()
        path = f"{self._folder}/server"
        self.url = f"unix:{path}"
        self._log: collections.deque[str] = collections.deque(maxlen=LOG_LINES)
        self.progress = ""
        """What the server is busy with before it listens, such as downloads; empty if it does not say."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(os.getpid()), ROOT, *arguments, "--uds", path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=child_environment(environment),
            start_new_session=True,  # Ctrl-C is for the chat
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while the server runs."""
        return self._process.poll()

    def log(self) -> list[str]:
        """The last lines that the server wrote."""
        return list(self._log)

    def last_words(self) -> str:
        """Why the server ended."""
        self._reader.join(timeout=2)
        code = self.exit_code()
        how = f"with exit code {code}" if code is None or code >= 0 else f"by signal {signal.Signals(-code).name}"
        errors = [line.removeprefix("octavo: ") for line in self._log if line.startswith("octavo: ")]
        reason = "\n".join(errors or [*self._log][-20:]) or "it wrote nothing"
        return f"the server ended {how}: {reason}"

    def stop(self) -> None:
        """Ends the server and removes its socket."""
        if self.exit_code() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join(timeout=2)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> LocalServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        rest = ""
        with self._process.stderr as pipe:
            while data := os.read(pipe.fileno(), 1 << 16):
                *lines, rest = re.split(r"[\r\n]", (rest + data.decode("utf-8", "replace"))[-(1 << 16) :])
                for line in lines:
                    self._take(line)
                if read_progress(rest) is not None:  # bars are drawn before their line ends
                    self._take(rest)
        self._take(rest)

    def _take(self, line: str) -> None:
        progress = read_progress(line)
        if progress is not None:
            self.progress = progress
        elif line.strip():
            self._log.append(line)


def read_progress(line: str) -> str | None:
    """What a progress bar says, without the bar; None for other lines of the log."""
    bar = _PROGRESS.match(line)
    return None if bar is None else f"{bar[1].strip()} {bar[2]} %"


def follow_parent(parent: int) -> None:
    """In the child, before the server is imported: ends this process when its parent does, or at once if it has."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)


def _make_folder() -> str:
    """A folder that only this user can enter, with a path short enough for a socket."""
    path = tempfile.mkdtemp(prefix="octavo-chat-")
    if len(path) > MAX_SOCKET_PATH - 20:
        os.rmdir(path)
        path = tempfile.mkdtemp(prefix="octavo-chat-", dir="/tmp")
    return path
