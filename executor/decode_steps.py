"""Inputs of decode steps of the same requests on a device that shares the host's memory.

Only numbers change from one such step to the next, so they are changed in place, and the model reads the tensors of the
first step again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from executor.attention.base import AttentionGroup
from executor.deferred import Array
from executor.input_batch import InputBatch
from executor.messages import I32, I64
from executor.request_states import RequestStates
from ops.dispatch import KeptInputs


class DecodeSteps:
    """Steps that compute one token of each row, one position after the other."""

    def __init__(
        self,
        batch: InputBatch,
        columns: Mapping[str, Array],
        slots: I32,
        positions: I64,
        states: RequestStates,
        groups: Sequence[AttentionGroup],
    ) -> None:
        """
        Args:
            batch: The inputs of the first step; they share memory with ``columns``.
            columns: As uploaded.
            slots: int32 [rows].
            positions: int64 [rows]: of the first step's tokens.
            states: Has the tokens and blocks of the following steps.
            groups: The model's groups of attention layers.
        """
        self.batch = batch
        self.inputs = KeptInputs(batch.step_inputs())
        self._input_ids, self._positions, self._seq_lens = (
            columns[name] for name in ("input_ids", "positions", "seq_lens")
        )
        self._token_ids = states.token_ids.reshape(-1)
        self._places: I64 = positions + slots.astype(np.int64) * states.token_ids.shape[1]
        """int64 [rows]: of the tokens in ``_token_ids``."""
        self._blocks = [
            (columns[f"slot_mapping.{index}"], columns[f"block_table.{index}"], group.block_size)
            for index, group in enumerate(groups)
        ]

    def advance(self) -> None:
        """Goes on to the next step, whose tokens are known and whose blocks are those of the first step's table."""
        self.batch.spans = self.batch.deepstack = None
        self._places += 1
        self._positions += 1
        self._seq_lens += 1
        self._token_ids.take(self._places, out=self._input_ids, mode="clip")
        for slot_mapping, block_table, block_size in self._blocks:
            slot_mapping += 1
            offsets = self._positions % block_size
            if not offsets.all():  # some row begins a block
                rows = np.arange(len(offsets))
                blocks = block_table[rows, self._positions // block_size].astype(np.int64)
                slot_mapping[:] = blocks * block_size + offsets
