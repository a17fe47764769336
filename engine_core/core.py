"""The engine core: one thread, one poller, one loop.

It receives requests, fills the pipeline with plans, retires the oldest step when its result arrives, and sends outputs.
Workers live in other processes, so nothing here ever waits for a forward pass; the queue of steps in flight overlaps
planning with compute. Be careful with this file: everything passes through ``step``.
"""

from __future__ import annotations

import gc
import os
import time
from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol

import msgspec

from engine_core.adapters import ABANDONED, AdapterPool
from engine_core.config import EngineConfig, StepSize
from engine_core.flight_record import FlightRecord
from engine_core.in_flight import InFlight
from engine_core.memory import plan_kv_cache
from engine_core.messages import (
    EXIT_MODEL,
    AbortRequests,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineDead,
    EngineReady,
    EnsureAdapter,
    FinishReason,
    ForgetAdapter,
    FromEngineCore,
    Ping,
    PoolingSupport,
    ResetPrefixCache,
    SetVocabulary,
    Shutdown,
    SiblingRequests,
    StatusRequest,
    ToEngineCore,
    UtilityOutput,
    WorkersLost,
    WorkersRestarted,
)
from engine_core.request import Request
from engine_core.restart import ISOLATE_DEATHS, MAX_DEATHS, PROBATION_TIME, RestartBudget, suspect
from engine_core.scheduler import Scheduler
from engine_core.structured.compiler import Compiled, GrammarCompiler
from engine_core.structured.drafts import mask_counts
from engine_core.suspects import lost_requests
from engine_core.validation import image_problem, request_problem
from engine_core.worker_watch import WorkerWatch
from executor.base import REGISTRY, Executor, ExecutorFactory, WorkerDiedError
from executor.log import DETAILS, get_logger
from executor.messages import (
    AdapterLoaded,
    FromWorker,
    GrammarMask,
    Heartbeat,
    InitKVCache,
    KVCacheReady,
    LoadProgress,
    ModelRunnerOutput,
    WorkerFailed,
    WorkerReady,
)
from executor.registry import resolve

logger = get_logger()

TRIAL_INTERVAL = 0.5
"""Seconds between checks whether the next trial may begin."""
CHECK_INTERVAL = 10.0
"""Seconds between integrity checks of an idle engine: with many blocks one takes as long as several steps."""


class Transport(Protocol):
    """The engine core's side of the socket to the api."""

    def send(self, message: FromEngineCore) -> None: ...

    def wait(self, fds: Sequence[Any], timeout: float | None) -> list[ToEngineCore] | None:
        """Waits for a message, for one of the sockets and descriptors to become readable, or for the timeout in
        seconds.

        Returns:
            The received messages, or None if the api is gone.
        """


def create_executor(config: EngineConfig, ipc_dir: str, log_level: str) -> Executor:
    """Creates the configured executor."""
    factory: ExecutorFactory = resolve(REGISTRY, config.executor.distributed_executor_backend, "executor")
    scheduler = config.scheduler
    step_size = StepSize(max_num_seqs=scheduler.max_num_seqs, max_num_batched_tokens=scheduler.max_num_batched_tokens)
    return factory(msgspec.structs.replace(config.executor, step_size=step_size), ipc_dir, log_level)


class WorkerHungError(WorkerDiedError):
    """A worker is alive but makes no progress."""

    def __init__(self, reason: str, *, was_stopped: bool) -> None:
        super().__init__(reason)
        self.was_stopped = was_stopped


class EngineCore:
    """Drives an executor with the plans of a scheduler."""

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        transport: Transport,
        engine_epoch: int,
        record: FlightRecord | None = None,
        watch: WorkerWatch | None = None,
    ) -> None:
        """Prepares the engine core; ``run`` starts the workers.

        Args:
            config: Configuration, resolved by the api.
            executor: Computes the plans.
            transport: Connection to the api.
            engine_epoch: Number of this engine core, counted over restarts.
            record: Flight record of the work in progress.
            watch: Detects hung workers.
        """
        self.config = config
        self.executor = executor
        self.transport = transport
        self.engine_epoch = engine_epoch
        self.in_flight: deque[InFlight] = deque()
        """Steps without a result, oldest first."""
        self._results: deque[ModelRunnerOutput] = deque()
        """Results of the oldest steps in flight, held until the other ranks have answered."""
        self._lagging: deque[InFlight] = deque()
        """Retired steps that some rank other than the output rank has not answered."""
        self.exit_code: int | None = None
        """Set to end the loop."""
        self._scheduler: Scheduler | None = None
        self._early: dict[int, EngineCoreRequest] = {}
        """Requests that arrived before the model was loaded."""
        self._ready: dict[int, WorkerReady] = {}
        self._kv_ready: set[int] = set()
        self._announced = False
        """The api knows that the engine is ready: from now on, a restart of the workers is only a pause."""
        self._serving = False
        """The workers are loaded and accept plans."""
        self._may_schedule = False
        self._draining = False
        self._record = record
        self._watch = watch or WorkerWatch()
        self._suspects: deque[EngineCoreRequest] = deque()
        """Requests that may have killed engine cores: each is added once the previous one has proven harmless."""
        self._held: dict[int, EngineCoreRequest] = {}
        """Requests whose grammars must not be compiled during a trial, which must run a single request alone."""
        self._restarts = RestartBudget(config.max_worker_restarts)
        self._restart_reason = ""
        self._serving_since = 0.0
        self.probation = PROBATION_TIME
        self._checked_at = 0.0
        self._vocab_size = 0
        self._vocabulary: SetVocabulary | None = None
        self._grammars: GrammarCompiler | None = None
        """Unused by the loop until a request has a grammar."""
        self._prepared_grammars: GrammarCompiler | None = None
        """The same compiler, available as soon as the vocabulary is known."""
        self._hidden_size, self._pooling = 0, PoolingSupport()

    # -- the loop ------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Runs the loop until the engine core should exit. Returns the exit code."""
        self._start_workers()
        try:
            while self.exit_code is None:
                self.step()
        finally:
            self.close()
        return self.exit_code

    def close(self) -> None:
        """Ends all child processes."""
        if self._prepared_grammars is not None:
            self._prepared_grammars.close()
        self.executor.shutdown()

    def _start_workers(self) -> None:
        self.executor.start()
        self._watch.started(self.executor.worker_pids())

    def step(self) -> None:
        """One turn: receives messages, retires finished steps and plans another."""
        if self._held and not self._isolates:
            held, self._held = self._held, {}
            for request in held.values():
                self._admit(request)
        room = self._serving and self._has_room
        messages = self.transport.wait(*self._events(0 if room and self._may_schedule else None))
        if messages is None:
            self.exit_code = 0
            return
        for message in messages:
            self._handle(message)
        if self._grammars is not None:
            self._take_grammars(self._grammars)
        try:
            for answer in self.executor.receive():
                self._handle_worker(answer)
            self._look_after_workers()
            self._may_schedule |= self._isolates and not self._awaited
            if self.exit_code is None and self._serving:
                self._plan()
        except WorkerDiedError as error:
            self._restart_workers(error)
        if self.exit_code is None and self._serving and not self.in_flight:
            self._rest(heard_nothing=not messages)

    def _events(self, timeout: float | None) -> tuple[list[Any], float | None]:
        """What to wait for besides the api, and for how long."""
        fds = self.executor.poll_fds()
        grammars = self._grammars
        if grammars is not None:
            fds = [*fds, grammars.fileno()]
        if timeout == 0:
            return fds, timeout
        limits = [timeout, self._watch.interval if self._awaited or not self._serving else None]
        if self._isolates:
            limits.append(TRIAL_INTERVAL)
        if grammars is not None:
            limits.append(grammars.timeout)
        return fds, min((limit for limit in limits if limit is not None), default=None)

    def _rest(self, *, heard_nothing: bool) -> None:
        """Called while nothing is being computed: exits after draining, or checks integrity."""
        scheduler = self._scheduler
        assert scheduler is not None
        if scheduler.has_unfinished or self._suspects or self._held:
            return
        if self._draining:
            self.exit_code = 0
        elif heard_nothing and time.monotonic() - self._checked_at > CHECK_INTERVAL:
            scheduler.check_integrity()
            self._checked_at = time.monotonic()

    def _plan(self) -> None:
        """Plans a step if the pipeline has room."""
        scheduler = self._scheduler
        assert scheduler is not None
        if not self._may_schedule or not self._has_room:
            return
        if self._isolates:
            if not self._awaited:
                self._next_trial(scheduler)
            if scheduler.suspects.current is None and (self._isolates or self._awaited):
                self._may_schedule = False  # the next one runs alone: wait for steps in flight or the probation time
                return
        planned = scheduler.schedule()
        self._send_commands(scheduler)
        if self._record is not None:
            self._record.adding(0)
        if planned is None:
            self._may_schedule = False
            return
        plan, step = planned
        self.in_flight.append(step)
        if self._record is not None:
            self._record.computing(self.in_flight)
        self.executor.submit(plan)
        if len(self.in_flight) == 1:
            ended = self._send_mask()
            if ended:
                self._send_outputs(*ended)

    def _send_commands(self, scheduler: Scheduler) -> None:
        """Tells the workers which adapters to load, before the plan that needs them."""
        commands, scheduler.adapters.commands = scheduler.adapters.commands, []
        for command in commands:
            self.executor.submit(command)

    @property
    def _awaited(self) -> Sequence[InFlight]:
        """Steps that some worker has not answered, oldest first."""
        return (*self._lagging, *self.in_flight) if self._lagging else self.in_flight

    @property
    def _has_room(self) -> bool:
        """Whether another step may be planned. No rank may lag by more than the steps allowed in flight."""
        return len(self._awaited) < self.config.scheduler.max_in_flight_steps

    def _note_idle(self) -> None:
        """Records that no step is in flight, so that a death now implicates no request."""
        if self._record is not None and not self.in_flight:
            self._record.computing(())

    def _note_compiling(self, scheduler: Scheduler) -> None:
        if self._record is not None:
            self._record.compiling(scheduler.compiling)

    @property
    def _isolates(self) -> bool:
        """Whether a request runs alone or waits to."""
        return bool(self._suspects) or (self._scheduler is not None and self._scheduler.suspects.is_isolating)

    def _next_trial(self, scheduler: Scheduler) -> None:
        """Begins the trial of the next suspect. No rank may be computing steps of other requests."""
        may_convict = time.monotonic() - self._serving_since >= self.probation
        scheduler.suspects.next_trial(may_convict=may_convict)
        while self._suspects and not scheduler.suspects.is_isolating:
            suspicion = self._suspects[0].suspicion
            if suspicion is not None and suspicion.is_grave and not may_convict:
                return
            request = self._admit(self._suspects.popleft())
            if request is not None:
                scheduler.suspects.isolate([request])
                scheduler.suspects.next_trial()

    def _send_mask(self) -> list[EngineCoreOutput]:
        """Sends the mask of the oldest step in flight, if it has constrained rows: all earlier tokens are known.

        The worker computes the step meanwhile and waits for the mask before sampling. So each such step must get a
        mask, even if its requests are gone.

        Returns:
            The outputs of requests that end here because no further token is possible.
        """
        if not self.in_flight or not len(self.in_flight[0].grammar_rows):
            return []
        scheduler, step = self._scheduler, self.in_flight[0]
        assert scheduler is not None and self._grammars is not None
        states = scheduler.grammars(step)
        masks, problems = self._grammars.masks.fill(list(chain.from_iterable(states)))
        ended, step.num_masks = mask_counts([len(row) for row in states], problems)
        num_positions = bytes(len(row) for row in states) if len(masks) > len(states) else b""
        self.executor.submit(GrammarMask(step_id=step.step_id, bitmask=masks.tobytes(), num_positions=num_positions))
        rows = step.grammar_rows.tolist()
        return [
            scheduler.end_row(step, rows[row], FinishReason.STOP if error is None else FinishReason.ERROR, error or "")
            for row, error in ended
        ]

    # -- messages from the api -----------------------------------------------------------------------------

    def _handle(self, message: ToEngineCore) -> None:
        if isinstance(message, EngineCoreRequest):
            self._add_request(message)
        elif isinstance(message, SiblingRequests):
            self._add_siblings(message)
        elif isinstance(message, AbortRequests):
            self._abort(message)
        elif isinstance(message, SetVocabulary):
            self._vocabulary = self._vocabulary or message
            self._prepare_grammars()
        elif isinstance(message, Ping):
            self.transport.send(UtilityOutput(call_id=message.call_id))
        elif isinstance(message, StatusRequest):
            self.transport.send(UtilityOutput(call_id=message.call_id, result=self._status()))
        elif isinstance(message, ResetPrefixCache):
            if self._scheduler is not None:
                self._scheduler.kv.reset_prefix_cache()
            self.transport.send(UtilityOutput(call_id=message.call_id))
        elif isinstance(message, EnsureAdapter):
            self._ensure_adapter(message)
        elif isinstance(message, ForgetAdapter):
            if self._scheduler is not None:
                self._scheduler.adapters.forget(message.content_hash)
                self._may_schedule = True
        elif isinstance(message, Shutdown):
            self._draining = True
            if not message.drain:
                self.exit_code = 0

    def _ensure_adapter(self, message: EnsureAdapter) -> None:
        """Has an adapter loaded or tried. The api asks once the engine is ready."""
        error = "adapters need a server started with --enable-lora"
        if self._scheduler is not None and self.config.executor.lora.enable_lora:
            if not self._scheduler.adapters.ensure(message.call_id, message.adapter):
                self._may_schedule = True
                return
            error = ""
        self.transport.send(UtilityOutput(call_id=message.call_id, result={"error": error}))

    def _adapter_loaded(self, message: AdapterLoaded) -> None:
        scheduler = self._scheduler
        assert scheduler is not None
        outcome = scheduler.adapters.answered(message)
        if outcome is None:
            return
        for call_id in outcome.calls:
            self.transport.send(UtilityOutput(call_id=call_id, result={"error": outcome.error}))
        for request in outcome.failed:
            self._send_outputs(scheduler.fail_request(request, outcome.error))
        scheduler.unpark()
        self._may_schedule = True

    def _add_siblings(self, message: SiblingRequests) -> None:
        """Adds requests that differ only in name, index and seed: their common part is checked once."""
        is_checked = False
        for request in message.requests():
            is_checked = self._add_request(request, is_checked=is_checked)

    def _add_request(self, message: EngineCoreRequest, *, is_checked: bool = False) -> bool:
        """Accepts a request. Returns False if it was not admitted, or not yet."""
        scheduler = self._scheduler
        if scheduler is None or not self._announced:
            self._early.setdefault(message.index, message)
            return False
        if message.index in scheduler.requests:
            # An answer would end the first one: the api identifies requests by index.
            logger.error("dropped request %s: its index %d is in use", message.request_id, message.index)
        elif message.suspicion is not None and message.suspicion.num_deaths >= ISOLATE_DEATHS:
            self._suspects.append(message)
            self._may_schedule = True
        elif message.grammar is not None and self._isolates:
            self._held[message.index] = message
        else:
            return self._admit(message, is_checked=is_checked) is not None
        return False

    def _admit(self, message: EngineCoreRequest, *, is_checked: bool = False) -> Request | None:
        """Validates a request, unless that is already done, and queues it. Returns None if it was rejected."""
        scheduler = self._scheduler
        assert scheduler is not None
        request = None
        try:
            if self._record is not None:
                self._record.adding(message.index)
            problem = None
            if not is_checked:
                problem = request_problem(
                    message,
                    self._vocab_size,
                    scheduler.max_model_len,
                    self._hidden_size,
                    self._pooling,
                    multimodal=scheduler.images.support,
                    has_adapters=self.config.executor.lora.enable_lora,
                )
            if problem is None:
                request = Request(message)
                scheduler.add_request(request)
                if message.grammar is not None:
                    self._compile(request, scheduler)
        except Exception as error:  # a bad request must not break the loop
            logger.exception("failed to add request %s", message.request_id)
            if request is not None:
                scheduler.abort_request(request.index)
            problem = f"internal error: {error}"
        if self._record is not None:
            self._record.adding(0)
        if problem is not None:
            num_outputs = len(message.resumed_output_token_ids) // 4
            self._send_outputs(
                EngineCoreOutput(
                    index=message.index,
                    first_output_index=num_outputs,
                    finish_reason=FinishReason.ERROR,
                    error=problem,
                )
            )
            return None
        self._may_schedule = True
        return request

    def _prepare_grammars(self) -> None:
        """Starts building what all grammars share: calls that hold the GIL for long."""
        if self._vocabulary is not None and self._vocab_size and self._prepared_grammars is None:
            self._prepared_grammars = GrammarCompiler(self._vocab_size)
            self._prepared_grammars.set_vocabulary(self._vocabulary)

    def _compile(self, request: Request, scheduler: Scheduler) -> None:
        """Starts compiling a request's grammar; the request is not scheduled until that is done."""
        if self._grammars is None:
            self._grammars = self._prepared_grammars or GrammarCompiler(self._vocab_size)
        if self._record is not None:
            self._record.also_compiling(request.index)
        self._grammars.start(request, scheduler.max_output_tokens(request))

    def _take_grammars(self, grammars: GrammarCompiler) -> None:
        """Queues requests whose grammars are compiled, and rejects those whose grammars failed."""
        results = grammars.take()
        if not results:
            return
        assert self._scheduler is not None
        for compiled in results:
            if compiled.problem is None:
                self._scheduler.grammar_is_there(compiled.request)
            else:
                self._refuse(compiled, self._scheduler)
        self._note_compiling(self._scheduler)
        self._may_schedule = True  # the rejected request may have been on trial, with others waiting for it

    def _refuse(self, compiled: Compiled, scheduler: Scheduler) -> None:
        request, param = compiled.request, compiled.param
        if param == "":
            param = request.grammar_param
        output = scheduler.fail_request(request, f"{param} {compiled.problem}" if param else str(compiled.problem))
        self._send_outputs(msgspec.structs.replace(output, error_param=param))

    def _abort(self, message: AbortRequests) -> None:
        for index in message.indices:
            self._early.pop(index, None)
            self._held.pop(index, None)
            self._suspects = deque(suspect for suspect in self._suspects if suspect.index != index)
            if self._grammars is not None:
                self._grammars.forget(index)
            if self._scheduler is not None:
                self._scheduler.abort_request(index)
        self._may_schedule = True
        if self._scheduler is not None and self._grammars is not None:
            self._note_compiling(self._scheduler)
        if self._scheduler is not None and not self.in_flight:
            self._send_outputs()  # no step will follow to report the remaining requests

    def _send_outputs(self, *outputs: EngineCoreOutput) -> None:
        self.transport.send(
            EngineCoreOutputs(
                engine_epoch=self.engine_epoch,
                outputs=outputs,
                scheduler_stats=None if self._scheduler is None else self._scheduler.stats(),
                timestamp=time.monotonic(),
            )
        )

    def _status(self) -> dict[str, int | float | str | bool]:
        """Counts for tests and operators; ``integrity`` is empty if all checks pass."""
        status: dict[str, int | float | str | bool] = {"serving": self._serving, "steps_in_flight": len(self.in_flight)}
        scheduler = self._scheduler
        if scheduler is None:
            return status
        integrity = ""
        try:
            scheduler.check_integrity()
        except AssertionError as error:
            integrity = str(error) or "inconsistent"
        return status | {
            "num_running_reqs": scheduler.num_running,
            "num_waiting_reqs": scheduler.num_waiting,
            "num_blocks": scheduler.kv.num_blocks,
            "num_free_blocks": scheduler.kv.num_free,
            "num_preemptions": scheduler.num_preemptions,
            "num_adapters": scheduler.adapters.num_loaded,
            "integrity": integrity,
        }

    # -- messages from the workers -------------------------------------------------------------------------

    def _handle_worker(self, message: FromWorker) -> None:
        if isinstance(message, ModelRunnerOutput | Heartbeat):
            self._watch.heard(message.rank, message.step_id)
            while self._lagging and self._watch.all_answered(self._lagging[0].step_id):
                self._lagging.popleft()
                self._may_schedule = True
            if isinstance(message, ModelRunnerOutput):  # only the output rank sends them
                self._results.append(message)
            self._retire_steps()
            return
        self._watch.heard(message.rank)
        if isinstance(message, LoadProgress):
            if message.rank == 0:  # the other ranks load as much
                self.transport.send(message)
        elif isinstance(message, WorkerReady):
            self._ready[message.rank] = message
            if len(self._ready) == self.executor.num_ranks:
                self._init_kv_cache()
        elif isinstance(message, KVCacheReady):
            self._kv_ready.add(message.rank)
            if len(self._kv_ready) == self.executor.num_ranks:
                self._start_serving()
        elif isinstance(message, AdapterLoaded):
            self._adapter_loaded(message)
        elif isinstance(message, WorkerFailed):
            self._worker_failed(message)

    def _retire_steps(self) -> None:
        """Retires the steps whose results have arrived.

        While there are suspects, a step counts as survived only once all ranks have answered: otherwise the death of a
        rank after the others' answers would go unnoticed.
        """
        scheduler = self._scheduler
        assert scheduler is not None
        while self._results:
            if scheduler.suspects and not self._watch.all_answered(self._results[0].step_id):
                return
            self._retire(self._results.popleft())

    def _retire(self, result: ModelRunnerOutput) -> None:
        scheduler = self._scheduler
        assert scheduler is not None
        step = self.in_flight.popleft()
        assert step.step_id == result.step_id, f"expected the result of step {step.step_id}, got {result.step_id}"
        self._watch.step_done(step, result.forward_ms * 1e-3)
        if not self._watch.all_answered(step.step_id):
            self._lagging.append(step)
        self._restarts.progress()
        outputs = scheduler.update_from_output(step, result)
        ended: list[EngineCoreOutput] = []
        try:
            ended = self._send_mask()  # first, since a worker may be waiting for it
        finally:
            for piece in outputs.pieces():
                self.transport.send(piece)
        if ended:
            self._send_outputs(*ended)
        self._note_idle()
        self._may_schedule = True
        if self.config.executor.check_every_step:
            scheduler.check_integrity()

    def _init_kv_cache(self) -> None:
        ready = [self._ready[rank] for rank in sorted(self._ready)]
        if self._scheduler is None:
            self._settle_step_size(ready)
            planned = plan_kv_cache(ready, self.config)
            if isinstance(planned, str):
                self._die(planned, EXIT_MODEL)
                return
            shape, max_model_len = planned
            problem = image_problem(ready[0].multimodal, self.config.scheduler)
            if problem is not None:
                self._die(problem, EXIT_MODEL)
                return
            self._vocab_size = min(worker.vocab_size for worker in ready)
            self._hidden_size = min(worker.hidden_size for worker in ready)
            self._pooling = ready[0].pooling
            self._scheduler = Scheduler(
                self.config.scheduler,
                self.config.cache,
                shape,
                max_model_len,
                engine_epoch=self.engine_epoch,
                max_draft_tokens=self.config.executor.max_draft_tokens,
                num_lookahead_tokens=self.config.executor.num_lookahead_tokens,
                multimodal=self._ready[0].multimodal,
                adapters=AdapterPool(self.config.executor.lora, self.executor.num_ranks),
            )
            self._scheduler.on_admit = None if self._record is None else self._record.adding
            self._prepare_grammars()  # if the vocabulary came first
        shape = self._scheduler.shape
        self.executor.submit(
            InitKVCache(
                num_blocks=tuple(group.num_blocks for group in shape.groups),
                max_model_len=self._scheduler.max_model_len,
            )
        )

    def _settle_step_size(self, ready: list[WorkerReady]) -> None:
        """Takes over the workers' default of the step size."""
        known = [worker.max_num_batched_tokens for worker in ready if worker.max_num_batched_tokens]
        scheduler = self.config.scheduler
        if ready[0].pooling.needs_whole_prompts:  # the workers have made room for the longest
            scheduler = msgspec.structs.replace(
                scheduler,
                enable_chunked_prefill=False,
                long_prefill_token_threshold=0,
                max_num_batched_tokens=min(known),
            )
        elif known and scheduler.max_num_batched_tokens is None:
            scheduler = msgspec.structs.replace(scheduler, max_num_batched_tokens=min(known))
        self.config = msgspec.structs.replace(self.config, scheduler=scheduler)

    def _start_serving(self) -> None:
        scheduler = self._scheduler
        assert scheduler is not None
        worker = self._ready[0]
        self._serving = True
        self._may_schedule = True
        self._restarts.serves()
        self._serving_since = time.monotonic()
        reason, self._restart_reason = self._restart_reason, ""
        if self._announced:
            logger.info("workers restarted (%s)", reason)
            self.transport.send(
                WorkersRestarted(engine_epoch=self.engine_epoch, worker_pids=self.executor.worker_pids(), reason=reason)
            )
            return
        self._announced = True
        shape = scheduler.shape
        gc.collect()
        gc.freeze()
        self.transport.send(
            EngineReady(
                engine_epoch=self.engine_epoch,
                pid=os.getpid(),
                max_model_len=scheduler.max_model_len,
                vocab_size=self._vocab_size,
                num_kv_blocks=shape.num_tokens // shape.alignment,
                block_size=shape.alignment,
                max_num_seqs=self.config.scheduler.max_num_seqs,
                dtype=worker.dtype,
                device=worker.device,
                architecture=worker.architecture,
                worker_pids=self.executor.worker_pids(),
                hidden_size=self._hidden_size,
                weight_bytes=sum(each.weight_bytes for each in self._ready.values()),
                kv_cache_dtype=", ".join(dict.fromkeys(spec.dtype for spec in worker.kv_cache_groups)),
                pooling=worker.pooling,
                multimodal=worker.multimodal,
            )
        )
        early, self._early = self._early, {}
        for request in early.values():
            self._add_request(request)

    # -- faults --------------------------------------------------------------------------------------------

    def _worker_failed(self, message: WorkerFailed) -> None:
        """Handles a worker's report that it cannot continue.

        Raises:
            WorkerDiedError: A restart may help. Further messages of these workers are ignored.
        """
        if message.traceback:
            logger.error("worker %d failed", message.rank, extra={DETAILS: message.traceback})
        if message.exit_code == EXIT_MODEL or not self._serving and not self._restart_reason:
            self._die(message.message, message.exit_code)
        else:
            raise WorkerDiedError(f"worker {message.rank} failed: {message.message}")

    def _look_after_workers(self) -> None:
        """Checks for hung workers.

        Raises:
            WorkerDiedError: A worker is hung.
        """
        problem = self._watch.hung(self._awaited, is_loading=not self._serving)
        if problem is not None:
            raise WorkerHungError(problem.reason, was_stopped=problem.was_stopped)

    def _restart_workers(self, error: WorkerDiedError) -> None:
        """Restarts all workers and requeues running requests as if preempted."""
        reason = str(error)
        was_serving, self._serving = self._serving, False
        self._may_schedule = False
        if self._scheduler is not None:
            if was_serving and not (isinstance(error, WorkerHungError) and error.was_stopped):
                self._blame(self._scheduler)
            self._scheduler.restart()
            for call_id in self._scheduler.adapters.take_abandoned():
                self.transport.send(UtilityOutput(call_id=call_id, result={"error": ABANDONED}))
        self.in_flight.clear()
        self._results.clear()
        self._lagging.clear()
        self._note_idle()
        cause = "loading" if not was_serving else "hung" if isinstance(error, WorkerHungError) else "died"
        if not self._restarts.spend(cause):
            self._die(f"{reason}; gave up after {self._restarts.limit} restarts without progress", 1)
            return
        logger.error("%s; restarting the workers", reason)
        self._restart_reason = reason
        self._ready.clear()
        self._kv_ready.clear()
        if self._announced:
            requests = {} if self._scheduler is None else self._scheduler.requests
            suspicions = {
                index: request.suspicion for index, request in requests.items() if request.suspicion is not None
            }
            self.transport.send(WorkersLost(engine_epoch=self.engine_epoch, reason=reason, suspicions=suspicions))
        if self._scheduler is not None:
            self._send_outputs()  # nothing is running for now
        self.executor.kill()
        self._start_workers()

    def _blame(self, scheduler: Scheduler) -> None:
        """Determines which requests of the lost steps are suspects, and ends the culprit if one is found."""
        lost = lost_requests(self._awaited, scheduler.owner)
        for request, first, last in lost:
            after = request.suspicion = suspect(request.suspicion, first, last)
            if after.num_deaths >= MAX_DEATHS and len(lost) == 1:
                logger.error("request %s kills workers; it was ended", request.message.request_id)
                output = scheduler.fail_request(request, "the engine failed repeatedly while it computed this request")
                self._send_outputs(msgspec.structs.replace(output, is_culprit=True))
                self._restarts.explained()
                return
        scheduler.suspects.isolate(
            request
            for request, _, _ in lost
            if request.suspicion is not None and request.suspicion.num_deaths >= ISOLATE_DEATHS
        )

    def _die(self, message: str, exit_code: int) -> None:
        self.transport.send(EngineDead(engine_epoch=self.engine_epoch, message=message, exit_code=exit_code))
        self.exit_code = exit_code
