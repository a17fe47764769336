"""The engine core: one thread, one poller, one loop.

It receives requests, fills the pipeline with plans, retires the oldest step when its result arrives, and sends outputs.
Workers live in other processes, so nothing here ever waits for a forward pass; the queue of steps in flight overlaps
planning with compute. Be careful with this file: everything passes through ``step``.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from engine_core.adapters import ABANDONED, AdapterPool
from engine_core.admission import Admission
from engine_core.config import EngineConfig, StepSize
from engine_core.flight_record import FlightRecord
from engine_core.grammars import Grammars
from engine_core.in_flight import InFlight
from engine_core.kept_cache import KeptCache
from engine_core.kv_transfer.open import open_transfers
from engine_core.memory import different_kernels, plan_kv_cache, settle_step_size
from engine_core.messages import (
    EXIT_MODEL,
    AbortRequests,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineDead,
    EnsureAdapter,
    FinishReason,
    ForgetAdapter,
    FromEngineCore,
    Ping,
    ResetPrefixCache,
    SetVocabulary,
    Shutdown,
    SiblingRequests,
    SleepRequest,
    StatusRequest,
    ToEngineCore,
    UtilityOutput,
    WakeUpRequest,
    WorkersLost,
    WorkersRestarted,
)
from engine_core.restart import ISOLATE_DEATHS, MAX_DEATHS, PROBATION_TIME, RestartBudget, suspect
from engine_core.scheduler import Scheduler
from engine_core.sleep import Sleep
from engine_core.status import engine_ready, status
from engine_core.suspects import lost_requests
from engine_core.validation import image_problem
from engine_core.worker_watch import WorkerWatch
from executor.base import REGISTRY, Executor, ExecutorFactory, WorkerDiedError
from executor.host_memory import host_memory
from executor.log import DETAILS, get_logger
from executor.messages import (
    AdapterLoaded,
    FinishedTransfer,
    FromWorker,
    Heartbeat,
    InitKVCache,
    KVCacheFreed,
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


def create_executor(config: EngineConfig, ipc_dir: str, log_level: str, engine_epoch: int = 1) -> Executor:
    """Creates the configured executor.

    The replicas of a machine load together, and none has taken its memory yet. One that starts again finds the others
    loaded.
    """
    backend = "nodes" if config.executor.parallel.nnodes > 1 else config.executor.distributed_executor_backend
    factory: ExecutorFactory = resolve(REGISTRY, backend, "executor")
    scheduler = config.settled().scheduler
    step_size = StepSize(
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_in_flight_steps=scheduler.max_in_flight_steps,
    )
    loads_with_others = config.num_replicas > 1 and engine_epoch == 1
    executor = msgspec.structs.replace(
        config.executor,
        step_size=step_size,
        kv_cache_dir=config.cache.kv_cache_dir,
        memory_share=host_memory()[1] // config.num_replicas if loads_with_others else None,
    )
    return factory(executor, ipc_dir, log_level)


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
        self.config = config.settled()
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
        self._ready: dict[int, WorkerReady] = {}
        self._kv_ready: dict[int, KVCacheReady] = {}
        self._kept = KeptCache()
        self._sleep = Sleep(executor, self._answer)
        self._announced = False
        """The api knows that the engine is ready: from now on, a restart of the workers is only a pause."""
        self._serving = False
        """The workers are loaded and accept plans."""
        self._may_schedule = False
        self._draining = False
        self._record = record
        self._watch = watch or WorkerWatch()
        self._restarts = RestartBudget(config.max_worker_restarts)
        self._restart_reason, self._serving_since = "", 0.0
        self.probation = PROBATION_TIME
        self._checked_at = 0.0
        self._grammars = Grammars(record)
        self._admission = Admission(
            self._grammars, self._send_outputs, record, has_adapters=config.executor.lora.enable_lora
        )

    # -- the loop ------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Runs the loop until the engine core should exit. Returns the exit code."""
        self._start_workers()
        try:
            while self.exit_code is None:
                self.step()
        except BaseException:  # another core may follow: agents of other machines wait for it
            self.executor.kill()
            self._grammars.close()
            raise
        self.close()
        return self.exit_code

    def close(self) -> None:
        """Ends all child processes."""
        self._grammars.close()
        self.executor.shutdown()

    def _start_workers(self) -> None:
        self.executor.start()
        self._watch.started(self.executor.worker_pids(), self.executor.remote_samplers())

    def step(self) -> None:
        """One turn: receives messages, retires finished steps and plans another."""
        self._may_schedule |= self._admission.admit_held()
        room = self._serving and self._has_room and self._sleep.plans
        messages = self.transport.wait(*self._events(0 if room and self._may_schedule else None))
        if messages is None:
            self.exit_code = 0
            return
        for message in messages:
            self._handle(message)
        self._may_schedule |= self._admission.take_grammars()  # one that was rejected may have been on trial
        try:
            for answer in self.executor.receive():
                self._handle_worker(answer)
            self._look_after_workers()
            self._may_schedule |= self._admission.isolates and not self._awaited
            if self.exit_code is None and self._serving:
                self._plan()
                self._settle()
        except WorkerDiedError as error:
            self._restart_workers(error)
        if self.exit_code is None and self._serving and not self.in_flight:
            self._rest(heard_nothing=not messages)

    def _events(self, timeout: float | None) -> tuple[list[Any], float | None]:
        """What to wait for besides the api, and for how long."""
        fds = self.executor.poll_fds()
        grammars = self._grammars.compiler
        if grammars is not None:
            fds = [*fds, grammars.fileno()]
        if timeout == 0:
            return fds, timeout
        is_loading = not self._serving and not self._sleep.is_down
        limits = [timeout, self._watch.interval if self._awaited or is_loading else None]
        if self._admission.isolates:
            limits.append(TRIAL_INTERVAL)
        if grammars is not None:
            limits.append(grammars.timeout)
        return fds, min((limit for limit in limits if limit is not None), default=None)

    def _rest(self, *, heard_nothing: bool) -> None:
        """Called while nothing is being computed: exits after draining, or checks integrity."""
        scheduler = self._scheduler
        assert scheduler is not None
        if scheduler.has_unfinished or not self._admission.is_idle:
            return
        if scheduler.pool.transfers is not None and not scheduler.pool.transfers.is_idle:
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
        if not self._may_schedule or not self._has_room or not self._sleep.plans:
            return
        if self._admission.isolates:
            if not self._awaited:
                self._admission.next_trial(may_convict=time.monotonic() - self._serving_since >= self.probation)
            if scheduler.suspects.current is None and (self._admission.isolates or self._awaited):
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
        self._may_schedule = not scheduler.leaves_nothing(step)
        if len(self.in_flight) == 1:
            ended = self._send_mask()
            if ended:
                self._send_outputs(*ended)

    def _settle(self) -> None:
        """Sends what follows from results, and falls asleep if that is wanted and nothing is in flight."""
        scheduler = self._scheduler
        assert scheduler is not None
        self._send_commands(scheduler)
        if self._sleep.is_wanted and not self._awaited:
            self._serving = self._sleep.settle(scheduler)

    def _send_commands(self, scheduler: Scheduler) -> None:
        """Tells the workers which adapters to load and which blocks to move, before the plan that needs or changes
        them."""
        adapters, transfers = scheduler.pool.adapters, scheduler.pool.transfers
        commands, adapters.commands = adapters.commands, []
        for command in (*commands, *(() if transfers is None else transfers.take_messages())):
            self.executor.submit(command)
        for call_id in adapters.take_abandoned():
            self.transport.send(UtilityOutput(call_id=call_id, result={"error": ABANDONED}))

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
        assert scheduler is not None
        mask, ended = self._grammars.mask(scheduler.table, step)
        self.executor.submit(mask)
        rows = step.grammar_rows.tolist()
        return [
            scheduler.end_row(step, rows[row], FinishReason.STOP if error is None else FinishReason.ERROR, error or "")
            for row, error in ended
        ]

    # -- messages from the api -----------------------------------------------------------------------------

    def _handle(self, message: ToEngineCore) -> None:
        if isinstance(message, EngineCoreRequest):
            self._admission.add(message)
            self._may_schedule = True
        elif isinstance(message, SiblingRequests):
            self._admission.add_siblings(message)
            self._may_schedule = True
        elif isinstance(message, AbortRequests):
            self._abort(message)
        elif isinstance(message, SetVocabulary):
            self._grammars.set_vocabulary(message)
        elif isinstance(message, Ping):
            self.transport.send(UtilityOutput(call_id=message.call_id))
        elif isinstance(message, StatusRequest):
            self.transport.send(UtilityOutput(call_id=message.call_id, result=self._status()))
        elif isinstance(message, ResetPrefixCache):
            if self._scheduler is not None:
                self._scheduler.kv.reset_prefix_cache()
            self.transport.send(UtilityOutput(call_id=message.call_id))
        elif isinstance(message, SleepRequest | WakeUpRequest):
            self._may_schedule = True
            if self._sleep.handle(message, self._scheduler, is_serving=self._serving):
                self._ready.clear()
                self._kv_ready.clear()
                self._start_workers()
        elif isinstance(message, EnsureAdapter):
            self._ensure_adapter(message)
        elif isinstance(message, ForgetAdapter):
            if self._scheduler is not None:
                self._scheduler.pool.adapters.forget(message.content_hash)
                self._may_schedule = True
        elif isinstance(message, Shutdown):
            self._draining = True
            if not message.drain or self._sleep.is_wanted:
                self.exit_code = 0

    def _status(self) -> dict[str, int | float | str | bool]:
        return status(self._scheduler, is_serving=self._serving, num_steps=len(self.in_flight))

    def _answer(self, call_id: int, error: str | None = None) -> None:
        self.transport.send(UtilityOutput(call_id=call_id, error=error))

    def _ensure_adapter(self, message: EnsureAdapter) -> None:
        """Has an adapter loaded or tried. The api asks once the engine is ready."""
        error = "adapters need a server started with --enable-lora"
        if self._scheduler is not None and self.config.executor.lora.enable_lora:
            if not self._scheduler.pool.adapters.ensure(message.call_id, message.adapter):
                self._may_schedule = True
                return
            error = ""
        self.transport.send(UtilityOutput(call_id=message.call_id, result={"error": error}))

    def _adapter_loaded(self, message: AdapterLoaded) -> None:
        scheduler = self._scheduler
        assert scheduler is not None
        outcome = scheduler.pool.adapters.answered(message)
        if outcome is None:
            return
        for call_id in outcome.calls:
            self.transport.send(UtilityOutput(call_id=call_id, result={"error": outcome.error}))
        for request in outcome.failed:
            self._send_outputs(scheduler.pool.fail(request, outcome.error))
        scheduler.pool.unpark()
        self._may_schedule = True

    def _abort(self, message: AbortRequests) -> None:
        self._admission.abort(message.indices)
        self._may_schedule = True
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

    # -- messages from the workers -------------------------------------------------------------------------

    def _handle_worker(self, message: FromWorker) -> None:
        if isinstance(message, ModelRunnerOutput | Heartbeat):
            self._watch.heard(message.rank, message.step_id, message.forward_ms * 1e-3)
            while self._lagging and self._watch.all_answered(self._lagging[0].step_id):
                self._lagging.popleft()
                self._may_schedule = True
            if isinstance(message, ModelRunnerOutput):  # only the output rank sends them
                self._results.append(message)
            self._retire_steps()
            return
        self._watch.heard(message.rank)
        if isinstance(message, KVCacheFreed):
            self._sleep.freed(message.rank)
        elif isinstance(message, FinishedTransfer):
            if self._scheduler is not None and self._scheduler.pool.transfers is not None:
                self._scheduler.pool.transfers.finished(message, self._scheduler.waiting.put_back)
                self._may_schedule = True
        elif isinstance(message, LoadProgress):
            if message.rank == 0:  # the other ranks load as much
                self.transport.send(message)
        elif isinstance(message, WorkerReady):
            self._ready[message.rank] = message
            if len(self._ready) == self.executor.num_ranks:
                self._init_kv_cache()
        elif isinstance(message, KVCacheReady):
            self._kv_ready[message.rank] = message
            if len(self._kv_ready) == self.executor.num_ranks:
                keeps_cache = self._kept.is_same(self._ready, self._kv_ready)
                if not keeps_cache and self._scheduler is not None:
                    self._scheduler.pool.forget_cache()
                self._start_serving(keeps_cache=keeps_cache)
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
        if not self._watch.all_answered(step.step_id):
            self._lagging.append(step)
        outputs = scheduler.update_from_output(step, result)
        ended: list[EngineCoreOutput] = []
        try:
            ended = self._send_mask()  # first, since a worker may be waiting for it
        finally:
            for piece in outputs.pieces():
                self.transport.send(piece)
        if ended:
            self._send_outputs(*ended)
        self._watch.step_done(step)  # after the outputs, for which somebody waits
        self._restarts.progress()
        self._note_idle()
        self._may_schedule = True
        if self.config.executor.check_every_step:
            scheduler.check_integrity()

    def _init_kv_cache(self) -> None:
        ready = [self._ready[rank] for rank in sorted(self._ready)]
        misfit = self._kept.misfit(ready) or different_kernels(ready)
        if misfit is not None:
            self._worker_failed(WorkerFailed(0, misfit, EXIT_MODEL))
            return
        if self._scheduler is None:
            self.config = settle_step_size(self.config, ready)
            planned = plan_kv_cache(ready, self.config)
            if isinstance(planned, str):
                self._die(planned, EXIT_MODEL)
                return
            shape, max_model_len = planned
            problem = image_problem(ready[0].multimodal, self.config.scheduler)
            if problem is not None:
                self._die(problem, EXIT_MODEL)
                return
            speculative = self.config.executor.speculative if all(worker.verifies_drafts for worker in ready) else None
            self._scheduler = Scheduler(
                self.config.scheduler,
                self.config.cache,
                shape,
                max_model_len,
                engine_epoch=self.engine_epoch,
                max_draft_tokens=0 if speculative is None else speculative.num_speculative_tokens,
                max_samples=None
                if speculative is None
                else speculative.max_samples(self.config.scheduler.max_num_seqs),
                num_lookahead_tokens=self.config.executor.num_lookahead_tokens,
                multimodal=self._ready[0].multimodal,
                adapters=AdapterPool(self.config.executor.lora, self.executor.num_ranks),
                num_stages=self.config.executor.parallel.pipeline_parallel_size,
                has_late_results=any(worker.has_late_results for worker in ready),
            )
            self._scheduler.on_admit = None if self._record is None else self._record.adding
            self._grammars.set_vocab_size(min(worker.vocab_size for worker in ready))
        scheduler = self._scheduler
        transfers = open_transfers(self.config, scheduler.kv, ready, scheduler.max_model_len)
        if isinstance(transfers, str):
            self._die(transfers, EXIT_MODEL)
            return
        scheduler.pool.transfers = transfers
        self.executor.submit(
            InitKVCache(
                num_blocks=tuple(group.num_blocks for group in scheduler.shape.groups),
                max_model_len=scheduler.max_model_len,
                kv_store="" if transfers is None else transfers.location,
            )
        )

    def _start_serving(self, *, keeps_cache: bool) -> None:
        scheduler = self._scheduler
        assert scheduler is not None
        self._serving = True
        self._may_schedule = True
        self._restarts.serves()
        self._serving_since = time.monotonic()
        reason, self._restart_reason = self._restart_reason, ""
        if self._sleep.is_waking:
            self._sleep.woke_up()
            scheduler.admits = True
            if not reason:
                return
        if self._announced:
            logger.info("workers restarted (%s)", reason)
            self.transport.send(
                WorkersRestarted(
                    engine_epoch=self.engine_epoch,
                    worker_pids=self.executor.worker_pids(),
                    reason=reason,
                    keeps_cache=keeps_cache,
                )
            )
            return
        self._announced = True
        gc.collect()
        gc.freeze()
        self.transport.send(engine_ready(self.config, scheduler, self._ready, self.executor.worker_pids()))
        self._admission.open(scheduler, list(self._ready.values()))

    # -- faults --------------------------------------------------------------------------------------------

    def _worker_failed(self, message: WorkerFailed) -> None:
        """Handles a worker's report that it cannot continue.

        Raises:
            WorkerDiedError: A restart may help. Further messages of these workers are ignored.
        """
        if message.traceback:
            logger.error("worker %d failed", message.rank, extra={DETAILS: message.traceback})
        if self._sleep.is_waking:
            self.executor.kill()
            self._sleep.failed(message.message)
            return
        if message.exit_code == EXIT_MODEL or not self._serving and not self._restart_reason:
            self._die(message.message, message.exit_code)
        else:
            raise WorkerDiedError(f"worker {message.rank} failed: {message.message}")

    def _look_after_workers(self) -> None:
        """Checks for hung workers.

        Raises:
            WorkerDiedError: A worker is hung.
        """
        if self._sleep.is_down:
            return
        if not self._serving and self.executor.worker_pids() != self._watch.pids:  # workers of other machines
            self._watch.started(self.executor.worker_pids(), self.executor.remote_samplers())
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
            self._scheduler.restart(self._awaited if self._kept.survives(error) else None)
        self.in_flight.clear()
        self._results.clear()
        self._lagging.clear()
        self._sleep.lost_workers()
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
        lost = lost_requests(self._awaited, scheduler.table.owner)
        for request, first, last in lost:
            after = request.suspicion = suspect(request.suspicion, first, last)
            if after.num_deaths >= MAX_DEATHS and len(lost) == 1:
                logger.error("request %s kills workers; it was ended", request.message.request_id)
                output = scheduler.pool.fail(request, "the engine failed repeatedly while it computed this request")
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
