"""Workers on several machines, as the engine core sees them. See ``executor/base.py``."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial

import msgspec
import zmq

from executor.base import ModelError, WorkerDiedError
from executor.config import ExecutorConfig
from executor.liveness import ProcessSample
from executor.log import get_logger
from executor.messages import EXIT_MODEL, FromWorker, ToWorker, WorkerFailed
from executor.multiproc import STORE, LocalWorkers, Network
from executor.nodes.addresses import listen, private_address
from executor.nodes.key_files import read_key_file
from executor.nodes.members import Members
from executor.nodes.messages import (
    FromMember,
    FromRank,
    KillNode,
    LaunchNode,
    NodeLaunched,
    NodePrepared,
    NodeStatus,
    PrepareNode,
    ToRanks,
    WorkerLost,
)
from executor.parallel import ParallelState, awaited_from_afar, places

logger = get_logger()

DOWN, WAITING, PREPARING, LAUNCHING, RUNNING = range(5)
"""There are no workers; machines are missing; their sockets are being opened; their workers are being started; all
have been started."""


def open_listeners(
    ranks: list[ParallelState], node_rank: int, address: str, interface: str = ""
) -> dict[str, tuple[int, str]]:
    """Opens the sockets on which ranks of a machine get messages from others.

    Args:
        ranks: All ranks.
        node_rank: The machine.
        address: Its address.
        interface: ``--private-interface``. On it, machine 0 has the store (``STORE``) through which leaders find each
            other.

    Returns:
        Descriptor and endpoint, by name of the event.

    Raises:
        OSError: It is no address of this machine.
        ModelError: The interface cannot be used.
    """
    own = [each for each in ranks if each.node_rank == node_rank]
    found = {name: listen(address) for each in own for name in awaited_from_afar(ranks, each)}
    if interface and node_rank == 0:
        found[STORE] = listen(private_address(interface))
    return found


class NodesExecutor:
    """Starts workers on this machine, machine 0, and through agents on the others, and exchanges messages with all."""

    def __init__(self, config: ExecutorConfig, ipc_dir: str, log_level: str = "info") -> None:
        self.num_ranks = config.parallel.world_size
        self._config = config
        self._ranks = places(config.parallel)
        self._local = LocalWorkers(ipc_dir, log_level)
        self._num_lives = self._num_attempts = 0
        self._has_launched = False
        """There may be KV caches in the memory of other machines."""
        self._phase = DOWN
        self._prepared: dict[int, dict[str, str]] = {}
        """Endpoints of the ranks of machines, by rank of the machine."""
        self._listeners: dict[str, int] = {}
        self._pids: dict[int, tuple[int, ...]] = {}
        """Of the workers of other machines, by rank of the machine."""
        self._status: dict[int, NodeStatus] = {}
        self._messages: deque[FromWorker] = deque()
        self._error: WorkerDiedError | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromWorker)
        self._members: Members | None = None
        self._obstacle = ""
        """Why sockets could not be opened."""
        self._failure: WorkerFailed | None = None
        self._news = os.eventfd(0, os.EFD_CLOEXEC)
        """Readable if there is a failure."""
        try:
            self._secret = read_key_file(config.parallel.cluster_key)
            if config.parallel.private_interface:
                private_address(config.parallel.private_interface)  # there must be one
            self._members = Members(config, self._secret)
        except ModelError as error:
            self._failure = WorkerFailed(0, str(error), EXIT_MODEL)
            os.eventfd_write(self._news, 1)

    @property
    def _life(self) -> str:
        assert self._members is not None
        return f"{self._members.session}.{self._num_lives}.{self._num_attempts}"

    def start(self) -> None:
        self._num_lives += 1
        self._phase = WAITING
        self._advance()

    def _advance(self) -> None:
        """Takes the next step towards workers, if it can be taken."""
        members = self._members
        if members is None:
            return
        if self._phase == WAITING and not members.missing:
            try:
                own = open_listeners(self._ranks, 0, members.address, self._config.parallel.private_interface)
            except (ModelError, OSError) as error:  # a cable may have been pulled
                if not self._obstacle:
                    logger.error("%s; waiting for it", error)
                self._obstacle = str(error)
                return
            self._obstacle = ""
            self._listeners = {name: descriptor for name, (descriptor, _) in own.items()}
            self._prepared = {0: {name: endpoint for name, (_, endpoint) in own.items()}}
            self._phase = PREPARING
            self._num_attempts += 1  # an answer to an earlier attempt names sockets that are closed
            members.broadcast(PrepareNode(self._life, self._config))
        if self._phase == PREPARING and len(self._prepared) == self._config.parallel.nnodes:
            endpoints = {name: endpoint for each in self._prepared.values() for name, endpoint in each.items()}
            self._phase, self._has_launched = LAUNCHING, True
            members.broadcast(LaunchNode(self._life, members.addresses, endpoints))
            network = Network(cluster_key=self._secret, addresses=members.addresses, endpoints=endpoints)
            own_ranks = [each for each in self._ranks if each.node_rank == 0]
            self._local.launch(self._config, own_ranks, network, self._listeners)
            self._close_listeners()
        if self._phase == LAUNCHING and len(self._pids) == self._config.parallel.nnodes - 1:
            self._phase = RUNNING

    def _close_listeners(self) -> None:
        for descriptor in self._listeners.values():
            os.close(descriptor)
        self._listeners = {}

    def submit(self, message: ToWorker) -> None:
        assert self._members is not None
        frame = self._encoder.encode(message)
        self._local.send(frame)
        self._members.broadcast(ToRanks(self._life, frame))
        for loss in self._members.take_losses():
            raise loss

    def receive(self) -> list[FromWorker]:
        if self._failure is not None:
            return [self._failure]
        assert self._members is not None
        for rank, message in self._members.take():
            self._handle(rank, message)
        for loss in self._members.take_losses():
            self._lost(loss)
        self._advance()
        try:
            self._messages += [self._decoder.decode(frame) for frame in self._local.take()]
        except WorkerDiedError as error:
            self._error = self._error or error
        if self._messages:
            messages, self._messages = list(self._messages), deque()
            return messages
        if self._error is not None and self._phase != DOWN:
            death, self._error = self._error, None
            raise death
        return []

    def _lost(self, loss: WorkerDiedError) -> None:
        """A machine was lost. If nothing of it is lost with it, it is waited for again."""
        if self._phase < LAUNCHING and not (loss.loses_memory and self._has_launched):
            self._close_listeners()
            self._phase = min(self._phase, WAITING)
        elif self._error is None or loss.loses_memory:
            self._error = loss

    def _handle(self, node_rank: int, message: FromMember) -> None:
        """Handles a message of an agent; those that belong to an earlier life are late."""
        assert self._members is not None
        if message.life != self._life:
            return
        if isinstance(message, FromRank):
            self._messages.append(self._decoder.decode(message.frame))
        elif isinstance(message, NodeStatus):
            self._status[node_rank] = message
        elif isinstance(message, NodePrepared):
            self._prepared[node_rank] = message.endpoints
        elif isinstance(message, NodeLaunched):
            self._pids[node_rank] = message.pids
        elif isinstance(message, WorkerLost):
            reason = f"{message.reason} on {self._members.name(node_rank)}"
            self._error = self._error or WorkerDiedError(reason, message.exit_code)

    def poll_fds(self) -> list[zmq.Socket[bytes] | int]:
        own = [self._news] if self._members is None else self._members.poll_fds()
        return [*own, *self._local.poll_fds()]

    def worker_pids(self) -> tuple[int, ...]:
        if self._phase != RUNNING:
            return ()
        return (*self._local.worker_pids(), *(pid for rank in sorted(self._pids) for pid in self._pids[rank]))

    def remote_samplers(self) -> Mapping[int, Callable[[], ProcessSample | None]]:
        result: dict[int, Callable[[], ProcessSample | None]] = {}
        for node_rank in range(1, self._config.parallel.nnodes):
            own = [each.rank for each in self._ranks if each.node_rank == node_rank]
            result |= {rank: partial(self._sample, node_rank, index) for index, rank in enumerate(own)}
        return result

    def _sample(self, node_rank: int, index: int) -> ProcessSample | None:
        """What an agent last said about one of its workers."""
        status = self._status.get(node_rank)
        if status is None or index >= len(status.states) or not status.states[index]:
            return None
        return ProcessSample(status.states[index], status.seconds[index])

    def _forget_life(self) -> None:
        self._close_listeners()
        self._phase = DOWN
        if self._error is not None and not self._error.loses_memory:
            self._error = None
        self._messages.clear()
        self._prepared, self._pids, self._status = {}, {}, {}

    def shutdown(self) -> None:
        self._forget_life()
        if self._members is not None:
            self._members.dismiss()
            self._members = None
        self._local.shutdown()

    def kill(self) -> None:
        if self._members is not None:
            self._members.broadcast(KillNode())
        self._local.kill()
        self._forget_life()

    def forget_memory(self) -> None:
        if self._members is not None:
            self._members.broadcast(KillNode(forgets_memory=True))
        self._has_launched = False
        self._local.forget_memory()
