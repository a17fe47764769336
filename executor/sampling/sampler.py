"""From logits to tokens and log probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

import ops
from executor.messages import I32, ResolvedParams, RowError, TokenLogprobs
from executor.request_states import RequestStates
from executor.sampling.stages import STAGES
from ops.reference.sampling import uniform

BAD_LOGITS = "the model produced logits that are not finite numbers"


@dataclass
class SamplerOutput:
    token_ids: npt.NDArray[np.int64]
    """int64 [rows]."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    row_errors: list[RowError] = field(default_factory=list)


class Sampler:
    """Applies the stages, picks tokens, reports log probabilities. State is arrays by slot."""

    def __init__(self, max_num_seqs: int) -> None:
        self._stages = [stage(max_num_seqs) for stage in STAGES]
        self._temperature = np.ones(max_num_seqs, np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int32)
        self._top_p = np.ones(max_num_seqs, np.float32)
        self._min_p = np.zeros(max_num_seqs, np.float32)
        self._seeds = np.zeros(max_num_seqs, np.uint64)
        self._wants_logprobs = np.zeros(max_num_seqs, np.bool_)

    def add(self, slot: int, params: ResolvedParams) -> None:
        """A request entered a slot."""
        for stage in self._stages:
            stage.add(slot, params)
        self._temperature[slot] = params.temperature
        self._top_k[slot] = params.top_k
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seeds[slot] = params.seed
        self._wants_logprobs[slot] = params.logprobs is not None

    def sample(self, logits: torch.Tensor, slots: I32, step_rows: I32, states: RequestStates) -> SamplerOutput:
        """Picks the next token of each row.

        Args:
            logits: float32 [rows, vocab_size]; changed in place.
            slots: int32 [rows]: whose next token it is.
            step_rows: int32 [rows]: the rows' numbers in the step, for the results.
            states: The tokens so far.
        """
        # The largest logit of a row tells without another pass whether the row is usable: a NaN carries through.
        largest = logits.amax(dim=-1)
        bad = np.flatnonzero(~torch.isfinite(largest).numpy())
        errors = [
            RowError(row=int(step_rows[row]), message="the model produced logits that are not numbers") for row in bad
        ]
        if len(bad):
            logits[torch.from_numpy(bad)] = 0.0
        wanted = np.flatnonzero(self._wants_logprobs[slots])
        raw = {row: torch.log_softmax(logits[row], dim=-1) for row in wanted.tolist()}
        for stage in self._stages:
            rows = stage.active(slots)
            if len(rows):
                stage.apply(logits, slots, rows, states)
        positions = states.num_tokens[slots] - states.num_prompt[slots]
        tokens = ops.sample(
            logits,
            torch.from_numpy(self._temperature[slots]),
            torch.from_numpy(self._top_k[slots]),
            torch.from_numpy(self._top_p[slots]),
            torch.from_numpy(self._min_p[slots]),
            torch.from_numpy(uniform(self._seeds[slots], positions)),
        ).numpy()
        output = SamplerOutput(token_ids=tokens, row_errors=errors)
        for row, logprobs in raw.items():
            params = states.params[slots[row]]
            assert params is not None
            output.logprobs.append(describe_logprobs(logprobs, int(tokens[row]), params, int(step_rows[row])))
        return output


def describe_logprobs(logprobs: torch.Tensor, token: int, params: ResolvedParams, row: int) -> TokenLogprobs:
    """The log probability of a token, of those asked for by id, and of the most likely ones."""
    count = logprobs.shape[0] if params.logprobs == -1 else int(params.logprobs or 0)
    return token_logprobs(logprobs, token, count, row, position=0, extra_ids=params.logprob_token_ids)


def token_logprobs(
    logprobs: torch.Tensor, token: int, count: int, row: int, position: int, extra_ids: tuple[int, ...] = ()
) -> TokenLogprobs:
    """What a position has to say of log probabilities.

    Args:
        logprobs: float32 [vocab_size].
        token: The token that stands there.
        count: Number of most likely tokens to report.
        row: Row of the step.
        position: See ``TokenLogprobs.position``.
        extra_ids: More tokens to report, instead of the most likely ones.
    """
    if extra_ids:
        top_ids = torch.tensor(extra_ids)
    else:
        top_ids = torch.sort(logprobs, descending=True, stable=True).indices[:count] if count else torch.empty(0).long()
    ids = torch.cat((torch.tensor([token]), top_ids))
    return TokenLogprobs(
        row=row,
        position=position,
        token_ids=ids.numpy().astype(np.int32).tobytes(),
        logprobs=logprobs[ids].numpy().astype(np.float32).tobytes(),
        rank=int((logprobs > logprobs[token]).sum()) + 1,
    )
