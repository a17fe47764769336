"""Starts an engine core process: all that the api needs besides messages and configuration."""

from __future__ import annotations

import msgspec

from engine_core.config import Config, EngineConfig
from engine_core.last_work import LastWork, read_flight_record
from executor.base import ModelError
from executor.device.base import device_problem
from executor.files import open_regular, read_document, read_json, why
from executor.helper import Helper, HelperError, HelperLimits, JobError
from executor.liveness import STOPPED_TIMEOUT, ProcessWatch
from executor.log import get_logger, printable, setup_logging
from executor.process import ChildProcess, child_command, child_environment
from executor.supported import check_gguf_architecture, check_supported

RUST_STACK_BYTES = 16 << 20
"""Stack of threads that compute grammar masks: as large as that of the threads that compile grammars."""


class EngineCoreLaunch(Config, frozen=True):
    """The start message of an engine core process."""

    config: EngineConfig
    address: str
    """Address of the api's ROUTER socket."""
    ipc_dir: str
    """A directory of mode 0700 for the workers' sockets."""
    engine_epoch: int
    log_level: str = "info"

    @property
    def record_path(self) -> str:
        """Path of the engine core's ``FlightRecord``."""
        return f"{self.ipc_dir}/record"


def launch_engine_core(launch: EngineCoreLaunch) -> ChildProcess:
    """Starts ``engine_core/__main__.py``. It dies with the calling process, and with the thread that called."""
    return ChildProcess("engine_core", msgspec.msgpack.encode(launch), {"RUST_MIN_STACK": str(RUST_STACK_BYTES)})


def engine_identity(engine_epoch: int) -> bytes:
    """The identity with which an engine core connects to the ROUTER socket."""
    return f"engine_core.{engine_epoch}".encode()


__all__ = [
    "STOPPED_TIMEOUT",
    "ChildProcess",
    "EngineCoreLaunch",
    "Helper",
    "HelperError",
    "HelperLimits",
    "JobError",
    "LastWork",
    "ProcessWatch",
    "ModelError",
    "check_gguf_architecture",
    "check_supported",
    "child_command",
    "child_environment",
    "device_problem",
    "engine_identity",
    "get_logger",
    "launch_engine_core",
    "read_flight_record",
    "open_regular",
    "printable",
    "read_document",
    "read_json",
    "setup_logging",
    "why",
]
