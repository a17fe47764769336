"""A server in processes of its own, for tests that want the real thing."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
READY = re.compile(r"Serving \S+ at (https?://\S+)/v1 ")
START_TIMEOUT = 120
PATIENCE = 120.0
"""Seconds that anything may take that must happen."""


class Server:
    """``python -m api`` with some flags, in ``cwd``. Leaves no process behind, and says so if one stays."""

    def __init__(self, *flags: str, env: dict[str, str] | None = None, cwd: Path = ROOT, module: str = "api") -> None:
        if not any(flag.startswith("--speculative-config") for flag in flags):  # streams take their time
            flags = ("--speculative-config", '{"method": "none"}', *flags)
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--port", "0", *flags],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.errors: list[str] = []
        self.num_kills = 0
        """Processes that ``kill`` has killed."""
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        self._children: list[psutil.Process] = []
        watchdog = threading.Timer(START_TIMEOUT, self.process.kill)
        watchdog.start()
        try:
            self.url = self._wait_until_ready()
        finally:
            watchdog.cancel()
        self._children = psutil.Process(self.process.pid).children(recursive=True)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line)

    def _wait_until_ready(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if match := READY.match(line):
                return match[1]
        self.process.wait()
        self._reader.join()
        raise AssertionError(f"the server did not start: {''.join(self.errors)}")

    def child(self, title: str) -> psutil.Process:
        """The child process of that title; waits while one is being started."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            for process in _children(self.process.pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if title in " ".join(process.cmdline()):
                        return process
            time.sleep(0.01)
        raise AssertionError(f"there is no process {title!r}")

    def kill(self, title: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to the child process of that title."""
        self.child(title).send_signal(number)
        self.num_kills += 1

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=PATIENCE, **options)

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        text = self.get("/metrics").text
        lines = [line for line in text.splitlines() if re.match(rf"{re.escape(name)}(\{{| )", line)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def restarted(self, count: float) -> None:
        """Waits until engines have been restarted so often: streams may end before a death is noticed."""
        deadline = time.monotonic() + PATIENCE
        while self.metric("octavo:engine_restarts_total") < count:
            assert time.monotonic() < deadline, "".join(self.errors)
            time.sleep(0.01)

    def rests(self) -> None:
        """Waits until no request is running and no block of the KV cache is in use."""
        deadline = time.monotonic() + PATIENCE
        names = ("vllm:num_requests_running", "vllm:kv_cache_usage_perc")
        while any(values := [self.metric(name) for name in names]):
            assert time.monotonic() < deadline, values
            time.sleep(0.01)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=PATIENCE, **options)

    def stop(self) -> int:
        """Asks the server to end, waits, and checks that nothing is left. Returns the exit code."""
        children = {*self._children, *_children(self.process.pid)}
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        _, alive = psutil.wait_procs(children, timeout=60)
        for process in alive:
            process.kill()
        assert not alive, f"processes outlived the server: {alive}"
        self._reader.join()
        assert self.process.stdout is not None and self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()
        return code

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def run_cli(*arguments: str, timeout: float = 240, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m api`` in ``cwd`` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "api", *arguments],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def stream_text(lines: Iterator[str]) -> Iterator[str]:
    """The data of server-sent events."""
    for line in lines:
        if line.startswith("data: "):
            yield line[len("data: ") :]
