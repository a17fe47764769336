"""Forward passes on memory that never moves, as graphs need it.

A step is padded to one of a few sizes (``GraphSizes``). Its inputs go up in one copy, to where those of the last step
were; the device's order makes that safe. What changes seldom stays on the device by slot: blocks of requests, and the
tokens that the host has not seen. A size's launches are recorded once. They run one by one the first time, and as a
graph from then on; larger steps run one by one.

Padding computes nothing that counts: a padded token writes no K and V and belongs to no request.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from executor.attention.base import AttentionGroup
from executor.deferred import Array
from executor.device.steps import ALIGNMENT, RECENT_TOKENS, as_dtype, places_of
from executor.forward import U8, Change, ForwardSetup, first_blocks, ranges, run_model
from executor.graph_sizes import SAMPLES, GraphSizes, Size
from executor.input_batch import InputBatch, adapter_rows, put_adapters
from executor.launched_forward import rehearse, take_rehearsed
from executor.messages import I32, I64, SchedulerOutput, i32
from executor.request_states import RequestStates
from executor.sampling.sampler import Sampler, SampleRows
from ops import AdapterTable, AttentionMetadata
from ops.dispatch import Node
from ops.triton import drafts, prepare
from ops.triton.launch import Launch, recorded, submit
from ops.triton.program import TritonProgram


@dataclass(frozen=True)
class _Column:
    """A part of the block of a step's inputs."""

    length: int
    dtype: type[np.generic]
    padding: int


def _columns(size: Size, setup: ForwardSetup) -> dict[str, _Column]:
    """The columns of a step, in the order of how often they change while the same requests decode."""
    max_samples, cached = _sizes(setup).max_samples, [group.is_cached for group in setup.groups]
    columns = {
        "places": _Column(size.tokens, np.int64, -1),
        "stored": _Column(max_samples, np.int64, -1),
        "positions": _Column(size.tokens, np.int32, 0),
        "seq_lens": _Column(size.rows, np.int32, 0),
    }
    columns |= {f"slot_mapping.{group}": _Column(size.tokens, np.int64, -1) for group in range(len(cached))}
    for group in range(sum(cached)):
        columns[f"updates.{group}"] = _Column(size.updates, np.int64, -1)
        columns[f"blocks.{group}"] = _Column(size.updates, np.int32, 0)
    for group in range(sum(cached), len(cached)):
        columns[f"first_blocks.{group}"] = _Column(size.rows, np.int32, 0)
    columns |= {
        "input_ids": _Column(size.tokens, np.int32, 0),
        "query_start_loc": _Column(size.rows + 1, np.int32, 0),
        "row_slots": _Column(size.rows, np.int32, 0),
        "logits_rows": _Column(size.samples, np.int64, 0),
    }
    if setup.model.num_token_types:
        columns["token_types"] = _Column(size.tokens, np.int32, 0)
    if setup.late is not None:
        columns["late_slots"] = _Column(size.rows, np.int32, -1)
    for name, count in (("row_adapters", size.tokens), ("sample_adapters", size.samples)) if size.has_adapters else ():
        columns |= {f"{name}.rows": _Column(count, np.int64, 0), f"{name}.adapters": _Column(count, np.int32, 0)}
        columns |= {f"{name}.starts": _Column(count + 1, np.int32, 0), f"{name}.of_row": _Column(count, np.int32, 0)}
    return columns


def _block_bytes(columns: Mapping[str, _Column]) -> int:
    return sum(
        -(-column.length * np.dtype(column.dtype).itemsize // ALIGNMENT) * ALIGNMENT for column in columns.values()
    )


@dataclass
class _Frame:
    """A size, with the places of its inputs on both sides."""

    size: Size
    padding: npt.NDArray[np.uint8]
    host: npt.NDArray[np.uint8]
    often: npt.NDArray[np.uint8]
    """The start of ``host``, with what changes in each decode step of the same requests."""
    columns: dict[str, Array]
    """Views of ``host``."""
    views: dict[str, Tensor]
    """The same on the device."""
    batch: InputBatch | None = None
    first_launches: Sequence[Launch] = ()
    """Those that complete the inputs."""
    launches: Sequence[Launch] = ()
    """All of them."""
    outputs: Sequence[Tensor] = ()
    num_tokens: int = 0
    """Those of the current step."""
    num_samples: int = 0
    shown: Sequence[Tensor] = ()
    """Outputs without padding."""
    graph: Callable[[], None] | None = None


@dataclass
class _Updates:
    """Changes of a group's block table that the device does not have yet."""

    places: list[I64] = field(default_factory=list)
    blocks: list[I32] = field(default_factory=list)

    def add(self, places: I64, blocks: I32) -> None:
        if len(places):
            self.places.append(places)
            self.blocks.append(blocks)

    def take(self) -> tuple[I64, I32] | None:
        """All of them, the last one of each place."""
        if not self.places:
            return None
        places, blocks = self.places[0], self.blocks[0]
        if len(self.places) > 1:
            places, blocks = np.concatenate(self.places), np.concatenate(self.blocks)
            places, last = np.unique(places[::-1], return_index=True)
            blocks = blocks[::-1][last]
        self.places.clear()
        self.blocks.clear()
        return places, blocks


class _Decoding:
    """Where the inputs are that change in decode steps of the same requests."""

    def __init__(
        self, frame: _Frame, count: int, tables: Sequence[npt.NDArray[np.int32]], groups: Sequence[AttentionGroup]
    ) -> None:
        columns = frame.columns
        self.tokens_at, self.stored = columns["places"][:count], columns["stored"][:count]
        self.positions, self.seq_lens = columns["positions"][:count], columns["seq_lens"][:count]
        self.groups = [
            _DecodingGroup(
                columns[f"slot_mapping.{index}"][:count], columns[f"updates.{index}"], table, group.block_size
            )
            for index, (table, group) in enumerate(zip(tables, groups, strict=True))
        ]


@dataclass
class _DecodingGroup:
    mapping: Array
    updates: Array
    table: npt.NDArray[np.int32]
    block_size: int
    has_updates: bool = True
    """Whether the last step had updates."""


def _sizes(setup: ForwardSetup) -> GraphSizes:
    is_encoder = not setup.block_sizes and len(setup.groups) > 0  # and samples nothing
    return GraphSizes(
        setup.max_num_seqs, setup.max_tokens, min(setup.max_samples, SAMPLES[0] if is_encoder else 1 << 30)
    )


def _largest_block(setup: ForwardSetup) -> int:
    """Bytes of the inputs of the largest step."""
    return _block_bytes(_columns(replace(_sizes(setup).largest, has_adapters=setup.has_adapters), setup))


def _step_widths(setup: ForwardSetup) -> list[int]:
    """Blocks that a request may need in one step, of each group without a cache."""
    return [-(-setup.max_tokens // group.block_size) for group in setup.groups if not group.is_cached]


def _rehearsed(setup: ForwardSetup, sizes: GraphSizes) -> int:
    """Bytes of what kernels share, and of the work lists of attention, in steps of all sizes."""
    assert setup.program is not None and isinstance(setup.program.runner, TritonProgram)
    num_bytes = 0
    for size in sizes.all:
        lists = rehearse(setup, size.tokens, size.rows, size.samples)
        num_bytes += lists * (1 + len(SAMPLES) if size.is_padded else 1) * (1 + setup.has_adapters)
    return num_bytes + take_rehearsed()


def adapter_tables(nodes: Sequence[Node]) -> list[AdapterTable]:
    """Those of a program's layers, each once."""
    found = (arg for node in nodes for arg in (*node.args, *node.kwargs.values()))
    return list({id(arg): arg for arg in found if isinstance(arg, AdapterTable)}.values())


class StaticForward:
    """See ``executor.forward.Forward``."""

    def __init__(self, setup: ForwardSetup, states: RequestStates) -> None:
        """Allocates the inputs, and captures the graphs of small steps."""
        assert setup.program is not None and isinstance(setup.program.runner, TritonProgram)
        assert setup.channel.graphs is not None
        self._runner = setup.program.runner
        self._channel = setup.channel
        self._graphs = graphs = setup.channel.graphs
        self._groups = setup.groups
        self._states = states
        self._sizes = sizes = _sizes(setup)
        self._setup = setup
        self._may_go_on = setup.samples and setup.late is None
        """Whether the host knows what the next decode step of the same requests has, but for its tokens."""
        self._block = graphs.block(_largest_block(setup))
        new = self._block.device.new_zeros
        num_slots = sizes.max_num_seqs
        int32, int64 = (as_dtype(np.zeros(0, kind)) for kind in (np.int32, np.int64))
        self._host_tables = states.block_tables[: len(setup.block_sizes)]
        """Those of the model; others may follow, of a model that drafts for it."""
        self._tables = [new(table.shape, dtype=int32) for table in self._host_tables]
        self._rows = [new(table.shape, dtype=int32) for table in self._host_tables]
        self._rows += [new((num_slots, width), dtype=int32) for width in _step_widths(setup)]
        self._recent = new(num_slots * RECENT_TOKENS, dtype=int32)
        self._tokens = new(2 * sizes.max_samples, dtype=int64)
        """The tokens sampled last, at the start."""
        self._ids = new(sizes.largest.tokens, dtype=int32)
        self._copies_tokens = True
        """Whether the sampler writes them elsewhere."""
        self._stored: I64 = np.zeros(0, np.int64)
        """Where they go in ``_recent``."""
        self._updates = [_Updates() for _ in self._host_tables]
        self._num_types = setup.model.num_token_types
        self._adapter_tables = adapter_tables(setup.program.nodes)
        self._highest_ranks = 0
        """Of the adapters that there were when launches for them were recorded, of all layers together."""
        self._rows_of_last: tuple[I32, I32, U8] | None = None
        """Slots, counts and samples of the last step, if each row had one token and each slot's request is the same."""
        self._decoding: _Decoding | None = None
        """What the steps that go on from it share."""
        self._ring: tuple[I32, I64] = (np.zeros(0, np.int32), np.zeros(0, np.int64))
        """Slots, and where in ``_recent`` the first token of each goes."""
        self._frames: dict[Size, _Frame] = {}
        self._frame: _Frame | None = None
        frames = [self._frame_of(size) for size in reversed(sizes.all)]  # the largest takes the most shared memory
        graphs.compile([each for frame in frames for each in frame.launches])
        for size in sizes.warm:
            self._warm_up(size)

    @classmethod
    def memory(cls, setup: ForwardSetup) -> tuple[int, int]:
        assert setup.channel.graphs is not None
        sizes = _sizes(setup)
        fixed = _largest_block(setup) + sum(4 * sizes.max_num_seqs * width for width in _step_widths(setup))
        fixed += 4 * (sizes.largest.tokens + RECENT_TOKENS * sizes.max_num_seqs) + 16 * sizes.max_samples
        tables = sum(-(-2 * 4 * sizes.max_num_seqs // size) for size in setup.block_sizes)
        return fixed + _rehearsed(setup, sizes) + setup.channel.graphs.reserve_bytes, tables

    # -- plans ---------------------------------------------------------------------------------------------

    def apply(self, plan: SchedulerOutput) -> None:
        if plan.new_reqs:
            self._rows_of_last = self._decoding = None
        elif not any(plan.block_updates):
            return
        for index, (updates, table) in enumerate(zip(self._updates, self._host_tables, strict=True)):
            width = table.shape[1]
            for request in plan.new_reqs:
                blocks = i32(request.block_ids[index])
                first = request.slot * width + (request.block_offsets[index] if request.block_offsets else 0)
                updates.add(np.arange(first, first + len(blocks)), blocks)
            if index < len(plan.block_updates) and plan.block_updates[index]:
                column = i32(plan.block_updates[index]).reshape(-1, 3)
                updates.add(column[:, 0].astype(np.int64) * width + column[:, 1], column[:, 2])

    def prepare(self, slots: I32, counts: I32, num_sampled: U8, *, follows: bool | None = None) -> InputBatch:
        states = self._states
        given, last = (slots, counts, num_sampled), self._rows_of_last
        if last is not None and all(map(operator.is_, given, last)):
            return self._prepare_next(slots)
        self._decoding = None
        ends = counts.cumsum(dtype=np.int64)
        num_rows, num_tokens = len(slots), int(ends[-1]) if len(slots) else 0
        decodes = num_rows and counts.max() == num_sampled.min() == num_sampled.max() == 1
        # Positions of requests with images are not those of their tokens in a sequence.
        self._rows_of_last = given if decodes and not states.axes and self._may_go_on else None
        num_samples = int(num_sampled.sum())
        adapters = states.adapters[slots]
        has_adapters = bool(self._adapter_tables) and bool(adapters.any())
        if has_adapters:
            self._follow_ranks()
        size = self._sizes.size(num_tokens, num_rows, num_samples)
        frame = self._frame = self._frame_of(replace(size, has_adapters=True) if has_adapters else size)
        if (num_tokens, num_samples) != (frame.num_tokens, frame.num_samples):
            frame.num_tokens, frame.num_samples, frame.shown = num_tokens, num_samples, ()
        frame.host[:] = frame.padding
        columns = frame.columns
        computed = states.num_computed[slots]
        if num_tokens == num_rows:
            token_slots, positions = slots, computed
        else:
            token_slots, positions = slots.repeat(counts), ranges(computed, counts)
        columns["input_ids"][:num_tokens] = states.token_ids[token_slots, positions]
        known = (states.num_known + states.num_drafts)[token_slots]
        columns["places"][:num_tokens] = np.where(positions < known, -1, places_of(token_slots, positions))
        rotary = states.rotary_positions(positions, token_slots)
        columns["positions"][:num_tokens] = rotary if rotary.ndim == 1 else positions
        columns["query_start_loc"][1 : num_rows + 1] = ends
        columns["query_start_loc"][num_rows + 1 :] = num_tokens
        columns["seq_lens"][:num_rows] = np.minimum(computed + counts, states.num_attended[slots])
        columns["row_slots"][:num_rows] = slots
        columns["logits_rows"][:num_samples] = ranges(ends - num_sampled, num_sampled)
        columns["stored"][: len(self._stored)] = self._stored
        self._put_late(columns, slots)
        if has_adapters:
            put_adapters("row_adapters", columns, adapters.repeat(counts))
            put_adapters("sample_adapters", columns, adapters.repeat(num_sampled))
        if self._num_types > 1:
            columns["token_types"][:num_tokens] = positions >= states.second_segments[token_slots]
        for index, group in enumerate(self._groups):
            if group.is_cached:
                blocks = self._host_tables[index][token_slots, positions // group.block_size].astype(np.int64)
                self._put_updates(index, frame)
            else:
                firsts = first_blocks(counts, group.block_size)
                columns[f"first_blocks.{index}"][:num_rows] = firsts
                blocks = firsts.repeat(counts) + positions // group.block_size
            columns[f"slot_mapping.{index}"][:num_tokens] = blocks * group.block_size + positions % group.block_size
        self._block.write(frame.host)
        assert frame.batch is not None
        if rotary.ndim == 1:
            return frame.batch
        wide = np.zeros((len(rotary), size.tokens), np.int32)  # of images, whose steps are not replayed
        wide[:, :num_tokens] = rotary
        return replace(frame.batch, positions=self._channel.upload({"positions": wide})["positions"])

    def _put_late(self, columns: Mapping[str, Array], slots: I32) -> None:
        """Names the rows that go on from what the device keeps: those with tokens that the host does not have."""
        if self._setup.late is not None:
            is_late = self._states.num_known[slots] < self._states.num_tokens[slots]
            columns["late_slots"][: len(slots)] = np.where(is_late, slots, np.int32(-1))

    def _prepare_next(self, slots: I32) -> InputBatch:
        """Uploads the inputs of a decode step of the same requests as the last one, whose inputs it goes on from.

        Each row's token is the one that was sampled last, which the device has.
        """
        frame = self._frame
        assert frame is not None and frame.batch is not None and len(self._stored) == len(slots)
        step = self._decoding
        if step is None:
            step = self._decoding = _Decoding(frame, len(slots), self._host_tables, self._groups)
            # The last step may have stored tokens of requests that have left since.
            frame.columns["stored"][len(slots) :] = -1
        step.tokens_at[:] = self._stored
        step.stored[:] = self._stored
        step.positions += 1
        step.seq_lens += 1
        has_updates = False
        for index, group in enumerate(step.groups):
            group.mapping += 1
            offsets = step.positions % group.block_size
            if not offsets.all():
                begun = np.flatnonzero(offsets == 0)
                blocks = group.table[slots[begun], step.positions[begun] // group.block_size]
                group.mapping[begun] = blocks.astype(np.int64) * group.block_size
            if group.has_updates:
                group.updates[:] = -1
                has_updates = True
            group.has_updates = self._put_updates(index, frame)
            has_updates |= group.has_updates
        self._block.write(frame.host if has_updates else frame.often)
        return frame.batch

    def _put_updates(self, index: int, frame: _Frame) -> bool:
        """Adds a group's changes to the inputs of a step, or makes them at once if they are many; whether there are
        any."""
        taken = self._updates[index].take()
        if taken is None:
            return False
        places, blocks = taken
        if len(places) <= frame.size.updates:
            frame.columns[f"updates.{index}"][: len(places)] = places
            frame.columns[f"blocks.{index}"][: len(places)] = blocks
        else:
            views = self._channel.upload({"places": places, "blocks": blocks})
            prepare.scatter(self._tables[index], views["places"], views["blocks"])
        return True

    def run(self, batch: InputBatch) -> Sequence[Tensor]:
        frame = self._frame
        assert frame is not None and frame.batch is batch, "the batch that was prepared last"
        if frame.graph is not None:
            frame.graph()
        else:
            for each in frame.launches:
                submit(each)
            if frame.size.is_padded:
                frame.graph = self._graphs.capture(frame.launches)
        return self._shown(frame)

    def _shown(self, frame: _Frame) -> Sequence[Tensor]:
        """The outputs without padding."""
        if not frame.shown:
            hidden, logits, *aux = frame.outputs
            tokens = frame.num_tokens
            frame.shown = hidden[:tokens], logits[: frame.num_samples], *(each[:tokens] for each in aux)
        return frame.shown

    def run_eagerly(self, batch: InputBatch, change: Change, embed: Callable[[InputBatch], Tensor]) -> Sequence[Tensor]:
        frame = self._frame
        assert frame is not None
        for each in frame.first_launches:
            submit(each)
        batch = change(batch)
        results = run_model(self._setup.model, batch, embed(batch))
        hidden, logits, *aux = (result[: len(shown)] for result, shown in zip(results, self._shown(frame), strict=True))
        # The sampler keeps what it launches for each place of logits.
        return hidden, self._shown(frame)[1].copy_(logits), *aux

    def attach(self, sampler: Sampler) -> None:
        self._copies_tokens = not sampler.keep_tokens_in(self._tokens)

    def store(self, rows: SampleRows, token_ids: Tensor) -> None:
        if self._setup.late is not None:
            return
        if self._ring[0] is not rows.slots:
            self._ring = rows.slots, rows.slots.astype(np.int64) * RECENT_TOKENS
        self._stored = self._ring[1] + rows.positions % RECENT_TOKENS
        if len(rows) and self._copies_tokens:
            self._tokens[: len(rows)].copy_(token_ids)

    # -- sizes ---------------------------------------------------------------------------------------------

    def _follow_ranks(self) -> None:
        """Forgets launches that adapters of higher ranks have outgrown."""
        ranks = sum(table.max_rank for table in self._adapter_tables)
        if ranks != self._highest_ranks:
            self._highest_ranks = ranks
            self._frames = {size: frame for size, frame in self._frames.items() if not size.has_adapters}

    def _frame_of(self, size: Size) -> _Frame:
        frame = self._frames.get(size)
        if frame is None:
            frame = self._new_frame(size)
            if size.is_padded:
                self._frames[size] = frame
        return frame

    def _new_frame(self, size: Size) -> _Frame:
        """Lays out the inputs of a size, and records its launches."""
        layout = _columns(size, self._setup)
        host = np.zeros(_block_bytes(layout), np.uint8)
        often, columns, views = host, {}, {}
        begin = 0
        for name, column in layout.items():
            if name == "updates.0":  # encoders have none, and decode nothing
                often = host[:begin]
            end = begin + column.length * np.dtype(column.dtype).itemsize
            columns[name] = host[begin:end].view(column.dtype)
            columns[name][:] = column.padding
            views[name] = self._block.device[begin:end].view(as_dtype(columns[name]))
            begin += -(-(end - begin) // ALIGNMENT) * ALIGNMENT
        frame = _Frame(size, host.copy(), host, often, columns, views)
        with recorded() as launches:
            frame.batch = self._first_launches(frame)
        bound = self._runner.bind(frame.batch.step_inputs())
        frame.first_launches = launches
        frame.launches = [*launches, *bound.launches]
        frame.outputs = bound.outputs
        return frame

    def _first_launches(self, frame: _Frame) -> InputBatch:
        """Completes the inputs on the device."""
        views, size = frame.views, frame.size
        prepare.scatter(self._recent, views["stored"], self._tokens)
        ids = self._ids[: size.tokens]
        prepare.complete(views["input_ids"], views["places"], self._recent, ids)
        late, starts = self._setup.late, views["query_start_loc"]
        if late is not None:
            drafts.go_on(
                views["late_slots"], starts, late.newest, late.tokens, ids, views["positions"], views["seq_lens"]
            )
        attention = []
        for index, group in enumerate(self._groups):
            rows = self._rows[index][: size.rows]
            if group.is_cached:
                table = self._tables[index]
                prepare.scatter(table, views[f"updates.{index}"], views[f"blocks.{index}"])
                if late is not None:
                    own, mapping = (views[name] for name in ("late_slots", f"slot_mapping.{index}"))
                    drafts.map_slots(own, starts, views["positions"], table, own, group.block_size, mapping)
                prepare.block_rows(table, views["row_slots"], views["seq_lens"], group.block_size, rows)
            else:
                firsts = views[f"first_blocks.{index}"]
                prepare.block_rows(None, firsts, views["seq_lens"], group.block_size, rows)
            columns = AttentionMetadata(
                views["query_start_loc"], views["seq_lens"], rows, views[f"slot_mapping.{index}"], group.block_size
            )
            attention.append(group.plan(columns))
        return InputBatch(
            ids,
            views["positions"],
            attention,
            views["logits_rows"],
            adapter_rows("row_adapters", views),
            adapter_rows("sample_adapters", views),
            views.get("token_types"),
            hidden=None if self._setup.hidden is None else self._setup.hidden[: size.tokens],
        )

    def _warm_up(self, size: Size) -> None:
        """Runs a step without tokens, and captures its graph."""
        frame = self._frame = self._frame_of(size)
        assert frame.batch is not None
        frame.host[:] = frame.padding
        self._block.write(frame.host)
        self.run(frame.batch)
        self._channel.download([]).collect()
