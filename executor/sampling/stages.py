"""The stages in plain torch, in the order in which they are applied: see ``STAGES``.

They define what the kernels do (``ops/cpu/csrc/sampling_edits.h``) and serve where there are none. Numbers of a
request are float32 where they meet logits, as there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from executor.messages import I32, ResolvedParams
from executor.request_states import RequestStates
from executor.sampling.base import Rows, SamplingStage

MINUS_INFINITY = float("-inf")


class _Flagged:
    """Remembers which slots want a stage."""

    def __init__(self, max_num_seqs: int) -> None:
        self._wanted = np.zeros(max_num_seqs, np.bool_)
        self._params: list[ResolvedParams] = [ResolvedParams()] * max_num_seqs

    def _set(self, slot: int, params: ResolvedParams, wanted: bool) -> None:
        self._wanted[slot] = wanted
        self._params[slot] = params

    def active(self, slots: I32) -> Rows:
        return np.flatnonzero(self._wanted[slots])


class AllowedTokens(_Flagged):
    """Leaves only ``allowed_token_ids``."""

    def add(self, slot: int, params: ResolvedParams) -> None:
        self._set(slot, params, params.allowed_token_ids is not None)

    def apply(self, logits: torch.Tensor, slots: I32, rows: Rows, states: RequestStates) -> None:
        for row in rows.tolist():
            allowed = list(self._params[slots[row]].allowed_token_ids or ())
            kept = logits[row, allowed]
            logits[row] = MINUS_INFINITY
            logits[row, allowed] = kept


class BadWords(_Flagged):
    """Forbids the last token of each word of ``bad_words`` where the output ends with the ones before it."""

    def add(self, slot: int, params: ResolvedParams) -> None:
        self._set(slot, params, bool(params.bad_words_token_ids))

    def apply(self, logits: torch.Tensor, slots: I32, rows: Rows, states: RequestStates) -> None:
        for row in rows.tolist():
            slot = int(slots[row])
            output = states.token_ids[slot, states.num_prompt[slot] : states.num_tokens[slot]]
            for word in self._params[slot].bad_words_token_ids:
                before = len(word) - 1
                if before <= len(output) and tuple(output[len(output) - before :].tolist()) == word[:-1]:
                    logits[row, word[-1]] = MINUS_INFINITY


class MinTokens(_Flagged):
    """Forbids every stop token until ``min_tokens`` are there."""

    def add(self, slot: int, params: ResolvedParams) -> None:
        self._set(slot, params, params.min_tokens > 0 and bool(params.all_stop_token_ids))

    def apply(self, logits: torch.Tensor, slots: I32, rows: Rows, states: RequestStates) -> None:
        for row in rows.tolist():
            slot = int(slots[row])
            params = self._params[slot]
            if states.num_tokens[slot] - states.num_prompt[slot] < params.min_tokens:
                logits[row, list(params.all_stop_token_ids)] = MINUS_INFINITY
            else:
                self._wanted[slot] = False


class LogitBias(_Flagged):
    """Adds ``logit_bias``."""

    def add(self, slot: int, params: ResolvedParams) -> None:
        self._set(slot, params, bool(params.logit_bias))

    def apply(self, logits: torch.Tensor, slots: I32, rows: Rows, states: RequestStates) -> None:
        for row in rows.tolist():
            ids, biases = zip(*self._params[slots[row]].logit_bias, strict=True)
            logits[row, list(ids)] += torch.tensor(biases, dtype=logits.dtype)


class Penalties(_Flagged):
    """Repetition penalty (Keskar et al., CTRL, arXiv:1909.05858) on the tokens of prompt and output, frequency and
    presence penalty (OpenAI) on those of the output."""

    def add(self, slot: int, params: ResolvedParams) -> None:
        wanted = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1.0, 0.0, 0.0)
        self._set(slot, params, wanted)

    def apply(self, logits: torch.Tensor, slots: I32, rows: Rows, states: RequestStates) -> None:
        for row in rows.tolist():
            slot = int(slots[row])
            params = self._params[slot]
            tokens = states.token_ids[slot, : states.num_tokens[slot]]
            if params.repetition_penalty != 1.0:
                seen = torch.from_numpy(np.unique(tokens).astype(np.int64))
                values = logits[row, seen]
                penalty = params.repetition_penalty
                logits[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
            if params.frequency_penalty or params.presence_penalty:
                ids, counts = np.unique(tokens[states.num_prompt[slot] :], return_counts=True)
                change = params.frequency_penalty * counts + params.presence_penalty
                logits[row, torch.from_numpy(ids.astype(np.int64))] -= torch.from_numpy(change.astype(np.float32))


STAGES: list[Callable[[int], SamplingStage]] = [AllowedTokens, BadWords, MinTokens, LogitBias, Penalties]
