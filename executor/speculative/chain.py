"""What proposers share whose model computes one draft after the other."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
from torch import Tensor

from executor.config import SpeculativeConfig
from executor.messages import I32, I64, NewRequest
from executor.request_states import RequestStates
from executor.sampling.draft_sampler import DraftSampler
from executor.speculative.base import ComputedRows, Drafts, ProposerContext
from executor.speculative.forced_drafts import ForcedDrafts
from executor.speculative.step_costs import StepCosts

Bools = npt.NDArray[np.bool_]

_NEVER = np.iinfo(np.int64).max // 2
"""Behind every token."""


class ChainProposer(ABC):
    """See ``executor/speculative/base.py``. State by slot: how much the model has computed, and the first draft."""

    def __init__(
        self, config: SpeculativeConfig, max_num_seqs: int, context: ProposerContext, max_len: int, shift: int = 0
    ) -> None:
        """
        Args:
            config: How to speculate.
            max_num_seqs: Number of slots.
            context: The model, and the table of tokens that it shares with the large one.
            max_len: Most tokens of a request for which drafts are made.
            shift: Its row p takes token p + ``shift``.
        """
        assert context.draft is not None and context.states is not None
        self._model = context.draft
        self._sampler = DraftSampler(
            config.draft_sample_method, max_num_seqs, self._model.device.torch_device.type, self._model.channel
        )
        self._states = context.states
        self._shift = shift
        self._max_len = max_len
        self._computed = np.zeros(max_num_seqs, np.int64)
        self._next = np.zeros(max_num_seqs, np.int64)
        """The first draft of each slot."""
        self._next_at = np.full(max_num_seqs, -1, np.int64)
        """Position of that draft; -1: there is none."""
        self._drafted = np.zeros((max_num_seqs, config.num_speculative_tokens), np.int32)
        """The last drafts of each slot, verified or not."""
        self._drafted_at = np.full(max_num_seqs, _NEVER, np.int64)
        """Position of the first of them."""
        states = copy.copy(context.states)  # the same arrays, but for what is computed, and where it is
        states.num_computed = self._computed
        states.token_ids = states.token_ids[:, shift:]
        states.block_tables = states.block_tables[-len(self._model.groups) :]
        states.adapters = np.zeros_like(states.adapters)
        states.num_known = np.full_like(states.num_known, np.iinfo(np.int32).max)  # drafts as well
        self._forward = self._model.forward(states)
        self._forced = ForcedDrafts(config, max_num_seqs) if config.script else None
        self.costs = StepCosts()

    def add(self, request: NewRequest) -> None:
        self._sampler.add(request)
        self._computed[request.slot] = request.num_computed_tokens
        self._next_at[request.slot] = -1
        self._drafted_at[request.slot] = _NEVER
        if self._forced is not None:
            self._forced.add(request)

    def remove(self, slot: int, output: I32) -> None:
        self._next_at[slot] = -1

    @abstractmethod
    def follow(self, computed: ComputedRows, states: RequestStates) -> None:
        """See ``Proposer``."""

    @abstractmethod
    def _run(self, slots: I32, counts: I64, goes_on: Bools, states: list[Tensor] | None = None) -> None:
        """Computes the next rows of slots, and keeps what is drawn after those that go on as ``_next``.

        Args:
            slots: int32 [n].
            counts: int64 [n]: rows of each.
            goes_on: bool [n].
            states: The large model's hidden states in these rows; None: the model goes on by itself.
        """

    def _num_right(self, slots: I32, states: RequestStates) -> I64:
        """Tokens of slots, all in all, as far as their last drafts are what came: int64 [n].

        Other drafts may have taken their places, and have been accepted.
        """
        begins = self._drafted_at[slots]
        places = np.minimum(begins[:, None] + np.arange(self._drafted.shape[1]), states.token_ids.shape[1] - 1)
        is_same = states.token_ids[slots[:, None], places] == self._drafted[slots]
        self._drafted_at[slots] = _NEVER
        ends: I64 = begins + np.where(is_same.all(1), is_same.shape[1], is_same.argmin(1))
        return ends

    def _draw(self, logits: Tensor, slots: I32) -> Tensor:
        """The drafts behind what is computed: int64 [n].

        Args:
            logits: float32 [n, vocab_size]; changed in place.
            slots: int32 [n].
        """
        return self._sampler.sample(logits, slots, self._computed[slots] + self._shift, self._states)

    def _read(self, tokens: Tensor) -> I64:
        """The values of a tensor; waits for the device."""
        (values,) = self._model.channel.download([tokens]).collect()
        return values

    def propose(self, slots: I32, limits: I64, states: RequestStates) -> Drafts:
        known = states.num_known[slots]
        limits = np.where(self._next_at[slots] == known, np.minimum(limits, self._max_len - known), 0)
        limits = np.maximum(limits, 0)
        most = int(limits.max(initial=0))
        tokens = np.zeros((len(slots), most), np.int32)
        for index in range(most):
            rows = np.flatnonzero(limits > index)
            own = slots[rows]
            if index:
                begin = time.perf_counter()
                self._run(own, np.ones(len(rows), np.int64), np.ones(len(rows), np.bool_))
                self.costs.add(len(rows), (time.perf_counter() - begin) * 1e3)
            found = self._next[own]
            if self._forced is not None:
                found = self._forced.replace(own, known[rows] + index, states.num_prompt[own], found)
            tokens[rows, index] = states.token_ids[own, known[rows] + index] = found
        taken = np.arange(most) < limits[:, None]
        self._drafted[slots, :most], self._drafted_at[slots] = tokens, known
        kinds = np.broadcast_to(np.arange(most, dtype=np.int8), taken.shape)
        return Drafts(limits, tokens[taken], kinds[taken])
