"""Queues of requests waiting for a slot."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Protocol

from engine_core.fair_shares import Account
from engine_core.request import Request


class RequestQueue(Protocol):
    """Orders waiting requests."""

    def add(self, request: Request) -> None: ...

    def put_back(self, request: Request) -> None:
        """Requeues a request that was running."""

    def peek(self) -> Request: ...

    def pop(self) -> Request: ...

    def remove(self, request: Request) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]: ...


class _Turns:
    """Tenants of one level with waiting requests; the least served one has the next turn."""

    __slots__ = ("children", "heap", "order", "requests")

    def __init__(self, order: int = 0) -> None:
        self.order = order
        """When the tenant began to wait; ties go to the earliest."""
        self.children: dict[Account, _Turns] = {}
        self.heap: list[tuple[float, int, Account]] = []
        """Children with a past virtual time (which only grows) and their order. Entries of children that are gone are
        skipped when they surface."""
        self.requests: OrderedDict[int, Request] = OrderedDict()
        """Requests of a tenant without children, in order of arrival."""

    def next_child(self) -> Account:
        heap = self.heap
        while True:
            served, order, account = heap[0]
            below = self.children.get(account)
            if below is None or below.order != order:
                heapq.heappop(heap)
            elif served < account.served:
                heapq.heapreplace(heap, (account.served, order, account))
            else:
                return account

    def remove(self, account: Account) -> None:
        del self.children[account]
        if len(self.heap) > 2 * len(self.children) + 64:
            self.heap = [(child.served, below.order, child) for child, below in self.children.items()]
            heapq.heapify(self.heap)


class FairQueue:
    """Tenants take turns, and each tenant's requests are served in order of arrival. Started requests go first: those
    that were preempted, and those resumed from an earlier life.
    """

    def __init__(self) -> None:
        self._begun: OrderedDict[int, Request] = OrderedDict()
        self._root = _Turns()
        self._size = 0
        """Number of requests that take turns."""
        self._num_orders = 0

    def add(self, request: Request) -> None:
        if request.message.resumed_output_token_ids:
            self._begun[request.index] = request
            return
        self._size += 1
        turns = self._root
        for account in _path(request):
            below = turns.children.get(account)
            if below is None:
                self._num_orders += 1
                below = turns.children[account] = _Turns(self._num_orders)
                heapq.heappush(turns.heap, (account.served, below.order, account))
            turns = below
        turns.requests[request.index] = request

    def put_back(self, request: Request) -> None:
        self._begun[request.index] = request
        self._begun.move_to_end(request.index, last=False)

    def peek(self) -> Request:
        if self._begun:
            return next(iter(self._begun.values()))
        turns = self._root
        while turns.children:
            turns = turns.children[turns.next_child()]
        return next(iter(turns.requests.values()))

    def pop(self) -> Request:
        if self._begun:
            return self._begun.popitem(last=False)[1]
        request = self.peek()
        request.account.take_turn()
        self.remove(request)
        return request

    def remove(self, request: Request) -> None:
        if self._begun.pop(request.index, None) is not None:
            return
        self._size -= 1
        path = _path(request)
        levels = [self._root]
        for account in path:
            levels.append(levels[-1].children[account])
        del levels[-1].requests[request.index]
        for account, level, below in reversed(list(zip(path, levels[:-1], levels[1:], strict=True))):
            if below.requests or below.children:
                return
            level.remove(account)

    def __len__(self) -> int:
        return self._size + len(self._begun)

    def __iter__(self) -> Iterator[Request]:
        yield from self._begun.values()
        stack = [self._root]
        while stack:
            turns = stack.pop()
            yield from turns.requests.values()
            stack += reversed(turns.children.values())


def _path(request: Request) -> list[Account]:
    """The accounts of a request's tenant, from key to user."""
    path: deque[Account] = deque()
    account = request.account
    while account.parent is not None:
        path.appendleft(account)
        account = account.parent
    return list(path)


class PriorityQueue:
    """Lowest priority number first; among requests of equal priority, tenants take turns."""

    def __init__(self) -> None:
        self._levels: dict[int, FairQueue] = {}
        self._heap: list[int] = []
        """Heap of these priorities; some may have no requests left."""
        self._size = 0

    def _level(self, request: Request) -> FairQueue:
        priority = request.message.priority
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = FairQueue()
            heapq.heappush(self._heap, priority)
        return level

    def _first(self) -> FairQueue:
        while not len(level := self._levels[self._heap[0]]):
            del self._levels[heapq.heappop(self._heap)]
        return level

    def add(self, request: Request) -> None:
        self._size += 1
        self._level(request).add(request)

    def put_back(self, request: Request) -> None:
        self._size += 1
        self._level(request).put_back(request)

    def peek(self) -> Request:
        return self._first().peek()

    def pop(self) -> Request:
        request = self._first().pop()
        self._size -= 1
        return request

    def remove(self, request: Request) -> None:
        self._size -= 1
        self._levels[request.message.priority].remove(request)
        if len(self._levels) > 2 * self._size + 64:
            self._levels = {priority: level for priority, level in self._levels.items() if len(level)}
            self._heap = sorted(self._levels)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Request]:
        for priority in sorted(self._levels):
            yield from self._levels[priority]


def create_request_queue(policy: str) -> RequestQueue:
    return PriorityQueue() if policy == "priority" else FairQueue()
