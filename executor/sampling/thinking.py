"""Thinking budgets: once a request's budget is used up, only the next token of the end marker is allowed.

The forced token depends only on the output so far, so it is the same after a preemption or restart.
"""

from __future__ import annotations

import numpy as np

from executor.messages import I32, ResolvedParams, ThinkingBudget
from executor.request_states import RequestStates
from executor.sampling.base import SampleRows, TokenMask


class ThinkingBudgets:
    """Thinking budgets of running requests, by slot."""

    def __init__(self, max_num_seqs: int) -> None:
        self._budgets: list[ThinkingBudget | None] = [None] * max_num_seqs
        self._least = np.full(max_num_seqs, np.iinfo(np.int64).max)
        """Number of output tokens before which nothing can be forced."""
        self._num_budgets = 0
        """Number of slots with a budget; a slot whose request is gone counts until it is reused."""

    def add(self, slot: int, params: ResolvedParams) -> None:
        """Registers a request that enters a slot."""
        self._num_budgets += int(params.thinking_budget is not None) - int(self._budgets[slot] is not None)
        budget = self._budgets[slot] = params.thinking_budget
        self._least[slot] = np.iinfo(np.int64).max if budget is None else budget.max_tokens

    def restrict(
        self, mask: TokenMask | None, rows: SampleRows, states: RequestStates, vocab_size: int
    ) -> TokenMask | None:
        """Adds rows whose next token is forced to a step's mask.

        Args:
            mask: The step's grammar mask, if any; not modified.
            rows: The rows to sample.
            states: The tokens so far.
            vocab_size: Width of the logits.
        """
        if not self._num_budgets:
            return mask
        slots = rows.slots
        num_outputs = rows.positions - states.num_prompt[slots]
        forced: list[tuple[int, int]] = []
        for row in np.flatnonzero(num_outputs >= self._least[slots]).tolist():
            slot = int(slots[row])
            budget = self._budgets[slot]
            assert budget is not None
            output = states.token_ids[slot, states.num_prompt[slot] : rows.positions[row]]
            token = forced_token(budget, output)
            if token is not None:
                forced.append((row, token))
        if not forced:
            return mask
        if mask is None:
            mask = TokenMask(np.zeros((0, -(-vocab_size // 32)), np.int32), np.full(len(slots), -1, np.int32))
        extra = np.zeros((len(forced), mask.bitmask.shape[1]), np.uint32)
        mask_rows = mask.rows.copy()
        for index, (row, token) in enumerate(forced):
            extra[index, token // 32] = 1 << (token % 32)
            mask_rows[row] = len(mask.bitmask) + index
        return TokenMask(np.concatenate((mask.bitmask, extra.view(np.int32))), mask_rows)


def forced_token(budget: ThinkingBudget, output: I32) -> int | None:
    """The token that must follow, or None if none is forced.

    Args:
        budget: The budget and the markers of thinking.
        output: int32 [num_output_tokens]: the output so far.
    """
    end = budget.end_token_ids
    opened = _last_place(output, budget.start_token_ids)
    if _last_place(output, end) > opened or (opened < 0 and not budget.starts_open):
        return None
    thinking = output[opened + len(budget.start_token_ids) :] if opened >= 0 else output
    if len(thinking) < budget.max_tokens:
        return None
    for length in range(min(len(end) - 1, len(thinking)), 0, -1):
        if tuple(thinking[-length:].tolist()) == end[:length]:
            return end[length]  # inside the end marker
    return end[0]


def _last_place(tokens: I32, wanted: tuple[int, ...]) -> int:
    """Index of the last occurrence of a sequence; -1: none."""
    if not wanted:
        return -1
    for place in np.flatnonzero(tokens == wanted[0])[::-1].tolist():
        if tuple(tokens[place : place + len(wanted)].tolist()) == wanted:
            return int(place)
    return -1
