"""Child processes that never outlive their parents.

A child runs one of our modules (``child_command``) and gets its start message on a pipe (its standard input). The pipe
stays open: end of file means that the parent is gone. On Linux the kernel's parent death signal covers a child that
does not read. Descriptors travel with the message, over a socket of their own, so a child that was started ahead gets
them, too. Neither fork nor pickle is involved.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import setproctitle

_LENGTH = struct.Struct("<Q")
_PR_SET_PDEATHSIG = 1
_F_SETPIPE_SZ = 1031
_PIPE_BYTES = 1 << 20
_SOCKET_OPTION = "octavo_descriptors"
"""Interpreter option (``-X``) with the number of the socket on which a child gets descriptors."""
MAX_DESCRIPTORS = 250
"""Most descriptors that travel with a message."""
_ROOT = str(Path(__file__).resolve().parent.parent)
"""The folder of the four packages."""
_BOOTSTRAP = (
    "import sys; root, module = sys.argv[1:3]; del sys.argv[1:3]; "
    "sys.path[:] = [root, *(entry for entry in sys.path if entry not in ('', root))]; "
    "import runpy; runpy.run_module(module, run_name='__main__', alter_sys=True)"
)
"""``python -m`` would search the current folder first and import an ``ops.py`` or ``torch.py`` from there. ``-P`` needs
Python 3.11, and ``-I`` drops PYTHONPATH and the user's site-packages."""


def child_command(module: str, *arguments: str) -> list[str]:
    """The command that runs one of our modules as ``__main__``, importing nothing from the current folder.

    Args:
        module: Dotted name of the module, such as ``executor.describe``.
        arguments: What it finds in ``sys.argv[1:]``.
    """
    return [sys.executable, "-c", _BOOTSTRAP, _ROOT, module, *arguments]


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a ``child_command``: this process's, with ``extra`` added.

    Empty and relative entries of PYTHONPATH are dropped: they refer to the current folder.
    """
    environment = {**os.environ, **(extra or {})}
    entries = environment.pop("PYTHONPATH", "").split(os.pathsep)
    if absolute := [entry for entry in entries if os.path.isabs(entry)]:
        environment["PYTHONPATH"] = os.pathsep.join(absolute)
    return environment


class ChildProcess:
    """A running child. Becomes readable (``fileno``) when it ends."""

    def __init__(
        self,
        module: str,
        payload: bytes | None,
        env: dict[str, str] | None = None,
        *,
        arguments: Sequence[str] = (),
        descriptors: Sequence[int] = (),
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> None:
        """
        Args:
            module: Module to run.
            payload: The start message. None: ``begin`` sends it, and the child imports what it needs in the meantime.
            env: Additions to the environment.
            arguments: Command line arguments.
            descriptors: What ``read_descriptors`` returns in the child, besides the start message.
            stdout: Descriptor for standard output. None: inherited.
            stderr: Descriptor for standard error. None: inherited.
        """
        self._socket, theirs = socket.socketpair()
        interpreter, *command = child_command(module, *arguments)
        try:
            self._process = subprocess.Popen(
                [interpreter, "-X", f"{_SOCKET_OPTION}={theirs.fileno()}", *command],
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                env=child_environment(env),
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        with contextlib.suppress(OSError):  # otherwise a long message blocks until the child has finished its imports
            fcntl.fcntl(self._pipe.fileno(), _F_SETPIPE_SZ, _PIPE_BYTES)
        if payload is not None:
            self.begin(payload, descriptors)

    def begin(self, payload: bytes, descriptors: Sequence[int] = ()) -> None:
        """Sends the start message, with descriptors, to a child that was started without one."""
        assert len(descriptors) <= MAX_DESCRIPTORS
        try:
            if descriptors:  # first, so that they are there when the message is
                socket.send_fds(self._socket, [b"\0"], descriptors)
            self._pipe.write(_LENGTH.pack(len(payload)) + payload)
            self._pipe.flush()
        except BrokenPipeError:
            pass  # it died at once; the watcher of the process will notice

    def fileno(self) -> int:
        return self._pidfd

    @property
    def stdin(self) -> int:
        """Descriptor of our end of the pipe."""
        return self._pipe.fileno()

    def poll(self) -> int | None:
        """The exit code, or None while the process runs."""
        return self._process.poll()

    def begin_to_kill(self) -> None:
        """Kills the process, whose end may take a while: its memory is freed first. ``kill`` waits for it."""
        self._process.kill()

    def kill(self) -> None:
        """Kills the process and reaps it."""
        self._process.kill()
        self.wait()

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end of the process.

        Raises:
            subprocess.TimeoutExpired: It is still running.
        """
        code = self._process.wait(timeout)
        self.close()
        return code

    def hang_up(self) -> None:
        """Closes the pipe, which asks the process to end."""
        self._socket.close()
        with contextlib.suppress(BrokenPipeError):
            self._pipe.close()

    def close(self) -> None:
        """Releases the descriptors of a process that has ended."""
        self.hang_up()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


_prepared: dict[str, ChildProcess] = {}


def prepare_child(module: str, env: dict[str, str] | None = None, arguments: Sequence[str] = ()) -> None:
    """Starts a child that ``prepared_child`` will need soon: its imports run while this process does other work."""
    _prepared[module] = ChildProcess(module, None, env, arguments=arguments)


def prepared_child(module: str, payload: bytes, descriptors: Sequence[int] = ()) -> ChildProcess | None:
    """The child that was prepared for a module, with its start message; None if there is none, or it has died."""
    child = _prepared.pop(module, None)
    if child is None:
        return None
    if child.poll() is not None:
        child.wait()
        return None
    child.begin(payload, descriptors)
    return child


def discard_child(module: str) -> None:
    """Ends the child that was prepared for a module, if it was never needed."""
    child = _prepared.pop(module, None)
    if child is not None:
        child.kill()


def read_payload() -> bytes:
    """In the child: the start message, or the next message after it.

    Raises:
        EOFError: The parent exited before the message was complete.
    """
    (length,) = _LENGTH.unpack(_read_exactly(_LENGTH.size))
    return _read_exactly(length)


def read_descriptors() -> list[int]:
    """In the child: the descriptors that came with the last message, in order. The caller owns them."""
    number = sys._xoptions.get(_SOCKET_OPTION)
    if not isinstance(number, str):
        return []  # not started by ``ChildProcess``
    with socket.socket(fileno=os.dup(int(number))) as connection:
        connection.setblocking(False)
        try:
            _, descriptors, _, _ = socket.recv_fds(connection, 1, MAX_DESCRIPTORS)
        except BlockingIOError:
            return []
    return descriptors


def _read_exactly(count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = os.read(0, min(count - len(data), 1 << 20))
        if not part:
            raise EOFError("the parent process exited")
        data += part
    return bytes(data)


def become_child(title: str) -> None:
    """In the child, first of all: names the process and ties its life to the parent's."""
    setproctitle.setproctitle(title)
    # Ctrl-C and hang-ups of the terminal reach all processes, and service managers signal whole groups: the parent
    # decides how to react.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # No signal comes if the parent exited before this point; check now, or a model load would hold memory for minutes.
    poller = select.poll()
    poller.register(0, 0)
    if any(event & select.POLLHUP for _, event in poller.poll(0)):
        raise SystemExit(1)
