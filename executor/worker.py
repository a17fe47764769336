"""The worker process: its sockets to the engine core, and the loop.

It takes plans in order, launches them, and sends results in the same order as they arrive from the device. Any failure
becomes a ``WorkerFailed``: a human-readable line if the model or its configuration is at fault, otherwise a traceback.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import msgspec
import setproctitle
import torch
import zmq

import ops
from executor.adapters import LoadedAdapters, check_adapters
from executor.base import ModelError
from executor.config import ExecutorConfig
from executor.device.base import Device, create_device
from executor.draft_checks import speculation_of
from executor.draft_heads import load_head
from executor.draft_runner import DraftModel, check_draft_model, check_place
from executor.fingerprint import Digests, fingerprint, kernels_of, state_of
from executor.image_inputs import create_image_inputs
from executor.kv_memory import KVMemory
from executor.kv_transfer.base import KVConnector
from executor.kv_transfer.open import open_connector
from executor.layers.attention import form_groups
from executor.loader import LoadedModel, load_model
from executor.log import get_logger, setup_logging
from executor.messages import (
    EXIT_MODEL,
    AdapterLoaded,
    FreeKVCache,
    FromWorker,
    GrammarMask,
    Heartbeat,
    InitKVCache,
    KVCacheFreed,
    KVCacheReady,
    KVTransfer,
    LoadAdapter,
    LoadProgress,
    SchedulerOutput,
    ToWorker,
    UnloadAdapter,
    WorkerFailed,
    WorkerShutdown,
    i32,
)
from executor.model_runner import ModelRunner, PendingOutput, StartedStep
from executor.multiproc import LISTENER, STORE, WorkerLaunch
from executor.nodes.addresses import host_and_port
from executor.nodes.gloo import GlooLinks, GlooMeeting, meeting_of
from executor.nodes.links import NetworkLinks
from executor.nodes.ranks import join_machines
from executor.parallel import RANKS, RENDEZVOUS, STAGES, ParallelState, near_place, num_sharers, places
from executor.process import read_descriptors, read_payload
from executor.readiness import worker_ready
from executor.stages import Stage, StageRoom, connect
from executor.step_sequence import Answers, steps_of
from ops import Communicator, PeerLostError
from ops.dispatch import Spec, UnsupportedOpError

logger = get_logger()

PEER_TIMEOUT = 30.0
"""Seconds in which the engine core notices that a worker has ended, and ends those that miss it."""


@contextmanager
def _refusals(device: Device) -> Iterator[None]:
    """Turns what a device's kernels cannot compute into an error of the configuration."""
    try:
        yield
    except (UnsupportedOpError, NotImplementedError) as error:
        raise ModelError(f"--device {device.name} cannot run this model: {error}; --device cpu can") from error


class Worker:
    """Loads a model and executes plans. Answers go through ``send``."""

    runner: ModelRunner
    results_fd: int | None = None
    """A descriptor that is readable when ``take_results`` has work. None: results never need waiting for, or there is
    no device yet."""

    def __init__(
        self,
        parallel: ParallelState,
        config: ExecutorConfig,
        send: Callable[[FromWorker], None],
        descriptors: Mapping[str, int] | None = None,
        links: NetworkLinks | None = None,
    ) -> None:
        """
        Args:
            parallel: Its place.
            config: What it does.
            send: Takes its answers.
            descriptors: See ``WorkerLaunch``.
            links: With ranks of other machines.
        """
        self._descriptors = descriptors or {}
        self._links = links
        self._meeting: GlooMeeting | None = None
        """On rank 0, it has the store through which others meet, too."""
        self._stage_links: GlooLinks | None = None
        self._kv_memory: KVMemory | None = None
        self.parallel = parallel
        self.rank = parallel.rank
        self.config = config
        self._send = send
        self._adapters: LoadedAdapters | None = None
        self._connector: KVConnector | None = None
        self._plans: deque[SchedulerOutput | LoadAdapter | UnloadAdapter | KVTransfer] = deque()
        self._masks: dict[int, GrammarMask] = {}
        self._step: StartedStep | None = None
        """The step that is launched but cannot be sampled yet."""
        self._outputs: deque[PendingOutput] = deque()
        """Outputs of launched steps, in transit from the device."""
        self._answers = Answers()
        self._stage_fds: list[int] = []

    def start(self) -> None:
        """Loads the model, then reports its requirements.

        Raises:
            ModelError: The model cannot be served as configured.
        """
        torch.set_grad_enabled(False)
        config = self.config
        device = create_device(config.device.device)
        device.initialize(config.device, self.parallel.local_rank)
        communicator = self._meet(device)
        loaded = self._load(device, communicator)
        speculative = speculation_of(config.speculative, loaded, device, config.parallel.world_size)
        model = loaded.model
        groups = form_groups(model.attention_layers(), config.device.block_size, model.attention_of_stages)
        draft = self._load_draft(loaded, device)
        if "kv" in self._descriptors and device.maps_kv:
            self._kv_memory = KVMemory(self._descriptors["kv"])
        self.runner = ModelRunner(
            loaded,
            device,
            groups,
            step_size=config.step_size,
            enforce_eager=config.model.enforce_eager or not loaded.model.can_be_captured,
            speculative=speculative,
            draft=draft,
            forced_outputs=config.forced_outputs,
            rank=self.rank,
            communicator=communicator,
            kv_memory=self._kv_memory,
            stage=self._connect(loaded, device, communicator),
        )
        channel = self.runner.channel
        captures = not self.runner.enforce_eager and channel.graphs is None
        self.runner.images = create_image_inputs(
            loaded, device, self.runner.max_tokens, captures=captures, channel=channel
        )
        self.results_fd, self._stage_fds = self.runner.channel.fileno(), self.runner.stage.wake_fds
        communicator.wait()  # all have loaded their weights
        memory = device.memory()  # before the step, whose memory an allocator may keep
        with _refusals(device):
            step_bytes, position_bytes = self.runner.step_memory()
            self.runner.time_steps()
        if config.lora.enable_lora:
            self._adapters = LoadedAdapters(loaded, config.lora)
            step_bytes += self._adapters.num_bytes(self.runner.max_tokens)
        ready = worker_ready(
            self.runner,
            loaded,
            device,
            memory,
            (step_bytes, position_bytes),
            device.default_kv_bytes(),
            shares_memory=device.shares_memory and (RANKS in self._descriptors or STAGES in self._descriptors),
        )
        digests = Digests(config.kv_cache_dir) if config.kv_cache_dir else state_of
        own = fingerprint(config, self.parallel, device, ready.kv_cache_groups, digests)
        place, kernels = self.parallel.node_rank, kernels_of(device)
        self._send(msgspec.structs.replace(ready, fingerprint=own, node_rank=place, kernels=kernels))

    def _meet(self, device: Device) -> Communicator:
        """Connects this rank with others."""
        if self._links is not None:
            config, ranks = self.config.parallel, places(self.config.parallel)
            if not config.private_interface and not device.shares_memory:
                raise ModelError(
                    f"--nnodes {config.nnodes} --device {device.name}: NCCL encrypts nothing; name an interface in a "
                    "network that you trust with --private-interface"
                )
            if config.private_interface and self.rank == 0:
                logger.warning("what goes over %s is neither encrypted nor asks for a key", config.private_interface)
            self._links.check()
            if device.shares_memory:
                near = device.communicator(near_place(ranks, self.parallel))
                meeting = self._meeting = meeting_of(self._links, self.parallel, config.private_interface)
                communicator = join_machines(ranks, self.parallel, near, self._links, meeting)
                if meeting is not None:
                    self._stage_links = GlooLinks(self._links, meeting, ranks, self.rank)
                return communicator
        return device.communicator(self.parallel)

    def _connect(self, loaded: LoadedModel, device: Device, communicator: Communicator) -> Stage:
        """Connects this rank with those of other pipeline stages."""
        size = self.config.step_size
        max_tokens = size.max_num_batched_tokens or device.max_num_batched_tokens
        max_samples = size.max_num_seqs * (1 + self.config.max_draft_tokens)
        room = StageRoom(size.max_in_flight_steps, max_tokens, max_samples)
        hidden = Spec("tokens", loaded.hf_config.hidden_size, loaded.dtype)
        transfer = device.stage_transfer()
        return connect(
            self.parallel, self._descriptors, hidden, room, communicator, self._stage_links or self._links, transfer
        )

    def _load(self, device: Device, communicator: Communicator) -> LoadedModel:
        """Loads this rank's share of the model."""
        config, memory = self.config, device.memory()
        free_bytes = memory.free_bytes if config.memory_share is None else config.memory_share
        if device.shares_memory:
            free_bytes //= num_sharers(config.parallel, self.parallel.node_rank)
        loaded = load_model(
            config.model,
            self.parallel,
            device.torch_device,
            config.device.attention_backend,
            self._progress,
            memory.total_bytes,
            communicator,
            config.lora.max_loaded,
            free_bytes,
        )
        op_set = ops.op_set(device.torch_device.type).name
        check_adapters(config.lora, loaded, config.parallel.world_size, op_set)
        return loaded

    def _load_draft(self, target: LoadedModel, device: Device) -> DraftModel | None:
        """Loads the draft model or head, if there is one.

        Raises:
            ModelError: It cannot propose drafts for the model.
        """
        config = self.config
        if config.speculative is None or not config.speculative.has_model:
            return None
        method, backend = config.speculative.method, config.device.attention_backend
        check_place(target, config.parallel.world_size)
        model = config.speculative.draft or config.model
        if method == "draft_model":
            loaded = load_model(model, self.parallel, device.torch_device, backend, self._progress)
            check_draft_model(target, loaded)
        else:
            loaded = load_head(method, target, model, backend, self._progress)
        max_tokens = config.step_size.max_num_batched_tokens or device.max_num_batched_tokens
        return DraftModel(
            loaded,
            device,
            form_groups(loaded.model.attention_layers(), config.device.block_size),
            config.step_size.max_num_seqs,
            max_tokens,
        )

    def _progress(self, stage: str, done: int, total: int) -> None:
        self._send(LoadProgress(rank=self.rank, stage=stage, done=done, total=total))

    def handle(self, message: ToWorker) -> bool:
        """Handles a message. Returns False if it asks the worker to exit."""
        if isinstance(message, SchedulerOutput):
            self._plans += steps_of(message)
            self._work()
        elif isinstance(message, LoadAdapter | UnloadAdapter):
            self._plans.append(message)
            self._work()
        elif isinstance(message, GrammarMask):
            if self.runner.stage.is_last:
                self._masks[message.step_id] = message
                self._work()
        elif isinstance(message, FreeKVCache):
            if self._kv_memory is not None:
                self._kv_memory.free()
            self._send(KVCacheFreed(rank=self.rank))
        elif isinstance(message, KVTransfer):
            self._plans.append(message)
            self._work()
        elif isinstance(message, InitKVCache):
            with _refusals(self.runner.device):
                self.runner.initialize(message)
            if message.kv_store:
                self._connector = open_connector(message.kv_store, self.rank, self.runner)
            gc.collect()
            gc.freeze()
            kept = 0 if self._kv_memory is None else self._kv_memory.num_bytes
            self._send(KVCacheReady(rank=self.rank, num_kept_bytes=kept))
        elif isinstance(message, WorkerShutdown):
            return False
        return True

    def _change_adapters(self, message: LoadAdapter | UnloadAdapter) -> None:
        """Loads or forgets an adapter, between two steps: rows of earlier plans may have its number."""
        assert self._adapters is not None, "the engine core knows whether there are adapters"
        if isinstance(message, UnloadAdapter):
            self._adapters.unload(message.number)
            return
        error = ""
        try:
            self._adapters.load(message.number, message.adapter)
        except ModelError as problem:
            error = str(problem)
        except Exception as problem:  # its files may be anything; requests without it must continue
            logger.exception("cannot load adapter %s", message.adapter.name)
            error = f"{message.adapter.path}: cannot be loaded: {type(problem).__name__}: {problem}"
        self._send(AdapterLoaded(self.rank, message.number, message.adapter.content_hash, error))

    def _work(self) -> None:
        """Launches plans in order, each once another pipeline stage has given what it begins with.

        Before sampling, a step with constrained rows waits for its mask, and a step that reads tokens waits for the
        results of earlier steps. A step that may verify drafts waits for those results before launch, since its
        positions depend on them; while no drafts are worth verifying, it does not.
        """
        while self._step is not None or self._plans:
            if self._step is None:
                plan = self._plans[0]
                if isinstance(plan, KVTransfer):
                    if self._outputs:
                        return
                    self._transfer(plan)
                    self._plans.popleft()
                    continue
                if not isinstance(plan, SchedulerOutput):
                    self._change_adapters(plan)
                    self._plans.popleft()
                    continue
                if self._outputs and self.runner.must_wait_for_drafts(plan) or self.runner.lacks_input(plan):
                    return
                self._step = self.runner.begin(plan)
                self._plans.popleft()
            step = self._step
            if self._outputs and self.runner.lacks_tokens(step):
                return
            mask = self._masks.pop(step.plan.step_id, None)
            if step.plan.grammar_slots and mask is None and self.runner.stage.is_last:
                return
            self._step = None
            self._outputs.append(self.runner.finish(step, mask))
            self._send_results()
            if not self.runner.stage.is_last:  # its tokens come later, from the last stage
                self._send(Heartbeat(self.rank, step.plan.step_id, step.launch_ms))

    def _transfer(self, transfer: KVTransfer) -> None:
        """Begins a transfer. No earlier plan reads or writes its blocks any more."""
        assert self._connector is not None
        if not transfer.is_load:
            self._connector.save_kv_layer(transfer)
            return
        if self._kv_memory is not None:
            self._kv_memory.use(transfer.groups, i32(transfer.block_ids))
        self._connector.start_load_kv(transfer)

    @property
    def has_plans(self) -> bool:
        """Whether plans wait for results, or for another pipeline stage."""
        return bool(self._plans)

    @property
    def wake_fds(self) -> list[int]:
        """Descriptors that become readable when ``take_results`` has work."""
        results = self._stage_fds if self.results_fd is None else [self.results_fd, *self._stage_fds]
        return results if self._connector is None else [*results, self._connector.fileno()]

    def take_results(self) -> None:
        """Sends results that have arrived from the device, or of transfers, and resumes the work that waited for
        them."""
        if self._connector is not None:
            for finished in self._connector.get_finished():
                self._send(finished)
        self.runner.stage.listen()
        self._send_results()
        self._work()

    def _send_results(self) -> None:
        while self._outputs and self._outputs[0].is_ready():
            pending = self._outputs.popleft()
            output = self._answers.add(pending.collect(), pending.num_left)
            if output is None:
                continue
            if self.parallel.is_output_rank:
                self._send(output)
            elif self.runner.stage.is_last:
                self._send(Heartbeat(self.rank, output.step_id, output.forward_ms))

    def close(self) -> None:
        """Ends what runs beside the steps."""
        if self._connector is not None:
            self._connector.close()
            self._connector = None
        if self._stage_links is not None:
            self._stage_links.close()
            self._stage_links = None

    def run(self, receive: Callable[[Sequence[int]], ToWorker | None]) -> int:
        """Starts the worker, then handles messages until one asks it to exit.

        Args:
            receive: Waits for a message, or returns None once one of the given descriptors becomes readable.

        Returns:
            The exit code.
        """
        try:
            self.start()
            while True:
                message = receive(self.wake_fds)
                if message is None:
                    self.take_results()
                elif not self.handle(message):
                    break
        except ModelError as error:
            self._send(WorkerFailed(rank=self.rank, message=str(error), exit_code=EXIT_MODEL))
            return EXIT_MODEL
        except PeerLostError as error:  # why it has left, the engine core learns from its process
            logger.warning("%s; waiting for the engine core to start all again", error)
            if not _is_ended(receive):  # no process has ended: what failed is the connection
                self._send(WorkerFailed(rank=self.rank, message=str(error), traceback=traceback.format_exc()))
            return 1
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self._send(WorkerFailed(rank=self.rank, message=reason, traceback=traceback.format_exc()))
            return 1
        finally:
            self.close()
        return 0


def _is_ended(receive: Callable[[Sequence[int]], ToWorker | None]) -> bool:
    """Waits until the engine core ends this worker, as it does once it knows that another one has ended. False: it has
    not for ``PEER_TIMEOUT``."""
    expired = os.eventfd(0)
    timer = threading.Timer(PEER_TIMEOUT, os.eventfd_write, (expired, 1))
    timer.daemon = True
    timer.start()
    try:
        while (message := receive([expired])) is not None:
            if isinstance(message, WorkerShutdown):
                return True
        return False
    finally:
        timer.cancel()
        timer.join()
        os.close(expired)


class Inbox:
    """What a worker process waits for: messages of the engine core, their end, and descriptors of its own."""

    def __init__(self, messages: zmq.Socket[bytes], end: int) -> None:
        """
        Args:
            messages: Brings them.
            end: A descriptor that becomes readable when the engine core is gone.
        """
        self._messages = messages
        self._decoder = msgspec.msgpack.Decoder(ToWorker)
        self._poller = zmq.Poller()
        self._poller.register(messages, zmq.POLLIN)
        self._poller.register(end, zmq.POLLIN)
        self._wake_fds: list[int] = []

    def receive(self, wake_fds: Sequence[int]) -> ToWorker | None:
        """See ``Worker.run``."""
        if self._wake_fds != wake_fds:  # others may be readable, and nobody would take what they tell of
            for descriptor in self._wake_fds:
                self._poller.unregister(descriptor)
            for descriptor in wake_fds:
                self._poller.register(descriptor, zmq.POLLIN)
            self._wake_fds = list(wake_fds)
        events = dict(self._poller.poll())
        if any(descriptor in events for descriptor in wake_fds):
            return None  # results first: their receiver may be about to send more work
        if self._messages in events:
            message: ToWorker = self._decoder.decode(self._messages.recv())
            return message
        return WorkerShutdown()


def run() -> int:
    """Runs a worker as its start message says. Returns the exit code."""
    try:
        launch = msgspec.msgpack.decode(read_payload(), type=WorkerLaunch)
    except EOFError:  # prepared, and never needed
        return 0
    setproctitle.setproctitle(f"octavo worker {launch.parallel.rank}")
    if launch.cores:  # before any other thread
        os.sched_setaffinity(0, launch.cores)
    setup_logging(f"worker {launch.parallel.rank}", launch.log_level)
    context = zmq.Context()
    inputs: zmq.Socket[bytes] = context.socket(zmq.PULL)
    outputs: zmq.Socket[bytes] = context.socket(zmq.PUSH)
    for socket, address in ((inputs, launch.input_address), (outputs, launch.output_address)):
        socket.set_hwm(0)
        socket.connect(address)
    encoder = msgspec.msgpack.Encoder()

    def send(message: FromWorker) -> None:
        outputs.send(encoder.encode(message))

    descriptors = dict(zip(launch.descriptors, read_descriptors(), strict=True))
    parallel = dataclasses.replace(
        launch.parallel, memory_fd=descriptors.get(RANKS, -1), rendezvous_fd=descriptors.get(RENDEZVOUS, -1)
    )
    links = None
    if launch.network is not None:
        if STORE in launch.network.endpoints:
            parallel = dataclasses.replace(
                parallel,
                rendezvous_fd=descriptors.get(LISTENER + STORE, -1),
                store=host_and_port(launch.network.endpoints[STORE]),
                interface=launch.config.parallel.private_interface,
            )
        sockets = {name.removeprefix(LISTENER): fd for name, fd in descriptors.items() if name.startswith(LISTENER)}
        links = NetworkLinks(launch.network, places(launch.config.parallel), parallel, sockets)
    code = Worker(parallel, launch.config, send, descriptors, links).run(Inbox(inputs, sys.stdin.fileno()).receive)
    if links is not None:
        links.close()
    outputs.close(linger=2000)
    inputs.close(linger=0)
    context.term()
    return code
