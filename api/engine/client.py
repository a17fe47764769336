"""The api process's client of the engine: requests go in and deltas come out, even if processes behind it die.

The client keeps a journal of each request: its prompt, resolved parameters with the seed, and emitted tokens. A
request's output depends on nothing else, so when the engine core dies, the client starts another and resubmits the
unfinished requests; consumers see only a pause.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from api.engine.blame import CULPRIT_ERROR, fingerprint
from api.engine.calls import Answer, Calls
from api.engine.channel import Channel, PacedChannel
from api.engine.core_socket import CoreSocket
from api.engine.metrics import EngineMetrics
from api.engine.outbox import Outbox
from api.engine.output import OutputProcessor
from api.engine.place import ALONE, INDEX_BITS, Place, no_such_rank
from api.engine.queue_bound import QueueBound, Tenant
from api.engine.remote import RemoteSocket, RemoteSupervisor
from api.engine.request_state import RequestState
from api.engine.resubmission import clear_suspicion, resumed_request, runs_alone, trial_order
from api.engine.sleeper import Sleeper
from api.engine.submission import Submission
from api.engine.supervisor import Supervisor
from api.engine.vocabulary import VocabularyFrame
from api.errors import EngineDeadError, asleep
from api.model.tokenizer import Tokenizer
from engine_core.config import EngineConfig
from engine_core.launch import STOPPED_TIMEOUT, ProcessWatch, get_logger
from engine_core.messages import (
    EXIT_MODEL,
    AbortRequests,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineDead,
    EngineReady,
    EnsureAdapter,
    ForgetAdapter,
    FromEngineCore,
    LoadProgress,
    Ping,
    ResetPrefixCache,
    SiblingRequests,
    SleepRequest,
    StatusRequest,
    ToEngineCore,
    UtilityOutput,
    WakeUpRequest,
    WorkersLost,
    WorkersRestarted,
)
from engine_core.restart import MAX_DEATHS, RestartBudget, suspect

logger = get_logger()

PING_INTERVAL = 1.0
PING_TIMEOUT = 10.0
"""Seconds without a message after which an engine core counts as hung; only time in which it could run counts, see
``ProcessWatch``. It never waits for a forward pass, so it answers much sooner, however long a step takes."""
LOAD_PING_TIMEOUT = 60.0
"""The same for an engine core that is starting."""
UNREADY_TIME = 3.0
"""Seconds without a message after which the engine counts as not ready."""

LAST_WORDS_TIMEOUT = 200
"""Milliseconds to wait for the last message of an engine core that exited with an error."""

MAX_ABORTS_PER_TURN = 256

ControlMessage = Ping | StatusRequest | ResetPrefixCache | EnsureAdapter | SleepRequest | WakeUpRequest


@dataclass
class _Life:
    """State of the current engine core process."""

    watch: ProcessWatch | None = None
    """None: there is no process to watch."""
    has_vocabulary: bool = False
    """It was sent the vocabulary, which grammars need."""
    is_hung: bool = False
    """It was killed because it did not answer."""


class EngineClient:
    """One engine core behind a ROUTER socket, supervised and restarted."""

    def __init__(
        self,
        config: EngineConfig,
        read_tokenizer: Callable[[], Tokenizer] | None,
        metrics: EngineMetrics,
        *,
        on_progress: Callable[[LoadProgress], None] | None = None,
        on_fatal: Callable[[EngineDeadError], None] | None = None,
        bounds_queue: bool = False,
        prepares_grammars: bool = False,
        log_level: str = "info",
        place: Place = ALONE,
    ) -> None:
        """Creates a client; ``start`` launches the engine.

        Args:
            config: Configuration of the engine core.
            read_tokenizer: Called in a thread while the engine starts; the tokenizer detokenises outputs. None: outputs
                are token ids only.
            metrics: Metrics to update.
            on_progress: Called while the model loads.
            on_fatal: Called once if the engine dies for good after it had been ready.
            bounds_queue: ``check_queue`` rejects requests when too many wait.
            prepares_grammars: Send the vocabulary as soon as nobody waits for the engine, instead of with the first
                request that has a grammar, which would delay all others by some tenths of a second.
            log_level: Log level of the child processes.
            place: Which replica it is.
        """
        self.rank = place.rank
        self.tokenizer: Tokenizer | None = None
        self.ready: EngineReady | None = None
        """The engine's first ready message."""
        self.dead: EngineDeadError | None = None
        """Why the engine is dead for good; None: it is not."""
        self._config = config
        self._read_tokenizer = read_tokenizer
        self._metrics = metrics
        self._on_progress = on_progress
        self._on_fatal = on_fatal
        self._pool = place.pool
        own = QueueBound(config.scheduler, enabled=bounds_queue, on_refused=metrics.on_refused)
        self._queue, events, self._culprits = place.shares(own)
        self._processor = OutputProcessor(metrics, events)
        self._supervisor, self._socket = self._connection(place, log_level)
        self._serving = self._has_workers = self._closing = self._was_idle = False
        self._next_index = place.rank << INDEX_BITS
        self._calls, self.sleeper = Calls(), Sleeper(self.call, self._on_sleep)
        self._budget = RestartBudget()
        self._life = _Life()
        self._last_words: EngineDead | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._started: asyncio.Future[EngineReady] | None = None
        self._pinger: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outbox = Outbox(self._send_again)
        self._vocabulary = VocabularyFrame(self._on_vocabulary)
        self._prepares_grammars = prepares_grammars

    def _connection(
        self, place: Place, log_level: str
    ) -> tuple[Supervisor | RemoteSupervisor, CoreSocket | RemoteSocket]:
        """What starts the engine core, and what talks to it."""
        remote = place.remote
        if remote is None:
            supervisor = Supervisor(self._config, self._on_exit, log_level, place.local_rank)
            return supervisor, CoreSocket(self._handle)
        socket = RemoteSocket(remote, place.rank, self._handle)
        remote.add(place.rank, socket.deliver, self._on_remote_exit)
        return RemoteSupervisor(remote, place.rank, log_level), socket

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self) -> EngineReady:
        """Launches the engine, reads the tokenizer meanwhile, and waits until both are ready.

        Raises:
            EngineDeadError: The engine cannot start; ``exit_code`` 78 if the model or its configuration is at fault.
            ModelFileError: The tokenizer cannot be read.
        """
        self._loop = asyncio.get_running_loop()
        self._socket.open(self._supervisor.address)
        self._started = self._loop.create_future()
        self._launch()
        self._pinger = asyncio.create_task(self._watch_heartbeat())
        ready, _ = await asyncio.gather(self._started, self._load_tokenizer())
        self.ready = ready
        self._metrics.on_ready(ready)
        self._queue.on_ready(ready)
        return ready

    async def _load_tokenizer(self) -> None:
        if self._read_tokenizer is not None:
            self.tokenizer = await asyncio.to_thread(self._read_tokenizer)

    def _launch(self) -> None:
        self._socket.epoch += 1
        self._serving = False
        self._has_workers = False
        self._life = _Life()
        self._last_words = None
        self._outbox.clear()
        self._socket.begin_life()
        self._supervisor.start(self._socket.epoch)
        self._life.watch = self._supervisor.watch()

    async def close(self) -> None:
        """Stops the engine. Unfinished requests end with an error."""
        self._closing = True
        self._socket.stop()
        if self.dead is None:
            self.dead = EngineDeadError("the server is shutting down")
        if self._pinger is not None:
            self._pinger.cancel()
            await asyncio.wait([self._pinger])  # the loop may end as soon as this does
        self._vocabulary.close()
        self._outbox.clear()
        await self._supervisor.stop()
        self._socket.close()
        self._calls.fail_all()
        self._processor.fail_all(str(self.dead))

    @property
    def num_unfinished(self) -> int:
        return len(self._processor.states)

    @property
    def engine_pid(self) -> int | None:
        return self._supervisor.pid

    @property
    def is_serving(self) -> bool:
        """Whether an engine core accepts requests right now; otherwise new requests wait in the journal."""
        return self._serving

    @property
    def is_ready(self) -> bool:
        """Whether new requests run without a pause: engine core and workers are up and responding."""
        watch = self._life.watch
        is_silent = watch is not None and watch.waited > UNREADY_TIME
        is_up = self._serving and self._has_workers and self.sleeper.is_awake
        return self.dead is None and is_up and not is_silent

    # -- requests ------------------------------------------------------------------------------------------

    def open_channel(self, stream_interval: int = 1) -> Channel:
        """Opens a channel for the outputs of requests that share a consumer.

        Args:
            stream_interval: Tokens of a choice per delta, except its first and last delta.
        """
        loop = asyncio.get_running_loop()
        return Channel(loop) if stream_interval == 1 else PacedChannel(loop, stream_interval)

    def submit(
        self,
        channel: Channel,
        choice: int,
        submission: Submission,
        *,
        request_id: str,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int] = (),
    ) -> RequestState:
        """Starts a request whose deltas go to ``channel``, marked with ``choice``.

        ``output_token_ids`` are the beginning of its output, and generation continues after them. Such a request is
        part of work that has begun, so it does not count as waiting.

        Raises:
            EngineDeadError: The engine died and is not restarted.
            RequestError: This request crashed the engine recently, or there is no such replica.
        """
        self._check_submit(submission.data_parallel_rank)
        self._next_index += 1
        message = submission.request(
            request_id,
            self._next_index,
            np.asarray(prompt_token_ids, np.int32).tobytes(),
            output_token_ids=np.asarray(output_token_ids, np.int32).tobytes(),
        )
        self._culprits.check(message)
        state = RequestState(message, submission.options, self.tokenizer, channel, choice)
        frame = self._encoder.encode(message)  # first, so that a request that cannot be sent never enters the journal
        self._add(state)
        if not output_token_ids:
            self._enter_queue(state, submission)
        self._send_new([state], frame)
        return state

    def submit_siblings(
        self,
        channel: Channel,
        first_choice: int,
        submission: Submission,
        *,
        request_ids: Sequence[str],
        prompt_token_ids: bytes,
        seeds: Sequence[int],
    ) -> list[RequestState]:
        """Starts completions of one prompt that differ only in id and seed, with one message and no copies.

        ``prompt_token_ids`` are int32. Choices are numbered from ``first_choice``.

        Raises:
            EngineDeadError: The engine died and is not restarted.
            RequestError: This request crashed the engine recently, or there is no such replica.
        """
        self._check_submit(submission.data_parallel_rank)
        first = submission.request(request_ids[0], self._next_index + 1, prompt_token_ids, seed=seeds[0])
        self._culprits.check(first)
        indices = range(first.index, first.index + len(seeds))
        message: EngineCoreRequest | SiblingRequests = first
        requests: Iterable[EngineCoreRequest] = (first,)
        if len(seeds) > 1:
            numbers = np.array(indices, np.int64).tobytes()
            message = SiblingRequests(first, tuple(request_ids), numbers, tuple(seeds))
            requests = message.requests()
        numbered = enumerate(requests, first_choice)
        states = [
            RequestState(request, submission.options, self.tokenizer, channel, choice) for choice, request in numbered
        ]
        frame = self._encoder.encode(message)  # first, so that a request that cannot be sent never enters the journal
        self._next_index = indices[-1]
        for state in states:
            self._add(state)
            self._enter_queue(state, submission)
        self._send_new(states, frame)
        return states

    def _add(self, state: RequestState) -> None:
        state.engine = self.rank
        self._processor.add(state)

    def _enter_queue(self, state: RequestState, submission: Submission) -> None:
        self._queue.enter(state.index, submission.tenant, state.num_prompt_tokens, is_extra=submission.is_extra)

    def _check_submit(self, data_parallel_rank: int | None) -> None:
        if self._pool is None and data_parallel_rank not in (None, self.rank):
            raise no_such_rank(data_parallel_rank, (self.rank,))
        if self.dead is not None:
            raise self.dead

    def _send_new(self, states: list[RequestState], frame: bytes) -> None:
        """Sends new requests of the journal; queues them if the outbox still has requests to send first."""
        if not self._serving:
            return  # the whole journal is sent to the next engine core
        if self._outbox:
            self._outbox.add(states)
        elif self._send_vocabulary(states[0]):
            self._socket.send(frame)

    def _send_again(self, state: RequestState) -> None:
        """Sends a request of the journal, with the output that it has emitted."""
        if self._send_vocabulary(state):
            self._send(resumed_request(state))

    def _send_vocabulary(self, state: RequestState) -> bool:
        """Sends the vocabulary to the engine core if the request has a grammar and needs it.

        Returns:
            False: the vocabulary is still being encoded; the request is sent from the journal afterwards.
        """
        if state.message.grammar is None or self._life.has_vocabulary:
            return True
        if self._vocabulary.frame is None:
            self._vocabulary.make(self.tokenizer)
            return False
        self._socket.send(self._vocabulary.frame)
        self._life.has_vocabulary = True
        return True

    def _offer_vocabulary(self) -> None:
        """Sends the vocabulary ahead of time, once there have been no requests for a while.

        An engine core builds its automaton in calls of some tenths of a second, in which it does nothing else.
        """
        is_idle = self._serving and not self._processor.states
        was_idle, self._was_idle = self._was_idle, is_idle
        if not (self._prepares_grammars and is_idle and was_idle) or self._life.has_vocabulary:
            return
        if self._vocabulary.frame is None:
            self._vocabulary.make(self.tokenizer)
        else:
            self._socket.send(self._vocabulary.frame)
            self._life.has_vocabulary = True

    def _on_vocabulary(self, error: str) -> None:
        """Sends the requests that waited for the vocabulary, or ends them with an error."""
        self._offer_vocabulary()
        waiting = [state for state in self._processor.states.values() if state.message.grammar is not None]
        if error:
            for state in waiting:
                self._processor.fail(state, error)
        elif self._serving:
            self._outbox.add(waiting)

    def check_queue(self, tenant: Tenant, count: int = 1, num_tokens: int = 0) -> bool:
        """Rejects requests when too many are waiting.

        Args:
            tenant: Whom they are for.
            count: Number of requests; either all are accepted or none.
            num_tokens: Tokens of all their prompts; 0: not known yet.

        Returns:
            ``is_extra`` of ``submit``: they are accepted although the queue is full, since the tenant uses less than
            its share.

        Raises:
            EngineDeadError: The engine died and is not restarted.
            RequestError: 429.
        """
        return self._present_queue().check(tenant, count, num_tokens)

    def check_key(self, key: str) -> None:
        """Rejects a request of a key when too many are waiting, whichever user it is for.

        Raises:
            EngineDeadError: The engine died and is not restarted.
            RequestError: 429.
        """
        self._present_queue().check_key(key)

    def _present_queue(self) -> QueueBound:
        if self.dead is not None:
            raise self.dead
        if self.sleeper.is_sleeping:
            raise asleep()
        self._queue.num_unfinished = self.num_unfinished
        self._queue.is_saturated = self.is_saturated
        return self._queue

    @property
    def is_saturated(self) -> bool:
        """Whether the engine last reported waiting requests."""
        return self._metrics.is_saturated

    def abort(self, states: Iterable[RequestState]) -> None:
        """Aborts requests, large numbers over several iterations of the event loop; finished ones are ignored."""
        rest = list(states)
        now, rest = rest[:MAX_ABORTS_PER_TURN], rest[MAX_ABORTS_PER_TURN:]
        self._abort([state.index for state in now if self._processor.abort(state)])
        if rest:
            assert self._loop is not None
            self._loop.call_soon(self.abort, rest)

    def release(self) -> list[RequestState]:
        """Gives up the requests that another replica may go on with, in the order in which to resubmit them.

        Requests that run alone, because they are suspected of too many deaths, stay.
        """
        states = list(self._processor.states.values())
        for state in states:
            clear_suspicion(state)
        states = [state for state in states if not runs_alone(state)]
        for state in states:
            self._processor.release(state)
        indices = [state.index for state in states]
        self._outbox.discard(indices)
        self._abort(indices)
        return states

    def adopt(self, states: Iterable[RequestState]) -> None:
        """Goes on with requests of another replica, from their journals."""
        states = list(states)
        for state in states:
            self._add(state)
        if self._serving:
            self._outbox.add(states)

    def fail_like(self, known: bytes) -> None:
        """Ends all requests with that fingerprint, since they crash the engine."""
        same = [state for state in self._processor.states.values() if fingerprint(state.message) == known]
        for state in same:
            self._processor.fail(state, CULPRIT_ERROR)
        self._abort([state.index for state in same])

    def fail_all(self, message: str) -> None:
        """Ends all requests with an error, and rejects new ones."""
        if self.dead is None:
            self.dead = EngineDeadError(message)
        self._abort(list(self._processor.states))
        self._processor.fail_all(message)

    def _abort(self, indices: list[int]) -> None:
        if indices and self._serving:
            self._send(AbortRequests(indices=tuple(indices)))

    async def call(self, make: Callable[[int], ControlMessage]) -> Answer:
        """Sends a control message and waits for its answer.

        Args:
            make: The message with a ``call_id``.

        Raises:
            EngineDeadError: The engine died before it answered.
            CallError: The engine refuses.
        """
        if not self._serving:
            raise EngineDeadError("the engine is not running at the moment")
        call_id, answer = self._calls.begin()
        self._send(make(call_id))
        return await answer

    def tell(self, message: ForgetAdapter) -> None:
        """Sends a control message that has no answer, if an engine core runs: a later one starts without its cause."""
        if self._serving:
            self._send(message)

    # -- messages ------------------------------------------------------------------------------------------

    def _send(self, message: ToEngineCore) -> None:
        self._socket.send(self._encoder.encode(message))

    def _handle(self, message: FromEngineCore) -> None:
        watch = self._life.watch
        if watch is not None:
            watch.heard()
        if isinstance(message, EngineCoreOutputs):
            self._on_outputs(message)
        elif isinstance(message, UtilityOutput):
            self._calls.answer(message.call_id, message.result, message.error)
        elif isinstance(message, LoadProgress):
            if self._on_progress is not None and self.ready is None:
                self._on_progress(message)
        elif isinstance(message, EngineReady):
            self._on_ready(message)
        elif isinstance(message, WorkersLost):
            self._has_workers = False
            self._on_workers_lost(message)
        elif isinstance(message, WorkersRestarted):
            self._has_workers = True
            if self._pool is not None:
                if not message.keeps_cache:
                    self._pool.cache_lost(self.rank)
                self._pool.recovers(self.rank)
            self._metrics.on_restart("worker", self.num_unfinished)
            logger.warning("workers were restarted: %s; resuming %d requests", message.reason, self.num_unfinished)
        elif isinstance(message, EngineDead):
            self._last_words = message

    def _on_sleep(self, level: int) -> None:
        self._metrics.on_sleep(level)
        if level and self._pool is not None:
            self._pool.cache_lost(self.rank)

    def _on_workers_lost(self, message: WorkersLost) -> None:
        """Lets other replicas go on with the requests, and tells them which may be to blame."""
        if self._pool is None:
            return
        for index, suspicion in message.suspicions.items():
            state = self._processor.states.get(index)
            if state is not None:
                state.suspicion, state.suspected_at = suspicion, len(state.output_token_ids)
        self._pool.fails(self.rank)

    def _on_outputs(self, message: EngineCoreOutputs) -> None:
        stats = message.scheduler_stats
        if stats is not None and stats.num_scheduled_tokens:
            self._budget.progress()
        culprits = [
            state
            for output in message.outputs
            if output.is_culprit and (state := self._processor.states.get(output.index)) is not None
        ]
        for culprit in culprits:
            self._convict(culprit)
        self._abort(self._processor.process(message))

    def _on_ready(self, message: EngineReady) -> None:
        objection = None if self._pool is None else self._pool.objection(self.rank, message)
        if objection is not None:
            self._supervisor.kill()
            self._give_up(EngineDeadError(objection, EXIT_MODEL))
            return
        self._serving = self._has_workers = True
        self.sleeper.awake()
        self._budget.serves()
        states = list(self._processor.states.values())
        for state in states:
            clear_suspicion(state)
        self._outbox.add(sorted(states, key=trial_order))
        if self._pool is not None:
            self._pool.recovers(self.rank)
        assert self._started is not None
        if not self._started.done():
            self._started.set_result(message)
        else:
            self._metrics.on_restart("engine_core", self.num_unfinished)
            logger.warning("the engine core is back; resuming %d requests", self.num_unfinished)

    # -- faults --------------------------------------------------------------------------------------------

    def _on_remote_exit(self, code: int | None) -> None:
        """As ``_on_exit``. If its machine is lost (None), nothing says that the engine core would die again."""
        if code is not None:
            self._on_exit(code)
        elif self._socket.take():
            assert self._loop is not None
            self._loop.call_soon(self._on_remote_exit, code)
        elif not self._closing and self.dead is None:
            self._serving = False
            self._life.watch = None
            self._calls.fail_all()
            logger.error("the machine of engine %d is lost; waiting for it", self.rank)
            self._restart()

    def _on_exit(self, code: int) -> None:
        """Restarts the engine core after an unexpected exit, unless its last message said that it is dead for good."""
        if code > 0 and self._last_words is None:
            self._socket.wait(LAST_WORDS_TIMEOUT)  # its last message may still be in transit
        if self._socket.take():
            assert self._loop is not None
            self._loop.call_soon(self._on_exit, code)  # there are more messages from it
            return
        if self._closing or (self.dead is not None and self._pool is not None):
            self._life.watch = None
            return
        was_serving, self._serving = self._serving, False
        watch = self._life.watch
        was_stopped = watch is not None and watch.stopped >= STOPPED_TIMEOUT
        self._life.watch = None
        self._calls.fail_all()
        words = self._last_words
        assert self._started is not None
        if words is not None or (code >= 0 and not self._started.done()):
            message = words.message if words is not None else f"the engine core exited with code {code}"
            self._give_up(EngineDeadError(message, words.exit_code if words is not None else max(code, 1)))
            return
        if was_serving and not was_stopped:
            self._blame()
        cause = "hung" if self._life.is_hung else "died" if was_serving else "loading"
        if not self._budget.spend(cause):
            count = self._budget.limit + 1
            self._give_up(
                EngineDeadError(f"the engine core {cause} {count} times without any progress; giving up")
                if was_serving
                else EngineDeadError(f"the engine core exited {count} times while loading; giving up")
            )
            return
        logger.error("the engine core exited with code %d; restarting it", code)
        self._restart()

    def _restart(self) -> None:
        """Starts a new engine core; others may go on with the requests meanwhile."""
        if self._pool is not None:
            self._pool.cache_lost(self.rank)
            self._pool.fails(self.rank)
        try:
            self._launch()
        except Exception as error:  # without this, requests would wait forever
            logger.exception("the engine core cannot be restarted")
            self._give_up(EngineDeadError(f"the engine core died and cannot be restarted: {error}"))

    def _blame(self) -> None:
        """Records suspicion against the requests that ran when the engine core died; rejects a proven culprit."""
        states = self._processor.states
        suspects = {index: place for index, place in self._supervisor.last_work().suspects.items() if index in states}
        for index, (first, last) in suspects.items():
            state = states[index]
            clear_suspicion(state)
            state.suspicion = suspect(state.suspicion, first, last)
            state.suspected_at = len(state.output_token_ids)
            if state.suspicion.num_deaths >= MAX_DEATHS and len(suspects) == 1:
                self._convict(state)
                self._budget.explained()
                return

    def _convict(self, culprit: RequestState) -> None:
        """Ends a request that crashes the engine and all with the same fingerprint; rejects it from now on."""
        logger.error("request %s crashes the engine; rejecting it from now on", culprit.message.request_id)
        known = self._culprits.add(culprit.message)
        if self._pool is None:
            self.fail_like(known)
        else:
            self._pool.convict(known)

    def _give_up(self, error: EngineDeadError) -> None:
        self.dead = error
        if self._pool is not None:
            self._pool.fails(self.rank)
        self._processor.fail_all(str(error))
        assert self._started is not None
        if not self._started.done():
            self._started.set_exception(error)
        elif self._on_fatal is not None:
            self._on_fatal(error)

    async def _watch_heartbeat(self) -> None:
        """Kills an engine core that does not respond, so that it is restarted. Uses idle time, too."""
        ping = self._encoder.encode(Ping(call_id=0))
        while True:
            await asyncio.sleep(PING_INTERVAL)
            self._offer_vocabulary()
            watch = self._life.watch
            if watch is None:
                continue
            watch.tick()
            problem = self._hung(watch)
            if problem is not None:
                logger.error("the engine core %s; killing it", problem)
                self._life.is_hung = True
                self._supervisor.kill()
            else:
                self._socket.send(ping)

    def _hung(self, watch: ProcessWatch) -> str | None:
        """Describes how the engine core hangs; None if it does not."""
        if watch.stopped >= STOPPED_TIMEOUT:
            return f"has been stopped for {watch.stopped:.0f} s"
        limit = PING_TIMEOUT if self._serving else LOAD_PING_TIMEOUT
        if watch.waited >= limit and self._config.executor.distributed_executor_backend != "inline":
            return f"has not responded for {watch.waited:.0f} s"
        return None
