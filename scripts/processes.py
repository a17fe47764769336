"""Servers and other processes that a benchmark starts, watches and always stops. Linux only (/proc)."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT = 600.0
"""Seconds until a server must accept requests; some compile first."""
STOP_TIMEOUT = 20.0
"""Seconds that a server has to exit when asked to."""


def processor_seconds(pids: dict[str, int]) -> dict[str, float]:
    """User and system time of processes, by name."""
    ticks = os.sysconf("SC_CLK_TCK")
    seconds: dict[str, float] = {}
    for name, pid in pids.items():
        fields = _stat(pid)
        seconds[name] = (int(fields[11]) + int(fields[12])) / ticks if fields else 0.0
    return seconds


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    fields = _stat(pid)
    return int(fields[21]) * os.sysconf("SC_PAGE_SIZE") if fields else 0


def proportional_bytes(pid: int) -> int:
    """Proportional set size (PSS) of a process."""
    return _rolled_up(pid, "Pss:")


def own_bytes(pid: int) -> int:
    """The part of a process's PSS that is no file. That of libraries changes as other programs map them, too."""
    return _rolled_up(pid, "Pss_Anon:", "Pss_Shmem:")


def _rolled_up(pid: int, *names: str) -> int:
    """Sum of fields of /proc/PID/smaps_rollup, in bytes; 0 if the process is gone."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(names))
    return 0


def process_name(pid: int) -> str:
    """The title of a process, shortened; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()[:20]
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold anything; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


class Server:
    """A server of any make, from its start to the end of its last process."""

    def __init__(self, command: list[str], env: dict[str, str] | None = None) -> None:
        """Starts it.

        Args:
            command: Its command line; ``{port}`` in an argument becomes a free port. Octavo has no drafts unless it
                says so, since other servers have none.
            env: Additional environment variables.
        """
        says_so = any(argument.startswith(("--speculative-config", "-sc")) for argument in command)
        if command[1:3] == ["-m", "api"] and not says_so:
            command = [*command, "--speculative-config", '{"method": "none"}']
        self.port = free_port()
        self.started = time.monotonic()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = start_process(
            [argument.replace("{port}", str(self.port)) for argument in command],
            env=env,
            stdout=self._log,
            stderr=self._log,
        )
        self._known: set[tuple[int, str]] = set()
        """Process ids and start times of everything that the server has started."""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def memory_bytes(self) -> int:
        """Memory of the whole process tree; pages that several of its processes share count once."""
        return sum(proportional_bytes(pid) for pid in self.pids())

    def pids(self) -> list[int]:
        """Process ids of the whole process tree."""
        children = descendants(self._process.pid)
        self._known |= children
        return [self._process.pid, *(child for child, _ in children)]

    def wait_ready(self, path: str = "/health", interval: float = 0.1) -> None:
        """Waits until the server accepts requests.

        Args:
            path: Path that answers 200 once it does.
            interval: Seconds between checks.

        Raises:
            RuntimeError: The server exited or was not ready in time.
        """
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {self._process.returncode}:\n{self.log()}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                try:
                    connection.request("GET", path)
                    if connection.getresponse().status == 200:
                        return
                finally:
                    connection.close()
            time.sleep(interval)
        raise RuntimeError(f"the server is not ready after {START_TIMEOUT:.0f} s:\n{self.log()}")

    def log(self) -> str:
        """The tail of the server's output."""
        self._log.seek(0)
        return self._log.read()[-4000:].decode("utf-8", "replace")

    def stop(self) -> None:
        """Stops the server and all its descendants."""
        self._known |= descendants(self._process.pid)
        end_process(self._process)
        deadline = time.monotonic() + STOP_TIMEOUT
        for pid, started in self._known:
            while is_alive(pid, started) and time.monotonic() < deadline:
                time.sleep(0.05)
            if is_alive(pid, started):
                os.kill(pid, signal.SIGKILL)
        self._log.close()


def start_process(command: list[str], env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[bytes]:
    """Starts a process that finds the repository's packages and dies with this one, however this one ends."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    libc = ctypes.CDLL(None)
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        preexec_fn=lambda: libc.prctl(1, signal.SIGKILL),  # PR_SET_PDEATHSIG
        **options,
    )


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Asks a process to exit, and kills it if it does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def descendants(pid: int) -> set[tuple[int, str]]:
    """Ids and start times of all processes below one."""
    found: set[tuple[int, str]] = set()
    parents = {pid}
    stats = [(int(entry.name), _stat(int(entry.name))) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    while parents:
        children = {(child, fields[19]) for child, fields in stats if fields and int(fields[1]) in parents}
        parents = {child for child, _ in children - found}
        found |= children
    return found


def is_alive(pid: int, started: str) -> bool:
    """Whether a process still runs; another one with its id does not count."""
    fields = _stat(pid)
    return bool(fields) and fields[0] != "Z" and fields[19] == started


def free_port() -> int:
    """A currently unused port on the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP unwind the stack, so that what was started is stopped."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
