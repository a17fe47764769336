"""Machines that Ray provides, as the server sees them: a process that keeps agents on them (``ray_driver.py``)."""

from __future__ import annotations

import os
import queue
import threading

import msgspec

from executor.base import ModelError
from executor.log import get_logger
from executor.nodes.ray_messages import RayPlacement, RayReport
from executor.process import ChildProcess

logger = get_logger()

DRIVER_MODULE = "executor.nodes.ray_driver"
RETRY = 5.0
"""Seconds before a driver that ended is started again: Ray ends it when the node of this machine is lost."""


class RayMachines:
    """Keeps agents on machines until it is closed."""

    def __init__(self, placement: RayPlacement) -> None:
        self._option = placement.option
        self._payload = msgspec.msgpack.encode(placement)
        self._first: queue.SimpleQueue[RayReport] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._child: ChildProcess | None = None
        self._thread = threading.Thread(target=self._run, name="ray", daemon=True)

    def start(self) -> str:
        """Waits until Ray has placed the agents.

        Returns:
            The address of this machine at which the others reach it.

        Raises:
            ModelError: There is no Ray, no cluster, or too few machines.
        """
        self._thread.start()
        report = self._first.get()
        if report.error:
            raise ModelError(report.error)
        return report.address

    def _run(self) -> None:
        """Runs drivers, one after another. They live as long as this thread."""
        try:
            self._keep_running()
        except OSError as error:  # no process or descriptor to be had
            logger.exception("Ray is asked no more")
            self._first.put(RayReport(error=f"{self._option}: {error.strerror or error}"))

    def _keep_running(self) -> None:
        while True:
            reader, writer = os.pipe()
            with self._lock:
                if self._closing.is_set():
                    os.close(reader)
                    os.close(writer)
                    return
                self._child = child = ChildProcess(DRIVER_MODULE, self._payload, descriptors=[writer], stdout=2)
            os.close(writer)
            with os.fdopen(reader, "rb") as pipe:
                data = pipe.read()
            report = msgspec.msgpack.decode(data, type=RayReport) if data else RayReport(error="Ray's driver has ended")
            self._first.put(report)
            code = child.wait()
            if self._closing.is_set():
                return
            logger.warning("%s; asking Ray again", report.error or f"Ray's driver ended with exit code {code}")
            self._closing.wait(RETRY)

    def close(self) -> None:
        """Ends the agents."""
        self._closing.set()
        with self._lock:
            if self._child is not None and self._child.poll() is None:
                self._child.begin_to_kill()
        if self._thread.is_alive():
            self._thread.join()
