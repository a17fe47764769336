"""The latest outputs of requests that may take drafts from each other's."""

from __future__ import annotations

from collections import OrderedDict, deque

import numpy as np

from executor.messages import I32
from executor.speculative.lookup import NO_TOKEN

POOL_TOKENS = 1 << 14
"""Tokens of a pool: it is searched in a few microseconds."""
MAX_POOLS = 256
MAX_OUTPUT = POOL_TOKENS // 4
"""Tokens of one output that are kept, the first ones."""


class Pool:
    """A ring of outputs, with ``NO_TOKEN`` between them."""

    def __init__(self, max_outputs: int) -> None:
        self._tokens: I32 = np.full(POOL_TOKENS, NO_TOKEN, np.int32)
        self._address: int = self._tokens.__array_interface__["data"][0]
        self._outputs: deque[tuple[int, int]] = deque()
        """Begin and end of each output, the oldest first."""
        self._max_outputs = max_outputs
        self._end = 0
        self._size = 0

    @property
    def address(self) -> int:
        """Address of ``text``."""
        return self._address

    @property
    def text(self) -> I32:
        """int32 [length]: all outputs."""
        return self._tokens[: self._size]

    def add(self, output: I32) -> None:
        """Adds an output in place of the oldest ones."""
        output = output[:MAX_OUTPUT]
        begin = self._end if self._end + len(output) + 1 <= POOL_TOKENS else 0
        end = begin + len(output) + 1
        while self._outputs and self._must_go(begin, end):
            first, last = self._outputs.popleft()
            self._tokens[first:last] = NO_TOKEN
        self._tokens[begin : end - 1] = output
        self._tokens[end - 1] = NO_TOKEN
        self._outputs.append((begin, end))
        self._end, self._size = end, max(self._size, end)

    def _must_go(self, begin: int, end: int) -> bool:
        first, last = self._outputs[0]
        return len(self._outputs) >= self._max_outputs or (first < end and begin < last) or first >= begin > 0


class Pools:
    """Pools by number. The one that was used least recently makes room for a new one."""

    def __init__(self, max_outputs: int) -> None:
        self._max_outputs = max_outputs
        self._pools: OrderedDict[int, Pool] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pools)

    def get(self, number: int) -> Pool | None:
        pool = self._pools.get(number)
        if pool is not None:
            self._pools.move_to_end(number)
        return pool

    def add(self, number: int, output: I32) -> None:
        if not self._max_outputs or not len(output):
            return
        pool = self.get(number)
        if pool is None:
            pool = self._pools[number] = Pool(self._max_outputs)
            if len(self._pools) > MAX_POOLS:
                self._pools.popitem(last=False)
        pool.add(output)
