"""Stand-ins for torch's streams, events and graphs: what the host does for a GPU runs, and the GPU does nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

from executor.device import cuda


class Stream:
    def __init__(self) -> None:
        self.waits: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other)


class Event:
    error: Exception | None = None

    def __init__(self, **options: bool) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        if Event.error is not None:
            raise Event.error

    def elapsed_time(self, end: Event) -> float:
        return 1.5


class Graph:
    log: list[str] = []

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        Graph.log.append(f"begin {capture_error_mode}")

    def capture_end(self) -> None:
        Graph.log.append("end")

    def replay(self) -> None:
        Graph.log.append("replay")


@contextmanager
def stubbed() -> Iterator[Stream]:
    """Puts the stand-ins in place; yields the main stream."""
    main = Stream()
    Event.error = None
    Graph.log = []
    stand_ins: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda: main,
        "graph_pool_handle": lambda: (0, 1),
    }
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(cuda, "pinned", lambda size: torch.empty(size, dtype=torch.uint8)))
        yield main
