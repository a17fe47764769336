"""Drafts that a second model, or a head, makes on the device before the host knows the results of the step.

After each step, the device itself determines which drafts are accepted (``ops/triton/drafts.py``), and the second model
goes on from there: it computes the rows of the step once more, and then one draft after the other. The next step reads
them, and begins where the accepted ones end. The host plans with upper bounds, and learns the counts with the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from executor.config import SpeculativeConfig
from executor.deferred import Array, Deferred, Together
from executor.draft_runner import DraftModel
from executor.forward import ForwardSetup, LateSlots, ModelStep
from executor.input_batch import InputBatch
from executor.launched_forward import LaunchedForward
from executor.messages import I32, I64, NewRequest, row_offsets
from executor.request_states import RequestStates
from executor.sampling.base import Sampled, SampleRows
from executor.sampling.draft_sampler import DraftSampler
from executor.speculative.base import Drafts
from executor.speculative.draft_lengths import MAX_KINDS, DraftLengths
from executor.speculative.speculation import FIRST_LOGIT
from executor.speculative.step_costs import StepCosts
from ops.triton import drafts
from ops.triton.drafts import ModelRows, Samples

Views = dict[str, Tensor]


@dataclass(frozen=True)
class LateOutput:
    """What the device has found out about the rows of a step that sample."""

    accepted: I64
    """int64 [rows that sample]: accepted drafts."""
    counts: I64
    """int64 [rows that sample]: drafts for the next step."""
    token_ids: I32
    """int32 [sum of counts]: these drafts."""


class LateSpeculation:
    """The worker's speculation where the device makes drafts by itself. See ``Speculation``."""

    def __init__(
        self, config: SpeculativeConfig, drafter: LateDrafter, states: RequestStates, draft_share: float
    ) -> None:
        """
        Args:
            config: How to speculate.
            drafter: Makes the drafts.
            states: Of all requests.
            draft_share: What a draft takes, in times of a step of the large model: the bytes that each reads.
        """
        max_num_seqs = len(states.num_tokens)
        self._drafter = drafter
        self._states = states
        self._share = draft_share
        self._most = config.num_speculative_tokens
        self._limits = np.full(max_num_seqs, self._most, np.int64)
        """Maximum drafts by slot."""
        self._ends = np.zeros(max_num_seqs, np.int64)
        """Maximum length of prompt and output together, by slot."""
        self._lengths = DraftLengths(
            max_num_seqs,
            self._most,
            config.min_token_prob,
            is_adaptive=config.is_adaptive,
            first_logits=(FIRST_LOGIT,) * MAX_KINDS,
        )

    def add(self, request: NewRequest) -> None:
        """Registers a request that enters a slot."""
        self._drafter.add(request)
        self._lengths.add(request.slot)
        params = request.params
        if params is None:
            return
        own = params.num_speculative_tokens
        self._limits[request.slot] = self._most if own is None else min(own, self._most)
        self._ends[request.slot] = request.num_prompt_tokens + params.max_tokens

    def launch(self, step: ModelStep, sampled: Sampled) -> Deferred[LateOutput]:
        """Determines the accepted drafts of a step whose sampling is launched, and makes the next ones."""
        states, slots = self._states, step.rows.slots[_firsts(step.rows)]
        accepted = self._drafter.settle(step, sampled)
        known = states.num_tokens[slots]  # at most
        # The last token of a request is never verified: nothing follows it.
        room = np.minimum(states.token_ids.shape[1] - known, self._ends[slots] - 1 - known)
        room = np.minimum(room, self._drafter.room(slots))
        limits = np.maximum(np.minimum(self._limits[slots], room), 0)
        counts = self._lengths.affordable(slots, limits, _Shares(self._lengths.costs, self._share))
        drafts = self._drafter.propose(step, counts)
        states.num_drafts[slots] = counts
        parts = Together((accepted, drafts))

        def make(arrays: Sequence[Array]) -> LateOutput:
            found, token_ids = parts.make(arrays)
            return LateOutput(found, counts, token_ids)

        return Deferred(parts.tensors, make)

    def note_step(self, num_tokens: int, output: LateOutput, milliseconds: float) -> None:
        """Records the time of a step that sampled at each of its tokens, and of the drafts after it."""
        num_drafts = int(output.counts.max(initial=0))
        self._lengths.costs.add(num_tokens, milliseconds / (1 + self._share * max(1, num_drafts)))

    def note(self, rows: SampleRows, epochs: I64, output: LateOutput) -> Drafts:
        """Takes over the drafts of a step whose tokens have just been filled in.

        Args:
            rows: The sampled rows.
            epochs: int64 [samples]: the slots' epochs when the step began.
            output: Its drafts.

        Returns:
            The drafts of each row that samples.
        """
        states, firsts = self._states, _firsts(rows)
        slots, counts = rows.slots[firsts], output.counts
        is_current = states.epochs[slots] == epochs[firsts]
        places, offsets = row_offsets(counts)
        kinds = offsets.astype(np.int8)
        current = is_current[places]
        own = Drafts(counts[is_current], output.token_ids[current], kinds[current])
        numbers = slots[is_current].tolist()
        self._lengths.learn(numbers, states)
        self._lengths.choose(numbers, own, states)  # and so they are compared with what comes
        # A step that is under way already has them on the device, and needs no others.
        rests = is_current & (states.num_known[slots] == states.num_tokens[slots])
        if rests.any():
            states.set_drafts(slots[rests], counts[rests], output.token_ids[rests[places]])
        return Drafts(counts, output.token_ids)


class _Shares:
    """What drafts take. See ``StepCosts``."""

    def __init__(self, costs: StepCosts, share: float) -> None:
        self._costs = costs
        self._share = share

    def milliseconds(self, num_tokens: Sequence[int]) -> list[float]:
        """Times of drafts of so many slots each."""
        return [self._share * time for time in self._costs.milliseconds(num_tokens)]


class LateDrafter:
    """Settles the steps of a model on the device, and makes the next drafts."""

    def __init__(
        self, config: SpeculativeConfig, slots: LateSlots, draft: DraftModel, setup: ForwardSetup, states: RequestStates
    ) -> None:
        """
        Args:
            config: How to speculate.
            slots: What the device keeps; the model's steps go on from it.
            draft: The second model, or a head.
            setup: Of its forward passes.
            states: Of all requests.
        """
        self._late = slots
        self._draft = draft
        self._channel = setup.channel
        self._states = states
        self._shift = int(draft.has_head)
        self._max_len = min(draft.loaded.max_model_len, states.token_ids.shape[1] - 1)
        if draft.has_head:
            self._max_len = states.token_ids.shape[1] - 1
        self._forward = _DraftForward(setup, states, slots, self._shift)
        self._sampler = DraftSampler(
            config.draft_sample_method, len(states.num_tokens), slots.tokens.device.type, setup.channel
        )
        self._hidden: Tensor | None = None
        """From where a head goes on, [slots, num_features]."""
        self._is_behind = np.zeros(len(states.num_tokens), np.bool_)
        """Slots whose tokens it has not computed, as they are more than it can."""

    def add(self, request: NewRequest) -> None:
        """Registers a request that enters a slot."""
        self._sampler.add(request)
        self._is_behind[request.slot] = False

    def room(self, slots: I32) -> I64:
        """Most drafts for slots: int64 [n]."""
        room: I64 = np.where(self._is_behind[slots], 0, self._max_len - self._states.num_tokens[slots])
        return room

    def settle(self, step: ModelStep, sampled: Sampled) -> Deferred[I64]:
        """Determines which drafts are accepted."""
        rows = step.rows
        if not len(rows):
            return Deferred.known(np.empty(0, np.int64))
        firsts = _firsts(rows)
        counts = np.diff(firsts, append=len(rows))
        columns = {"firsts": firsts.astype(np.int32), "counts": counts.astype(np.int32), "slots": rows.slots[firsts]}
        views = self._channel.upload({**columns, "accepted": np.zeros(len(firsts), np.int32)})
        assert sampled.status is not None
        drafts.settle(
            Samples(views["firsts"], views["counts"], views["slots"]),
            step.batch.logits_rows,
            step.batch.input_ids,
            step.batch.positions,
            (sampled.token_ids, sampled.status),
            self._late.newest,
            self._late.tokens,
            views["accepted"],
        )
        return Deferred((views["accepted"],), lambda arrays: arrays[0].astype(np.int64))

    def propose(self, step: ModelStep, counts: I64) -> Deferred[I32]:
        """Makes drafts.

        Args:
            step: The step, which is settled.
            counts: int64 [rows that sample]: drafts of each.

        Returns:
            int32 [sum of counts].
        """
        samples = step.rows.slots[_firsts(step.rows)]
        goes_on = self._follow(step, samples)
        most = int(counts.max(initial=0))
        if goes_on is None or not most:
            return Deferred.known(np.empty(0, np.int32))
        batch, rows = None, np.flatnonzero(counts > 0)
        for index in range(1, most):
            going = np.flatnonzero(counts > index)
            if batch is None or len(going) < len(rows):
                rows, batch = going, self._forward.alone(samples[going])
            self._next(batch, samples[rows], index)
        slots = self._channel.upload({"": samples.astype(np.int64)})[""]
        found = self._late.tokens[slots, 2 : 2 + most]

        def make(arrays: Sequence[Array]) -> I32:
            taken: I32 = arrays[0][np.arange(most) < counts[:, None]]
            return taken

        return Deferred((found,), make)

    def _follow(self, step: ModelStep, samples: I32) -> InputBatch | None:
        """Computes what the model has computed; the first drafts of slots that have sampled follow."""
        has_sampled = np.isin(step.slots, samples)
        counts = step.counts + (has_sampled & (self._shift == 0))
        self._is_behind[step.slots] |= step.ends - step.counts + counts > self._max_len
        rows = np.flatnonzero(~self._is_behind[step.slots])
        if not len(rows):
            return None
        batch = self._forward.shadow(step, rows, counts[rows].astype(np.int32), has_sampled[rows])
        hidden: list[Tensor] = []
        if self._shift:
            model_ends = step.counts.cumsum(dtype=np.int64)
            if len(rows) < len(step.slots):
                places = np.concatenate(
                    [np.arange(model_ends[row] - step.counts[row], model_ends[row]) for row in rows]
                )
                own = self._channel.upload({"": places})[""]
                hidden = [each[own] for each in step.hidden]
            else:
                hidden = list(step.hidden)
        self._compute(batch, step.slots[rows][has_sampled[rows]], 0, hidden)
        return batch

    def _next(self, batch: InputBatch, slots: I32, index: int) -> None:
        """Computes a draft, and so the one behind it."""
        self._forward.advance(batch, index)
        self._compute(batch, slots, index)

    def _compute(self, batch: InputBatch, slots: I32, index: int, hidden: Sequence[Tensor] = ()) -> None:
        """Runs the model, and keeps what it draws as drafts number ``index`` of these slots, one per logits row.

        Args:
            batch: The rows.
            slots: int32 [rows with logits].
            index: Of the draft.
            hidden: What the large model has computed in these rows; empty: a head goes on by itself.
        """
        head = self._draft.head if self._shift else None
        own = self._channel.upload({"": slots.astype(np.int64)})[""] if len(slots) else None
        if head is not None:
            if hidden:
                previous = head.combine_hidden_states(hidden, batch)
            else:
                assert self._hidden is not None and own is not None
                previous = self._hidden[own]
            batch = replace(batch, hidden=previous)
        states, logits = self._forward.run(batch)[:2]
        if own is None:
            return
        positions = batch.positions[batch.logits_rows].long() + (1 + self._shift)
        most = self._states.num_tokens[slots] + index
        drawn = self._sampler.sample(logits, slots, most, self._states, positions)
        if head is not None:
            drawn = head.target_ids(drawn)
            if self._hidden is None:
                self._hidden = states.new_zeros((len(self._states.num_tokens), head.num_features))
            self._hidden[own] = states[batch.logits_rows]
        self._late.tokens[own, 2 + index] = drawn.int()


def _firsts(rows: SampleRows) -> I64:
    """The first sample of each row that has some: int64 [rows that sample]."""
    firsts: I64 = np.arange(len(rows)) if rows.offsets is None else np.flatnonzero(rows.offsets == 0)
    return firsts


class _DraftForward(LaunchedForward):
    """Forward passes of a second model in rows of which the host does not know where they are."""

    def __init__(self, setup: ForwardSetup, states: RequestStates, late: LateSlots, shift: int) -> None:
        super().__init__(setup, states)
        self._late = late
        self._shift = shift
        self._tables = states.block_tables[-len(setup.groups) :]
        self._views: Views = {}

    def shadow(self, step: ModelStep, rows: I64, counts: I32, has_sampled: Array) -> InputBatch:
        """The rows of a step of the large model.

        Args:
            step: The step.
            rows: int64 [rows]: those of the step.
            counts: int32 [rows]: tokens.
            has_sampled: bool [rows].
        """
        slots, ends = step.slots[rows], counts.cumsum(dtype=np.int64)
        input_ids = np.zeros(int(ends[-1]), np.int32)
        # Behind a part of a prompt, a head reads its next token.
        width = self._states.token_ids.shape[1]
        input_ids[ends - 1] = self._states.token_ids[slots, np.minimum(step.ends[rows], width - 1)]
        model_ends = step.counts.cumsum(dtype=np.int64)[rows]
        bounds = np.stack((model_ends - step.counts[rows], model_ends), 1).astype(np.int32)
        views = self._upload(slots, counts, input_ids, has_sampled, bounds)
        drafts.shadow(
            views["sampled"],
            views["query_start_loc"],
            views["last"],
            self._late.newest,
            self._late.tokens,
            ModelRows(views["bounds"], step.batch.input_ids, step.batch.positions),
            views["input_ids"],
            views["positions"],
            views["seq_lens"],
            views["logits_rows"],
            shift=self._shift,
        )
        return self._mapped(views)

    def alone(self, slots: I32) -> InputBatch:
        """Rows of one token each, of these slots; ``advance`` says which."""
        ones = np.ones(len(slots), np.int32)
        self._views = self._upload(slots, ones, np.zeros(len(slots), np.int32), ones > 0)
        return InputBatch(self._views["input_ids"], self._views["positions"], [], self._views["logits_rows"])

    def advance(self, batch: InputBatch, index: int) -> None:
        """Makes the rows of ``alone`` those that compute the draft before the one of this index."""
        views = self._views
        drafts.go_on(
            views["slots"],
            views["query_start_loc"],
            self._late.newest,
            self._late.tokens,
            views["input_ids"],
            views["positions"],
            views["seq_lens"],
            offset=index - self._shift,
            shift=self._shift,
        )
        batch.attention = self._mapped(views).attention

    def _upload(self, slots: I32, counts: I32, input_ids: I32, has_sampled: Array, bounds: I32 | None = None) -> Views:
        starts = np.zeros(len(slots) + 1, np.int32)
        starts[1:] = counts.cumsum(dtype=np.int64)
        columns: dict[str, Array] = {
            "input_ids": input_ids,
            "positions": np.zeros(len(input_ids), np.int32),
            "seq_lens": np.zeros(len(slots), np.int32),
            "query_start_loc": starts,
            "slots": slots,
            "sampled": np.where(has_sampled, slots, np.int32(-1)),
            "last": np.cumsum(has_sampled, dtype=np.int32) - 1,
            "logits_rows": np.arange(int(np.count_nonzero(has_sampled))),
        }
        if bounds is not None:
            columns["bounds"] = bounds
        for index, table in enumerate(self._tables):
            columns[f"block_table.{index}"] = table[slots]
            columns[f"slot_mapping.{index}"] = np.zeros(len(input_ids), np.int64)
        return dict(self._channel.upload(columns))

    def _mapped(self, views: Views) -> InputBatch:
        """The batch, once its positions are there."""
        for index, group in enumerate(self._groups):
            drafts.map_slots(
                views["slots"],
                views["query_start_loc"],
                views["positions"],
                views[f"block_table.{index}"],
                None,
                group.block_size,
                views[f"slot_mapping.{index}"],
            )
        return InputBatch(views["input_ids"], views["positions"], self._planned(views, []), views["logits_rows"])
