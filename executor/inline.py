"""A worker in the caller's process: the same messages without processes or sockets, for tests and debuggers."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Mapping

from executor.base import ModelError
from executor.config import ExecutorConfig
from executor.liveness import ProcessSample
from executor.messages import EXIT_MODEL, FromWorker, ToWorker, WorkerFailed
from executor.parallel import ParallelState
from executor.worker import Worker


class InlineExecutor:
    """Computes steps inside ``receive``. See ``executor/base.py``."""

    num_ranks = 1

    def __init__(self, config: ExecutorConfig, ipc_dir: str, log_level: str = "info") -> None:
        self._config = config
        self._pending: deque[ToWorker] = deque()
        self._answers: list[FromWorker] = []
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self._worker: Worker | None = None

    def start(self) -> None:
        self._worker = Worker(ParallelState(), self._config, self._answer)
        try:
            self._worker.start()
        except ModelError as error:
            self._answer(WorkerFailed(rank=0, message=str(error), exit_code=EXIT_MODEL))

    def _answer(self, message: FromWorker) -> None:
        self._answers.append(message)
        os.eventfd_write(self._event, 1)

    def submit(self, message: ToWorker) -> None:
        self._pending.append(message)
        os.eventfd_write(self._event, 1)

    def receive(self) -> list[FromWorker]:
        if self._worker is None:
            return []
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        if self._worker.wake_fds:
            self._worker.take_results()
        if self._pending and not self._answers:
            self._worker.handle(self._pending.popleft())
        answers, self._answers = self._answers, []
        if self._pending:
            os.eventfd_write(self._event, 1)
        return answers

    def poll_fds(self) -> list[int]:
        return [self._event, *([] if self._worker is None else self._worker.wake_fds)]

    def worker_pids(self) -> tuple[int, ...]:
        return ()

    def remote_samplers(self) -> Mapping[int, Callable[[], ProcessSample | None]]:
        return {}

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = None
        self._pending.clear()
        self._answers.clear()

    def kill(self) -> None:
        self.shutdown()

    def forget_memory(self) -> None:
        pass
