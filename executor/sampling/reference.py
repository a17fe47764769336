"""Sampling as a sequence of torch stages, on any device.

Nothing here reads device memory on the host: parameters go up, tokens and reports come back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

import ops
from executor.deferred import Array, Deferred
from executor.device.steps import ImmediateSteps, StepChannel
from executor.messages import I32, ResolvedParams, TokenLogprobs
from executor.request_states import RequestStates
from executor.sampling.base import BAD_LOGITS, NOTHING_LEFT, Sampled, SamplerOutput, SampleRows, TokenMask, row_error
from executor.sampling.logprobs import report
from executor.sampling.stages import STAGES
from ops.reference.sampling import uniform

_INT32_MAX = np.iinfo(np.int32).max
OK, NOT_FINITE, LEFT_NOTHING = 0, 1, 2
"""What became of a row."""
_ROW_BYTES = 10 * 8
"""Per token of the vocabulary while a row is sampled; rows are sampled one at a time."""
_MESSAGES = {NOT_FINITE: BAD_LOGITS, LEFT_NOTHING: NOTHING_LEFT}


class ReferenceSampler:
    """See ``executor.sampling.sampler.Sampler``."""

    def __init__(self, max_num_seqs: int, channel: StepChannel | None = None) -> None:
        self._channel = channel or ImmediateSteps()
        self._stages = [stage(max_num_seqs) for stage in STAGES]
        self._temperature = np.ones(max_num_seqs, np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int32)
        self._top_p = np.ones(max_num_seqs, np.float32)
        self._min_p = np.zeros(max_num_seqs, np.float32)
        self._seeds = np.zeros(max_num_seqs, np.uint64)
        self._params: list[ResolvedParams] = [ResolvedParams()] * max_num_seqs
        self._reports = np.zeros(max_num_seqs, np.bool_)

    def add(self, slot: int, params: ResolvedParams) -> None:
        for stage in self._stages:
            stage.add(slot, params)
        self._temperature[slot] = params.temperature
        self._top_k[slot] = min(params.top_k, _INT32_MAX)
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seeds[slot] = params.seed
        self._params[slot] = params
        self._reports[slot] = params.logprobs is not None

    def sample(
        self,
        logits: torch.Tensor,
        raw_logits: torch.Tensor,
        rows: SampleRows,
        states: RequestStates,
        mask: TokenMask | None,
    ) -> Sampled:
        slots = rows.slots
        wanted = np.flatnonzero(self._reports[slots])
        views = self._upload(rows, states, mask, wanted)
        raw = raw_logits[views["wanted"]] if len(wanted) else None
        is_bad = ~torch.isfinite(raw_logits.amax(dim=-1))
        logits.masked_fill_(is_bad.unsqueeze(1), 0.0)
        if mask is not None:
            _apply_mask(logits, views)
        for stage in self._stages:
            active = stage.active(slots)
            if len(active):
                stage.apply(logits, rows, active, states, self._channel)
        largest = logits.amax(dim=-1)
        is_left = torch.isfinite(largest)
        status = torch.where(largest == float("-inf"), LEFT_NOTHING, NOT_FINITE)
        status = torch.where(is_bad, NOT_FINITE, torch.where(is_left, OK, status))
        logits.masked_fill_(~is_left.unsqueeze(1), 0.0)
        if rows.device_positions is not None:
            numbers = views["numbers"][views["places"], rows.device_positions - views["least"]]
            views = {**views, "numbers": numbers}
        tokens = ops.sample(logits, *(views[name] for name in ("temperature", "top_k", "top_p", "min_p", "numbers")))
        tokens = tokens.masked_fill(status != OK, 0)
        reports = None if raw is None else self._report(raw, tokens[views["wanted"]], rows, wanted)
        return Sampled(tokens, sampler_output(tokens, status, rows, wanted, reports), status)

    def keep_tokens_in(self, buffer: torch.Tensor) -> bool:
        return False

    def step_bytes(self, num_rows: int, vocab_size: int) -> int:
        return vocab_size * (num_rows * 4 + _ROW_BYTES)  # a copy of the unprocessed logits, for log probabilities

    def _upload(
        self, rows: SampleRows, states: RequestStates, mask: TokenMask | None, wanted: Array
    ) -> Mapping[str, torch.Tensor]:
        slots = rows.slots
        columns: dict[str, Array] = {
            "temperature": self._temperature[slots],
            "top_k": self._top_k[slots],
            "top_p": self._top_p[slots],
            "min_p": self._min_p[slots],
            "wanted": wanted,
        }
        if rows.device_positions is None:
            columns["numbers"] = uniform(self._seeds[slots], rows.positions - states.num_prompt[slots])
        else:  # those of all positions that there may be
            least = np.minimum(states.num_known[slots], rows.positions)
            counters = (least - states.num_prompt[slots])[:, None] + np.arange(int((rows.positions - least).max()) + 1)
            seeds = self._seeds[slots].repeat(counters.shape[1])
            columns["numbers"] = uniform(seeds, counters.ravel()).reshape(counters.shape)
            columns |= {"least": least, "places": np.arange(len(slots))}
        if mask is not None:
            masked = np.flatnonzero(mask.rows >= 0)
            columns |= {
                "masked": masked,
                "bitmask": mask.bitmask[mask.rows[masked]],
                "bits": np.arange(32, dtype=np.int32),
            }
        return self._channel.upload(columns)

    def _report(
        self, raw: torch.Tensor, tokens: torch.Tensor, rows: SampleRows, wanted: Array
    ) -> Deferred[list[TokenLogprobs | None]]:
        params = [self._params[slot] for slot in rows.slots[wanted].tolist()]
        return report(
            raw,
            tokens,
            [row.logprobs or 0 for row in params],
            [row.logprob_token_ids for row in params],
            [rows.name(index) for index in wanted.tolist()],
            self._channel,
        )

    def prompt_logprobs(
        self, logits: torch.Tensor, tokens: I32, count: int, row: int, first_position: int
    ) -> Deferred[list[TokenLogprobs]]:
        num_rows = len(tokens)
        deferred = report(
            logits,
            self._channel.upload({"tokens": tokens.astype(np.int64)})["tokens"],
            [count] * num_rows,
            [()] * num_rows,
            [(row, first_position + index) for index in range(num_rows)],
            self._channel,
        )
        return Deferred(
            deferred.tensors, lambda arrays: [entry for entry in deferred.make(arrays) if entry is not None]
        )


def sampler_output(
    tokens: torch.Tensor,
    status: torch.Tensor,
    rows: SampleRows,
    wanted: Array,
    reports: Deferred[list[TokenLogprobs | None]] | None,
) -> Deferred[SamplerOutput]:
    """A step's output.

    Args:
        tokens: int64 [rows], 0 where there is none.
        status: Integers [rows]: OK, NOT_FINITE or LEFT_NOTHING.
        rows: The rows.
        wanted: Those that report log probabilities.
        reports: Their log probabilities.
    """

    def make(arrays: Sequence[Array]) -> SamplerOutput:
        token_ids, states = arrays[:2]
        entries = [] if reports is None else reports.make(arrays[2:])
        return SamplerOutput(
            token_ids=token_ids,
            logprobs=[
                entry
                for index, entry in zip(wanted.tolist(), entries, strict=True)
                if entry is not None and states[index] == OK
            ],
            row_errors=[
                row_error(*rows.name(index), _MESSAGES[int(states[index])])
                for index in np.flatnonzero(states != OK).tolist()
            ],
        )

    return Deferred((tokens, status, *(() if reports is None else reports.tensors)), make)


def _apply_mask(logits: torch.Tensor, views: Mapping[str, torch.Tensor]) -> None:
    words = views["bitmask"].unsqueeze(2)  # [masked rows, words, 1]
    is_allowed = ((words >> views["bits"]) & 1).flatten(1)[:, : logits.shape[1]] != 0
    rows = views["masked"]
    logits[rows] = logits[rows].masked_fill(~is_allowed, float("-inf"))
