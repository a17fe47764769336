"""Machines connected by torch.distributed, in a network that one trusts: Gloo encrypts nothing, and asks for no key.

It listens on one interface, and so does the store through which the machines find each other. Tensors go over it; what
says which step they belong to goes over the links, encrypted, as Gloo's sockets cannot be polled.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, PrefixStore, Store

from executor.multiproc import STORE
from executor.nodes.addresses import host_and_port
from executor.nodes.links import NetworkLinks, NetworkSource, NetworkTarget, broken
from executor.parallel import ParallelState, hidden_event
from executor.parallel.store import CONNECT_TIMEOUT, connect_store
from executor.stages import StageSource, StageTarget, as_bytes
from ops import PeerLostError

PATIENCE = timedelta(days=1)
"""How long an operation waits for others. The engine core alone decides that they hang, and ends their workers."""
UNDER_WAY = 8
"""Hidden states that a rank sends another one before it waits until the first of them is there."""


class GlooMeeting:
    """Where a rank finds those of other machines with which it forms groups."""

    def __init__(self, interface: str, endpoint: str, listener: int | None = None) -> None:
        """
        Args:
            interface: Name of the network interface here.
            endpoint: Where the store is.
            listener: Its listening socket, which this takes over: the store is here, and lasts as long as this object.
                None: it is elsewhere.

        Raises:
            PeerLostError: It cannot be opened.
        """
        self._interface, self._endpoint = interface, endpoint
        self._store: Store | None = None
        if listener is not None:  # others need it, whether this rank does or not
            self._store = connect_store(host_and_port(endpoint), listener, interface)

    def group(self, name: str, place: int, nodes: Sequence[int]) -> Any:
        """Connects to others. Returns once all have called it.

        Args:
            name: Of the group.
            place: This rank's, in the group.
            nodes: The machine of each member.

        Returns:
            A ``ProcessGroupGloo``.

        Raises:
            PeerLostError: They cannot be reached.
        """
        gloo: Any = dist.ProcessGroupGloo  # torch's types lack what is needed
        option = f"--private-interface {self._interface}"
        try:
            if self._store is None:
                self._store = connect_store(host_and_port(self._endpoint), None, self._interface)
            store = PrefixStore(name, self._store)
            _greet(store, place, nodes, f"{option}: {self._endpoint} cannot be reached by machine")
            options = gloo._Options()
            options._devices = [gloo.create_device(interface=self._interface)]
            options._timeout = CONNECT_TIMEOUT
            return gloo(store, place, len(nodes), options)
        except PeerLostError:
            raise
        except RuntimeError as error:
            raise PeerLostError(f"{option}: machines {_joined(nodes)} cannot reach each other: {error}") from error


def meeting_of(links: NetworkLinks, own: ParallelState, interface: str) -> GlooMeeting | None:
    """Where a rank meets others.

    Args:
        links: Its links.
        own: Its place.
        interface: ``--private-interface``; empty: nothing goes by Gloo.

    Raises:
        PeerLostError: The store cannot be opened.
    """
    if not interface:
        return None
    listener = links.listeners.get(STORE) if own.rank == 0 else None
    return GlooMeeting(interface, links.network.endpoints[STORE], listener)


class GlooGather:
    """See ``executor.nodes.ranks.Gather``."""

    def __init__(self, meeting: GlooMeeting, name: str, place: int, nodes: Sequence[int]) -> None:
        """See ``GlooMeeting.group``."""
        self._meeting = meeting  # others may come later
        self._group = meeting.group(name, place, nodes)
        self._options = AllgatherOptions()
        self._options.asyncOp, self._options.timeout = False, PATIENCE
        self.gather(torch.zeros(1, dtype=torch.uint8), [1] * len(nodes))  # all have connected

    def gather(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        most = max(sizes)
        if own.numel() < most:  # as long as the longest
            own = torch.nn.functional.pad(own, (0, most - own.numel()))
        out = torch.empty(len(sizes) * most, dtype=torch.uint8)
        try:
            self._group._allgather_base(out, own, self._options).wait()
        except RuntimeError as error:
            raise _lost(error) from error
        return [part[:size] for part, size in zip(out.split(most), sizes, strict=True)]


class GlooTarget:
    """Takes hidden states to another rank. See ``executor.stages.StageTarget``."""

    def __init__(self, group: Any, place: int, notices: NetworkTarget) -> None:
        """
        Args:
            group: Of both.
            place: The other rank's, in the group.
            notices: Tells it what comes.
        """
        self._group, self._place, self._notices = group, place, notices
        self._under_way: deque[tuple[Any, Tensor]] = deque()

    def send(self, step_id: int, tensor: Tensor) -> None:
        data = torch.from_numpy(as_bytes(tensor).copy())  # the next step overwrites the tensor
        self._notices.send(step_id, torch.tensor([data.numel()]))
        try:
            if data.numel():
                self._under_way.append((self._group.send([data], self._place, 0), data))
            if len(self._under_way) > UNDER_WAY:
                work, _ = self._under_way.popleft()
                work.wait(PATIENCE)
        except RuntimeError as error:
            raise _lost(error) from error


class GlooSource:
    """Brings hidden states, while steps are computed. See ``executor.stages.StageSource``."""

    def __init__(self, group: Any, notices: NetworkSource) -> None:
        """
        Args:
            group: Of both; the sender is the first.
            notices: Tells what comes. Only this object uses it from now on.
        """
        self._group, self._notices = group, notices
        self._messages: deque[tuple[int, Tensor]] = deque()
        self._error: Exception | None = None
        self._count = 0
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._end = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._receive, name="hidden states", daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        """Runs in a thread of its own, until the end or an error, which then is what comes last."""
        poller = select.poll()
        for descriptor in (self._notices.fileno(), self._end):
            poller.register(descriptor, select.POLLIN)
        try:
            count = 0
            while True:
                for _ in range(self._notices.num_arrived() - count):
                    step_id, size = self._notices.next()
                    count += 1
                    data = torch.empty(int(size.view(torch.int64)), dtype=torch.uint8)
                    if data.numel():
                        self._group.recv([data], 0, 0).wait(PATIENCE)
                    self._messages.append((step_id, data))
                    os.eventfd_write(self._event, 1)
                if any(descriptor == self._end for descriptor, _ in poller.poll()):
                    return
        except Exception as error:
            self._error = error
            os.eventfd_write(self._event, 1)

    def num_arrived(self) -> int:
        with suppress(BlockingIOError):
            self._count += os.eventfd_read(self._event)
        return self._count

    def take(self, step_id: int) -> Tensor:
        if not self._messages:
            assert self._error is not None
            raise _lost(self._error) from self._error
        number, data = self._messages.popleft()
        if number != step_id:
            raise broken(step_id, number)
        return data

    def fileno(self) -> int:
        return self._event

    def close(self, timeout: float = 1.0) -> None:
        """Ends the thread, unless it is in the middle of a message for longer than ``timeout`` seconds."""
        os.eventfd_write(self._end, 1)
        self._thread.join(timeout)
        if not self._thread.is_alive():
            os.close(self._event)
            os.close(self._end)


class GlooLinks:
    """A rank's links with those of other machines, of which Gloo moves the hidden states. See
    ``executor.stages.FarLinks``."""

    def __init__(self, links: NetworkLinks, meeting: GlooMeeting, ranks: Sequence[ParallelState], rank: int) -> None:
        """Connects to the ranks of other stages. Each rank calls it.

        Args:
            links: Which move the rest, and have been checked.
            meeting: Where the ranks meet.
            ranks: The places of all ranks.
            rank: This one.

        Raises:
            PeerLostError: They cannot be reached.
        """
        self.first_rank = links.first_rank
        self.sources: Mapping[str, StageSource] = links.sources
        self.targets: Mapping[str, StageTarget] = links.targets
        self._opened: list[GlooSource] = []
        for sender in ranks:  # in the same order on all machines, as each group waits for its members
            readers = _readers_elsewhere(ranks, sender)
            members = [sender.rank, *(each.rank for each in readers)]
            if not readers or rank not in members:
                continue
            place = members.index(rank)
            nodes = [ranks[each].node_rank for each in members]
            group = meeting.group(f"hidden.{sender.rank}", place, nodes)
            if place:
                name = hidden_event(rank)
                source = GlooSource(group, links.sources[name])
                self._opened.append(source)
                self.sources = {**self.sources, name: source}
            else:
                names = {hidden_event(each): index for index, each in enumerate(members) if index}
                gloo = {name: GlooTarget(group, index, links.targets[name]) for name, index in names.items()}
                self.targets = {**self.targets, **gloo}

    def close(self) -> None:
        """Ends what runs beside the steps. The links below remain."""
        for source in self._opened:
            source.close()


def _readers_elsewhere(ranks: Sequence[ParallelState], sender: ParallelState) -> list[ParallelState]:
    """The ranks of other machines that get hidden states of this one."""
    if sender.tp_rank:
        return []
    return [each for each in ranks if each.pp_rank == sender.pp_rank + 1 and each.node_rank != sender.node_rank]


def _lost(error: Exception) -> PeerLostError:
    return PeerLostError(f"another machine cannot be reached: {error}")


def _joined(nodes: Sequence[int]) -> str:
    return " and ".join(str(node) for node in sorted(set(nodes)))


def _greet(store: Store, place: int, nodes: Sequence[int], complaint: str) -> None:
    """Waits until all machines of the group have reached the store: Gloo would not say which one has not."""
    store.set(f"here {place}", "")
    for index, node in enumerate(nodes):
        try:
            store.wait([f"here {index}"], CONNECT_TIMEOUT)
        except RuntimeError as error:
            raise PeerLostError(f"{complaint} {node} ({error})") from error
