"""Supervises the engine core process: starts it, detects its exit, stops it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable

from api.engine.socket_dir import SocketDir
from engine_core.config import EngineConfig
from engine_core.launch import (
    ChildProcess,
    EngineCoreLaunch,
    LastWork,
    ProcessWatch,
    launch_engine_core,
    read_flight_record,
)


class Supervisor:
    """Owns the engine core process and the directory of its sockets."""

    def __init__(
        self,
        config: EngineConfig,
        on_exit: Callable[[int], None],
        log_level: str = "info",
        replica: int = 0,
    ) -> None:
        """Creates the socket directory; starts no process yet.

        Args:
            config: Configuration of the engine core.
            on_exit: Called in the event loop with the exit code when the process exits unexpectedly.
            log_level: Log level of the child processes.
            replica: Which of the replicas on this machine it is.
        """
        self._replica = replica
        self._config = config
        self._on_exit = on_exit
        self._log_level = log_level
        self._child: ChildProcess | None = None
        self._record_path = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket_dir = SocketDir()
        self.ipc_dir = self._socket_dir.path
        self.address = f"ipc://{self.ipc_dir}/api"

    def watch(self) -> ProcessWatch | None:
        """Measures the engine core's silence; None: there is none."""
        return None if self._child is None else ProcessWatch(self._child.pid)

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    def start(self, engine_epoch: int) -> None:
        """Starts the engine core."""
        worker_dir = f"{self.ipc_dir}/{engine_epoch}"
        os.mkdir(worker_dir, 0o700)
        if self._record_path:  # the previous engine core's record has been read
            shutil.rmtree(os.path.dirname(self._record_path), ignore_errors=True)
        launch = EngineCoreLaunch(
            config=self._config,
            address=self.address,
            ipc_dir=worker_dir,
            engine_epoch=engine_epoch,
            log_level=self._log_level,
            replica=self._replica,
        )
        self._record_path = launch.record_path
        self._loop = asyncio.get_running_loop()
        self._child = launch_engine_core(launch)
        self._loop.add_reader(self._child.fileno(), self._ended)

    def _ended(self) -> None:
        child = self._child
        assert child is not None
        code = self._forget(child)
        self._on_exit(code)

    def _forget(self, child: ChildProcess) -> int:
        if self._loop is not None and child.fileno() >= 0:
            self._loop.remove_reader(child.fileno())
        self._child = None
        return child.wait()

    def last_work(self) -> LastWork:
        """The work of the last engine core when it ended."""
        return read_flight_record(self._record_path)

    def kill(self) -> None:
        """Kills a process that does not respond; its exit is then handled like any other."""
        if self._child is not None:
            os.kill(self._child.pid, 9)

    async def stop(self, timeout: float = 5.0) -> None:
        """Stops the engine core and removes its sockets."""
        child = self._child
        if child is not None:
            assert self._loop is not None
            self._child = None
            ended: asyncio.Future[None] = self._loop.create_future()
            self._loop.add_reader(child.fileno(), _resolve, ended)
            child.hang_up()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(ended, timeout)
            self._loop.remove_reader(child.fileno())
            child.kill()
        self._socket_dir.close()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
