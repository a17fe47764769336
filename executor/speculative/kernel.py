"""Searches texts with the CPU's kernel: one call per step, a few microseconds per request."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

import ops
from executor.config import SpeculativeConfig
from executor.messages import I32, I64
from executor.request_states import RequestStates
from executor.speculative.base import Drafts
from executor.speculative.pool import Pool
from ops.cpu.lookup import LOOKUP, LookupOptions
from ops.cpu.op_set import CpuOps
from ops.cpu.sampling import address


class KernelSearch:
    """See ``executor.speculative.suffix.Search``, which gives the same drafts."""

    def __init__(self, config: SpeculativeConfig, max_num_seqs: int) -> None:
        op_set = ops.op_set("cpu")
        assert isinstance(op_set, CpuOps)
        self._kernel = op_set.lookup
        self._options = LookupOptions(
            factor=config.max_spec_factor, least=config.prompt_lookup_min, most=config.prompt_lookup_max
        )
        self._rows = np.zeros(max_num_seqs, LOOKUP)
        """By slot."""
        self._place = address(self._rows["tokens"])  # the first field: an array of structs takes long to describe
        self._columns = [self._rows[name] for name in ("num_tokens", "limit", "pool", "pool_size", "count")]
        self._texts: I32 | None = None
        """The table to which ``_rows`` points."""
        self._tokens = np.empty(max_num_seqs * config.num_speculative_tokens, np.int32)
        self._kinds = np.empty(len(self._tokens), np.int8)
        self._results = ctypes.addressof(self._options), address(self._tokens), address(self._kinds)

    def forget(self, slot: int) -> None:
        for field in ("followed_size", "followed_place", "followed_match"):
            self._rows[field][slot] = 0

    def propose(self, slots: I32, limits: I64, states: RequestStates, pools: Sequence[Pool | None]) -> Drafts:
        texts = states.token_ids
        if texts is not self._texts:
            self._texts = texts
            self._rows["tokens"] = address(texts) + np.arange(len(texts), dtype=np.uint64) * np.uint64(texts.strides[0])
        if len(slots) == 1:
            return self._propose_alone(int(slots[0]), int(limits[0]), states, pools[0])
        rows = self._rows[slots]
        rows["num_tokens"] = states.num_known[slots]
        rows["limit"] = limits
        if any(pools):
            rows["pool"] = [0 if pool is None else pool.address for pool in pools]
            rows["pool_size"] = [0 if pool is None else len(pool.text) for pool in pools]
        else:
            rows["pool"] = 0
        self._kernel.propose(address(rows["tokens"]), len(rows), *self._results)
        counts = rows["count"].astype(np.int64)
        self._rows[slots] = rows
        return self._drafts(counts, int(counts.sum()))

    def _propose_alone(self, slot: int, limit: int, states: RequestStates, pool: Pool | None) -> Drafts:
        """The same for one slot: most steps are of one, and arrays take longer than the search."""
        num_tokens, limits, pools, sizes, counts = self._columns
        num_tokens[slot], limits[slot] = states.num_known[slot], limit
        pools[slot], sizes[slot] = (0, 0) if pool is None else (pool.address, len(pool.text))
        self._kernel.propose(self._place + slot * LOOKUP.itemsize, 1, *self._results)
        total = int(counts[slot])
        return self._drafts(np.array([total]), total)

    def _drafts(self, counts: I64, total: int) -> Drafts:
        return Drafts(counts, self._tokens[:total].copy(), self._kinds[:total].copy())
