"""Pipeline stages: what a stage gets from the one before it, and what it passes on.

Each step goes through all stages. A stage gets the hidden states of the step's tokens from the one before it, and the
last one tells all others which tokens were sampled: they keep the same tables, and the first one goes on from them. So
for all but the last stage, the results of a step come late, as from a device (``StepChannel``).

What connects stages are links, each with a ``StageTarget`` at one end and a ``StageSource`` at the other. On one
machine that is a ring of messages in memory that its ends map (``SharedRing``), between machines a socket
(``nodes/links.py``); nothing else here knows how messages travel. Devices with memory of their own move hidden states
themselves (``StageTransfer``), and a ring tells when.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from executor.base import ModelError
from executor.deferred import Array, Deferred
from executor.device.base import StageTransfer
from executor.device.steps import Graphs, Pending, RecentTokens, StepChannel
from executor.messages import I64, ResolvedParams, SchedulerOutput, i32
from executor.parallel import STAGES, ParallelState, hidden_event, tokens_event
from executor.request_states import RequestStates
from executor.sampling.base import Sampled, SamplerOutput, SampleRows, TokenMask
from executor.sampling.sampler import Sampler, from_ids, ids_of
from ops import Communicator, SingleRank
from ops.dispatch import Spec

_PAGE = mmap.ALLOCATIONGRANULARITY
_HEADER = 16 * _PAGE
"""Bytes before a ring's slots, for the counters of its readers."""
_LINE = 64
"""Bytes of a cache line. Counters of different processes share none."""


def as_bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """A tensor's bytes, in row-major order. Of a single element, any stride counts as contiguous, even 0."""
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


class StageTarget(Protocol):
    """Takes messages from one rank to others, in the order of steps, one for each."""

    def send(self, step_id: int, tensor: Tensor) -> None:
        """Sends a copy of a tensor."""


class StageSource(Protocol):
    """Brings them to one of these."""

    def num_arrived(self) -> int:
        """Messages that have come so far, those taken included."""

    def take(self, step_id: int) -> Tensor:
        """uint8 [bytes]: the next message, which has come. Holds until the next one is taken."""

    def fileno(self) -> int:
        """Readable while messages have come that ``num_arrived`` has not counted."""


class DeviceTarget:
    """Takes hidden states of a device."""

    def __init__(self, transfer: StageTransfer, rank: int, notices: StageTarget | None) -> None:
        """
        Args:
            transfer: Moves them.
            rank: Where to.
            notices: Tells all ranks of that stage how many bytes come; None: another rank does.
        """
        self._transfer = transfer
        self._rank = rank
        self._notices = notices

    def send(self, step_id: int, tensor: Tensor) -> None:
        if self._notices is not None:
            self._notices.send(step_id, torch.tensor([tensor.nbytes]))
        self._transfer.send(tensor, self._rank)


class DeviceSource:
    """Brings hidden states to a device, always to the same place."""

    def __init__(self, transfer: StageTransfer, rank: int, notices: StageSource, memory: Tensor) -> None:
        """
        Args:
            transfer: Moves them.
            rank: Where they come from.
            notices: Tells when that stage has launched a step: nothing is launched here before, so nothing waits for
                what may never come.
            memory: uint8 [bytes of the most tokens], on the device.
        """
        self._transfer = transfer
        self._rank = rank
        self._notices = notices
        self._memory = memory

    def num_arrived(self) -> int:
        return self._notices.num_arrived()

    def take(self, step_id: int) -> Tensor:
        (num_bytes,) = self._notices.take(step_id).view(torch.int64).tolist()
        received = self._memory[:num_bytes]
        self._transfer.receive(received, self._rank)
        return received

    def fileno(self) -> int:
        return self._notices.fileno()


class SharedRing:
    """A link through memory that both ends map. The sender signals each receiver with an event for each message.

    The system orders what was written before an event and what is read after it.
    """

    def __init__(
        self, memory: int, start: int, num_slots: int, slot_bytes: int, events: Sequence[int], reader: int | None = None
    ) -> None:
        """Opens one end.

        Args:
            memory: Descriptor of the memory, zeroed.
            start: Where the ring begins; see ``ring_bytes``.
            num_slots: Messages that may be under way.
            slot_bytes: Size of the longest.
            events: Event descriptors of all readers, in order; of a reader, its own.
            reader: Index of this reader; None: this is the sender.
        """
        length = ring_bytes(num_slots, slot_bytes)
        mapping = mmap.mmap(memory, length, flags=mmap.MAP_SHARED, offset=start)
        self._data = np.frombuffer(mapping, np.uint8)
        self._num_taken = self._data[:_HEADER].view(np.int64)[:: _LINE // 8]
        """By reader; each has one writer."""
        self._num_slots, self._slot_bytes = num_slots, _slot_bytes(slot_bytes)
        self._events, self._reader = tuple(events), reader
        self._count = 0
        """Messages sent, or those that have come."""

    def send(self, step_id: int, tensor: Tensor) -> None:
        slowest = int(self._num_taken[: len(self._events)].min())
        assert self._count - slowest < self._num_slots, "more steps are in flight than stages have room for"
        data = as_bytes(tensor)
        slot = self._slot(self._count)
        slot[:16].view(np.int64)[:] = step_id, len(data)
        slot[_LINE : _LINE + len(data)] = data
        self._count += 1
        for event in self._events:
            os.eventfd_write(event, 1)

    def _slot(self, number: int) -> npt.NDArray[np.uint8]:
        begin = _HEADER + number % self._num_slots * self._slot_bytes
        return self._data[begin : begin + self._slot_bytes]

    def num_arrived(self) -> int:
        with suppress(BlockingIOError):
            self._count += os.eventfd_read(self._events[0])
        return self._count

    def take(self, step_id: int) -> Tensor:
        assert self._reader is not None
        number = int(self._num_taken[self._reader])
        assert number < self._count, "the message has not come"
        slot = self._slot(number)
        sent, length = slot[:16].view(np.int64).tolist()
        assert sent == step_id, f"expected what belongs to step {step_id}, got step {sent}"
        self._num_taken[self._reader] = number + 1  # the last slot stays untouched: there is one more than steps
        return torch.from_numpy(slot[_LINE : _LINE + length])

    def fileno(self) -> int:
        return self._events[0]


def _slot_bytes(slot_bytes: int) -> int:
    return _LINE + -(-slot_bytes // _LINE) * _LINE


def ring_bytes(num_slots: int, slot_bytes: int) -> int:
    """Memory of a ring."""
    return -(-(_HEADER + num_slots * _slot_bytes(slot_bytes)) // _PAGE) * _PAGE


class Stage:
    """The place of a rank in the pipeline."""

    def __init__(
        self,
        parallel: ParallelState,
        hidden: Spec,
        *,
        source: StageSource | None = None,
        target: StageTarget | None = None,
        tokens: StageSource | None = None,
        audience: StageTarget | None = None,
        communicator: Communicator | None = None,
        memory: Tensor | None = None,
    ) -> None:
        """
        Args:
            parallel: The rank.
            hidden: Of the hidden states between stages.
            source: Brings the hidden states of the stage before; None on the first stage, and of a model that is
                measured and not served: they are zeros.
            target: Takes this stage's; None on the last stage, and on ranks whose hidden states another one passes on.
            tokens: Of ranks of earlier stages, brings the sampled tokens.
            audience: Of the output rank, takes them.
            communicator: Connects the ranks of this stage; None: there is one.
            memory: uint8, on the device: where the source brings hidden states; None: anywhere in the host's.
        """
        self._communicator = communicator or SingleRank()
        self.is_first = parallel.pp_rank == 0
        self.is_last = parallel.pp_rank == parallel.pp_size - 1
        self.hidden = None if self.is_first else hidden
        """Of this stage's input."""
        self.memory = None if memory is None else memory.view(hidden.dtype).view(-1, hidden.width)
        """[tokens, hidden_size], on the device: where this stage's input always is; None: each step's is elsewhere."""
        self._source, self._target, self._tokens, self._audience = source, target, tokens, audience
        self._num_inputs = 0
        """Hidden states taken so far."""
        self._num_steps = 0
        """Steps begun so far."""
        self._step_id = 0

    @property
    def wake_fds(self) -> list[int]:
        """Descriptors that become readable when hidden states have come; the channel has that of tokens."""
        return [] if self._source is None else [self._source.fileno()]

    def listen(self) -> None:
        """Takes note of what has come."""
        for link in (self._source, self._tokens):
            if link is not None:
                link.num_arrived()

    def lacks_input(self, plan: SchedulerOutput, states: RequestStates) -> bool:
        """Whether a step cannot begin yet: the stage before has not computed it, or tokens that the first stage needs
        have not come back from the last one."""
        if self._source is not None:
            return self._source.num_arrived() == self._num_inputs
        return self.lacks_tokens(plan, states)

    def lacks_tokens(self, plan: SchedulerOutput, states: RequestStates) -> bool:
        """Whether tokens of a plan's rows have not come back from the last stage."""
        if self._tokens is None:
            return False
        slots, counts = i32(plan.slots), i32(plan.num_scheduled_tokens)
        known, ends = states.num_known[slots], states.num_computed[slots] + counts
        lacks: npt.NDArray[np.bool_] = (known < states.num_tokens[slots]) & (known < ends)
        if not lacks.any():
            return False
        started = [request.slot for request in plan.new_reqs]  # others had these slots before
        return bool((lacks & ~np.isin(slots, started)).any())

    def begin(self, step_id: int, num_tokens: int) -> Tensor | None:
        """Begins a step that does not lack its input.

        Returns:
            The hidden states of its tokens, [num_tokens, hidden_size]; None on the first stage.
        """
        self._step_id = step_id
        self._num_steps += 1
        if self.hidden is None:
            return None
        if self._source is None:
            return self.zeros(num_tokens)
        self._num_inputs += 1
        return self._source.take(step_id).view(self.hidden.dtype).view(num_tokens, self.hidden.width)

    def zeros(self, num_tokens: int) -> Tensor | None:
        """What ``begin`` returns in a dry run."""
        if self.hidden is None:
            return None
        if self.memory is not None:
            return self.memory[:num_tokens]
        return torch.zeros((num_tokens, self.hidden.width), dtype=self.hidden.dtype)

    def pass_on(self, hidden: Tensor) -> None:
        """Sends the hidden states of the step's tokens to the next stage."""
        if self._target is not None:
            self._target.send(self._step_id, hidden)
        if not self.is_last and self._communicator.shares_rows:  # which the next step overwrites
            self._communicator.wait()

    def announce(self, sampled: Sampled, rows: SampleRows) -> Sampled:
        """Tells the other stages which tokens the output rank has sampled, once it knows."""
        if self._audience is None:
            return sampled
        step_id, audience = self._step_id, self._audience

        def make(arrays: Sequence[Array]) -> SamplerOutput:
            output = sampled.output.make(arrays)
            audience.send(step_id, ids_of(output, rows))
            return output

        return Sampled(sampled.token_ids, Deferred(sampled.output.tensors, make))

    def channel(self, channel: StepChannel) -> StepChannel:
        """The channel of the device: of all but the last stage, results come with the tokens."""
        return channel if self._tokens is None else AwaitedSteps(channel, self._tokens, lambda: self._num_steps)

    def sampler(self, sampler: Sampler) -> Sampler:
        """What gives the tokens of a step, of the last stage the sampler."""
        return sampler if self.is_last else AwaitedTokens(self._next_tokens)

    def _next_tokens(self) -> Callable[[], I64]:
        """What returns the tokens of this step once they have come."""
        step_id, tokens = self._step_id, self._tokens
        assert tokens is not None
        return lambda: tokens.take(step_id).view(torch.int64).numpy().copy()


class AwaitedSteps:
    """The channel of a device, with results that come with the tokens of the step."""

    def __init__(self, channel: StepChannel, tokens: StageSource, count: Callable[[], int]) -> None:
        """
        Args:
            channel: Of the device.
            tokens: Brings the tokens of each step.
            count: Returns how many steps have begun. What is downloaded before the first one comes without tokens.
        """
        self.graphs: Graphs | None = channel.graphs
        self._channel = channel
        self._tokens = tokens
        self._count = count

    def upload(self, columns: Mapping[str, Array]) -> Mapping[str, Tensor]:
        return self._channel.upload(columns)

    def download(self, tensors: Sequence[Tensor]) -> Pending:
        return _Awaited(self._tokens, self._count(), self._channel.download(tensors))

    def recent_tokens(self, max_num_seqs: int) -> RecentTokens:
        return self._channel.recent_tokens(max_num_seqs)

    def fileno(self) -> int:
        return self._tokens.fileno()


class _Awaited:
    def __init__(self, tokens: StageSource, number: int, own: Pending) -> None:
        self._tokens = tokens
        self._number = number
        self._own = own

    def is_ready(self) -> bool:
        return self._tokens.num_arrived() >= self._number

    def collect(self) -> Sequence[Array]:
        return self._own.collect()  # done, as the last stage has gone on from it

    @property
    def device_ms(self) -> float:
        return self._own.device_ms


class AwaitedTokens(Sampler):
    """Samples nothing: the tokens of a step are those of the last stage."""

    def __init__(self, next_tokens: Callable[[], Callable[[], I64]]) -> None:
        """``next_tokens`` is asked before a step's tokens have come, and returns what returns them afterwards."""
        super().__init__(0)
        self._next_tokens = next_tokens

    def add(self, slot: int, params: ResolvedParams) -> None:
        pass

    def lacks_tokens(self, rows: SampleRows, states: RequestStates) -> bool:
        return False

    def sample(self, logits: Tensor, rows: SampleRows, states: RequestStates, mask: TokenMask | None = None) -> Sampled:
        tokens = self._next_tokens()
        return Sampled(torch.empty(0, dtype=torch.int64), Deferred((), lambda arrays: from_ids(tokens(), rows)))


@dataclass(frozen=True)
class StageRoom:
    """What links have room for."""

    num_steps: int
    """Steps in flight."""
    max_tokens: int
    max_samples: int


class FanOut:
    """Several targets as one."""

    def __init__(self, targets: Sequence[StageTarget]) -> None:
        self._targets = targets

    def send(self, step_id: int, tensor: Tensor) -> None:
        for target in self._targets:
            target.send(step_id, tensor)


class FarLinks(Protocol):
    """A rank's links with other machines."""

    @property
    def sources(self) -> Mapping[str, StageSource]:
        """By name of the event that their messages cause here."""

    @property
    def targets(self) -> Mapping[str, StageTarget]:
        """By name of the event that their messages cause there."""

    @property
    def first_rank(self) -> int:
        """The first rank of this machine."""


def connect(
    parallel: ParallelState,
    descriptors: Mapping[str, int],
    hidden: Spec,
    room: StageRoom,
    communicator: Communicator,
    links: FarLinks | None = None,
    transfer: StageTransfer | None = None,
) -> Stage:
    """The stage of a rank.

    Args:
        parallel: The rank.
        descriptors: What ``executor.parallel.SharedByRanks`` gives it.
        hidden: Of the hidden states between stages.
        room: The same for all ranks.
        communicator: Connects the ranks of the stage.
        links: With ranks of other machines; None: there are none.
        transfer: Moves hidden states from device to device; None: they go through the memory of the host.

    Raises:
        ModelError: The ranks share nothing.
    """
    if parallel.pp_size == 1:
        return Stage(parallel, hidden)
    memory = descriptors.get(STAGES)
    if memory is None and links is None:
        raise ModelError(
            f"--pipeline-parallel-size {parallel.pp_size}: stages are processes, which --distributed-executor-backend "
            "mp starts"
        )
    size = room.max_tokens * hidden.width * hidden.dtype.itemsize
    ends = _Ends(memory, descriptors, room.num_steps + 1, size, links)
    of_tokens = parallel.pp_size - 1, 8 * room.max_samples
    first, rank = parallel.rank - parallel.tp_rank, parallel.rank
    source: StageSource | None = None
    target: StageTarget | None = None
    tokens = audience = None
    room_on_device: Tensor | None = None
    if parallel.pp_rank:
        source = ends.source(hidden_event(rank), parallel.pp_rank - 1, size, parallel.tp_rank)
    if parallel.pp_rank < parallel.pp_size - 1:
        tokens = ends.source(tokens_event(rank), *of_tokens, rank - (0 if links is None else links.first_rank))
        if parallel.tp_rank == 0:
            following = range(first + parallel.tp_size, first + 2 * parallel.tp_size)
            target = ends.target([hidden_event(each) for each in following], parallel.pp_rank, size)
    elif parallel.is_output_rank:
        audience = ends.target([tokens_event(each) for each in range(first)], *of_tokens)
    if transfer is not None:
        source, target, room_on_device = _over_devices(parallel, transfer, size, source, target)
    return Stage(
        parallel,
        hidden,
        source=source,
        target=target,
        tokens=tokens,
        audience=audience,
        communicator=communicator,
        memory=room_on_device,
    )


def _over_devices(
    parallel: ParallelState,
    transfer: StageTransfer,
    most_bytes: int,
    source: StageSource | None,
    target: StageTarget | None,
) -> tuple[StageSource | None, StageTarget | None, Tensor | None]:
    """Has a device move hidden states, for which links through the host give notice.

    Returns:
        Where they come from and go to, and where they lie on the device.
    """
    memory = None
    if source is not None:
        memory = transfer.memory(most_bytes)
        source = DeviceSource(transfer, parallel.pp_rank - 1, source, memory)
    if parallel.pp_rank < parallel.pp_size - 1:
        target = DeviceTarget(transfer, parallel.pp_rank + 1, target)
    transfer.check()
    return source, target, memory


class _Ends:
    """Opens the ends of a rank's links: of rings with ranks of this machine, and of sockets with others."""

    def __init__(
        self, memory: int | None, descriptors: Mapping[str, int], num_slots: int, most_bytes: int, far: FarLinks | None
    ) -> None:
        """
        Args:
            memory: Descriptor of the rings' memory; None: no other stage is on this machine.
            descriptors: Of events, by name.
            num_slots: Messages that may be under way.
            most_bytes: Size of the longest.
            far: Links with other machines.
        """
        self._memory, self._descriptors, self._num_slots = memory, descriptors, num_slots
        self._stride = ring_bytes(num_slots, most_bytes)
        self._sources: Mapping[str, StageSource] = {} if far is None else far.sources
        self._targets: Mapping[str, StageTarget] = {} if far is None else far.targets

    def _ring(self, number: int, slot_bytes: int, names: Sequence[str], reader: int | None = None) -> SharedRing:
        assert self._memory is not None, "both ends are on this machine"
        events = [self._descriptors[name] for name in names]
        return SharedRing(self._memory, number * self._stride, self._num_slots, slot_bytes, events, reader)

    def source(self, name: str, number: int, slot_bytes: int, reader: int) -> StageSource:
        """The end that brings messages.

        Args:
            name: Of the event that they cause.
            number: Of the ring, if it is one.
            slot_bytes: Size of the longest message.
            reader: Index of this rank among the ring's readers.
        """
        return self._sources.get(name) or self._ring(number, slot_bytes, [name], reader)

    def target(self, names: Sequence[str], number: int, slot_bytes: int) -> StageTarget:
        """The end that takes messages for all who wait for these events."""
        near = [name for name in names if name not in self._targets]
        rings = [self._ring(number, slot_bytes, near)] if near else []
        return FanOut([*rings, *(self._targets[name] for name in names if name in self._targets)])
