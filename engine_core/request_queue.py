"""Requests that wait for a slot."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

from engine_core.request import Request


class RequestQueue(Protocol):
    """Which waiting request is next."""

    def add(self, request: Request) -> None: ...

    def put_back(self, request: Request) -> None:
        """Queues a request again that had been running."""

    def peek(self) -> Request: ...

    def pop(self) -> Request: ...

    def remove(self, request: Request) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]: ...


class FCFSQueue:
    """First come, first served; requests that were preempted go first."""

    def __init__(self) -> None:
        self._requests: OrderedDict[int, Request] = OrderedDict()

    def add(self, request: Request) -> None:
        self._requests[request.index] = request

    def put_back(self, request: Request) -> None:
        self._requests[request.index] = request
        self._requests.move_to_end(request.index, last=False)

    def peek(self) -> Request:
        return next(iter(self._requests.values()))

    def pop(self) -> Request:
        return self._requests.popitem(last=False)[1]

    def remove(self, request: Request) -> None:
        del self._requests[request.index]

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())


class PriorityQueue:
    """The lowest priority number first, then the earliest arrival."""

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}
        self._heap: list[tuple[tuple[int, float, int], int]] = []
        """May hold requests that were removed; they are skipped when they come up."""

    def add(self, request: Request) -> None:
        self._requests[request.index] = request
        heapq.heappush(self._heap, (request.priority, request.index))

    def put_back(self, request: Request) -> None:
        self.add(request)

    def peek(self) -> Request:
        while self._heap[0][1] not in self._requests:
            heapq.heappop(self._heap)
        return self._requests[self._heap[0][1]]

    def pop(self) -> Request:
        request = self.peek()
        heapq.heappop(self._heap)
        del self._requests[request.index]
        return request

    def remove(self, request: Request) -> None:
        del self._requests[request.index]

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())


def create_request_queue(policy: str) -> RequestQueue:
    return PriorityQueue() if policy == "priority" else FCFSQueue()
