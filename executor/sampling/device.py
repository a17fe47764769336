"""Sampling with the GPU kernels: one launch per step whatever its requests ask for, and one for log probabilities.

Nothing here reads device memory on the host. What requests ask for is kept in arrays by slot; a step uploads the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from executor.deferred import Array, Deferred
from executor.device.steps import ImmediateSteps, StepChannel
from executor.messages import I32, ResolvedParams, TokenLogprobs
from executor.request_states import RequestStates
from executor.sampling.base import Sampled, SampleRows, TokenMask
from executor.sampling.logprobs import make_entries, report
from executor.sampling.plain_steps import ROW_BYTES, PlainSteps, results_of
from executor.sampling.reference import sampler_output
from executor.sampling.stages import BadWords, LogitBias, MinTokens, Penalties, RowTokens, RowValues
from ops import OpSet
from ops.triton import sample
from ops.triton.logprobs import most_likely
from ops.triton.sample import Edits, Filters, Mask, Randomness, sample_rows

_INT32_MAX = np.iinfo(np.int32).max
_FILTERS = np.dtype([("temperature", np.float32), ("top_k", np.int32), ("top_p", np.float32), ("min_p", np.float32)])
"""A row of the table of filters."""
_NONE = np.zeros(0, np.int64)


def create(op_set: OpSet, max_num_seqs: int, channel: StepChannel | None) -> DeviceSampler:
    """A sampler that uses the GPU's kernels."""
    return DeviceSampler(max_num_seqs, channel)


class DeviceSampler:
    """See ``executor.sampling.sampler.Sampler``."""

    def __init__(self, max_num_seqs: int, channel: StepChannel | None = None) -> None:
        self._channel = channel or ImmediateSteps()
        self._filters = np.zeros(max_num_seqs, _FILTERS)
        self._filters["temperature"] = self._filters["top_p"] = 1
        self._seeds = np.zeros(max_num_seqs, np.uint64)
        self._params: list[ResolvedParams] = [ResolvedParams()] * max_num_seqs
        self._reports = np.zeros(max_num_seqs, np.bool_)
        self._restricts = np.zeros(max_num_seqs, np.bool_)
        """Whether a slot's request names the tokens that it allows."""
        self._allowed: dict[int, I32] = {}
        """Their bits, by slot; made when the size of the vocabulary is known."""
        self._edits = _StepEdits(max_num_seqs)
        self._results: torch.Tensor | None = None
        """See ``keep_tokens_in``."""
        self._plain: PlainSteps | None = None
        self._asks_more = np.zeros(max_num_seqs, np.bool_)
        """Whether a slot's request asks for more than filters."""
        self._plain_slots: I32 | None = None
        """Slots of which none does."""

    def add(self, slot: int, params: ResolvedParams) -> None:
        row = self._filters[slot]
        row["temperature"] = params.temperature
        row["top_k"] = min(params.top_k, _INT32_MAX)
        row["top_p"] = params.top_p
        row["min_p"] = params.min_p
        self._seeds[slot] = params.seed
        self._params[slot] = params
        self._reports[slot] = params.logprobs is not None
        self._restricts[slot] = params.allowed_token_ids is not None
        self._allowed.pop(slot, None)
        self._edits.add(slot, params)
        self._asks_more[slot] = self._reports[slot] or self._restricts[slot] or self._edits.has(slot)
        self._plain_slots = None
        if self._plain is not None:
            self._plain.changed()

    def sample(
        self,
        logits: torch.Tensor,
        raw_logits: torch.Tensor,
        rows: SampleRows,
        states: RequestStates,
        mask: TokenMask | None,
    ) -> Sampled:
        slots = rows.slots
        is_plain = mask is None and raw_logits is logits and rows.offsets is None and len(rows) > 0
        is_plain = is_plain and rows.device_positions is None
        if self._plain is not None and is_plain and self._are_plain(slots):
            tokens, status = self._plain.sample(logits, rows, states)
            return Sampled(tokens, sampler_output(tokens, status, rows, _NONE, None), status)
        wanted = np.flatnonzero(self._reports[slots])
        mask = self._with_allowed(mask, slots, logits.shape[1])
        edits = self._edits.columns(rows, states)
        columns: dict[str, Array] = {
            "filters": self._filters[slots].view(np.int32).reshape(-1, 4),
            "seeds": self._seeds[slots].view(np.int64),
            "counters": (rows.positions if rows.device_positions is None else 0) - states.num_prompt[slots],
            **edits,
        }
        if mask is not None:
            columns |= {"bitmask": np.ascontiguousarray(mask.bitmask), "mask_rows": mask.rows}
        if len(wanted):
            columns["wanted"] = wanted
        views = self._channel.upload(columns)
        raw = raw_logits
        if len(wanted) and raw is logits and (mask is not None or edits):
            raw = raw_logits.clone()  # the logits will change
        table, counters = views["filters"], views["counters"]
        if rows.device_positions is not None:
            counters = counters + rows.device_positions
        numbers = table.view(torch.float32)
        tokens, status = sample_rows(
            logits,
            Filters(numbers[:, 0], table[:, 1], numbers[:, 2], numbers[:, 3]),
            Randomness(views["seeds"], counters),
            raw=None if raw is logits else raw,
            mask=None if mask is None else Mask(views["bitmask"], views["mask_rows"]),
            edits=Edits(views["edit_tokens"], views["edit_values"], views["edit_bounds"]) if edits else None,
            out=self._out(len(slots)),
        )
        reports = self._report(raw, tokens, rows, wanted, views["wanted"]) if len(wanted) else None
        return Sampled(tokens, sampler_output(tokens, status, rows, wanted, reports), status)

    def _are_plain(self, slots: I32) -> bool:
        """Whether no request of these slots asks for more than filters."""
        if slots is not self._plain_slots and not self._asks_more[slots].any():
            self._plain_slots = slots
        return slots is self._plain_slots

    def _out(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Memory for tokens and status of a step, one behind the other: they come back in one copy."""
        return None if self._results is None else results_of(self._results, num_rows)

    def keep_tokens_in(self, buffer: torch.Tensor) -> bool:
        self._results = buffer
        if self._channel.graphs is not None:
            self._plain = PlainSteps(self._channel.graphs, self._filters, self._seeds, buffer)
        return True

    def step_bytes(self, num_rows: int, vocab_size: int) -> int:
        logits = num_rows * vocab_size * 4  # a copy of them, for log probabilities
        return logits + sample.step_bytes(num_rows) + len(self._seeds) * ROW_BYTES

    def _with_allowed(self, mask: TokenMask | None, slots: I32, vocab_size: int) -> TokenMask | None:
        """The grammar's mask, restricted to what requests allow."""
        restricted = np.flatnonzero(self._restricts[slots]).tolist()
        if not restricted:
            return mask
        if mask is None:
            mask = TokenMask(np.empty((0, -(-vocab_size // 32)), np.int32), np.full(len(slots), -1, np.int32))
        mask_rows = mask.rows.copy()
        extra = []
        for row in restricted:
            bits = self._allowed_bits(int(slots[row]), mask.bitmask.shape[1])
            extra.append(bits if mask.rows[row] < 0 else bits & mask.bitmask[mask.rows[row]])
            mask_rows[row] = len(mask.bitmask) + len(extra) - 1
        return TokenMask(np.concatenate((mask.bitmask, np.stack(extra))), mask_rows)

    def _allowed_bits(self, slot: int, num_words: int) -> I32:
        """int32 [num_words]: the tokens that a slot's request allows."""
        if slot not in self._allowed:
            bits = np.zeros(num_words * 32, np.bool_)
            bits[list(self._params[slot].allowed_token_ids or ())] = True
            self._allowed[slot] = np.packbits(bits, bitorder="little").view(np.int32)
        return self._allowed[slot]

    def _report(
        self, raw: torch.Tensor, tokens: torch.Tensor, rows: SampleRows, wanted: Array, places: torch.Tensor
    ) -> Deferred[list[TokenLogprobs | None]]:
        params = [self._params[slot] for slot in rows.slots[wanted].tolist()]
        counts = [row.logprobs or 0 for row in params]
        listed = [row.logprob_token_ids for row in params]
        names = [rows.name(index) for index in wanted.tolist()]
        sizes = _sizes(counts, raw.shape[1])
        if any(listed) or max(sizes) > sample.MOST_KEPT:
            return report(raw[places], tokens[places], counts, listed, names, self._channel)
        tensors = most_likely(raw, tokens, max(sizes), places)
        return Deferred(tensors, lambda arrays: make_entries(arrays, [1] * len(sizes), sizes, names))

    def prompt_logprobs(
        self, logits: torch.Tensor, tokens: I32, count: int, row: int, first_position: int
    ) -> Deferred[list[TokenLogprobs]]:
        num_rows = len(tokens)
        given = self._channel.upload({"tokens": tokens.astype(np.int64)})["tokens"]
        names = [(row, first_position + index) for index in range(num_rows)]
        sizes = _sizes([count] * num_rows, logits.shape[1])
        if max(sizes) > sample.MOST_KEPT:
            deferred = report(logits, given, [count] * num_rows, [()] * num_rows, names, self._channel)
        else:
            tensors = most_likely(logits, given, max(sizes))
            deferred = Deferred(tensors, lambda arrays: make_entries(arrays, [1] * num_rows, sizes, names))
        return Deferred(
            deferred.tensors, lambda arrays: [entry for entry in deferred.make(arrays) if entry is not None]
        )


def _sizes(counts: Sequence[int], vocab_size: int) -> list[int]:
    """How many of the most likely tokens rows report; -1: all."""
    return [vocab_size if count < 0 else min(count, vocab_size) for count in counts]


class _StepEdits:
    """The changes of logits that requests ask for, as columns of a step."""

    def __init__(self, max_num_seqs: int) -> None:
        self._bad_words = BadWords(max_num_seqs)
        self._min_tokens = MinTokens(max_num_seqs)
        self._bias = LogitBias(max_num_seqs)
        self._penalties = Penalties(max_num_seqs)

    def add(self, slot: int, params: ResolvedParams) -> None:
        for stage in (self._bad_words, self._min_tokens, self._bias, self._penalties):
            stage.add(slot, params)

    def has(self, slot: int) -> bool:
        """Whether a slot's request asks for changes."""
        return any(stage.is_used_by(slot) for stage in (self._bad_words, self._min_tokens, self._bias, self._penalties))

    def columns(self, rows: SampleRows, states: RequestStates) -> dict[str, Array]:
        """The fields of ``Edits``; empty if there are none."""
        slots = rows.slots
        forbidden: RowTokens = []
        for stage in (self._bad_words, self._min_tokens):
            active = stage.active(slots)
            if len(active):
                forbidden += stage.forbidden(rows, active, states)
        kinds: list[RowValues] = [[(row, ids, np.zeros(len(ids), np.float32)) for row, ids in forbidden]]
        kinds.append(self._bias.biases(rows, self._bias.active(slots)))
        kinds += self._penalties.penalties(rows, self._penalties.active(slots), states)
        return _edit_columns(kinds, len(slots)) if any(kinds) else {}


def _edit_columns(kinds: Sequence[RowValues], num_rows: int) -> dict[str, Array]:
    """Sorts edits by row, and those of a row by kind."""
    entries = sorted(
        ((row, kind, ids, values) for kind, of_kind in enumerate(kinds) for row, ids, values in of_kind),
        key=lambda entry: entry[:2],
    )
    counts = np.zeros((num_rows, len(kinds)), np.int32)
    for row, kind, ids, _ in entries:
        counts[row, kind] += len(ids)
    bounds = np.zeros((num_rows, len(kinds) + 1), np.int32)
    ends = counts.reshape(-1).cumsum(dtype=np.int32).reshape(counts.shape)
    bounds[:, 1:] = ends
    bounds[:, 0] = ends[:, 0] - counts[:, 0]
    return {
        "edit_tokens": np.concatenate([np.asarray(ids, np.int32) for _, _, ids, _ in entries]),
        "edit_values": np.concatenate([values for *_, values in entries]),
        "edit_bounds": bounds,
    }
