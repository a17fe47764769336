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

    def forget(self, slot: int) -> None:
        self._rows[slot] = np.zeros((), LOOKUP)

    def propose(self, slots: I32, limits: I64, states: RequestStates, pools: Sequence[Pool | None]) -> Drafts:
        texts = states.token_ids
        rows = self._rows[slots]
        rows["tokens"] = address(texts) + slots.astype(np.uint64) * np.uint64(texts.strides[0])
        rows["num_tokens"] = states.num_known[slots]
        rows["limit"] = limits
        rows["pool"] = [0 if pool is None else pool.address for pool in pools]
        rows["pool_size"] = [0 if pool is None else len(pool.text) for pool in pools]
        room = int(np.maximum(limits, 0).sum())
        tokens, kinds = np.empty(room, np.int32), np.empty(room, np.int8)
        self._kernel.propose(address(rows), len(rows), ctypes.addressof(self._options), address(tokens), address(kinds))
        self._rows[slots] = rows
        counts = rows["count"].astype(np.int64)
        total = int(counts.sum())
        return Drafts(counts, tokens[:total], kinds[:total])
