"""A proposer for tests, which knows the outputs in advance and can also propose wrong tokens."""

from __future__ import annotations

import numpy as np

from executor.config import SpeculativeConfig
from executor.messages import I32, I64, NewRequest, i32
from executor.request_states import RequestStates
from executor.scripts import NO_OUTPUT, read_scripts
from executor.speculative.base import ComputedRows, Drafts, ProposerContext


class ScriptedProposer:
    """Reads scripts from a file (``executor/scripts.py``) and proposes their outputs for matching prompts.

    With ``wrong_every`` = n, each draft whose index in the output is a multiple of n is a wrong token.
    """

    costs = None

    def __init__(self, config: SpeculativeConfig, max_num_seqs: int, context: ProposerContext) -> None:
        self._output_of = read_scripts(config.script)
        self._wrong_every = config.wrong_every
        self._by_slot: list[I32] = [NO_OUTPUT] * max_num_seqs

    def add(self, request: NewRequest) -> None:
        output = self._output_of(i32(request.token_ids)[: request.num_prompt_tokens])
        self._by_slot[request.slot] = _spoilt(output, self._wrong_every)

    def remove(self, slot: int, output: I32) -> None:
        pass

    def follow(self, computed: ComputedRows, states: RequestStates) -> None:
        pass

    def propose(self, slots: I32, limits: I64, states: RequestStates) -> Drafts:
        num_outputs = states.num_known[slots] - states.num_prompt[slots]
        rows = zip(slots.tolist(), num_outputs.tolist(), limits.tolist(), strict=True)
        drafts = [self._by_slot[slot][known : known + limit] for slot, known, limit in rows]
        counts = np.array([len(row) for row in drafts], np.int64)
        return Drafts(counts, np.concatenate([np.empty(0, np.int32), *drafts]))


def _spoilt(output: I32, wrong_every: int) -> I32:
    tokens: I32 = output.copy()
    if wrong_every:
        tokens[::wrong_every] = np.where(tokens[::wrong_every] > 0, tokens[::wrong_every] - 1, 1)
    return tokens
