"""Sampling in plain torch, stage by stage: the definition, and what runs where there are no kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import ops
from executor.messages import I32, ResolvedParams, TokenLogprobs
from executor.request_states import RequestStates
from executor.sampling.base import BAD_LOGITS, NOTHING_LEFT, SamplerOutput, TokenMask, row_error
from executor.sampling.logprobs import describe
from executor.sampling.stages import STAGES
from ops.reference.sampling import uniform

_INT32_MAX = np.iinfo(np.int32).max


class ReferenceSampler:
    """See ``executor.sampling.sampler.Sampler``."""

    def __init__(self, max_num_seqs: int) -> None:
        self._stages = [stage(max_num_seqs) for stage in STAGES]
        self._temperature = np.ones(max_num_seqs, np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int32)
        self._top_p = np.ones(max_num_seqs, np.float32)
        self._min_p = np.zeros(max_num_seqs, np.float32)
        self._seeds = np.zeros(max_num_seqs, np.uint64)
        self._params: list[ResolvedParams] = [ResolvedParams()] * max_num_seqs

    def add(self, slot: int, params: ResolvedParams) -> None:
        for stage in self._stages:
            stage.add(slot, params)
        self._temperature[slot] = params.temperature
        self._top_k[slot] = min(params.top_k, _INT32_MAX)
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seeds[slot] = params.seed
        self._params[slot] = params

    def sample(
        self,
        logits: torch.Tensor,
        raw_logits: torch.Tensor,
        slots: I32,
        step_rows: I32,
        states: RequestStates,
        mask: TokenMask | None,
    ) -> SamplerOutput:
        params = [self._params[slot] for slot in slots.tolist()]
        wanted = [row for row, row_params in enumerate(params) if row_params.logprobs is not None]
        raw = {row: raw_logits[row].clone() for row in wanted}
        errors: dict[int, str] = {}
        self._exclude(raw_logits, logits, BAD_LOGITS, errors)
        if mask is not None:
            _apply_mask(logits, mask)
        for stage in self._stages:
            rows = stage.active(slots)
            if len(rows):
                stage.apply(logits, slots, rows, states)
        self._exclude(logits, logits, NOTHING_LEFT, errors)
        positions = states.num_tokens[slots] - states.num_prompt[slots]
        tokens = ops.sample(
            logits,
            torch.from_numpy(self._temperature[slots]),
            torch.from_numpy(self._top_k[slots]),
            torch.from_numpy(self._top_p[slots]),
            torch.from_numpy(self._min_p[slots]),
            torch.from_numpy(uniform(self._seeds[slots], positions)),
        ).numpy()
        tokens[list(errors)] = 0
        return SamplerOutput(
            token_ids=tokens,
            logprobs=[
                describe(
                    raw[row],
                    int(tokens[row]),
                    params[row].logprobs or 0,
                    int(step_rows[row]),
                    extra_ids=params[row].logprob_token_ids,
                )
                for row in wanted
                if row not in errors
            ],
            row_errors=[row_error(int(step_rows[row]), message) for row, message in sorted(errors.items())],
        )

    def prompt_logprobs(
        self, logits: torch.Tensor, tokens: I32, count: int, row: int, first_position: int
    ) -> list[TokenLogprobs]:
        return [
            describe(logits[index], token, count, row, first_position + index)
            for index, token in enumerate(tokens.tolist())
        ]

    def _exclude(self, looked_at: Any, logits: torch.Tensor, nothing_left: str, errors: dict[int, str]) -> None:
        """Notes rows without a finite largest logit, and makes them harmless. A NaN carries through to the largest."""
        largest = looked_at.amax(dim=-1)
        for row in torch.nonzero(~torch.isfinite(largest)).flatten().tolist():
            only_masked = float(largest[row]) == float("-inf")
            errors.setdefault(row, nothing_left if only_masked else BAD_LOGITS)
            logits[row] = 0.0


def _apply_mask(logits: torch.Tensor, mask: TokenMask) -> None:
    vocab_size = logits.shape[1]
    for row in np.flatnonzero(mask.rows >= 0).tolist():
        words = mask.bitmask[mask.rows[row]].astype("<i4")
        bits = np.unpackbits(words.view(np.uint8), bitorder="little", count=vocab_size)
        logits[row, torch.from_numpy(bits == 0)] = float("-inf")
