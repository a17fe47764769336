"""The agent of a machine other than the leader's: starts workers as the leader says. Needs no torch.

It takes no configuration from its own command line but where it is, and where the model's files are. Messages between
workers and the leader's engine core pass through it, so a machine has one connection to the leader. The memory of its
workers' KV caches belongs to it: it survives a worker, not the agent.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket as sockets
import time
from typing import Any

import msgspec
import zmq
from msgspec.structs import replace
from zmq.utils.monitor import parse_monitor_message

from executor.base import ModelError, WorkerDiedError
from executor.config import ExecutorConfig
from executor.identity import code_digest, model_digest
from executor.liveness import MAX_TICK, sample_process
from executor.log import get_logger, printable, setup_logging
from executor.multiproc import LocalWorkers, Network
from executor.nodes.addresses import address_towards, endpoint_of, numeric, use_ipv6
from executor.nodes.frames import bound_frames, in_frames
from executor.nodes.head import open_listeners
from executor.nodes.key_files import read_key_file
from executor.nodes.keys import FAILED_HANDSHAKES, Curve
from executor.nodes.messages import (
    NODE_TIMEOUT,
    PING_INTERVAL,
    FromAgent,
    FromRank,
    KillNode,
    LaunchNode,
    NodeGoodbye,
    NodeHello,
    NodeLaunched,
    NodePrepared,
    NodeRefused,
    NodeStatus,
    NodeUnknown,
    NodeWelcome,
    PrepareNode,
    ToAgent,
    ToRanks,
    WorkerLost,
)
from executor.parallel import places

logger = get_logger()

REMINDER = 5.0
"""Seconds between lines that say what is waited for."""


class NodeAgent:
    """Joins the leader, and does as it says."""

    def __init__(self, config: ExecutorConfig, ipc_dir: str, log_level: str = "info") -> None:
        """Connects nowhere yet.

        Args:
            config: As the machine's own command line says, with the paths of the model's files here.
            ipc_dir: A directory of mode 0700 for the workers' sockets.
            log_level: Of the workers.

        Raises:
            ModelError: The key cannot be read.
        """
        self._own, self._parallel = config, config.parallel
        self._curve = Curve(secret := read_key_file(config.parallel.cluster_key))
        self._secret = secret
        self._digests = code_digest().hex(), model_digest(config.model)
        self._local = LocalWorkers(ipc_dir, log_level)
        self._config = config
        """Of the workers."""
        self._life = ""
        self._listeners: dict[str, int] = {}
        self._exit_code: int | None = None
        self._session, self._number, self._has_joined = "", 1, False
        self._silent = 0.0
        """Seconds since the leader was last heard from."""
        self._ticked_at = self._reminded_at = time.monotonic()
        self._obstacle = ""
        """Why the leader cannot be joined."""
        self._address = self._parallel.node_address
        self._endpoint = endpoint_of(self._parallel.master_addr, self._parallel.master_port)
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
        logger.info(
            "machine %d of %d: joining the leader at %s",
            self._parallel.node_rank,
            self._parallel.nnodes,
            self._endpoint,
        )
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
        for source in (self._socket, self._monitor, self._wake, *self._local.poll_fds()):
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
        """Sends what workers have said, and that one has died."""
        try:
            for frame in self._local.take():
                self._send(FromRank(self._life, frame))
        except WorkerDiedError as error:
            self._kill()
            logger.error("%s", error)
            self._send(WorkerLost(self._life, str(error), error.exit_code))

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
                self._send(self._status())
        if not self._has_joined:
            self._say_hello()

    def _status(self) -> NodeStatus:
        pids = self._local.worker_pids()
        if not pids:
            return NodeStatus()
        samples = [sample_process(pid) for pid in pids]
        return NodeStatus(
            self._life,
            tuple("" if sample is None else sample.state for sample in samples),
            tuple(0.0 if sample is None else sample.processor_seconds for sample in samples),
        )

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
        self._kill()

    def _kill(self) -> None:
        self._local.kill()
        self._close_listeners()

    def _close_listeners(self) -> None:
        for descriptor in self._listeners.values():
            os.close(descriptor)
        self._listeners = {}

    def _end(self) -> None:
        self._close_listeners()
        self._local.shutdown()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        with contextlib.suppress(OSError):
            os.close(self._wake)
        self._context.term()

    # -- messages of the leader ----------------------------------------------------------------------------

    def _handle(self, message: ToAgent) -> None:
        self._silent = 0.0
        if isinstance(message, ToRanks):
            if message.life == self._life and self._local.is_up:
                with contextlib.suppress(WorkerDiedError):  # its end is noticed elsewhere
                    self._local.send(message.frame)
        elif isinstance(message, NodeWelcome):
            self._join(message.session)
        elif isinstance(message, NodeRefused):
            self._refused(message)
        elif isinstance(message, NodeUnknown):
            if self._has_joined:
                self._leave("the leader is a new process")
            self._say_hello()
        elif isinstance(message, PrepareNode):
            self._prepare(message)
        elif isinstance(message, LaunchNode):
            self._launch(message)
        elif isinstance(message, KillNode):
            self._kill()
            if message.forgets_memory:
                self._local.forget_memory()
        elif isinstance(message, NodeGoodbye):
            logger.info("the leader has ended")
            self._exit_code = 0

    def _join(self, session: str) -> None:
        if self._has_joined:
            return
        if session != self._session:  # nobody knows what is in it
            self._local.forget_memory()
        self._session, self._has_joined, self._silent = session, True, 0.0
        logger.info("joined the leader at %s, as %s", self._endpoint, self._address)

    def _refused(self, message: NodeRefused) -> None:
        if message.is_final:
            raise ModelError(f"machine 0 does not admit this one: {printable(message.reason)}")
        self._obstacle = printable(message.reason)

    def _prepare(self, message: PrepareNode) -> None:
        """Opens the sockets of ranks. Files and threads are those of this machine, all else is the leader's."""
        self._kill()
        own, theirs = self._own, message.config
        model = replace(
            theirs.model,
            model=own.model.model,
            weights=own.model.weights,
            imatrix=own.model.imatrix,
            vision=own.model.vision,
        )
        device = replace(theirs.device, num_threads=own.device.num_threads or theirs.device.num_threads)
        self._config = replace(theirs, model=model, device=device)
        self._life = message.life
        try:
            found = open_listeners(places(theirs.parallel), self._parallel.node_rank, self._address)
        except OSError as error:
            raise ModelError(
                f"--node-address {self._address}: cannot listen for other machines: {error.strerror or error}"
            ) from None
        self._listeners = {name: descriptor for name, (descriptor, _) in found.items()}
        self._send(NodePrepared(self._life, {name: endpoint for name, (_, endpoint) in found.items()}))

    def _launch(self, message: LaunchNode) -> None:
        if message.life != self._life or self._local.is_up:
            return
        network = Network(cluster_key=self._secret, addresses=message.addresses, endpoints=message.endpoints)
        ranks = [each for each in places(self._config.parallel) if each.node_rank == self._parallel.node_rank]
        self._local.launch(self._config, ranks, network, self._listeners)
        self._close_listeners()
        self._send(NodeLaunched(self._life, self._local.worker_pids()))


def run_agent(config: ExecutorConfig, ipc_dir: str, log_level: str = "info") -> int:
    """Runs the agent of this machine. Returns the exit code.

    Args:
        config: As the machine's own command line says, with the paths of the model's files here.
        ipc_dir: A directory of mode 0700 for the workers' sockets.
        log_level: Of the agent and its workers.

    Raises:
        ModelError: The key cannot be read, or the leader does not admit the machine.
    """
    setup_logging(f"machine {config.parallel.node_rank}", log_level)
    return NodeAgent(config, ipc_dir, log_level).run()
