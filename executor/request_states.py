"""What a worker knows of each running request: arrays indexed by slot.

Rows are written only from plans and from the step's own tokens, so preemption, restart and slot reuse need no
backup and no reordering.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from executor.messages import I32, NewRequest, ResolvedParams, SchedulerOutput, i32


class RequestStates:
    """Tokens and lengths by slot, and the block tables of each KV cache group."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_sizes: list[int]) -> None:
        self.token_ids: I32 = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        """int32 [slots, positions]: prompt and output."""
        self.num_tokens = np.zeros(max_num_seqs, np.int64)
        """Tokens in the table."""
        self.num_computed = np.zeros(max_num_seqs, np.int64)
        """Tokens whose K and V are in the cache."""
        self.num_prompt = np.zeros(max_num_seqs, np.int64)
        self.params: list[ResolvedParams | None] = [None] * max_num_seqs
        self.block_tables: list[I32] = [
            np.zeros((max_num_seqs, -(-max_model_len // size)), np.int32) for size in block_sizes
        ]
        """int32 [slots, blocks] per group."""

    def apply(self, plan: SchedulerOutput) -> None:
        """Takes over what a plan says of requests and their blocks."""
        for slot in i32(plan.finished_slots).tolist():
            self.params[slot] = None
        for request in plan.new_reqs:
            self._add(request)
        for table, column in zip(self.block_tables, plan.block_updates, strict=False):
            updates = i32(column).reshape(-1, 3)
            table[updates[:, 0], updates[:, 1]] = updates[:, 2]

    def _add(self, request: NewRequest) -> None:
        slot = request.slot
        tokens = i32(request.token_ids)
        self.token_ids[slot, : len(tokens)] = tokens
        self.num_tokens[slot] = len(tokens)
        self.num_computed[slot] = request.num_computed_tokens
        self.num_prompt[slot] = request.num_prompt_tokens
        self.params[slot] = request.params
        for table, column in zip(self.block_tables, request.block_ids, strict=True):
            blocks = i32(column)
            table[slot, : len(blocks)] = blocks

    def append(self, slots: I32, tokens: npt.NDArray[np.int64]) -> None:
        """Adds a sampled token to each slot."""
        self.token_ids[slots, self.num_tokens[slots]] = tokens
        self.num_tokens[slots] += 1
