"""What an agent does when its machine has some of a model's workers: starts them, and passes their messages on.

The memory of the workers' KV caches belongs to the agent: it survives a worker, not the agent.
"""

from __future__ import annotations

import contextlib
import os

import zmq
from msgspec.structs import replace

from executor.base import ModelError, WorkerDiedError
from executor.config import ExecutorConfig, ModelConfig
from executor.liveness import sample_process
from executor.log import get_logger
from executor.multiproc import LocalWorkers, Network
from executor.nodes.addresses import private_address
from executor.nodes.head import open_listeners
from executor.nodes.messages import (
    FromMember,
    FromRank,
    KillNode,
    LaunchNode,
    NodeLaunched,
    NodePrepared,
    NodeStatus,
    PrepareNode,
    ToAgent,
    ToRanks,
    WorkerLost,
)
from executor.parallel import places

logger = get_logger()


class WorkerDuties:
    """See ``executor.nodes.agent.Duties``."""

    num_engines = 0

    def __init__(self, config: ExecutorConfig, secret: bytes, ipc_dir: str, log_level: str = "info") -> None:
        """Starts nothing yet.

        Args:
            config: As the machine's own command line says, with the paths of the model's files here.
            secret: The cluster's.
            ipc_dir: A directory of mode 0700 for the workers' sockets.
            log_level: Of the workers.
        """
        self._own = self._config = config
        self._node_rank = config.parallel.node_rank
        self.title = f"machine {self._node_rank} of {config.parallel.nnodes}"
        self._secret = secret
        self._local = LocalWorkers(ipc_dir, log_level)
        self._life = ""
        self._listeners: dict[str, int] = {}

    def poll_fds(self) -> list[zmq.Socket[bytes] | int]:
        return self._local.poll_fds()

    def take(self) -> list[FromMember]:
        """What workers have said, or that one has died."""
        try:
            return [FromRank(self._life, frame) for frame in self._local.take()]
        except WorkerDiedError as error:
            self.kill()
            logger.error("%s", error)
            return [WorkerLost(self._life, str(error), error.exit_code)]

    def status(self) -> NodeStatus:
        pids = self._local.worker_pids()
        if not pids:
            return NodeStatus()
        samples = [sample_process(pid) for pid in pids]
        return NodeStatus(
            self._life,
            tuple("" if sample is None else sample.state for sample in samples),
            tuple(0.0 if sample is None else sample.processor_seconds for sample in samples),
        )

    def kill(self) -> None:
        """The workers' memory may be of use to the leader yet."""
        self._local.kill()
        self._close_listeners()

    def forget_memory(self) -> None:
        self._local.forget_memory()

    def close(self) -> None:
        self._close_listeners()
        self._local.shutdown()

    def _close_listeners(self) -> None:
        for descriptor in self._listeners.values():
            os.close(descriptor)
        self._listeners = {}

    def handle(self, message: ToAgent, address: str) -> list[FromMember]:
        if isinstance(message, ToRanks):
            if message.life == self._life and self._local.is_up:
                with contextlib.suppress(WorkerDiedError):  # its end is noticed elsewhere
                    self._local.send(message.frame)
        elif isinstance(message, PrepareNode):
            return [self._prepare(message, address)]
        elif isinstance(message, LaunchNode):
            return self._launch(message)
        elif isinstance(message, KillNode):
            self.kill()
            if message.forgets_memory:
                self._local.forget_memory()
        return []

    def _prepare(self, message: PrepareNode, address: str) -> NodePrepared:
        """Opens the sockets of ranks. Files and threads are those of this machine, all else is the leader's."""
        self.kill()
        self._config = with_files_of(message.config, self._own)
        self._life = message.life
        try:
            parallel = self._config.parallel
            if parallel.private_interface:
                private_address(parallel.private_interface)  # there must be one
            found = open_listeners(places(parallel), self._node_rank, address)
        except OSError as error:
            raise ModelError(
                f"--node-address {address}: cannot listen for other machines: {error.strerror or error}"
            ) from None
        self._listeners = {name: descriptor for name, (descriptor, _) in found.items()}
        return NodePrepared(self._life, {name: endpoint for name, (_, endpoint) in found.items()})

    def _launch(self, message: LaunchNode) -> list[FromMember]:
        if message.life != self._life or self._local.is_up:
            return []
        network = Network(cluster_key=self._secret, addresses=message.addresses, endpoints=message.endpoints)
        ranks = [each for each in places(self._config.parallel) if each.node_rank == self._node_rank]
        self._local.launch(self._config, ranks, network, self._listeners)
        self._close_listeners()
        return [NodeLaunched(self._life, self._local.worker_pids())]


def with_files_of(config: ExecutorConfig, own: ExecutorConfig) -> ExecutorConfig:
    """The leader's configuration, with the files, threads and interface of this machine.

    Raises:
        ModelError: A draft model is missing here.
    """
    speculative = config.speculative
    if speculative is not None and speculative.draft is not None:
        draft = None if own.speculative is None else own.speculative.draft
        if draft is None:
            raise ModelError("--speculative-config: the server has a draft model; this machine needs the same option")
        speculative = replace(speculative, draft=_with_files(speculative.draft, draft))
    device = replace(config.device, num_threads=own.device.num_threads or config.device.num_threads)
    parallel = config.parallel
    if parallel.private_interface and own.parallel.private_interface:
        parallel = replace(parallel, private_interface=own.parallel.private_interface)
    model = _with_files(config.model, own.model)
    return replace(config, model=model, device=device, speculative=speculative, parallel=parallel)


def _with_files(model: ModelConfig, own: ModelConfig) -> ModelConfig:
    return replace(model, model=own.model, weights=own.weights, imatrix=own.imatrix, vision=own.vision)
