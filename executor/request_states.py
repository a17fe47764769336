"""A worker's state of each running request: arrays indexed by slot.

Rows are written only from plans and from the step's own tokens, so preemption, restart and slot reuse need no backup or
reordering. Counts advance when a step begins; its tokens are filled in when its results arrive, on some devices after
later steps have begun.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from executor.messages import (
    I32,
    I64,
    OUTPUT_SNAPSHOT_TOKENS,
    NewRequest,
    ResolvedParams,
    SchedulerOutput,
    i32,
    row_offsets,
)


class RequestStates:
    """Tokens and lengths by slot, and the block tables of each KV cache group."""

    tokens_of_drafts = OUTPUT_SNAPSHOT_TOKENS
    """Multiples of it are passed by no drafts, if there are states."""

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_sizes: list[int], *, has_states: bool = False
    ) -> None:
        """Creates the arrays, without requests.

        Args:
            max_num_seqs: Number of slots.
            max_model_len: Longest sequence.
            block_sizes: Tokens per block of each KV cache group.
            has_states: Whether some group keeps states.
        """
        self.token_ids: I32 = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        """int32 [slots, positions]: known tokens of prompt and output."""
        self.num_tokens = np.zeros(max_num_seqs, np.int64)
        """Number of tokens in prompt and output, including those of steps in flight."""
        self.num_known = np.zeros(max_num_seqs, np.int64)
        """Number of tokens in the table; the others are still on the device."""
        self.num_drafts = np.zeros(max_num_seqs, np.int64)
        """Number of drafts of the next tokens, stored in the table after the known tokens."""
        self.num_verifying = np.zeros(max_num_seqs, np.int32)
        """Number of steps in flight that verify drafts: the counts may be too high."""
        self.num_computed = np.zeros(max_num_seqs, np.int64)
        """Number of tokens whose K and V are in the cache."""
        self.num_replayed: I32 = np.zeros(max_num_seqs, np.int32)
        """Number of the last computed tokens that states leave out: accepted drafts."""
        self.num_prompt = np.zeros(max_num_seqs, np.int64)
        self.epochs = np.zeros(max_num_seqs, np.int64)
        """Number of requests that have used the slot: results of an earlier one must not reach its successor."""
        self.second_segments = np.zeros(max_num_seqs, np.int64)
        """Position at which tokens of type 1 begin; beyond every prompt if there are none."""
        self.num_attended = np.zeros(max_num_seqs, np.int64)
        """Number of leading tokens to which others attend; beyond every prompt if they attend to all."""
        self.adapters: I32 = np.zeros(max_num_seqs, np.int32)
        """Id of each request's adapter; 0: none."""
        self.params: list[ResolvedParams | None] = [None] * max_num_seqs
        self.reports_prompt = np.zeros(max_num_seqs, np.bool_)
        """Whether the request reports prompt log probabilities."""
        self.axes: dict[int, I32] = {}
        """Positions on several axes, int32 [axes, prompt tokens], of prompts with images, by slot."""
        self.num_reporting = 0
        """Number of slots that do."""
        self.block_tables: list[I32] = [
            np.zeros((max_num_seqs, -(-max_model_len // size)), np.int32) for size in block_sizes
        ]
        """int32 [slots, blocks] per group. Entries before the window are stale; nothing reads those blocks."""
        self._has_states = has_states

    @staticmethod
    def position_bytes(max_num_seqs: int, block_sizes: list[int]) -> int:
        """Bytes of the tables per token of the longest sequence."""
        return max_num_seqs * 4 + sum(-(-max_num_seqs * 4 // size) for size in block_sizes)

    def apply(self, plan: SchedulerOutput) -> None:
        """Applies a plan's changes to requests and their blocks."""
        for slot in i32(plan.finished_slots).tolist() if plan.finished_slots else ():
            self._set_params(slot, None)
            self.axes.pop(slot, None)
        for request in plan.new_reqs:
            self._add(request)
        for table, column in zip(self.block_tables, plan.block_updates, strict=False):
            if column:
                updates = i32(column).reshape(-1, 3)
                table[updates[:, 0], updates[:, 1]] = updates[:, 2]

    def _add(self, request: NewRequest) -> None:
        slot = request.slot
        tokens = i32(request.token_ids)
        self.token_ids[slot, : len(tokens)] = tokens
        self.num_tokens[slot] = self.num_known[slot] = len(tokens)
        self.num_drafts[slot] = 0
        self.num_verifying[slot] = 0
        self.epochs[slot] += 1
        self.num_computed[slot] = request.num_computed_tokens
        self.num_replayed[slot] = 0
        self.num_prompt[slot] = request.num_prompt_tokens
        self.adapters[slot] = request.lora_id
        pooling = request.pooling_params
        self.second_segments[slot] = (0 if pooling is None else pooling.second_segment) or len(self.token_ids[slot])
        self.num_attended[slot] = (0 if pooling is None else pooling.num_attended) or len(self.token_ids[slot])
        self._set_params(slot, request.params)
        self.axes.pop(slot, None)
        offsets = request.block_offsets or (0,) * len(self.block_tables)
        for table, offset, column in zip(self.block_tables, offsets, request.block_ids, strict=True):
            blocks = i32(column)
            table[slot, offset : offset + len(blocks)] = blocks

    def set_axes(self, slot: int, table: I32) -> None:
        """Gives a prompt positions on several axes: int32 [axes, prompt tokens]. The output goes on after the last."""
        self.axes[slot] = table

    def rotary_positions(self, positions: I64, slots: I32) -> I32:
        """The positions by which a step's tokens are rotated.

        Args:
            positions: int64 [tokens]: the tokens' places in their requests.
            slots: int32 [tokens].

        Returns:
            int32 [tokens]; [axes, tokens] if axes differ.
        """
        result: I32 = positions.astype(np.int32)
        if not self.axes:
            return result
        wide: I32 = np.broadcast_to(result, (3, len(result))).copy()
        for slot in np.unique(slots).tolist():
            table = self.axes.get(slot)
            if table is not None:
                rows = np.flatnonzero(slots == slot)
                own = positions[rows]
                end = table.shape[1]
                shift = int(table.max()) + 1 - end
                wide[:, rows] = np.where(own < end, table[:, np.minimum(own, end - 1)], own + shift)
        if not (wide != wide[:1]).any():
            wide = wide[0].copy()
        return wide

    def _set_params(self, slot: int, params: ResolvedParams | None) -> None:
        reports = params is not None and params.prompt_logprobs is not None
        self.params[slot] = params
        self.num_reporting += reports - int(self.reports_prompt[slot])
        self.reports_prompt[slot] = reports

    def set_counts(self, places: npt.NDArray[np.integer], num_computed: I64, num_tokens: I64) -> None:
        """Sets the counts of slots, each named once, when a step begins: int64 each.

        Args:
            places: The slots.
            num_computed: Tokens whose K and V are computed after the step.
            num_tokens: Tokens of the request if all drafts are accepted.
        """
        self.num_computed[places] = num_computed
        self.num_tokens[places] = num_tokens
        self.num_replayed[places] = 0
        # The step verifies them, or they are void: the token whose place the first one has may stay on the device while
        # the next steps are launched.
        self.num_drafts[places] = 0

    def fill(self, slots: I32, epochs: I64, positions: I64, tokens: I64) -> None:
        """Fills in the tokens of a step. Drops those of requests that have left their slots.

        Args:
            slots: int32 [samples]; a slot may occur several times, with ascending positions.
            epochs: int64 [samples]: the slots' epochs when the step began.
            positions: int64 [samples]: positions of the tokens in the sequence.
            tokens: int64 [samples].
        """
        is_current = self.epochs[slots] == epochs
        if not is_current.all():
            slots, positions, tokens = slots[is_current], positions[is_current], tokens[is_current]
        self.token_ids[slots, positions] = tokens
        self.num_known[slots] = positions + 1

    def retract(self, slots: I32, epochs: I64, counts: I64, accepted: I64) -> None:
        """Takes back the counts that the step added for rejected drafts, once it has verified them.

        Args:
            slots: int32 [n], each at most once.
            epochs: int64 [n]: the slots' epochs when the step began.
            counts: int64 [n]: rejected drafts.
            accepted: int64 [n]: the others.
        """
        is_current = self.epochs[slots] == epochs
        slots, counts = slots[is_current], counts[is_current]
        self.num_computed[slots] -= counts
        self.num_tokens[slots] -= counts
        self.num_verifying[slots] -= 1
        self.num_replayed[slots] = accepted[is_current]

    def draft_room(self, slots: I32) -> I64:
        """Most drafts that may follow the known tokens of slots: int64 [n].

        The memory of a state keeps the inputs of drafts behind the token that the state ends with. So drafts do not
        pass the place where a snapshot is due, and leave the last token before it to a step that knows it.
        """
        known = self.num_known[slots]
        room: I64 = self.token_ids.shape[1] - known
        if self._has_states:
            offsets = known % self.tokens_of_drafts
            room = np.minimum(room, np.where(offsets > 0, self.tokens_of_drafts - 1 - offsets, 0))
        return room

    def set_drafts(self, slots: I32, counts: I64, token_ids: I32) -> None:
        """Replaces the drafts of slots whose tokens are all known.

        Args:
            slots: int32 [n], each at most once.
            counts: int64 [n]: drafts per slot.
            token_ids: int32 [sum of counts], concatenated slot by slot.
        """
        if len(slots) == 1:  # the usual case
            begin = self.num_known[slots[0]]
            self.token_ids[slots[0], begin : begin + len(token_ids)] = token_ids
        else:
            rows, offsets = row_offsets(counts)
            self.token_ids[slots[rows], self.num_known[slots[rows]] + offsets] = token_ids
        self.num_drafts[slots] = counts
