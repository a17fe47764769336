"""Sampling with the CPU kernels: one call per step, whatever its requests ask for.

Request parameters are written to a table by slot on arrival; a step only passes addresses.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from executor.deferred import Deferred
from executor.device.steps import StepChannel
from executor.messages import I32, ResolvedParams, TokenLogprobs
from executor.request_states import RequestStates
from executor.sampling.base import (
    BAD_LOGITS,
    NOTHING_LEFT,
    Sampled,
    SamplerOutput,
    SampleRows,
    TokenMask,
    row_error,
)
from ops import OpSet
from ops.cpu.op_set import CpuOps
from ops.cpu.sampling import (
    ALL_LOGPROBS,
    NEUTRAL_PARAMS,
    ROW_NOT_FINITE,
    ROW_OK,
    SampleStep,
    SamplingKernels,
    TokenHistory,
    address,
)
from ops.reference.sampling import MAX_VOCAB_SIZE

_INT32_MAX = np.iinfo(np.int32).max
_SCRATCH_BYTES = 6 * 4
"""Per token of the vocabulary and thread: see ``Scratch`` in ``csrc/sampling_row.h``."""


def create(op_set: OpSet, max_num_seqs: int, channel: StepChannel | None = None) -> KernelSampler:
    """A sampler that uses the kernels of the CPU's op set. It needs no channel."""
    assert isinstance(op_set, CpuOps)
    return KernelSampler(max_num_seqs, op_set.sampling)


class KernelSampler:
    """See ``executor.sampling.sampler.Sampler``."""

    def __init__(self, max_num_seqs: int, kernels: SamplingKernels) -> None:
        self._params = np.repeat(NEUTRAL_PARAMS, max_num_seqs)
        self._lists: list[tuple[npt.NDArray[Any], ...]] = [()] * max_num_seqs
        """The arrays that the table points to."""
        self._history = TokenHistory(kernels, max_num_seqs)
        self._has_history = np.zeros(max_num_seqs, np.bool_)
        self._report_sizes = np.zeros(max_num_seqs, np.int64)
        """Number of log probabilities that a slot's request reports, the sampled token's included."""
        self._reports_list = np.zeros(max_num_seqs, np.bool_)
        """Whether they are for a list of tokens instead of the most likely ones."""
        self._reports = 0
        """Number of slots that report some; a slot whose request is gone counts until it is reused."""
        self._states: RequestStates | None = None
        self._sample = kernels.sample_step
        self._step = SampleStep(params=address(self._params), history=self._history.handle)
        self._step_address = ctypes.addressof(self._step)
        self._make_room(max_num_seqs)

    def _make_room(self, num_rows: int) -> None:
        """Allocates the columns of a step, one entry per row."""
        step = self._step
        self._slots = np.zeros(num_rows, np.int32)
        self._lengths = np.zeros(num_rows, np.int64)
        """Number of tokens before the sampled one."""
        self._tokens = np.zeros(num_rows, np.int64)
        self._status = np.zeros(num_rows, np.int32)
        self._ranks = np.zeros(num_rows, np.int32)
        step.slots, step.lengths = address(self._slots), address(self._lengths)
        step.tokens, step.status, step.ranks = (address(x) for x in (self._tokens, self._status, self._ranks))

    def add(self, slot: int, params: ResolvedParams) -> None:
        if self._has_history[slot]:
            self._history.clear(slot)
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        self._has_history[slot] = penalties != (1.0, 0.0, 0.0)
        allowed = np.unique(np.array(params.allowed_token_ids or (), np.int32))
        stop = np.array(params.all_stop_token_ids if params.min_tokens > 0 else (), np.int32)
        bias_ids = np.array([token for token, _ in params.logit_bias], np.int32)
        biases = np.array([bias for _, bias in params.logit_bias], np.float32)
        bad_words = np.array([token for word in params.bad_words_token_ids for token in word], np.int32)
        bad_word_ends = np.cumsum([len(word) for word in params.bad_words_token_ids], dtype=np.int32)
        logprob_ids = np.array(params.logprob_token_ids, np.int32)
        self._lists[slot] = (allowed, stop, bias_ids, biases, bad_words, bad_word_ends, logprob_ids)

        size = 0
        if params.logprobs is not None:
            size = 1 + (len(logprob_ids) or (ALL_LOGPROBS if params.logprobs < 0 else params.logprobs))
        self._reports += int(size > 0) - int(self._report_sizes[slot] > 0)
        self._report_sizes[slot] = size
        self._reports_list[slot] = len(logprob_ids) > 0

        row = self._params[slot]
        row["presence_penalty"] = params.presence_penalty
        row["frequency_penalty"] = params.frequency_penalty
        row["seed"] = params.seed
        row["allowed_ids"] = address(allowed)
        row["stop_ids"] = address(stop)
        row["bias_ids"] = address(bias_ids)
        row["biases"] = address(biases)
        row["bad_words"] = address(bad_words)
        row["bad_word_ends"] = address(bad_word_ends)
        row["logprob_ids"] = address(logprob_ids)
        row["temperature"] = params.temperature
        row["top_p"] = params.top_p
        row["min_p"] = params.min_p
        row["repetition_penalty"] = params.repetition_penalty
        row["top_k"] = min(params.top_k, _INT32_MAX)
        row["min_tokens"] = min(params.min_tokens, _INT32_MAX)
        row["num_allowed"] = -1 if params.allowed_token_ids is None else len(allowed)
        row["num_stop"] = len(stop)
        row["num_biases"] = len(bias_ids)
        row["num_bad_words"] = len(bad_word_ends)
        row["num_logprob_ids"] = len(logprob_ids)
        row["num_logprobs"] = size - 1

    def sample(
        self,
        logits: torch.Tensor,
        raw_logits: torch.Tensor,
        rows: SampleRows,
        states: RequestStates,
        mask: TokenMask | None,
    ) -> Sampled:
        num_rows, vocab_size = logits.shape
        assert logits.dtype == torch.float32 and logits.stride(1) == 1 and raw_logits.stride() == logits.stride()
        assert vocab_size <= MAX_VOCAB_SIZE
        if states is not self._states:
            self._bind(states)
        step = self._step
        step.logits = logits.data_ptr()
        step.raw_logits = None if raw_logits is logits else raw_logits.data_ptr()
        step.row_stride = logits.stride(0)
        step.num_rows = num_rows
        step.vocab_size = vocab_size
        if num_rows > len(self._slots):
            self._make_room(2 * num_rows)
        slots = rows.slots
        self._slots[:num_rows] = slots
        self._lengths[:num_rows] = rows.positions
        if mask is not None:
            bitmask, mask_rows = np.ascontiguousarray(mask.bitmask), np.ascontiguousarray(mask.rows)
            assert bitmask.dtype == mask_rows.dtype == np.int32 and bitmask.shape[1] * 32 >= vocab_size
            step.bitmask = address(bitmask)
            step.bitmask_stride = bitmask.shape[1]
            step.bitmask_rows = address(mask_rows)
        report = None
        if self._reports and num_rows:
            sizes = self._report_sizes[slots]
            report = _Report(np.where(self._reports_list[slots], sizes, np.minimum(sizes, vocab_size + 1)))
            report.attach(step)
        num_failed = self._sample(self._step_address, torch.get_num_threads())
        step.bitmask = step.logprob_starts = None
        token_ids = self._tokens[:num_rows].copy()
        output = SamplerOutput(token_ids)
        if num_failed:
            status = self._status[:num_rows]
            output.row_errors = [
                row_error(*rows.name(index), BAD_LOGITS if status[index] == ROW_NOT_FINITE else NOTHING_LEFT)
                for index in np.flatnonzero(status != ROW_OK).tolist()
            ]
        if report is not None:
            output.logprobs = [
                report.entry(index, *rows.name(index), int(self._ranks[index]))
                for index in np.flatnonzero(report.sizes).tolist()
                if self._status[index] == ROW_OK
            ]
        return Sampled(torch.from_numpy(token_ids), Deferred.known(output))

    def prompt_logprobs(
        self, logits: torch.Tensor, tokens: I32, count: int, row: int, first_position: int
    ) -> Deferred[list[TokenLogprobs]]:
        num_rows, vocab_size = logits.shape
        assert logits.dtype == torch.float32 and logits.stride(1) == 1
        params = NEUTRAL_PARAMS.copy()
        params["num_logprobs"] = _INT32_MAX if count < 0 else count
        slots, lengths = np.zeros(num_rows, np.int32), np.zeros(num_rows, np.int64)
        given = tokens.astype(np.int64)
        status, ranks = np.zeros(num_rows, np.int32), np.zeros(num_rows, np.int32)
        report = _Report(np.full(num_rows, 1 + (vocab_size if count < 0 else min(count, vocab_size)), np.int64))
        step = SampleStep(
            logits=logits.data_ptr(),
            row_stride=logits.stride(0),
            num_rows=num_rows,
            vocab_size=vocab_size,
            slots=address(slots),
            params=address(params),
            lengths=address(lengths),
            num_prompt=address(lengths),
            given_tokens=address(given),
            status=address(status),
            ranks=address(ranks),
        )
        report.attach(step)
        self._sample(ctypes.addressof(step), torch.get_num_threads())
        return Deferred.known(
            [report.entry(index, row, first_position + index, int(ranks[index])) for index in range(num_rows)]
        )

    def keep_tokens_in(self, buffer: torch.Tensor) -> bool:
        return False

    def step_bytes(self, num_rows: int, vocab_size: int) -> int:
        return torch.get_num_threads() * vocab_size * _SCRATCH_BYTES

    def _bind(self, states: RequestStates) -> None:
        """Binds the address of the token table, fixed for the lifetime of the states."""
        assert states.token_ids.flags.c_contiguous and states.token_ids.dtype == np.int32
        assert states.num_prompt.dtype == np.int64
        self._states = states
        self._step.token_ids = address(states.token_ids)
        self._step.token_stride = states.token_ids.shape[1]
        self._step.num_prompt = address(states.num_prompt)


class _Report:
    """Buffer for the log probabilities of a step, row by row."""

    def __init__(self, sizes: npt.NDArray[np.int64]) -> None:
        self.sizes = sizes
        ends = sizes.cumsum()
        self.starts = ends - sizes
        self.token_ids = np.zeros(ends[-1], np.int32)
        self.logprobs = np.full(ends[-1], np.nan, np.float32)

    def attach(self, step: SampleStep) -> None:
        step.logprob_starts = address(self.starts)
        step.logprob_ids = address(self.token_ids)
        step.logprobs = address(self.logprobs)

    def entry(self, index: int, row: int, position: int, rank: int) -> TokenLogprobs:
        part = slice(self.starts[index], self.starts[index] + self.sizes[index])
        return TokenLogprobs(
            row=row,
            position=position,
            token_ids=self.token_ids[part].tobytes(),
            logprobs=self.logprobs[part].tobytes(),
            rank=rank,
        )
