"""The forward pass of a step: from the rows of a plan to hidden states and logits on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

import ops
from executor.attention.base import AttentionGroup, HostRows
from executor.decode_steps import DecodeSteps, OneRow, fill_row, row_columns
from executor.deferred import Array
from executor.device.steps import ImmediateSteps, StepChannel
from executor.graphs import Program
from executor.input_batch import InputBatch, adapter_columns, adapter_rows
from executor.messages import I32, I64, SchedulerOutput
from executor.models.base import Model
from executor.registry import resolve
from executor.request_states import RequestStates
from executor.sampling.sampler import Sampler, SampleRows
from ops import AttentionMetadata
from ops.dispatch import KeptInputs

U8 = npt.NDArray[np.uint8]
MAX_LONE = 64
"""Inputs of prompts computed alone that are kept."""
Change = Callable[[InputBatch], InputBatch]


class Forward(Protocol):
    """Launches the forward passes of a model. Nothing here waits for the device."""

    def __init__(self, setup: ForwardSetup, states: RequestStates) -> None:
        """Allocates what the steps of the requests in ``states`` need."""

    @classmethod
    def memory(cls, setup: ForwardSetup) -> tuple[int, int]:
        """Memory besides the program's: bytes, and bytes per token of the longest sequence."""

    def apply(self, plan: SchedulerOutput) -> None:
        """Takes over a plan's changes to the blocks of requests."""

    def prepare(self, slots: I32, counts: I32, num_sampled: U8, *, follows: bool | None = None) -> InputBatch:
        """Uploads the inputs of a plan's rows.

        Args:
            slots: int32 [rows].
            counts: int32 [rows]: tokens to compute.
            num_sampled: uint8 [rows]: tokens to sample, the last ones of the row.
            follows: Whether the rows are those of the last step, and each computes the token that it got. None: of no
                step, nor will it be.
        """

    def run(self, batch: InputBatch) -> Sequence[Tensor]:
        """Computes hidden states [tokens, hidden_size], logits [samples, vocab_size] and auxiliary hidden states of the
        batch that was prepared last. They hold until the next call."""

    def run_eagerly(self, batch: InputBatch, change: Change, embed: Callable[[InputBatch], Tensor]) -> Sequence[Tensor]:
        """As ``run``, op by op and with the same bits, for what is no part of the program.

        Args:
            batch: The one that was prepared last.
            change: Makes the batch to compute of it, once its inputs are on the device.
            embed: Makes the input of the first layer.
        """

    def attach(self, sampler: Sampler) -> None:
        """Makes a sampler known, which may write its tokens where the next step reads them."""

    def store(self, rows: SampleRows, token_ids: Tensor) -> None:
        """Keeps the tokens of the samples, int64 [samples], where the next step finds them."""


def run_model(model: Model, batch: InputBatch, embeds: Tensor | None = None) -> tuple[Tensor, ...]:
    """Hidden states, logits and auxiliary hidden states of a batch, tensors or symbolic values.

    Args:
        model: The model.
        batch: The tokens.
        embeds: Input of the first layer; None: it is looked up, or that of the previous pipeline stage.
    """
    output = model.forward(batch, batch.hidden if embeds is None else embeds)
    logits = model.compute_logits(ops.gather_rows(output.hidden, batch.logits_rows), batch)
    return output.hidden, logits, *output.aux_hidden_states


@dataclass(frozen=True)
class LateSlots:
    """What the device keeps of each slot, where it makes drafts by itself: see ``ops/triton/drafts.py``."""

    newest: Tensor
    """int32 [slots]: position of the newest token."""
    tokens: Tensor
    """int32 [slots, 2 + drafts]: the token before it, itself, and drafts."""


@dataclass(frozen=True)
class ModelStep:
    """A step of the model, as a second one that follows it sees it."""

    batch: InputBatch
    slots: I32
    """int32 [rows]."""
    counts: I32
    """int32 [rows]."""
    ends: I64
    """int64 [rows]: tokens that are computed once it is done, at most."""
    rows: SampleRows
    hidden: Sequence[Tensor]
    """Hidden states of all tokens, then the auxiliary ones."""


@dataclass(frozen=True)
class ForwardSetup:
    """What a ``Forward`` is made of."""

    model: Model
    program: Program | None
    """The model's captured program; None: its ops are called one by one."""
    channel: StepChannel
    groups: Sequence[AttentionGroup]
    """The model's groups of attention layers, those with a KV cache first."""
    max_num_seqs: int
    max_tokens: int
    max_samples: int
    hidden: Tensor | None = None
    """[max_tokens, hidden_size]: where the hidden states of the previous pipeline stage come to; None: elsewhere, or
    there is none."""
    samples: bool = True
    """Whether a step's tokens are sampled here, and not by a later pipeline stage."""
    late: LateSlots | None = None
    """From where rows go on whose last tokens the host does not have; None: from the tokens that ``store`` keeps."""

    @property
    def has_adapters(self) -> bool:
        """Whether rows may have adapters."""
        assert self.program is not None
        return any(node.name == "adapted_linear" for node in self.program.nodes)

    @property
    def block_sizes(self) -> list[int]:
        """Tokens per block of each KV cache group."""
        return [group.block_size for group in self.groups if group.is_cached]


class UploadedForward:
    """Each step gets tensors of its own, in the sizes that it has."""

    def __init__(self, setup: ForwardSetup, states: RequestStates) -> None:
        self._model = setup.model
        self._program = setup.program
        self._channel = setup.channel
        self._groups = setup.groups
        self._states = states
        self._recent = setup.channel.recent_tokens(len(states.num_tokens))
        self._has_drafts_of_states = any(group.shape.max_drafts for group in setup.groups)
        self._shares_memory = isinstance(setup.channel, ImmediateSteps)
        self._may_keep = (
            self._shares_memory
            and all(group.is_cached for group in setup.groups)
            and not self._has_drafts_of_states
            and not setup.model.num_token_types
        )
        """Whether rows need nothing but tokens, positions and blocks, and perhaps an adapter."""
        self._decode: DecodeSteps | None = None
        """Inputs of the last step, if the next one may go on from them."""
        self._rows: dict[int, OneRow] = {}
        """Inputs of steps with one row, by the number of its tokens."""
        self._kept: KeptInputs | None = None
        """Those of the step that was prepared last, if its tensors stay."""
        computes_whole = bool(setup.groups) and not any(group.is_cached for group in setup.groups)
        self._numbers: I64 | None = np.arange(setup.max_tokens) if computes_whole and self._shares_memory else None
        """int64 [tokens]: 0, 1, ..., if a step's prompts are whole."""
        self._positions: I32 = np.arange(0 if self._numbers is None else setup.max_tokens, dtype=np.int32)
        self._lone: dict[tuple[int, int], tuple[InputBatch, KeptInputs]] = {}
        """By slot and number of tokens: the inputs of a step that computes one prompt. They are read where the host
        keeps them, so the next prompt of this size has the same."""

    @classmethod
    def memory(cls, setup: ForwardSetup) -> tuple[int, int]:
        return 0, RequestStates.position_bytes(setup.max_num_seqs, setup.block_sizes)

    @classmethod
    def step_bytes(cls, setup: ForwardSetup) -> int:
        """Memory of the largest step besides the program's."""
        return 0

    def apply(self, plan: SchedulerOutput) -> None:
        if plan.block_updates or plan.new_reqs:  # the host's tables have them
            self._decode = None

    def prepare(self, slots: I32, counts: I32, num_sampled: U8, *, follows: bool | None = None) -> InputBatch:
        if follows and self._decode is not None:
            self._decode.advance()
            return self._decode.batch
        self._decode = self._kept = None
        if len(slots) == 1 and not self._states.adapters[slots[0]]:
            if self._numbers is not None:
                return self._prepare_alone(int(slots[0]), counts, self._numbers)
            if follows is not None and self._may_keep and counts[0] == num_sampled[0] and not self._states.axes:
                return self._one_row(slots, int(counts[0]))
        columns = self._columns(slots, counts, num_sampled)
        batch = self._batch(columns, counts)
        if follows is not None and self._may_go_on(batch, counts, num_sampled):
            self._go_on(DecodeSteps(batch, columns, slots, self._states, self._groups))
        return batch

    def _prepare_alone(self, slot: int, counts: I32, numbers: I64) -> InputBatch:
        """The inputs of a step that computes one prompt: somebody waits for it."""
        count, states = int(counts[0]), self._states
        if states.second_segments[slot] < count or states.num_attended[slot] < count:
            return self._batch(self._alone(slot, count, numbers), counts)
        kept = self._lone.get((slot, count))
        if kept is None:
            if len(self._lone) >= MAX_LONE:
                self._lone.clear()
            batch = self._batch(self._alone(slot, count, numbers), counts)
            kept = self._lone[slot, count] = batch, KeptInputs(batch.step_inputs())
        batch, self._kept = kept
        batch.spans = batch.deepstack = None
        return batch

    def _go_on(self, decode: DecodeSteps) -> None:
        """The next step may go on from the inputs of this one."""
        self._decode, self._kept = decode, decode.inputs

    def _alone(self, slot: int, count: int, numbers: I64) -> dict[str, Array]:
        """The columns of such a step, made of what is there already."""
        states, positions = self._states, self._positions[:count]
        columns: dict[str, Array] = {
            "input_ids": states.token_ids[slot, :count],
            "positions": positions,
            "logits_rows": numbers[:0],
            "query_start_loc": np.array((0, count), np.int32),
            "seq_lens": np.array((min(count, int(states.num_attended[slot])),), np.int32),
        }
        if self._model.num_token_types:
            second = positions >= states.second_segments[slot]
            columns["token_types"] = (second & (self._model.num_token_types > 1)).astype(np.int32)
        for index, group in enumerate(self._groups):
            columns[f"block_table.{index}"] = self._positions[None, : -(-count // group.block_size)]
            columns[f"slot_mapping.{index}"] = numbers[:count]
        return columns

    def _one_row(self, slots: I32, count: int) -> InputBatch:
        """The step of one request that samples all of its tokens, in tensors that are there already: there may be less
        to compute than new ones take."""
        row, states = self._rows.get(count), self._states
        if row is not None:
            row.fill(int(slots[0]), states)
        else:
            columns = row_columns(count, [table.shape[1] for table in states.block_tables[: len(self._groups)]])
            fill_row(columns, int(slots[0]), states, self._groups)
            row = OneRow(self._batch(columns, np.array((count,), np.int32)), columns, self._groups)
            if not _is_plain(row.batch):
                return row.batch
            self._rows[count] = row
        self._kept = row.inputs
        if count == 1:
            self._go_on(DecodeSteps(row.batch, row.columns, slots, states, self._groups, row.inputs))
        return row.batch

    def _columns(self, slots: I32, counts: I32, num_sampled: U8) -> dict[str, Array]:
        """The columns of a step."""
        states = self._states
        ends = counts.cumsum(dtype=np.int64)
        query_start_loc = np.zeros(len(slots) + 1, np.int32)
        query_start_loc[1:] = ends
        computed = states.num_computed[slots]
        token_rows = np.arange(len(slots)).repeat(counts)
        token_slots = slots[token_rows]
        positions = ranges(computed, counts)
        columns: dict[str, Array] = {
            "input_ids": states.token_ids[token_slots, positions],
            "positions": states.rotary_positions(positions, token_slots),
            "logits_rows": ranges(ends - num_sampled, num_sampled),
            "query_start_loc": query_start_loc,
            "seq_lens": np.minimum(computed + counts, states.num_attended[slots]).astype(np.int32),
            **self._recent.columns(token_slots, positions, states.num_known + states.num_drafts),
        }
        if self._has_drafts_of_states:
            columns["num_replayed"] = states.num_replayed[slots]
            columns["num_drafts"] = np.maximum(num_sampled.astype(np.int32) - 1, 0)
        adapters = states.adapters[slots]
        if adapters.any():
            columns |= adapter_columns("row_adapters", adapters[token_rows])
            columns |= adapter_columns("sample_adapters", np.repeat(adapters, num_sampled))
        if self._model.num_token_types:
            second = positions >= states.second_segments[token_slots]
            columns["token_types"] = (second & (self._model.num_token_types > 1)).astype(np.int32)
        for index, group in enumerate(self._groups):
            is_cached = group.is_cached
            block_table = states.block_tables[index][slots] if is_cached else step_blocks(counts, group.block_size)
            blocks = block_table[token_rows, positions // group.block_size].astype(np.int64)
            columns[f"block_table.{index}"] = block_table
            columns[f"slot_mapping.{index}"] = blocks * group.block_size + positions % group.block_size
        return columns

    def _batch(self, columns: Mapping[str, Array], counts: I32) -> InputBatch:
        """Uploads the columns."""
        views = self._channel.upload(columns)
        tables = [columns[f"block_table.{index}"] for index in range(len(self._groups))]
        return InputBatch(
            input_ids=self._recent.input_ids(views),
            positions=views["positions"],
            attention=self._planned(views, [HostRows(counts, columns["seq_lens"], table) for table in tables]),
            logits_rows=views["logits_rows"],
            row_adapters=adapter_rows("row_adapters", views),
            sample_adapters=adapter_rows("sample_adapters", views),
            token_types=views.get("token_types"),
        )

    def _planned(self, views: Mapping[str, Tensor], rows: Sequence[HostRows]) -> list[AttentionMetadata]:
        """The metadata of each group, from what was uploaded and what the host knows."""
        return [
            group.plan(
                AttentionMetadata(
                    views["query_start_loc"],
                    views["seq_lens"],
                    views[f"block_table.{index}"],
                    views[f"slot_mapping.{index}"],
                    group.block_size,
                    num_replayed=views.get("num_replayed"),
                    num_drafts=views.get("num_drafts"),
                ),
                rows[index] if group.backend.needs_rows else None,
            )
            for index, group in enumerate(self._groups)
        ]

    def _may_go_on(self, batch: InputBatch, counts: I32, num_sampled: U8) -> bool:
        """Whether the inputs of a next step with the same rows follow from those of this one, see ``DecodeSteps``."""
        if not self._may_keep or self._states.axes or not _is_plain(batch):
            return False
        return len(counts) > 0 and int(counts.max()) == 1 and int(num_sampled.min()) == 1

    def run(self, batch: InputBatch) -> Sequence[Tensor]:
        if self._program is None:
            return run_model(self._model, batch)
        if self._kept is not None and batch.hidden is None:  # hidden states come anew with each step
            return self._program.replay(self._kept)
        return self._program.replay(batch.step_inputs())

    def run_eagerly(self, batch: InputBatch, change: Change, embed: Callable[[InputBatch], Tensor]) -> Sequence[Tensor]:
        batch = change(batch)
        return run_model(self._model, batch, embed(batch))

    def attach(self, sampler: Sampler) -> None:
        pass

    def store(self, rows: SampleRows, token_ids: Tensor) -> None:
        self._recent.store(rows.slots, rows.positions, token_ids)


REGISTRY = {
    "launched": "executor.launched_forward:LaunchedForward",
    "uploaded": "executor.forward:UploadedForward",
    "static": "executor.static_forward:StaticForward",
}


def _is_plain(batch: InputBatch) -> bool:
    """Whether a batch has nothing that was made for its step alone."""
    return all(type(each) is AttentionMetadata for each in batch.attention)


def forward_class(setup: ForwardSetup) -> type[Forward]:
    """The way to launch a model on a device."""
    name = "uploaded"
    if setup.program is not None and setup.channel.graphs is not None:
        name = "launched" if any(group.backend.needs_rows for group in setup.groups) else "static"
    chosen: type[Forward] = resolve(REGISTRY, name, "forward")
    return chosen


def step_blocks(counts: I32, block_size: int) -> I32:
    """Blocks for the K and V of one step, given to its rows in order: int32 [rows, blocks]."""
    most = -(-int(counts.max(initial=1)) // block_size)
    blocks: I32 = (first_blocks(counts, block_size)[:, None] + np.arange(most)).astype(np.int32)
    return blocks


def first_blocks(counts: I32, block_size: int) -> I64:
    """The first block of each row: int64 [rows]; see ``step_blocks``."""
    each = -(-counts.astype(np.int64) // block_size)
    firsts: I64 = each.cumsum() - each
    return firsts


def ranges(firsts: Array, counts: Array) -> I64:
    """Concatenated ranges, ``counts[i]`` consecutive integers from ``firsts[i]`` each: int64 [sum of counts]."""
    total = int(counts.sum(dtype=np.int64))
    if total == len(counts) and counts.all():
        return firsts.astype(np.int64)  # one each
    ends = counts.cumsum(dtype=np.int64)
    numbers: I64 = np.arange(total) + (firsts - ends + counts).repeat(counts)
    return numbers
