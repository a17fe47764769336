"""Whether the KV cache outlives workers: it does if it lies in memory that the engine core owns."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any

from executor.base import WorkerDiedError
from executor.messages import KVCacheReady, WorkerReady

_WILD = tuple(-int(number) for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE))
"""Ways to die after which memory may hold anything."""


class KeptCache:
    """What the workers said about the memory of their KV caches, from life to life."""

    def __init__(self) -> None:
        self._identity: tuple[tuple[str, int], ...] = ()
        """By rank: what determines the content besides tokens, and the size. Empty: the cache dies with a worker."""
        self._shapes: list[Any] = []
        """What the first workers said of their models, by rank."""

    def misfit(self, ready: Sequence[WorkerReady]) -> str | None:
        """Why new workers cannot take the place of the first ones, as a message; None: they can.

        Args:
            ready: The workers' first messages, by rank.
        """
        shapes = [(each.kv_cache_groups, each.vocab_size, each.hidden_size, each.max_model_len) for each in ready]
        self._shapes = self._shapes or shapes
        if shapes == self._shapes:
            return None
        return "the model's files have other shapes than when the server was started; restart the server"

    def survives(self, error: WorkerDiedError) -> bool:
        """Records that workers died. Returns whether the cache still holds what finished steps have computed."""
        if error.exit_code in _WILD or error.loses_memory:
            self._identity = ()
        return bool(self._identity)

    def is_same(self, ready: Mapping[int, WorkerReady], caches: Mapping[int, KVCacheReady]) -> bool:
        """Takes over what new workers say. Returns whether their caches are those of the last workers.

        Args:
            ready: The workers' first messages by rank.
            caches: Their answers to ``InitKVCache`` by rank.
        """
        before = self._identity
        ranks = sorted(caches)
        self._identity = tuple((ready[rank].fingerprint, caches[rank].num_kept_bytes) for rank in ranks)
        if not all(fingerprint and num_bytes for fingerprint, num_bytes in self._identity):
            self._identity = ()
        return bool(before) and before == self._identity
