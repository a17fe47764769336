"""From logits to tokens and log probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from executor.messages import I32, ResolvedParams, TokenLogprobs
from executor.request_states import RequestStates
from executor.sampling.base import SamplerBackend, SamplerOutput, SamplingStage, TokenMask
from executor.sampling.kernel import KernelSampler
from executor.sampling.logprobs import token_logprobs
from executor.sampling.reference import ReferenceSampler
from executor.sampling.thinking import ThinkingBudgets
from ops.cpu.sampling import sampling_kernels

__all__ = ["Sampler", "SamplerOutput", "TokenMask", "token_logprobs"]


class Sampler:
    """Processes logits, picks tokens, reports log probabilities: the second program of a step.

    State is by slot and written in ``add`` alone; what a request has generated is read from the ``RequestStates``.
    On a CPU with kernels a step is one call (``executor/sampling/kernel.py``), otherwise a list of stages in torch
    (``executor/sampling/reference.py``). Both give the same tokens.
    """

    def __init__(self, max_num_seqs: int, device_type: str = "cpu", stages: Sequence[SamplingStage] = ()) -> None:
        """
        Args:
            max_num_seqs: Number of slots.
            device_type: Where the logits will be.
            stages: Changes to the logits that no kernel knows. They come before all others.
        """
        kernels = sampling_kernels() if device_type == "cpu" else None
        self._backend: SamplerBackend = (
            ReferenceSampler(max_num_seqs) if kernels is None else KernelSampler(max_num_seqs, kernels)
        )
        self._stages = tuple(stages)
        self._thinking = ThinkingBudgets(max_num_seqs)

    def add(self, slot: int, params: ResolvedParams) -> None:
        """A request entered a slot."""
        for stage in self._stages:
            stage.add(slot, params)
        self._thinking.add(slot, params)
        self._backend.add(slot, params)

    def sample(
        self,
        logits: torch.Tensor,
        slots: I32,
        step_rows: I32,
        states: RequestStates,
        mask: TokenMask | None = None,
    ) -> SamplerOutput:
        """Picks the next token of each row.

        Args:
            logits: float32 [rows, vocab_size]; changed in place.
            slots: int32 [rows]: whose next token it is; each slot at most once.
            step_rows: int32 [rows]: the rows' numbers in the step, for the results.
            states: The tokens so far.
            mask: Tokens that a grammar allows.
        """
        raw = logits
        for stage in self._stages:
            rows = stage.active(slots)
            if len(rows):
                if raw is logits:
                    raw = logits.clone()
                stage.apply(logits, slots, rows, states)
        mask = self._thinking.restrict(mask, slots, states, logits.shape[1])
        return self._backend.sample(logits, raw, slots, step_rows, states, mask)

    def prompt_logprobs(
        self, logits: torch.Tensor, tokens: I32, count: int, row: int, first_position: int
    ) -> list[TokenLogprobs]:
        """Log probabilities of given tokens at positions that follow one another.

        Args:
            logits: float32 [positions, vocab_size].
            tokens: int32 [positions]: what stands there.
            count: Number of most likely tokens to report beside them; -1: all.
            row: Row of the step.
            first_position: Number of the first token in the prompt.
        """
        return self._backend.prompt_logprobs(logits, tokens, count, row, first_position)
