"""Replaces sampled tokens by those of outputs that are known in advance: benchmarks measure a text of their choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from executor.base import ModelError
from executor.deferred import Array, Deferred
from executor.device.steps import ImmediateSteps, StepChannel
from executor.messages import I64
from executor.request_states import RequestStates
from executor.sampling.base import Sampled, SamplerOutput, SampleRows, TokenMask
from executor.sampling.sampler import Sampler
from executor.scripts import read_scripts
from ops import Communicator


class ForcedSampler(Sampler):
    """Samples as usual, and then replaces the tokens of requests whose prompts are in a file.

    Log probabilities are those of the sampled tokens.
    """

    def __init__(
        self,
        max_num_seqs: int,
        device_type: str,
        channel: StepChannel | None,
        path: str,
        communicator: Communicator | None = None,
    ) -> None:
        """
        Args:
            max_num_seqs: Number of slots.
            device_type: Device type of the logits.
            channel: Channel to that device.
            path: A file of ``executor/scripts.py``.
            communicator: As of ``Sampler``.

        Raises:
            ValueError: The file cannot be read.
        """
        super().__init__(max_num_seqs, device_type, channel=channel, communicator=communicator)
        self._uploads = channel or ImmediateSteps()
        self._output_of = read_scripts(path)
        self._epochs = np.full(max_num_seqs, -1, np.int64)
        self._tokens = np.full((max_num_seqs, 1), -1, np.int64)
        """int64 [slots, positions]: the token at each position of the sequence; -1: it is sampled."""

    def sample(
        self, logits: torch.Tensor, rows: SampleRows, states: RequestStates, mask: TokenMask | None = None
    ) -> Sampled:
        sampled = super().sample(logits, rows, states, mask)
        for slot in np.unique(rows.slots[self._epochs[rows.slots] != states.epochs[rows.slots]]).tolist():
            self._find(slot, states)
        forced = self._tokens[rows.slots, np.minimum(rows.positions, self._tokens.shape[1] - 1)]
        if not (forced >= 0).any():
            return sampled
        given = self._uploads.upload({"forced": forced.copy()})["forced"]

        def make(arrays: Sequence[Array]) -> SamplerOutput:
            output = sampled.output.make(arrays)
            return replace(output, token_ids=np.where(forced >= 0, forced, output.token_ids))

        return Sampled(torch.where(given >= 0, given, sampled.token_ids), Deferred(sampled.output.tensors, make))

    def keep_tokens_in(self, buffer: torch.Tensor) -> bool:
        return False  # the backend would keep those that are replaced

    def _find(self, slot: int, states: RequestStates) -> None:
        """Looks up the output of a request that is new in its slot."""
        if self._tokens.shape[1] == 1:
            self._tokens = np.full(states.token_ids.shape, -1, np.int64)
        begin = int(states.num_prompt[slot])
        output: I64 = self._output_of(states.token_ids[slot, :begin]).astype(np.int64)
        self._epochs[slot] = states.epochs[slot]
        self._tokens[slot] = -1
        room = self._tokens[slot, begin : begin + len(output)]
        room[:] = output[: len(room)]


def create_sampler(
    max_num_seqs: int,
    device_type: str,
    channel: StepChannel | None,
    *,
    forced_outputs: str = "",
    communicator: Communicator | None = None,
) -> Sampler:
    """The sampler of a worker.

    Args:
        max_num_seqs: Number of slots.
        device_type: Device type of the logits.
        channel: Channel to that device.
        forced_outputs: File of outputs that replace sampled tokens; empty: none.
        communicator: As of ``Sampler``.

    Raises:
        ModelError: The file cannot be read.
    """
    if not forced_outputs:
        return Sampler(max_num_seqs, device_type, channel=channel, communicator=communicator)
    try:
        return ForcedSampler(max_num_seqs, device_type, channel, forced_outputs, communicator)
    except ValueError as error:
        raise ModelError(f"--forced-outputs: {error}") from None
