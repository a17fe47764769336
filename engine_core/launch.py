"""Starts an engine core process: all that the api needs besides messages and configuration."""

from __future__ import annotations

import os

import msgspec

from engine_core.config import Config, EngineConfig, ExecutorConfig
from engine_core.last_work import LastWork, read_flight_record
from executor.base import WORKER_MODULE, ModelError
from executor.device.base import device_problem
from executor.files import open_regular, read_document, read_json, why
from executor.helper import Helper, HelperError, HelperLimits, JobError
from executor.liveness import STOPPED_TIMEOUT, ProcessWatch
from executor.log import get_logger, printable, setup_logging
from executor.nodes.key_files import HeldKey, create_key_file
from executor.nodes.ray_machines import RayMachines
from executor.nodes.ray_messages import AgentLaunch, RayPlacement
from executor.parallel import numa_nodes, thread_places
from executor.process import (
    ChildProcess,
    become_child,
    child_command,
    child_environment,
    discard_child,
    prepare_child,
    prepared_child,
    read_payload,
)
from executor.supported import can_generate, check_gguf_architecture, check_load_format, check_supported

RUST_STACK_BYTES = 16 << 20
"""Stack of threads that compute grammar masks: as large as that of the threads that compile grammars."""
_MODULE = "engine_core"
_ENVIRONMENT = {"RUST_MIN_STACK": str(RUST_STACK_BYTES)}
_OWN_CORES = ("OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY")
"""Variables by which users say themselves where threads run."""


class EngineCoreLaunch(Config, frozen=True):
    """The start message of an engine core process."""

    config: EngineConfig
    address: str
    """Address of the api's ROUTER socket."""
    ipc_dir: str
    """A directory of mode 0700 for the workers' sockets."""
    engine_epoch: int
    log_level: str = "info"
    replica: int = 0
    """Which of the replicas on this machine it is."""

    @property
    def record_path(self) -> str:
        """Path of the engine core's ``FlightRecord``."""
        return f"{self.ipc_dir}/record"


def launch_engine_core(launch: EngineCoreLaunch) -> ChildProcess:
    """Starts ``engine_core/__main__.py``, or goes on with a prepared one.

    It dies with the calling process, and with the thread that called.
    """
    payload = msgspec.msgpack.encode(launch)
    return prepared_child(_MODULE, payload) or ChildProcess(
        _MODULE, payload, _environment(launch.config), arguments=_early_children(launch.config)
    )


def prepare_engine_core(config: EngineConfig) -> None:
    """Starts the process of the next ``launch_engine_core``, and a worker's, while the caller is still preparing.

    Args:
        config: May still change in all but the kind of executor.
    """
    prepare_child(_MODULE, _environment(config), _early_children(config))


def prepare_agent() -> None:
    """Starts the process of the first worker that ``run_agent`` will need, likewise."""
    prepare_child(WORKER_MODULE)


def discard_prepared() -> None:
    """Ends what ``prepare_engine_core`` or ``prepare_agent`` started, if it was not needed."""
    discard_child(_MODULE)
    discard_child(WORKER_MODULE)


def run_agent(config: ExecutorConfig, ipc_dir: str, log_level: str) -> int:
    """See ``executor/nodes/agent.py``."""
    from executor.nodes.agent import run_agent as run  # others need no sockets

    return run(config, ipc_dir, log_level)


def _environment(config: EngineConfig) -> dict[str, str]:
    """What an engine core's environment has besides. Its workers inherit it, and know what it does to a main thread."""
    shares_cores = config.num_replicas > 1 or config.executor.parallel.world_size > 1
    has_worker = config.executor.distributed_executor_backend == "mp"
    if shares_cores or not has_worker or any(name in os.environ for name in _OWN_CORES):
        return _ENVIRONMENT
    return _ENVIRONMENT | thread_places()


def _early_children(config: EngineConfig) -> list[str]:
    """Modules of the processes that an engine core certainly needs. A replica's inherit its share of the cores, which
    it knows only from its start message."""
    is_early = config.executor.distributed_executor_backend == "mp" and config.num_replicas == 1
    return [WORKER_MODULE] if is_early else []


def engine_identity(engine_epoch: int) -> bytes:
    """The identity with which an engine core connects to the ROUTER socket."""
    return f"engine_core.{engine_epoch}".encode()


__all__ = [
    "STOPPED_TIMEOUT",
    "AgentLaunch",
    "ChildProcess",
    "EngineCoreLaunch",
    "Helper",
    "HeldKey",
    "HelperError",
    "HelperLimits",
    "JobError",
    "LastWork",
    "ProcessWatch",
    "ModelError",
    "RayMachines",
    "RayPlacement",
    "become_child",
    "can_generate",
    "check_gguf_architecture",
    "check_load_format",
    "check_supported",
    "create_key_file",
    "child_command",
    "child_environment",
    "device_problem",
    "engine_identity",
    "get_logger",
    "launch_engine_core",
    "thread_places",
    "numa_nodes",
    "discard_prepared",
    "prepare_agent",
    "prepare_engine_core",
    "read_flight_record",
    "run_agent",
    "open_regular",
    "printable",
    "read_document",
    "read_json",
    "read_payload",
    "setup_logging",
    "why",
]
