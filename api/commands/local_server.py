"""An own server, on a Unix socket that only this user can access. It exits with the process that started it."""

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
"""Maximum length of a socket path in bytes, with some margin (the kernel's limit is 107)."""
LOG_LINES = 400
STOP_TIMEOUT = 10.0
_PROGRESS = re.compile(r"([^:|]{1,60}): +(\d+)%\|")
"""A tqdm progress bar: description and percentage."""
_PR_SET_PDEATHSIG = 1
_START = (
    "import sys; _, parent, root, *arguments = sys.argv; sys.path = [root, *filter(None, sys.path)]; "
    "from api.commands.local_server import follow_parent; follow_parent(int(parent)); "
    "from api.cli import main; sys.exit(main(['serve', *arguments]))"
)
"""The child's program. The empty path entry is the current folder, whose modules must not be imported."""


class LocalServer:
    """``octavo serve`` as a child process."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str] | None = None) -> None:
        """Starts the process.

        Args:
            arguments: Arguments of ``octavo serve``, without an address.
            environment: Additional environment variables.
        """
        self._folder = _make_folder()
        path = f"{self._folder}/server"
        self.url = f"unix:{path}"
        self._log: collections.deque[str] = collections.deque(maxlen=LOG_LINES)
        self.progress = ""
        """What the server is doing before it listens, such as downloading; empty if not reported."""
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
        """The last lines of the server's log."""
        return list(self._log)

    def last_words(self) -> str:
        """Why the server exited."""
        self._reader.join(timeout=2)
        code = self.exit_code()
        how = f"with exit code {code}" if code is None or code >= 0 else f"on {signal.Signals(-code).name}"
        errors = [line.removeprefix("octavo: ") for line in self._log if line.startswith("octavo: ")]
        reason = "\n".join(errors or [*self._log][-20:]) or "no output"
        return f"the server exited {how}: {reason}"

    def stop(self) -> None:
        """Stops the server and removes its socket."""
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
    """The text of a progress bar, without the bar; None for other log lines."""
    bar = _PROGRESS.match(line)
    return None if bar is None else f"{bar[1].strip()} {bar[2]} %"


def follow_parent(parent: int) -> None:
    """In the child, before the server is imported: exits this process when its parent exits, or already has."""
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
