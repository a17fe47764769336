"""Several engines that serve the same model: the interface of one ``EngineClient``, over one client per replica.

Each client has its own engine core, journal and supervisor. The pool routes requests (``routing.py``), and when an
engine stops computing, its requests go on in others from their journals: all replicas compute the same bits, so nobody
can tell. Suspicion travels with a request, so a fatal one reaches at most two replicas before it runs alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import msgspec
import numpy as np

from api.config import ServerConfig
from api.engine.blame import Culprits
from api.engine.calls import Answer
from api.engine.channel import Channel
from api.engine.client import MAX_ABORTS_PER_TURN, ControlMessage, EngineClient
from api.engine.metrics import EngineMetrics
from api.engine.place import Place, no_such_rank
from api.engine.queue_bound import QueueBound, Tenant
from api.engine.remote import RemoteReplicas
from api.engine.request_state import RequestState
from api.engine.resubmission import trial_order
from api.engine.routing import Prefix, Router
from api.engine.sleeper import Sleepers
from api.engine.submission import Submission
from api.errors import EngineDeadError, asleep
from api.model.tokenizer import Tokenizer
from engine_core.config import EngineConfig
from engine_core.launch import get_logger
from engine_core.messages import (
    I32,
    EngineReady,
    ForgetAdapter,
    LoadProgress,
    ResetPrefixCache,
    i32,
)

logger = get_logger()


class _Events:
    """Tells queue and router of requests that begin and end."""

    def __init__(self, queue: QueueBound, router: Router) -> None:
        self._queue = queue
        self._router = router
        self.states: dict[int, RequestState] = {}
        """All unfinished requests, by index."""

    def begin(self, index: int) -> None:
        self._queue.begin(index)
        self._router.begin(index)

    def leave(self, index: int) -> None:
        self._queue.leave(index)
        state = self.states.pop(index, None)
        if state is None or not state.output_token_ids:
            self._router.leave(index)
        else:
            output = np.frombuffer(state.output_token_ids, np.int32)
            self._router.leave(index, np.concatenate((i32(state.message.prompt_token_ids), output)))


class EnginePool:
    """Replicas of a model behind the interface of ``EngineClient``, which describes what is not described here."""

    def __init__(
        self,
        config: EngineConfig,
        num_replicas: int,
        read_tokenizer: Callable[[], Tokenizer] | None,
        metrics: EngineMetrics,
        *,
        on_progress: Callable[[LoadProgress], None] | None = None,
        on_fatal: Callable[[EngineDeadError], None] | None = None,
        bounds_queue: bool = False,
        prepares_grammars: bool = False,
        log_level: str = "info",
        num_local: int | None = None,
    ) -> None:
        """Creates the clients; ``start`` launches their engines. See ``EngineClient``.

        Args:
            config: Configuration of each engine core; limits of the queue are those of all together.
            num_replicas: Number of engines.
            read_tokenizer: As for a client.
            metrics: Metrics of the first engine; those of the others are created. Its number there is that among the
                engines of all servers; here, they count from 0.
            on_progress: Called while the first engine's model loads.
            on_fatal: Called once if all engines have died for good.
            bounds_queue: As for a client.
            prepares_grammars: As for a client.
            log_level: As for a client.
            num_local: Engines on this machine, which come first; None: all. The others run on machines that join, at
                the address that ``executor.parallel`` says.
        """
        num_local = num_replicas if num_local is None else num_local
        self.tokenizer: Tokenizer | None = None
        self.culprits = Culprits()
        limits = msgspec.structs.replace(config.scheduler, max_num_seqs=config.scheduler.max_num_seqs * num_replicas)
        self.queue = QueueBound(limits, enabled=bounds_queue, on_refused=metrics.on_refused)
        self._router = Router(num_replicas, uses_prefixes=config.cache.enable_prefix_caching)
        self.events = _Events(self.queue, self._router)
        self._read_tokenizer = read_tokenizer
        self._metrics = metrics
        self._on_fatal = on_fatal
        self._refusal: EngineDeadError | None = None
        """Why no requests are accepted any more, although engines may be alive."""
        self._ranks = range(num_replicas)
        self._first = metrics.engine
        self._remote = RemoteReplicas(config, num_local, num_replicas) if num_local < num_replicas else None
        self._kernels: dict[int, str] = {}
        self.clients = [
            EngineClient(
                _share(config, rank, max(1, num_local)),
                None,
                metrics.of(self._first + rank),
                on_progress=on_progress if rank == 0 else None,
                on_fatal=self._on_death,
                prepares_grammars=prepares_grammars,
                log_level=log_level,
                place=Place(rank, rank, self, None if rank < num_local else self._remote),
            )
            for rank in self._ranks
        ]
        self.sleeper = Sleepers(self.clients)

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self) -> EngineReady:
        """Launches the engines, and waits until all are ready.

        Returns:
            What holds for all of them: the shortest of their limits, and their memory together.

        Raises:
            EngineDeadError: An engine cannot start.
            ModelFileError: The tokenizer cannot be read.
        """
        if self._remote is not None:
            self._remote.open()
        engines = asyncio.gather(*(client.start() for client in self.clients))
        found, _ = await asyncio.gather(engines, self._load_tokenizer())
        ready = msgspec.structs.replace(
            found[0],
            max_model_len=min(each.max_model_len for each in found),
            num_kv_blocks=sum(each.num_kv_blocks for each in found),
            max_num_seqs=sum(each.max_num_seqs for each in found),
            weight_bytes=sum(each.weight_bytes for each in found),
            worker_pids=tuple(pid for each in found for pid in each.worker_pids),
        )
        self.queue.on_ready(ready)
        for client, each in zip(self.clients, found, strict=True):
            self._router.engine_ready(client.rank, each.num_kv_blocks, each.block_size, each.snapshots)
        return ready

    async def _load_tokenizer(self) -> None:
        if self._read_tokenizer is not None:
            self.tokenizer = await asyncio.to_thread(self._read_tokenizer)
            for client in self.clients:
                client.tokenizer = self.tokenizer

    async def close(self) -> None:
        """Stops the engines. Unfinished requests end with an error."""
        await asyncio.gather(*(client.close() for client in self.clients))
        if self._remote is not None:
            await self._remote.close()

    @property
    def dead(self) -> EngineDeadError | None:
        """Why all engines are dead for good; None: at least one is not."""
        if self._refusal is not None:
            return self._refusal
        reasons = [client.dead for client in self.clients]
        return None if None in reasons else reasons[-1]

    @property
    def num_unfinished(self) -> int:
        return sum(client.num_unfinished for client in self.clients)

    @property
    def is_serving(self) -> bool:
        """Whether an engine core accepts requests right now."""
        return any(client.is_serving for client in self.clients)

    @property
    def is_ready(self) -> bool:
        """Whether new requests run without a pause: one engine is enough."""
        return self._refusal is None and any(client.is_ready for client in self.clients)

    # -- requests ------------------------------------------------------------------------------------------

    def open_channel(self, stream_interval: int = 1) -> Channel:
        """See ``EngineClient``."""
        return self.clients[0].open_channel(stream_interval)

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
        """See ``EngineClient``."""
        prefix = self._prefix(np.array((*prompt_token_ids, *output_token_ids), np.int32), submission)
        state = self._choose(prefix, submission.data_parallel_rank).submit(
            channel,
            choice,
            submission,
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            output_token_ids=output_token_ids,
        )
        self._enter((state,), prefix)
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
        """See ``EngineClient``. Completions of one prompt run in one engine, which computes the prompt once."""
        prefix = self._prefix(i32(prompt_token_ids), submission)
        states = self._choose(prefix, submission.data_parallel_rank).submit_siblings(
            channel,
            first_choice,
            submission,
            request_ids=request_ids,
            prompt_token_ids=prompt_token_ids,
            seeds=seeds,
        )
        self._enter(states, prefix)
        return states

    def _prefix(self, token_ids: I32, submission: Submission) -> Prefix:
        adapter = submission.lora_request
        return self._router.prefix(
            token_ids,
            submission.cache_salt,
            "" if adapter is None else adapter.content_hash,
            submission.mm_features,
        )

    def _choose(self, prefix: Prefix, wanted: int | None) -> EngineClient:
        """The engine for a prompt: the wanted one, or the best of those that can start at once."""
        if wanted is not None:
            if wanted - self._first not in self._ranks:
                raise no_such_rank(wanted, [self._first + rank for rank in self._ranks])
            return self.clients[wanted - self._first]
        clients = self.clients
        candidates = (
            [client.rank for client in clients if client.is_ready]
            or [client.rank for client in clients if client.dead is None and client.is_serving]
            or [client.rank for client in clients if client.dead is None]
        )
        if not candidates or self._refusal is not None:
            assert self.dead is not None
            raise self.dead
        return clients[self._router.choose(prefix, candidates)]

    def _enter(self, states: Iterable[RequestState], prefix: Prefix) -> None:
        for state in states:
            self.events.states[state.index] = state
            self._router.enter(state.index, state.engine, prefix)

    def check_queue(self, tenant: Tenant, count: int = 1, num_tokens: int = 0) -> bool:
        """See ``EngineClient``."""
        return self._present_queue().check(tenant, count, num_tokens)

    def check_key(self, key: str) -> None:
        """See ``EngineClient``."""
        self._present_queue().check_key(key)

    def _present_queue(self) -> QueueBound:
        if self.dead is not None:
            raise self.dead
        if self.sleeper.is_sleeping:
            raise asleep()
        self.queue.num_unfinished = self.num_unfinished
        self.queue.is_saturated = all(client.is_saturated for client in self.clients if client.dead is None)
        return self.queue

    def abort(self, states: Iterable[RequestState]) -> None:
        """See ``EngineClient``."""
        rest = [state for state in states if not state.finished]
        now, rest = rest[:MAX_ABORTS_PER_TURN], rest[MAX_ABORTS_PER_TURN:]
        for client in self.clients:
            own = [state for state in now if state.engine == client.rank]
            if own:
                client.abort(own)
        if rest:  # by the time of their turn, they may run in another engine
            asyncio.get_running_loop().call_soon(self.abort, rest)

    def fail_all(self, message: str) -> None:
        """Ends all requests with an error, and rejects new ones."""
        self._refusal = self._refusal or EngineDeadError(message)
        for client in self.clients:
            client.fail_all(message)

    def tell(self, message: ForgetAdapter) -> None:
        """See ``EngineClient``."""
        for client in self.clients:
            client.tell(message)

    async def call(self, make: Callable[[int], ControlMessage]) -> Answer:
        """Sends a control message to all engines that serve, and waits for the answers.

        Args:
            make: The message with a ``call_id``.

        Returns:
            The sums of the answers' numbers; of other values, those of the first engine that has one.

        Raises:
            EngineDeadError: One of them died before it answered, or none serves.
        """
        clients = [client for client in self.clients if client.is_serving] or self.clients[:1]
        if make is ResetPrefixCache:
            for client in clients:
                self._router.cache_lost(client.rank)
        first, *others = await asyncio.gather(*(client.call(make) for client in clients))
        return {name: _total(value, [other[name] for other in others]) for name, value in first.items()}

    # -- faults: what the clients tell -----------------------------------------------------------------------

    def recovers(self, rank: int) -> None:
        """An engine serves, perhaps again: it goes on with the requests of those that do not."""
        for other in self.clients:
            if other.rank != rank and not other.is_ready and other.num_unfinished:
                self._move(other, [rank])

    def fails(self, rank: int) -> None:
        """An engine does not compute for now, or is dead for good: others go on with its requests, if any can."""
        client = self.clients[rank]
        others = [other for other in self.clients if other is not client]
        ranks = [other.rank for other in others if other.is_ready]
        if not ranks and client.dead is not None:
            ranks = [other.rank for other in others if other.dead is None]
        if ranks:
            self._move(client, ranks)

    def cache_lost(self, rank: int) -> None:
        """An engine's prefix cache is empty."""
        self._router.cache_lost(rank)

    def _move(self, client: EngineClient, ranks: Sequence[int]) -> None:
        """Moves the requests of a client to the given ones, as they have room."""
        states = client.release()
        if not states:
            return
        moved: dict[int, list[RequestState]] = {}
        for state in sorted(states, key=trial_order):
            moved.setdefault(self._router.move(state.index, ranks), []).append(state)
        number = self._first + client.rank
        self._metrics.of(number).on_moved(len(states))
        for rank, own in moved.items():
            logger.warning("engine %d goes on with %d requests of engine %d", self._first + rank, len(own), number)
            self.clients[rank].adopt(own)

    def objection(self, rank: int, ready: EngineReady) -> str | None:
        """Why an engine that is ready cannot be one of the replicas: it would compute other bits."""
        self._kernels[rank] = ready.kernels
        for other, kernels in self._kernels.items():
            if kernels != ready.kernels and self.clients[other].dead is None:
                return (
                    f"engine {self._first + rank} would compute with {ready.kernels} and engine {self._first + other} "
                    f"with {kernels}, and tokens would depend on where a request runs; install the same versions on "
                    "all machines, and choose kernels that all of their CPUs have with OCTAVO_CPU_CAPABILITY"
                )
        return None

    def convict(self, known: bytes) -> None:
        """Ends all requests with that fingerprint, in all engines."""
        for client in self.clients:
            client.fail_like(known)

    def _on_death(self, error: EngineDeadError) -> None:
        if self.dead is None:
            alive = sum(client.dead is None for client in self.clients)
            logger.error("an engine is dead for good: %s; %d of %d are left", error, alive, len(self.clients))
        elif self._on_fatal is not None:
            self._on_fatal(error)


def _share(config: EngineConfig, rank: int, num_replicas: int) -> EngineConfig:
    """The configuration of one of the replicas on this machine."""
    executor = config.executor
    device = msgspec.structs.replace(executor.device, first_index=rank * executor.parallel.world_size)
    return msgspec.structs.replace(
        config, executor=msgspec.structs.replace(executor, device=device), num_replicas=num_replicas
    )


def _total(value: int | float | str | bool, others: Sequence[int | float | str | bool]) -> int | float | str | bool:
    """The sum of numbers; of other values, the first. A fact that is true must be true of all."""
    if isinstance(value, bool):
        return value and all(others)
    if isinstance(value, str):
        return next((each for each in (value, *others) if each), value)
    return value + sum(other for other in others if not isinstance(other, str))


Engines: TypeAlias = EngineClient | EnginePool


def create_engines(
    config: ServerConfig,
    read_tokenizer: Callable[[], Tokenizer] | None,
    metrics: EngineMetrics,
    *,
    on_progress: Callable[[LoadProgress], None] | None = None,
    on_fatal: Callable[[EngineDeadError], None] | None = None,
    bounds_queue: bool = False,
    prepares_grammars: bool = False,
) -> Engines:
    """The engines of a model, as configured: one, or a pool of replicas. See ``EngineClient``.

    A server of some of the replicas, behind a balancer of the user's, has those engines alone.
    """
    engine, count, rank = config.engine, config.num_local_replicas, config.data_parallel_rank
    size = config.data_parallel_size
    if config.data_parallel_hybrid_lb:
        size, rank = count, config.first_replica if count == 1 else None
    if rank is None and size > 1:
        return EnginePool(
            config.replica_engine,
            size,
            read_tokenizer,
            metrics,
            on_progress=on_progress,
            on_fatal=on_fatal,
            bounds_queue=bounds_queue,
            prepares_grammars=prepares_grammars,
            log_level=config.log_level,
            num_local=count,
        )
    rank = rank or 0
    return EngineClient(
        _share(engine, rank % count, count),
        read_tokenizer,
        metrics.of(rank),
        on_progress=on_progress,
        on_fatal=on_fatal,
        bounds_queue=bounds_queue,
        prepares_grammars=prepares_grammars,
        log_level=config.log_level,
        place=Place(rank, rank % count),
    )
