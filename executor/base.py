"""The executor seam: what the engine core asks of whatever runs its steps.

The engine core owns an ``Executor`` and nothing else of this floor. Plans go in by ``submit``, messages come out of
``receive``; neither ever waits for a step. Implementations: ``multiproc`` (worker processes), ``inline`` (a worker in
the caller's process) and ``simulated`` (a modelled device).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from executor.config import ExecutorConfig

if TYPE_CHECKING:
    from executor.messages import FromWorker, ToWorker


class ModelError(Exception):
    """The model cannot be served as configured; the message is one line for a person."""


class WorkerDiedError(Exception):
    """A worker process is gone."""


class Executor(Protocol):
    """Runs plans in order. ``submit`` never blocks; results come back in the order of the plans."""

    num_ranks: int

    def start(self) -> None:
        """Starts the workers. Each answers with ``WorkerReady`` or ``WorkerFailed``."""

    def submit(self, message: ToWorker) -> None:
        """Sends a message to every rank.

        Raises:
            WorkerDiedError: A worker is gone.
        """

    def receive(self) -> list[FromWorker]:
        """Takes what has arrived, without waiting.

        Raises:
            WorkerDiedError: A worker ended without saying why.
        """

    def poll_fds(self) -> list[Any]:
        """ZeroMQ sockets and file descriptors that become readable when ``receive`` has something to say."""

    def worker_pids(self) -> tuple[int, ...]: ...

    def shutdown(self) -> None:
        """Stops the workers, waiting for them a moment, then killing them."""

    def kill(self) -> None:
        """Ends workers that are of no use any more, at once."""


REGISTRY = {
    "mp": "executor.multiproc:MultiprocExecutor",
    "inline": "executor.inline:InlineExecutor",
    "simulated": "executor.simulated:SimulatedExecutor",
}


class ExecutorFactory(Protocol):
    def __call__(self, config: ExecutorConfig, ipc_dir: str, log_level: str) -> Executor: ...
