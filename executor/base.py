"""The executor seam: the engine core's interface to whatever runs its steps.

The engine core owns an ``Executor`` and uses nothing else of this floor. Plans go in through ``submit``, messages come
out of ``receive``; neither ever waits for a step. Implementations: ``multiproc`` (worker processes), ``nodes`` (those
of several machines), ``inline`` (a worker in the caller's process) and ``simulated`` (a modelled device).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from executor.config import ExecutorConfig

if TYPE_CHECKING:
    from executor.liveness import ProcessSample
    from executor.messages import FromWorker, ToWorker


Head = Literal["lm", "none", "sequence", "token", "reward", "process"]
"""What reads a model's hidden states: an output layer, nothing, or a classifier of sequences or of their tokens."""


class ModelError(Exception):
    """The model cannot be served as configured; the message is one human-readable line."""


class WorkerDiedError(Exception):
    """A worker process has died."""

    def __init__(self, message: str, exit_code: int | None = None, *, loses_memory: bool = False) -> None:
        """
        Args:
            message: What happened, in one line.
            exit_code: That of the process, negative for a signal; None: unknown, or it lives.
            loses_memory: The memory of the worker's KV cache is gone as well.
        """
        super().__init__(message)
        self.exit_code = exit_code
        self.loses_memory = loses_memory


class Executor(Protocol):
    """Runs plans in order. ``submit`` never blocks; results arrive in plan order."""

    num_ranks: int

    def start(self) -> None:
        """Starts the workers. Each answers with ``WorkerReady`` or ``WorkerFailed``."""

    def submit(self, message: ToWorker) -> None:
        """Sends a message to every rank.

        Raises:
            WorkerDiedError: A worker has died.
        """

    def receive(self) -> list[FromWorker]:
        """Returns the messages that have arrived, without waiting; none if there are no workers.

        Raises:
            WorkerDiedError: A worker ended without giving a reason.
        """

    def poll_fds(self) -> list[Any]:
        """ZeroMQ sockets and file descriptors that become readable when ``receive`` has messages."""

    def worker_pids(self) -> tuple[int, ...]:
        """Process ids by rank; empty while they are unknown, or if there are no processes."""

    def remote_samplers(self) -> Mapping[int, Callable[[], ProcessSample | None]]:
        """By rank: what samples a worker of another machine; None: its state is unknown."""

    def shutdown(self) -> None:
        """Stops the workers: gives them a moment to exit, then kills them."""

    def kill(self) -> None:
        """Kills the workers at once."""

    def forget_memory(self) -> None:
        """Gives memory that outlives workers back to the system. There are no workers."""


WORKER_MODULE = "executor"
"""The module that a worker process runs."""
REGISTRY = {
    "mp": "executor.multiproc:MultiprocExecutor",
    "nodes": "executor.nodes.head:NodesExecutor",
    "inline": "executor.inline:InlineExecutor",
    "simulated": "executor.simulated:SimulatedExecutor",
}


class ExecutorFactory(Protocol):
    def __call__(self, config: ExecutorConfig, ipc_dir: str, log_level: str) -> Executor: ...
