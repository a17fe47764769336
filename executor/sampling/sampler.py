"""From logits to tokens and log probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

import ops
from executor.deferred import Deferred
from executor.device.steps import ImmediateSteps, StepChannel
from executor.messages import I32, I64, ResolvedParams, TokenLogprobs
from executor.registry import resolve
from executor.request_states import RequestStates
from executor.sampling.base import (
    BAD_LOGITS,
    Sampled,
    SamplerBackend,
    SamplerOutput,
    SampleRows,
    SamplingStage,
    TokenMask,
    row_error,
)
from executor.sampling.reference import ReferenceSampler
from executor.sampling.stages import reads_tokens
from executor.sampling.thinking import ThinkingBudgets

__all__ = ["SampleRows", "Sampled", "Sampler", "SamplerOutput", "TokenMask"]

REGISTRY = {"cpu": "executor.sampling.kernel:create", "triton": "executor.sampling.device:create"}
"""Backend factories by op set: they take the set, the number of slots and the channel. Other op sets use the
reference."""


def new_backend(op_set: ops.OpSet, max_num_seqs: int, channel: StepChannel | None = None) -> SamplerBackend:
    """The backend of an op set."""
    if op_set.name not in REGISTRY:
        return ReferenceSampler(max_num_seqs, channel)
    backend: SamplerBackend = resolve(REGISTRY, op_set.name, "sampler")(op_set, max_num_seqs, channel)
    return backend


def ids_of(output: SamplerOutput, rows: SampleRows) -> torch.Tensor:
    """What ranks that sample nothing need of an output: int64 [rows], the tokens, -1 where there was an error."""
    ids = torch.from_numpy(output.token_ids.copy())
    failed = {(error.row, error.position) for error in output.row_errors}
    for index in range(len(ids)) if failed else ():
        if rows.name(index) in failed:
            ids[index] = -1
    return ids


def from_ids(ids: I64, rows: SampleRows) -> SamplerOutput:
    """What another rank has sampled, from the numbers of ``ids_of``."""
    errors = [row_error(*rows.name(index), BAD_LOGITS) for index in np.flatnonzero(ids < 0).tolist()]
    return SamplerOutput(np.maximum(ids, 0), row_errors=errors)


class Sampler:
    """Processes logits, picks tokens and reports log probabilities: the second half of a step.

    State is by slot and written only in ``add``; generated tokens are read from the ``RequestStates``. With kernels
    of a CPU or GPU a step is one call (``kernel.py``, ``device.py``), otherwise a sequence of torch stages
    (``reference.py``). All give the same tokens.
    """

    def __init__(
        self,
        max_num_seqs: int,
        device_type: str = "cpu",
        stages: Sequence[SamplingStage] = (),
        channel: StepChannel | None = None,
        communicator: ops.Communicator | None = None,
    ) -> None:
        """
        Args:
            max_num_seqs: Number of slots.
            device_type: Device type of the logits.
            stages: Additional edits of the logits, which no kernel implements. They run before all others.
            channel: Channel to that device. Default: the host's memory.
            communicator: Connects ranks with the same logits. If these are in common memory (``shares_rows``), rank 0
                samples, and the others get its tokens, without log probabilities. Default: there is one rank.
        """
        together = communicator is not None and communicator.shares_rows
        self._communicator = communicator if communicator is not None and together else ops.SingleRank()
        self._channel = channel or ImmediateSteps()
        self._backend = new_backend(ops.op_set(device_type), max_num_seqs, channel)
        self._stages = tuple(stages)
        self._thinking = ThinkingBudgets(max_num_seqs)
        self._reads_tokens = np.zeros(max_num_seqs, np.bool_)
        self._any_reads_tokens = False
        self._depends = np.zeros(max_num_seqs, np.bool_)
        """By slot: whether the host must know what came before a token, or how much, to sample it."""
        self._nothing: Sampled | None = None
        """What a step samples that has no rows to sample."""

    def add(self, slot: int, params: ResolvedParams) -> None:
        """Registers a request that enters a slot."""
        for stage in self._stages:
            stage.add(slot, params)
        self._thinking.add(slot, params)
        self._backend.add(slot, params)
        self._reads_tokens[slot] = bool(self._stages) or reads_tokens(params)
        self._any_reads_tokens = bool(self._reads_tokens.any())
        self._depends[slot] = self._reads_tokens[slot] or params.min_tokens > 0

    def lacks_tokens(self, rows: SampleRows, states: RequestStates) -> bool:
        """Whether sampling a row reads tokens that the host does not have yet."""
        if not self._any_reads_tokens:
            return False
        slots = rows.slots
        return bool((self._reads_tokens[slots] & (states.num_known[slots] < rows.positions)).any())

    def depends_on_tokens(self, slots: I32) -> bool:
        """Whether sampling some of these slots depends on earlier tokens, or their number, so that drafts cannot be
        verified before the host knows these."""
        return bool(self._depends[slots].any())

    def sample(
        self, logits: torch.Tensor, rows: SampleRows, states: RequestStates, mask: TokenMask | None = None
    ) -> Sampled:
        """Picks the next token of each row. Rows that ``lacks_tokens`` cannot be sampled yet.

        Args:
            logits: float32 [rows, vocab_size]; changed in place.
            rows: The rows of the logits.
            states: The tokens so far.
            mask: Tokens that a grammar allows.
        """
        if not len(rows):  # of a step that computes parts of prompts, or pools them
            if self._nothing is None:
                nothing = SamplerOutput(np.empty(0, np.int64))
                self._nothing = Sampled(logits.new_empty(0, dtype=torch.int64), Deferred.known(nothing))
            return self._nothing
        if self._communicator.rank:
            return self._received(rows)
        raw = logits
        for stage in self._stages:
            active = stage.active(rows.slots)
            if len(active):
                if raw is logits:
                    raw = logits.clone()
                stage.apply(logits, rows, active, states, self._channel)
        mask = self._thinking.restrict(mask, rows, states, logits.shape[1])
        sampled = self._backend.sample(logits, raw, rows, states, mask)
        return sampled if self._communicator.size == 1 else self._sent(sampled, rows)

    def _sent(self, sampled: Sampled, rows: SampleRows) -> Sampled:
        """Gives the other ranks the tokens."""
        output = sampled.output.make([tensor.numpy() for tensor in sampled.output.tensors])
        self._communicator.broadcast(ids_of(output, rows))
        return Sampled(sampled.token_ids, Deferred.known(output))

    def _received(self, rows: SampleRows) -> Sampled:
        """What rank 0 has sampled, so that all ranks accept the same drafts."""
        ids = self._communicator.broadcast(torch.zeros(len(rows), dtype=torch.int64))
        output = from_ids(ids.numpy(), rows)
        return Sampled(torch.from_numpy(output.token_ids), Deferred.known(output))

    def keep_tokens_in(self, buffer: torch.Tensor) -> bool:
        """See ``SamplerBackend``."""
        return self._backend.keep_tokens_in(buffer)

    def step_bytes(self, num_rows: int, vocab_size: int) -> int:
        """Approximate memory of a step with this many rows, in addition to its logits."""
        return self._backend.step_bytes(num_rows, vocab_size)

    def prompt_logprobs(
        self, logits: torch.Tensor, tokens: I32, count: int, row: int, first_position: int
    ) -> Deferred[list[TokenLogprobs]]:
        """Log probabilities of given tokens at consecutive positions.

        Args:
            logits: float32 [positions, vocab_size].
            tokens: int32 [positions]: the actual tokens.
            count: Number of most likely tokens to report besides them; -1: all.
            row: Row of the step.
            first_position: Index of the first token in the prompt.
        """
        return self._backend.prompt_logprobs(logits, tokens, count, row, first_position)
