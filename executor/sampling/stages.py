"""The sampling stages in plain torch, in order of application: see ``STAGES``.

They define what the kernels do (``ops/cpu/csrc/sampling_edits.h``) and run where there are no kernels. As in the
kernels, request parameters are rounded to float32 before they are combined with logits. Each stage collects the (row,
token) places that it changes, then changes them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from executor.deferred import Array
from executor.device.steps import StepChannel
from executor.messages import I32, ResolvedParams
from executor.request_states import RequestStates
from executor.sampling.base import Rows, SampleRows, SamplingStage

MINUS_INFINITY = float("-inf")


class _Flagged:
    """Remembers which slots use a stage."""

    def __init__(self, max_num_seqs: int) -> None:
        self._wanted = np.zeros(max_num_seqs, np.bool_)
        self._params: list[ResolvedParams] = [ResolvedParams()] * max_num_seqs

    def _set(self, slot: int, params: ResolvedParams, wanted: bool) -> None:
        self._wanted[slot] = wanted
        self._params[slot] = params

    def active(self, slots: I32) -> Rows:
        return np.flatnonzero(self._wanted[slots])

    def is_used_by(self, slot: int) -> bool:
        """Whether a slot's request uses the stage."""
        return bool(self._wanted[slot])


def _places(entries: Iterable[tuple[int, Sequence[int] | Array]]) -> dict[str, Array]:
    """Converts tokens by row to a column of rows and one of tokens."""
    pairs = [(row, np.asarray(tokens, np.int64)) for row, tokens in entries]
    return {
        "rows": np.repeat(
            np.array([row for row, _ in pairs], np.int64), np.array([len(tokens) for _, tokens in pairs], np.int64)
        ),
        "tokens": np.concatenate([np.empty(0, np.int64), *(tokens for _, tokens in pairs)]),
    }


def _forbid(logits: torch.Tensor, places: dict[str, Array], channel: StepChannel) -> None:
    views = channel.upload(places)
    logits[views["rows"], views["tokens"]] = MINUS_INFINITY


RowTokens = list[tuple[int, Sequence[int] | Array]]
"""Rows, and tokens of each."""
RowValues = list[tuple[int, Sequence[int] | Array, Array]]
"""Rows, tokens of each, and a float32 number for each token."""


def _values(entries: RowValues) -> dict[str, Array]:
    """Converts tokens with numbers by row to columns."""
    columns = _places((row, tokens) for row, tokens, _ in entries)
    return columns | {"values": np.concatenate([np.empty(0, np.float32), *(values for _, _, values in entries)])}


class AllowedTokens(_Flagged):
    """Leaves only ``allowed_token_ids``."""

    def add(self, slot: int, params: ResolvedParams) -> None:
        self._set(slot, params, params.allowed_token_ids is not None)

    def apply(
        self, logits: torch.Tensor, rows: SampleRows, active: Rows, states: RequestStates, channel: StepChannel
    ) -> None:
        allowed = ((row, self._params[rows.slots[row]].allowed_token_ids or ()) for row in active.tolist())
        views = channel.upload({**_places(allowed), "active": active})
        kept = logits[views["rows"], views["tokens"]]
        logits[views["active"]] = MINUS_INFINITY
        logits[views["rows"], views["tokens"]] = kept


class BadWords(_Flagged):
    """Forbids the last token of each of ``bad_words`` whose preceding tokens end the output."""

    def add(self, slot: int, params: ResolvedParams) -> None:
        self._set(slot, params, bool(params.bad_words_token_ids))

    def forbidden(self, rows: SampleRows, active: Rows, states: RequestStates) -> RowTokens:
        """The last tokens of these words, by row."""
        bad: RowTokens = []
        for row in active.tolist():
            slot = int(rows.slots[row])
            output = states.token_ids[slot, states.num_prompt[slot] : rows.positions[row]]
            for word in self._params[slot].bad_words_token_ids:
                before = len(word) - 1
                if before <= len(output) and tuple(output[len(output) - before :].tolist()) == word[:-1]:
                    bad.append((row, word[-1:]))
        return bad

    def apply(
        self, logits: torch.Tensor, rows: SampleRows, active: Rows, states: RequestStates, channel: StepChannel
    ) -> None:
        _forbid(logits, _places(self.forbidden(rows, active, states)), channel)


class MinTokens(_Flagged):
    """Forbids every stop token until ``min_tokens`` are generated."""

    def add(self, slot: int, params: ResolvedParams) -> None:
        self._set(slot, params, params.min_tokens > 0 and bool(params.all_stop_token_ids))

    def forbidden(self, rows: SampleRows, active: Rows, states: RequestStates) -> RowTokens:
        """The stop tokens of rows that must not stop yet."""
        stops: RowTokens = []
        for row in active.tolist():
            slot = int(rows.slots[row])
            params = self._params[slot]
            if rows.positions[row] - states.num_prompt[slot] < params.min_tokens:
                stops.append((row, params.all_stop_token_ids))
        return stops

    def apply(
        self, logits: torch.Tensor, rows: SampleRows, active: Rows, states: RequestStates, channel: StepChannel
    ) -> None:
        _forbid(logits, _places(self.forbidden(rows, active, states)), channel)


class LogitBias(_Flagged):
    """Adds ``logit_bias``."""

    def add(self, slot: int, params: ResolvedParams) -> None:
        self._set(slot, params, bool(params.logit_bias))

    def biases(self, rows: SampleRows, active: Rows) -> RowValues:
        """What is added to logits."""
        pairs = [(row, self._params[rows.slots[row]].logit_bias) for row in active.tolist()]
        return [
            (row, [token for token, _ in biases], np.array([bias for _, bias in biases], np.float32))
            for row, biases in pairs
        ]

    def apply(
        self, logits: torch.Tensor, rows: SampleRows, active: Rows, states: RequestStates, channel: StepChannel
    ) -> None:
        views = channel.upload(_values(self.biases(rows, active)))
        logits[views["rows"], views["tokens"]] += views["values"]


class Penalties(_Flagged):
    """Repetition penalty (Keskar et al., CTRL, arXiv:1909.05858) on tokens of prompt and output; frequency and presence
    penalties (OpenAI) on tokens of the output."""

    def add(self, slot: int, params: ResolvedParams) -> None:
        wanted = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1.0, 0.0, 0.0)
        self._set(slot, params, wanted)

    def penalties(self, rows: SampleRows, active: Rows, states: RequestStates) -> tuple[RowValues, RowValues]:
        """The repetition penalties of tokens, and what the other two subtract from logits."""
        seen: RowValues = []
        counted: RowValues = []
        for row in active.tolist():
            slot = int(rows.slots[row])
            params = self._params[slot]
            tokens = states.token_ids[slot, : rows.positions[row]]
            if params.repetition_penalty != 1.0:
                ids = np.unique(tokens)
                seen.append((row, ids, np.full(len(ids), params.repetition_penalty, np.float32)))
            if params.frequency_penalty or params.presence_penalty:
                ids, counts = np.unique(tokens[states.num_prompt[slot] :], return_counts=True)
                changes = (params.frequency_penalty * counts + params.presence_penalty).astype(np.float32)
                counted.append((row, ids, changes))
        return seen, counted

    def apply(
        self, logits: torch.Tensor, rows: SampleRows, active: Rows, states: RequestStates, channel: StepChannel
    ) -> None:
        seen, counted = self.penalties(rows, active, states)
        if seen:
            views = channel.upload(_values(seen))
            values, penalty = logits[views["rows"], views["tokens"]], views["values"]
            values = torch.where(values > 0, values / penalty, values * penalty)
            logits[views["rows"], views["tokens"]] = values
        if counted:
            views = channel.upload(_values(counted))
            logits[views["rows"], views["tokens"]] -= views["values"]


STAGES: list[Callable[[int], SamplingStage]] = [AllowedTokens, BadWords, MinTokens, LogitBias, Penalties]


def reads_tokens(params: ResolvedParams) -> bool:
    """Whether a stage reads the tokens so far, so that the host must have them."""
    penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
    return bool(params.bad_words_token_ids) or penalties != (1.0, 0.0, 0.0) or params.thinking_budget is not None
