"""The leader's side of the connections to agents: who has joined, and who is lost. Needs no torch."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from executor.base import ModelError, WorkerDiedError
from executor.config import ExecutorConfig
from executor.identity import model_digest, program_digest
from executor.liveness import MAX_TICK
from executor.log import get_logger, printable
from executor.nodes.addresses import endpoint_of, numeric, use_ipv6
from executor.nodes.frames import bound_frames, in_frames
from executor.nodes.keys import FAILED_HANDSHAKES, Curve, Gate
from executor.nodes.messages import (
    NODE_TIMEOUT,
    PING_INTERVAL,
    FromAgent,
    FromMember,
    NodeGoodbye,
    NodeHello,
    NodePing,
    NodeRefused,
    NodeUnknown,
    NodeWelcome,
    ToAgent,
)

logger = get_logger()

REMINDER = 5.0
"""Seconds between lines that say who is missing."""
EVENTS_PER_TURN = 32
"""Ends of connections looked at in a turn of the core's loop: strangers can make any number."""
GOODBYE_TIMEOUT = 3.0
"""Seconds that agents have to hear that they should end."""


@dataclass
class Member:
    """A machine that has joined."""

    rank: int
    identity: bytes
    """Of its agent's socket."""
    address: str
    host: str
    number: int
    """Of its attempts to join."""
    title: str
    """What it is, for people."""
    silent: float = 0.0
    """Seconds since it was last heard from."""

    @property
    def name(self) -> str:
        return f"{self.title} ({printable(self.host)}, {self.address})"


class Roster(Protocol):
    """Who may join."""

    option: str
    """That names the address at which machines wait for others."""

    def missing(self, joined: Collection[int]) -> list[int]:
        """Ranks of machines that have not joined."""

    def objection(self, hello: NodeHello, joined: Collection[int]) -> str | None:
        """Why a machine cannot join; None: it can."""

    def admitted(self, hello: NodeHello) -> None:
        """A machine has joined."""

    def title(self, hello: NodeHello) -> str:
        """What a machine that joins is, for people."""

    def reminder(self, missing: list[int]) -> str:
        """Who is missing, and what to do about it."""


class Stages:
    """Machines that each have some of the pipeline stages. See ``Roster``."""

    option = "--master-addr"

    def __init__(self, nnodes: int) -> None:
        self._nnodes = nnodes

    def missing(self, joined: Collection[int]) -> list[int]:
        return [rank for rank in range(1, self._nnodes) if rank not in joined]

    def objection(self, hello: NodeHello, joined: Collection[int]) -> str | None:
        if hello.num_engines:
            return f"--headless: it runs engines, and machine 0 wants workers; use --nnodes {self._nnodes} --node-rank"
        if hello.nnodes != self._nnodes:
            return f"--nnodes {hello.nnodes}: machine 0 was started with --nnodes {self._nnodes}"
        if not 0 < hello.node_rank < self._nnodes:
            return f"--node-rank {hello.node_rank}: must be from 1 to {self._nnodes - 1}"
        return None

    def admitted(self, hello: NodeHello) -> None:
        pass  # its rank says all

    def title(self, hello: NodeHello) -> str:
        return f"machine {hello.node_rank}"

    def reminder(self, missing: list[int]) -> str:
        ranks = ", ".join(map(str, missing))
        return f"machine {ranks} of {self._nnodes}: start the same command there with its --node-rank"


class Members:
    """The agents of the other machines."""

    def __init__(self, config: ExecutorConfig, secret: bytes, roster: Roster | None = None) -> None:
        """Waits for connections.

        Args:
            config: Where to wait, and the model.
            secret: The cluster's.
            roster: Who may join. None: the machines that have pipeline stages.

        Raises:
            ModelError: The address cannot be used.
        """
        parallel = config.parallel
        self._config = config
        self._roster: Roster = roster or Stages(parallel.nnodes)
        self.session = secrets.token_hex(8)
        self.address = own_address(parallel.node_address or parallel.master_addr, self._roster.option)
        self.endpoint = endpoint_of(self.address, parallel.master_port)
        self._digests: tuple[str, str] | None = None
        """Of the program and of the model."""
        self._by_rank: dict[int, Member] = {}
        self._losses: list[WorkerDiedError] = []
        self._ticked_at = self._reminded_at = time.monotonic()
        self._clock = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context: zmq.Context[Any] = zmq.Context()
        curve = Curve(secret)
        self._gate = Gate(self._context, curve, lambda: os.eventfd_write(self._clock, 1), PING_INTERVAL)
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # else who reconnects is never heard if the old one seems alive
        self._socket.setsockopt(zmq.LINGER, 0)
        bound_frames(self._socket)
        self._socket.set_hwm(0)
        use_ipv6(self._socket, self.endpoint)
        curve.accept(self._socket)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(FAILED_HANDSHAKES | zmq.EVENT_DISCONNECTED)
        self._num_strangers = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromAgent)
        try:
            self._socket.bind(self.endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ModelError(
                f"{self._roster.option} {parallel.master_addr}: cannot wait for other machines at {self.endpoint}: "
                f"{error.strerror}"
            ) from None
        self._monitor.setsockopt(zmq.RCVHWM, 0)  # if it were full of strangers, ZeroMQ's thread would wait

    @property
    def missing(self) -> list[int]:
        """Ranks of machines that have not joined."""
        return self._roster.missing(self._by_rank)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of all machines, once all have joined."""
        return self.address, *(self._by_rank[rank].address for rank in sorted(self._by_rank))

    @property
    def joined(self) -> dict[int, tuple[bytes, int]]:
        """What identifies each machine that has joined, since it did."""
        return {rank: (member.identity, member.number) for rank, member in self._by_rank.items()}

    def name(self, rank: int) -> str:
        """Of a machine, for people."""
        return self._by_rank[rank].name if rank in self._by_rank else f"machine {rank}"

    @property
    def has_messages(self) -> bool:
        """Whether ``take`` would have some at once."""
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def poll_fds(self) -> list[zmq.Socket[bytes] | int]:
        """What becomes readable when ``take`` has something to do: at least once a second."""
        return [self._socket, self._monitor, self._clock]

    def send(self, rank: int, message: ToAgent) -> None:
        """Sends a message to a machine. One that has not joined gets nothing; one that is gone is lost."""
        member = self._by_rank.get(rank)
        if member is not None and not self._send(member.identity, message):
            self._lose(member, "is gone")

    def broadcast(self, message: ToAgent) -> None:
        """Sends a message to all machines that have joined."""
        for rank in sorted(self._by_rank):
            self.send(rank, message)

    def _send(self, identity: bytes, message: ToAgent) -> bool:
        try:
            self._socket.send_multipart([identity, *in_frames(self._encoder.encode(message))], zmq.NOBLOCK)
        except zmq.ZMQError:  # its connection has ended
            return False
        return True

    def take(self) -> list[tuple[int, FromMember]]:
        """The messages of machines that have joined, with their ranks."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._clock)
        result: list[tuple[int, FromMember]] = []
        ranks = {member.identity: rank for rank, member in self._by_rank.items()}
        while True:
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                message = self._decoder.decode(b"".join(frames))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                logger.error("dropped a malformed message of another machine: %s", error)
                continue
            if isinstance(message, NodeHello):
                self._greet(identity, message)
                ranks = {member.identity: rank for rank, member in self._by_rank.items()}
            elif identity in ranks:
                self._by_rank[ranks[identity]].silent = 0.0
                result.append((ranks[identity], message))
            else:
                self._send(identity, NodeUnknown())
        self._look_at_connections()
        self._tick()
        return result

    def take_losses(self) -> list[WorkerDiedError]:
        """What happened to machines that were lost."""
        losses, self._losses = self._losses, []
        return losses

    def _greet(self, identity: bytes, hello: NodeHello) -> None:
        """Admits a machine, or says why not."""
        reason = self._objection(hello)
        if reason is not None:
            self._send(identity, NodeRefused(reason))
            logger.warning("%s (%s) may not join: %s", self._roster.title(hello), printable(hello.host), reason)
            return
        before = self._by_rank.get(hello.node_rank)
        if before is not None and before.identity != identity and self._send(before.identity, NodePing()):
            self._send(identity, NodeRefused(f"{before.name} has this --node-rank", is_final=False))
            return
        if before is not None and (before.identity, before.number) == (identity, hello.number):
            self._send(identity, NodeWelcome(self.session))
            return
        if before is not None:
            self._lose(before, "has started again", keeps_memory=hello.session == self.session)
        title = self._roster.title(hello)
        member = Member(hello.node_rank, identity, hello.address, hello.host, hello.number, title)
        self._by_rank[member.rank] = member
        self._roster.admitted(hello)
        self._send(identity, NodeWelcome(self.session))
        logger.info("%s has joined", member.name)

    def _objection(self, hello: NodeHello) -> str | None:
        """Why a machine cannot join; None: it can."""
        reason = self._roster.objection(hello, self._by_rank)
        if reason is not None:
            return reason
        if self._digests is None:
            self._digests = program_digest().hex(), model_digest(self._config.model)
        if hello.code != self._digests[0]:
            return "its version of Octavo is not that of machine 0; install the same on all"
        if hello.model != self._digests[1]:
            return "its files of the model are not those of machine 0; config.json, or names or sizes of weights differ"
        return None

    def _lose(self, member: Member, why: str, *, keeps_memory: bool = False) -> None:
        del self._by_rank[member.rank]
        reason = f"{member.name} {why}"
        logger.warning("%s", reason)
        self._losses.append(WorkerDiedError(reason, loses_memory=not keeps_memory))

    def _tick(self) -> None:
        """About once a second: shows that the leader lives, and looks for those that do not."""
        now = time.monotonic()
        seconds = now - self._ticked_at
        if seconds < PING_INTERVAL:
            return
        self._ticked_at = now
        for member in list(self._by_rank.values()):
            member.silent += min(seconds, MAX_TICK)
            if member.silent >= NODE_TIMEOUT:
                self._lose(member, f"has said nothing for {member.silent:.0f} s")
        self._ping()
        if now - self._reminded_at >= REMINDER:
            self._reminded_at = now
            self._remind()

    def _look_at_connections(self) -> None:
        has_ended = False
        for _ in range(EVENTS_PER_TURN):
            if not self._monitor.poll(0):
                break
            if parse_monitor_message(self._monitor.recv_multipart())["event"] == zmq.EVENT_DISCONNECTED:
                has_ended = True
            else:
                self._num_strangers += 1
        if has_ended:
            self._ping()

    def _ping(self) -> None:
        """Shows that the leader lives. Who cannot be told is gone."""
        for member in list(self._by_rank.values()):
            if not self._send(member.identity, NodePing()):
                self._lose(member, "is gone")

    def _remind(self) -> None:
        """Says what an operator should know, every few seconds."""
        if self._num_strangers:
            logger.warning(
                "%d connections to %s came from programs without the cluster key", self._num_strangers, self.endpoint
            )
            self._num_strangers = 0
        if self.missing:
            logger.info("waiting at %s for %s", self.endpoint, self._roster.reminder(self.missing))

    def dismiss(self) -> None:
        """Tells all agents to end, and waits until they have heard it.

        ZeroMQ drops what an agent has not read yet when its connection ends.
        """
        self.broadcast(NodeGoodbye())
        deadline = time.monotonic() + GOODBYE_TIMEOUT
        while any(self._send(member.identity, NodePing()) for member in self._by_rank.values()):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            if self._monitor.poll(int(1000 * min(left, PING_INTERVAL))):
                self._monitor.recv_multipart()
        self.close()

    def close(self) -> None:
        if self._clock < 0:
            return
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
        self._gate.close()
        self._context.term()
        os.close(self._clock)
        self._clock = -1


def own_address(host: str, option: str = "--master-addr") -> str:
    """Where this machine waits for connections.

    Raises:
        ModelError: The name is unknown, or means this machine to itself alone.
    """
    try:
        address = numeric(host)
    except OSError as error:
        raise ModelError(f"{option} {host}: {error.strerror or error}") from None
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback and host not in (address, "localhost"):
        raise ModelError(
            f"{option} {host}: on this machine the name means {address}, which others cannot reach; add "
            "--node-address with the address at which they reach it"
        )
    return address
