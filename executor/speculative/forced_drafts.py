"""Drafts of a second model that measurements and tests replace by others, so that random weights suffice."""

from __future__ import annotations

import numpy as np

from executor.base import ModelError
from executor.config import SpeculativeConfig
from executor.messages import I32, I64, NewRequest, i32
from executor.scripts import NO_OUTPUT, read_scripts


class ForcedDrafts:
    """Replaces drafts by known outputs with a given probability, and by other tokens otherwise."""

    def __init__(self, config: SpeculativeConfig, max_num_seqs: int) -> None:
        try:
            self._output_of = read_scripts(config.script)
        except ValueError as error:
            raise ModelError(f"--speculative-config: script: {error}") from None
        self._acceptance = config.acceptance
        self._outputs: list[I32] = [NO_OUTPUT] * max_num_seqs

    def add(self, request: NewRequest) -> None:
        """Registers a request that enters a slot."""
        prompt = i32(request.token_ids)[: request.num_prompt_tokens]
        self._outputs[request.slot] = self._output_of(prompt)

    def replace(self, slots: I32, positions: I64, num_prompt: I64, tokens: I64) -> I64:
        """The tokens to propose instead of these, one per slot.

        Args:
            slots: int32 [n].
            positions: int64 [n]: places of the drafts in their requests.
            num_prompt: int64 [n]: tokens of the prompts.
            tokens: int64 [n]: what the model proposes.
        """
        replaced: I64 = tokens.copy()
        for row, slot in enumerate(slots.tolist()):
            output, index = self._outputs[slot], int(positions[row] - num_prompt[row])
            if index < len(output):
                is_right = np.random.default_rng([len(output), index]).random() < self._acceptance
                replaced[row] = output[index] if is_right else (output[index] + 1) % 1000
        return replaced
