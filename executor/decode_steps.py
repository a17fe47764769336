"""Inputs of decode steps on a device that shares the host's memory.

Only numbers change from one step of the same requests to the next, so they are changed in place, and the model reads
the tensors of the first step again. So it is with steps of one request that have as many tokens, drafts included.
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
        states: RequestStates,
        groups: Sequence[AttentionGroup],
        inputs: KeptInputs | None = None,
    ) -> None:
        """
        Args:
            batch: The inputs of the first step; they share memory with ``columns``.
            columns: As uploaded.
            slots: int32 [rows].
            states: Has the tokens and blocks of the following steps.
            groups: The model's groups of attention layers.
            inputs: Those of the batch, if they were kept before.
        """
        self.batch = batch
        self.inputs = KeptInputs(batch.step_inputs()) if inputs is None else inputs
        self._input_ids, self._positions, self._seq_lens = (
            columns[name] for name in ("input_ids", "positions", "seq_lens")
        )
        self._token_ids = states.token_ids.reshape(-1)
        self._places: I64 = self._positions + slots.astype(np.int64) * states.token_ids.shape[1]
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


class OneRow:
    """Steps of one request, each with as many tokens as the others, which are all sampled."""

    def __init__(self, batch: InputBatch, columns: Mapping[str, Array], groups: Sequence[AttentionGroup]) -> None:
        """
        Args:
            batch: The inputs of the first step; they share memory with ``columns``.
            columns: As uploaded.
            groups: The model's groups of attention layers.
        """
        self.batch = batch
        self.columns = columns
        self.inputs = KeptInputs(batch.step_inputs())
        self._groups = groups

    def fill(self, slot: int, states: RequestStates) -> None:
        """Makes them those of the next step, which may be that of another slot."""
        self.batch.spans = self.batch.deepstack = None
        fill_row(self.columns, slot, states, self._groups)


def row_columns(count: int, widths: Sequence[int]) -> dict[str, Array]:
    """The columns of a step with one row that samples all of its tokens, without what ``fill_row`` fills in.

    Args:
        count: Tokens of the row.
        widths: Of the block table of each group of attention layers.
    """
    columns: dict[str, Array] = {
        "input_ids": np.empty(count, np.int32),
        "positions": np.empty(count, np.int32),
        "logits_rows": np.arange(count),
        "query_start_loc": np.array((0, count), np.int32),
        "seq_lens": np.empty(1, np.int32),
    }
    for index, width in enumerate(widths):
        columns[f"block_table.{index}"] = np.empty((1, width), np.int32)
        columns[f"slot_mapping.{index}"] = np.empty(count, np.int64)
    return columns


def fill_row(columns: Mapping[str, Array], slot: int, states: RequestStates, groups: Sequence[AttentionGroup]) -> None:
    """Fills in what depends on a step's only request.

    Args:
        columns: Of the step, with an input id for each of its tokens.
        slot: The slot of the request.
        states: Has its tokens and blocks.
        groups: The model's groups of attention layers, all of them with a KV cache.
    """
    begin = int(states.num_computed[slot])
    end = begin + len(columns["input_ids"])
    columns["input_ids"][:] = states.token_ids[slot, begin:end]
    positions = np.arange(begin, end)
    columns["positions"][:] = positions
    columns["seq_lens"][0] = min(end, int(states.num_attended[slot]))
    for index, group in enumerate(groups):
        block_table, slot_mapping = columns[f"block_table.{index}"], columns[f"slot_mapping.{index}"]
        block_table[0] = states.block_tables[index][slot]
        first, size = begin // group.block_size, group.block_size
        if (end - 1) // size == first:
            slot_mapping[:] = positions + (int(block_table[0, first]) - first) * size
        else:
            slot_mapping[:] = block_table[0, positions // size].astype(np.int64) * size + positions % size
