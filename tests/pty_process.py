"""A process on a pseudo-terminal, driven as a person would."""

from __future__ import annotations

import builtins
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from types import TracebackType

DEADLINE = 60.0


class Terminal:
    """Runs a command whose controlling terminal is a pty, so that Ctrl-C is a signal."""

    def __init__(self, command: list[str], *, cwd: str, env: dict[str, str], columns: int = 80) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        name = os.ttyname(slave)
        # A session leader without a terminal gets the first one that it opens.
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", 'tty=$1; shift; exec "$@" <>"$tty" >&0 2>&0', "sh", name, *command],
            cwd=cwd,
            env={**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", **env},
            start_new_session=True,
        )
        self._slave = slave
        self.output = ""
        """Everything that was written so far."""
        self._seen = 0

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def enter(self, text: str) -> None:
        """Types a text and presses Enter."""
        self.type(text)
        # Keys that arrive as one block could be taken for a paste; nobody types that fast.
        self.type("\r")

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def expect(self, pattern: str, timeout: float = DEADLINE) -> str:
        """Waits for a text after what was seen before. Returns what was written up to its end.

        Raises:
            AssertionError: It did not come in time.
        """
        deadline = time.monotonic() + timeout
        while True:
            if match := re.compile(pattern).search(self.output, self._seen):
                before = self.output[self._seen : match.end()]
                self._seen = match.end()
                return before
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{pattern!r} was not written, but {self.output[self._seen :]!r}")

    def _read(self, timeout: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], min(max(timeout, 0), 0.2))
        if ready:
            try:
                self.output += os.read(self._master, 1 << 16).decode("utf-8", "replace")
            except OSError:
                return False
            return True
        return timeout > 0 and self.process.poll() is None

    def wait(self, timeout: float = DEADLINE) -> int:
        """Waits for the end. Returns the exit code."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None and time.monotonic() < deadline:
            self._read(0.05)
        while self._read(0):
            pass
        return self.process.wait(1)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: builtins.type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGHUP)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        os.close(self._slave)
        os.close(self._master)
