"""The agent of a machine other than the leader's: joins it, and does as it says. Needs no torch.

It takes no configuration from its own command line but where it is, and where the model's files are. What it does is
described by its ``Duties``: it starts workers (``worker_duties.py``), or whole engine cores. Messages between these and
the leader pass through it, so a machine has one connection to the leader.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket as sockets
import time
from typing import Any, Protocol

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from executor.base import ModelError
from executor.config import ExecutorConfig, ModelConfig, ParallelConfig
from executor.identity import model_digest, program_digest
from executor.liveness import MAX_TICK
from executor.log import get_logger, printable, setup_logging
from executor.nodes.addresses import address_towards, endpoint_of, numeric, use_ipv6
from executor.nodes.frames import bound_frames, in_frames
from executor.nodes.key_files import read_key_file
from executor.nodes.keys import FAILED_HANDSHAKES, Curve
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
from executor.nodes.worker_duties import WorkerDuties

logger = get_logger()

REMINDER = 5.0
"""Seconds between lines that say what is waited for."""


class Duties(Protocol):
    """What an agent does for the leader."""

    title: str
    """What the agent is, for people."""
    num_engines: int
    """See ``NodeHello``."""

    def poll_fds(self) -> list[Any]:
        """What becomes readable when ``take`` has messages."""

    def take(self) -> list[FromMember]:
        """Messages for the leader, without waiting."""

    def handle(self, message: ToAgent, address: str) -> list[FromMember]:
        """Does what the leader says. Returns the answers.

        Args:
            message: One that concerns the duties.
            address: Of this machine.

        Raises:
            ModelError: It cannot be done on this machine.
        """

    def status(self) -> FromMember:
        """About once a second: how the processes are."""

    def kill(self) -> None:
        """The leader is lost, or wants it: ends the processes at once."""

    def forget_memory(self) -> None:
        """Gives the memory that outlives processes back. There are none."""

    def close(self) -> None:
        """Ends all."""


class NodeAgent:
    """Joins the leader, and does as it says."""

    def __init__(self, parallel: ParallelConfig, digests: tuple[str, str], secret: bytes, duties: Duties) -> None:
        """Connects nowhere yet.

        Args:
            parallel: Where the machine is, and where the leader.
            digests: Of the program and of the model's files.
            secret: The cluster's.
            duties: What the agent does; closed with it.
        """
        self._parallel, self._digests = parallel, digests
        self._curve = Curve(secret)
        self._duties = duties
        self._exit_code: int | None = None
        self._session, self._number, self._has_joined = "", 1, False
        self._silent = 0.0
        """Seconds since the leader was last heard from."""
        self._ticked_at = self._reminded_at = time.monotonic()
        self._obstacle = ""
        """Why the leader cannot be joined."""
        self._address = parallel.node_address
        self._endpoint = endpoint_of(parallel.master_addr, parallel.master_port)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context: zmq.Context[Any] = zmq.Context()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToAgent)
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(FAILED_HANDSHAKES | zmq.EVENT_DISCONNECTED)
        self._connect()

    def _connect(self) -> None:
        socket = self._socket
        socket.setsockopt(zmq.IDENTITY, secrets.token_hex(16).encode())
        socket.setsockopt(zmq.IMMEDIATE, 1)  # what is said while nobody listens is not kept
        socket.setsockopt(zmq.LINGER, 0)
        bound_frames(socket)
        socket.setsockopt(zmq.RECONNECT_IVL, 200)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        socket.setsockopt(zmq.HEARTBEAT_IVL, int(PING_INTERVAL * 1000))  # else a machine that vanished is not noticed
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(NODE_TIMEOUT * 1000))
        socket.set_hwm(0)
        use_ipv6(socket, self._endpoint)
        self._curve.join(socket)
        socket.connect(self._endpoint)

    # -- the loop ------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Runs until the leader or a signal says that it should end. Returns the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        logger.info("%s: joining the leader at %s", self._duties.title, self._endpoint)
        try:
            self._tick(0.0)
            while self._exit_code is None:
                self._turn()
            return self._exit_code
        finally:
            self._end()

    def _on_signal(self, number: int, frame: object) -> None:
        self._exit_code = 0
        os.eventfd_write(self._wake, 1)

    def _turn(self) -> None:
        poller = zmq.Poller()
        for source in (self._socket, self._monitor, self._wake, *self._duties.poll_fds()):
            poller.register(source, zmq.POLLIN)
        events = dict(poller.poll(int(PING_INTERVAL * 1000)))
        if self._monitor in events:
            self._look_at_connection()
        while self._exit_code is None:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                self._handle(self._decoder.decode(b"".join(frames)))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                logger.error("dropped a malformed message of the leader: %s", error)
        self._pass_on()
        seconds = time.monotonic() - self._ticked_at
        if seconds >= PING_INTERVAL:
            self._tick(seconds)

    def _look_at_connection(self) -> None:
        event = parse_monitor_message(self._monitor.recv_multipart())["event"]
        if event != zmq.EVENT_DISCONNECTED:
            self._obstacle = "the keys do not match: --cluster-key must be the same file on all machines"
        elif self._has_joined:  # what was under way is lost, even if there is a new connection already
            self._leave("the connection to the leader has ended")

    def _pass_on(self) -> None:
        for message in self._duties.take():
            self._send(message)

    def _send(self, message: FromAgent) -> None:
        try:
            self._socket.send_multipart(in_frames(self._encoder.encode(message)), zmq.NOBLOCK)
        except zmq.Again:  # there is no connection
            if self._has_joined:
                self._leave("the connection to the leader has ended")

    def _tick(self, seconds: float) -> None:
        """About once a second: asks to join, or shows that the machine lives."""
        self._ticked_at = time.monotonic()
        if self._has_joined:
            self._silent += min(seconds, MAX_TICK)
            if self._silent >= NODE_TIMEOUT:
                self._leave(f"the leader has said nothing for {self._silent:.0f} s")
            else:
                self._send(self._duties.status())
        if not self._has_joined:
            self._say_hello()

    def _say_hello(self) -> None:
        if self._find_address():
            self._send(
                NodeHello(
                    node_rank=self._parallel.node_rank,
                    nnodes=self._parallel.nnodes,
                    code=self._digests[0],
                    model=self._digests[1],
                    address=self._address,
                    host=sockets.gethostname(),
                    number=self._number,
                    session=self._session,
                    num_engines=self._duties.num_engines,
                )
            )
        if (now := time.monotonic()) - self._reminded_at >= REMINDER:
            self._reminded_at = now
            logger.info("waiting for the leader at %s%s", self._endpoint, self._obstacle and f": {self._obstacle}")
            self._obstacle = ""

    def _find_address(self) -> bool:
        """Finds out the address of this machine. Returns whether it is known: the leader's name may not be, yet."""
        try:
            if self._parallel.node_address:
                self._address = numeric(self._parallel.node_address)
            else:
                self._address = address_towards(self._parallel.master_addr, self._parallel.master_port)
        except OSError as error:
            self._obstacle = str(error.strerror or error)
            return False
        return True

    def _leave(self, why: str) -> None:
        """Is no longer with the leader, for whom the workers count as lost. Their memory may be of use to it yet."""
        logger.warning("%s", why)
        self._has_joined = False
        self._number += 1
        self._duties.kill()

    def _end(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)  # first: the leader waits for it
        self._duties.close()
        with contextlib.suppress(OSError):
            os.close(self._wake)
        self._context.term()

    # -- messages of the leader ----------------------------------------------------------------------------

    def _handle(self, message: ToAgent) -> None:
        self._silent = 0.0
        if isinstance(message, NodeWelcome):
            self._join(message.session)
        elif isinstance(message, NodeRefused):
            self._refused(message)
        elif isinstance(message, NodeUnknown):
            if self._has_joined:
                self._leave("the leader is a new process")
            self._say_hello()
        elif isinstance(message, NodeGoodbye):
            logger.info("the leader has ended")
            self._exit_code = 0
        elif not isinstance(message, NodePing):
            for answer in self._duties.handle(message, self._address):
                self._send(answer)

    def _join(self, session: str) -> None:
        if self._has_joined:
            return
        if session != self._session:  # nobody knows what is in it
            self._duties.forget_memory()
        self._session, self._has_joined, self._silent = session, True, 0.0
        logger.info("joined the leader at %s, as %s", self._endpoint, self._address)

    def _refused(self, message: NodeRefused) -> None:
        if message.is_final:
            raise ModelError(f"machine 0 does not admit this one: {printable(message.reason)}")
        self._obstacle = printable(message.reason)


def digests(model: ModelConfig) -> tuple[str, str]:
    """Of the program and of a model's files: what machines must have in common."""
    return program_digest().hex(), model_digest(model)


def run_agent(config: ExecutorConfig, ipc_dir: str, log_level: str = "info") -> int:
    """Runs the agent of this machine, which starts workers. Returns the exit code.

    Args:
        config: As the machine's own command line says, with the paths of the model's files here.
        ipc_dir: A directory of mode 0700 for the workers' sockets.
        log_level: Of the agent and its workers.

    Raises:
        ModelError: The key cannot be read, or the leader does not admit the machine.
    """
    setup_logging(f"machine {config.parallel.node_rank}", log_level)
    secret = read_key_file(config.parallel.cluster_key)
    duties = WorkerDuties(config, secret, ipc_dir, log_level)
    return NodeAgent(config.parallel, digests(config.model), secret, duties).run()
