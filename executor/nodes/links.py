"""Links between ranks on different machines: a socket for each pair of ranks and direction.

A message is the number of its step and the tensor's bytes, in frames. The end that gets messages waits for the
connection, on a socket that the machine's agent opened before any rank was started.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import zmq
from torch import Tensor

from executor.multiproc import Network
from executor.nodes.addresses import use_ipv6
from executor.nodes.frames import bound_frames, in_frames
from executor.nodes.keys import Curve, Gate
from executor.parallel import ParallelState, awaited_from_afar
from executor.stages import as_bytes

CHECK_TIMEOUT = 60.0
"""Seconds in which the first message of each link must come, before weights are loaded."""
_NUMBER = struct.Struct("<q")
_GREETING = -1
"""In place of a step's number."""


class LinkError(RuntimeError):
    """A link does not work."""


def broken(expected: int, number: int) -> LinkError:
    """What to raise if another message comes than the one that was expected."""
    return LinkError(f"the connection to another machine broke: message {expected} is missing, message {number} came")


class NetworkTarget:
    """See ``executor.stages.StageTarget``."""

    def __init__(self, context: zmq.Context[Any], curve: Curve, endpoint: str) -> None:
        self._socket: zmq.Socket[bytes] = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.set_hwm(0)
        use_ipv6(self._socket, endpoint)
        curve.join(self._socket)
        self._socket.connect(endpoint)
        self._socket.send(_NUMBER.pack(_GREETING))

    def send(self, step_id: int, tensor: Tensor) -> None:
        first, *others = in_frames(as_bytes(tensor).data)
        self._socket.send_multipart([_NUMBER.pack(step_id) + bytes(first), *others])

    def close(self) -> None:
        self._socket.close(linger=0)


class NetworkSource:
    """See ``executor.stages.StageSource``."""

    def __init__(self, context: zmq.Context[Any], curve: Curve, endpoint: str, listener: int) -> None:
        """Takes over ``listener``, the socket of the endpoint."""
        self._socket: zmq.Socket[bytes] = context.socket(zmq.PULL)
        self._socket.set_hwm(0)
        bound_frames(self._socket)
        use_ipv6(self._socket, endpoint)
        curve.accept(self._socket)
        self._socket.setsockopt(zmq.USE_FD, listener)
        self._socket.bind(endpoint)
        self._messages: deque[list[bytes]] = deque()
        self._count = 0

    def wait_for_greeting(self, timeout: float) -> bool:
        """Waits until the other end has connected. Returns whether it did."""
        if not self._socket.poll(int(timeout * 1000)):
            return False
        (number,) = _NUMBER.unpack(self._socket.recv())
        return bool(number == _GREETING)

    def num_arrived(self) -> int:
        while True:  # to the end: the descriptor tells of changes, not of messages that are there
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return self._count
            self._messages.append(frames)
            self._count += 1

    def next(self) -> tuple[int, Tensor]:
        """The next message, which has come: its number, and uint8 [bytes]."""
        first, *others = self._messages.popleft()
        (number,) = _NUMBER.unpack_from(first)
        data = bytearray().join([memoryview(first)[_NUMBER.size :], *others])
        return number, torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)

    def take(self, step_id: int) -> Tensor:
        number, data = self.next()
        if number != step_id:
            raise broken(step_id, number)
        return data

    def receive(self, number: int) -> Tensor:
        """Waits for the next message, which has this number: uint8 [bytes].

        Raises:
            LinkError: It has another one.
        """
        if not self._messages:
            self._messages.append(self._socket.recv_multipart())
            self._count += 1
        return self.take(number)

    def fileno(self) -> int:
        return int(self._socket.getsockopt(zmq.FD))

    def close(self) -> None:
        self._socket.close(linger=0)


class NetworkLinks:
    """A rank's links with ranks of other machines. See ``executor.stages.FarLinks``."""

    def __init__(
        self, network: Network, ranks: Sequence[ParallelState], own: ParallelState, listeners: Mapping[str, int]
    ) -> None:
        """Opens both ends of this rank's links.

        Args:
            network: Where the others are.
            ranks: The places of all ranks.
            own: The place of this one.
            listeners: Sockets of its endpoints, by the name of the event.
        """
        self.network, self._own = network, own
        self.listeners = listeners
        """As given."""
        self._context: zmq.Context[Any] = zmq.Context()
        curve = Curve(network.cluster_key)
        self._gate = Gate(self._context, curve)
        self._senders = awaited_from_afar(ranks, own)
        self.first_rank = min(each.rank for each in ranks if each.node_rank == own.node_rank)
        self.sources = {
            name: NetworkSource(self._context, curve, network.endpoints[name], listeners[name])
            for name in self._senders
        }
        self.targets = {
            name: NetworkTarget(self._context, curve, network.endpoints[name])
            for each in ranks
            for name, sender in awaited_from_afar(ranks, each).items()
            if sender.rank == own.rank
        }

    def check(self, timeout: float = CHECK_TIMEOUT) -> None:
        """Waits until all ranks that send to this one have connected.

        Raises:
            LinkError: One has not; the message names the machines.
        """
        for name, sender in self._senders.items():
            if not self.sources[name].wait_for_greeting(timeout):
                theirs, ours = sender.node_rank, self._own.node_rank
                raise LinkError(
                    f"machine {theirs} ({self.network.addresses[theirs]}) cannot reach machine {ours} at "
                    f"{self.network.endpoints[name]}: no connection within {timeout:.0f} s; let all machines of the "
                    "cluster reach each other on all ports, or choose other addresses with --node-address"
                )

    def close(self) -> None:
        for source in self.sources.values():
            source.close()
        for target in self.targets.values():
            target.close()
        self._gate.close()
        self._context.term()
