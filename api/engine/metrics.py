"""Prometheus metrics under the names that vLLM uses, so that existing dashboards and scalers work.

Numbers that change with every token are kept in plain arrays and converted to metrics on request: calling a histogram's
``observe`` for each token would cost more than detokenising it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import zip_longest
from typing import NamedTuple

import msgspec
import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from api.engine.histograms import Histogram, Histograms, add_histogram
from api.engine.request_state import RequestState
from engine_core.messages import EngineReady, SchedulerStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_LATENCY_BUCKETS = (
    0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0,
)  # fmt: skip
REQUEST_LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
ITERATION_BUCKETS = tuple(float(1 << power) for power in range(15))


def _length_buckets(max_model_len: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, ... up to the longest sequence."""
    buckets: list[float] = []
    decade = 1
    while True:
        for factor in (1, 2, 5):
            if factor * decade > max_model_len:
                return tuple(buckets) or (1.0,)
            buckets.append(float(factor * decade))
        decade *= 10


class _StepCollector(Collector):
    """Collects the metrics that change with each step."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._names, self._values = list(labels), list(labels.values())
        self.stats = SchedulerStats()
        self.generation_tokens = 0
        self.num_started = 0
        """Requests whose first token came with the step being counted."""
        self.latency_counts = np.zeros(len(TOKEN_LATENCY_BUCKETS) + 1, np.int64)
        self.latency_sum = 0.0
        self.iteration_counts = np.zeros(len(ITERATION_BUCKETS) + 1, np.int64)
        self.iteration_sum = 0
        self.sleep_level = 0
        """0: the engine is awake."""
        self.lost = SchedulerStats()
        """Counts of previous engine cores."""

    @property
    def totals(self) -> SchedulerStats:
        """The last step's statistics, with counts since the server started."""
        stats, lost = self.stats, self.lost
        return msgspec.structs.replace(
            stats,
            prefix_cache_queries=stats.prefix_cache_queries + lost.prefix_cache_queries,
            prefix_cache_hits=stats.prefix_cache_hits + lost.prefix_cache_hits,
            external_prefix_cache_queries=stats.external_prefix_cache_queries + lost.external_prefix_cache_queries,
            external_prefix_cache_hits=stats.external_prefix_cache_hits + lost.external_prefix_cache_hits,
            num_preemptions=stats.num_preemptions + lost.num_preemptions,
            num_drafts=stats.num_drafts + lost.num_drafts,
            num_draft_tokens=stats.num_draft_tokens + lost.num_draft_tokens,
            num_accepted_tokens=stats.num_accepted_tokens + lost.num_accepted_tokens,
            num_accepted_tokens_per_pos=tuple(
                map(sum, zip_longest(stats.num_accepted_tokens_per_pos, lost.num_accepted_tokens_per_pos, fillvalue=0))
            ),
        )

    def collect(self) -> Iterator[Metric]:
        stats = self.totals
        yield self._gauge("vllm:num_requests_running", "Running requests.", stats.num_running_reqs)
        yield self._gauge("vllm:num_requests_waiting", "Waiting requests.", stats.num_waiting_reqs)
        yield self._gauges(
            "vllm:num_requests_waiting_by_reason",
            "Waiting requests by reason: capacity, or deferred, such as for a grammar.",
            "reason",
            {"capacity": stats.num_waiting_reqs - stats.num_deferred_reqs, "deferred": stats.num_deferred_reqs},
        )
        yield self._gauges(
            "vllm:engine_sleep_state",
            "Whether the engine sleeps: with its weights in memory (weights_offloaded), or without.",
            "sleep_state",
            {
                "awake": int(self.sleep_level == 0),
                "weights_offloaded": int(self.sleep_level == 1),
                "discard_all": int(self.sleep_level == 2),
            },
        )
        for name in ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"):
            yield self._gauge(name, "Fraction of KV blocks in use.", stats.kv_cache_usage)
        queries, hits = stats.prefix_cache_queries, stats.prefix_cache_hits
        for prefix in ("vllm:", "vllm:gpu_"):
            yield self._counter(
                f"{prefix}prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", queries
            )
            yield self._counter(f"{prefix}prefix_cache_hits", "Prompt tokens found in the prefix cache.", hits)
        for name, what, count in (
            ("queries", "looked up in --kv-cache-dir", stats.external_prefix_cache_queries),
            ("hits", "loaded from --kv-cache-dir", stats.external_prefix_cache_hits),
        ):
            yield self._counter(f"vllm:external_prefix_cache_{name}", f"Prompt tokens {what}.", count)
        yield self._counter(
            "vllm:num_preemptions", "Preemptions of requests for lack of KV blocks.", stats.num_preemptions
        )
        yield self._counter("vllm:generation_tokens", "Tokens generated.", self.generation_tokens)
        if stats.num_drafts:
            yield from self._draft_metrics(stats)
        if stats.num_loaded_adapters or stats.waiting_adapters:
            yield from self._adapter_metrics(stats)
        for name in ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"):
            yield self._histogram(
                name,
                "Time between consecutive tokens of a request.",
                TOKEN_LATENCY_BUCKETS,
                self.latency_counts,
                self.latency_sum,
            )
        yield self._histogram(
            "vllm:iteration_tokens_total",
            "Prompt tokens computed and tokens generated per step.",
            ITERATION_BUCKETS,
            self.iteration_counts,
            self.iteration_sum,
        )

    def _draft_metrics(self, stats: SchedulerStats) -> Iterator[Metric]:
        """Counts of speculative decoding."""
        yield self._counter("vllm:spec_decode_num_drafts", "Times that drafts were verified.", stats.num_drafts)
        yield self._counter("vllm:spec_decode_num_draft_tokens", "Draft tokens verified.", stats.num_draft_tokens)
        yield self._counter("vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted.", stats.num_accepted_tokens)
        family = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted, by their position among the drafts verified together.",
            labels=[*self._names, "position"],
        )
        for position, count in enumerate(stats.num_accepted_tokens_per_pos):
            family.add_metric([*self._values, str(position)], count)
        yield family

    def _adapter_metrics(self, stats: SchedulerStats) -> Iterator[Metric]:
        """Which adapters requests have."""
        yield self._gauge("octavo:lora_adapters_loaded", "LoRA adapters in memory.", stats.num_loaded_adapters)
        names = ("running_lora_adapters", "waiting_lora_adapters")
        values = (",".join(stats.running_adapters), ",".join(stats.waiting_adapters))
        family = GaugeMetricFamily(
            "vllm:lora_requests_info", "LoRA adapters of running and waiting requests.", labels=[*self._names, *names]
        )
        family.add_metric([*self._values, *values], 1)
        yield family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=self._names)
        family.add_metric(self._values, value)
        return family

    def _gauges(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(name, text, labels=[*self._names, label])
        for kind, value in values.items():
            family.add_metric([*self._values, kind], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=self._names)
        family.add_metric(self._values, value)
        return family

    def _histogram(
        self,
        name: str,
        text: str,
        bounds: tuple[float, ...],
        counts: np.ndarray[tuple[int], np.dtype[np.int64]],
        total: float,
    ) -> Metric:
        family = HistogramMetricFamily(name, text, labels=self._names)
        add_histogram(family, self._values, bounds, counts.tolist(), total)
        return family


class _AllSteps(Collector):
    """The step metrics of all engines, each family once."""

    def __init__(self) -> None:
        self.engines: list[_StepCollector] = []

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for engine in self.engines:
            for family in engine.collect():
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples += family.samples
        yield from families.values()


class FinishedRequest(NamedTuple):
    """The metrics of a client's request that has finished. Times are CLOCK_MONOTONIC seconds."""

    reason: str
    arrival_time: float
    scheduled_time: float | None
    """None: the request never ran."""
    first_token_time: float | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    is_pooling: bool = False


class _Shared:
    """What the metrics of a server's engines have in common."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.steps = _AllSteps()
        self.engines: dict[int, EngineMetrics] = {}
        self.counters: dict[str, Counter] = {}
        self.histograms: dict[str, Histograms] = {}
        self.cache_config: Gauge | None = None
        self.on_trace: Callable[[RequestState, FinishedRequest], None] | None = None
        self.registry.register(self.steps)
        ProcessCollector(registry=self.registry)


class EngineMetrics:
    """All metrics of the requests and steps of an engine."""

    def __init__(
        self, model_name: str, max_model_len: int = 8192, *, engine: int = 0, shared: _Shared | None = None
    ) -> None:
        """Creates the series of an engine.

        Args:
            model_name: Their label ``model_name``.
            max_model_len: Upper bound of the histograms of lengths.
            engine: Their label ``engine``, the engine's rank among its replicas.
            shared: Families that other engines' series belong to; see ``of``.
        """
        self.model_name = model_name
        self.engine = engine
        self.num_prompt_tokens = 0
        """Prompt tokens of all requests that ran."""
        self._max_model_len = max_model_len
        self._shared = shared = _Shared() if shared is None else shared
        self._labels = {"model_name": model_name, "engine": str(engine)}
        self._steps = _StepCollector(self._labels)
        self._latency_bounds = np.array(TOKEN_LATENCY_BUCKETS)
        self._create_request_series(_length_buckets(max_model_len))
        self._restarts_by = self._counters(
            "octavo:engine_restarts", "Restarts of the engine core or of workers.", ["engine", "cause"]
        )
        self._resumed = self._counter("octavo:streams_resumed", "Requests resumed after a restart.")
        self._moved = self._counter("octavo:streams_moved", "Requests that another engine took over from this one.")
        self._rejections = self._counter("vllm:admission_rejections", "Requests rejected because the queue was full.")
        if shared.cache_config is None:
            shared.cache_config = Gauge(
                "vllm:cache_config_info",
                "The KV cache.",
                [*self._labels, "block_size", "num_gpu_blocks", "cache_dtype"],
                registry=self.registry,
            )
        self._cache_config = shared.cache_config
        shared.steps.engines.append(self._steps)
        shared.engines[engine] = self

    def of(self, engine: int) -> EngineMetrics:
        """The metrics of another engine of the same server, in the same families; created by the first call."""
        known = self._shared.engines.get(engine)
        if known is not None:
            return known
        return EngineMetrics(self.model_name, self._max_model_len, engine=engine, shared=self._shared)

    @property
    def engines(self) -> tuple[EngineMetrics, ...]:
        """The metrics of all engines of the server."""
        return tuple(self._shared.engines.values())

    @property
    def registry(self) -> CollectorRegistry:
        """The registry of all engines' metrics."""
        return self._shared.registry

    @property
    def on_trace(self) -> Callable[[RequestState, FinishedRequest], None] | None:
        """Called for each finished request of any engine, if set."""
        return self._shared.on_trace

    @on_trace.setter
    def on_trace(self, record: Callable[[RequestState, FinishedRequest], None] | None) -> None:
        self._shared.on_trace = record

    def _create_request_series(self, lengths: tuple[float, ...]) -> None:
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of the requests that were run.")
        self._cached_tokens = self._counter("vllm:prompt_tokens_cached", "Of these, tokens from the prefix cache.")
        success = self._counters(
            "vllm:request_success", "Finished requests by reason.", [*self._labels, "finished_reason"]
        )
        self._success_of = cache(lambda reason: success.labels(**self._labels, finished_reason=reason))
        self._ttft = self._histogram(
            "vllm:time_to_first_token_seconds", "Time from arrival to the first token.", TTFT_BUCKETS
        )
        self._tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time between the tokens of a request.",
            TOKEN_LATENCY_BUCKETS,
        )
        self._prefill_per_token = self._histogram(
            "vllm:time_per_prefill_token_request_seconds",
            "Time from the first step to the first token, per computed prompt token.",
            TTFT_BUCKETS,
        )
        latency = REQUEST_LATENCY_BUCKETS
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "Time from arrival to the end.", latency)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Time spent waiting.", latency)
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds", "Time from the first step to the first token.", latency
        )
        self._decode = self._histogram(
            "vllm:request_decode_time_seconds", "Time from the first token to the end.", latency
        )
        self._inference = self._histogram(
            "vllm:request_inference_time_seconds", "Time from the first step to the end.", latency
        )
        self._request_prompt = self._histogram("vllm:request_prompt_tokens", "Prompt tokens per request.", lengths)
        self._request_computed = self._histogram(
            "vllm:request_prefill_kv_computed_tokens", "Of these, tokens not in the prefix cache.", lengths
        )
        self._request_output = self._histogram(
            "vllm:request_generation_tokens", "Generated tokens per request.", lengths
        )
        self._request_longest = self._histogram(
            "vllm:request_max_num_generation_tokens", "Tokens of the longest of a prompt's completions.", lengths
        )
        self._request_max = self._histogram("vllm:request_params_max_tokens", "max_tokens of a request.", lengths)
        self._request_n = self._histogram("vllm:request_params_n", "n of a request.", (1.0, 2.0, 5.0, 10.0, 20.0))

    def _counters(self, name: str, text: str, labels: list[str]) -> Counter:
        """A family of counters."""
        families = self._shared.counters
        if name not in families:
            families[name] = Counter(name, text, labels, registry=self.registry)
        return families[name]

    def _counter(self, name: str, text: str) -> Counter:
        return self._counters(name, text, list(self._labels)).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        families = self._shared.histograms
        if name not in families:
            families[name] = Histograms(name, text, list(self._labels), tuple(buckets), self.registry)
        return families[name].labels(*self._labels.values())

    def on_ready(self, ready: EngineReady) -> None:
        config = {
            "block_size": str(ready.block_size),
            "num_gpu_blocks": str(ready.num_kv_blocks),
            "cache_dtype": ready.kv_cache_dtype,
        }
        self._cache_config.labels(**self._labels, **config).set(1)

    def on_moved(self, count: int) -> None:
        """Counts requests that another engine took over."""
        self._moved.inc(count)

    def on_refused(self) -> None:
        """Counts a request that was rejected because too many were waiting."""
        self._rejections.inc()

    def on_request(self, n: int | None, max_tokens: int) -> None:
        """Counts a completion that was started; ``n`` is given for the first completion of a prompt."""
        if n is not None:
            self._request_n.observe(n)
        self._request_max.observe(max_tokens)

    def on_step(self, stats: SchedulerStats | None, num_tokens: int, latencies: list[float]) -> None:
        """Counts a step.

        Args:
            stats: The scheduler's statistics, if the message had them.
            num_tokens: Number of new tokens.
            latencies: Seconds since the previous token of the request, for each plain token.
        """
        steps = self._steps
        steps.generation_tokens += num_tokens
        if stats is not None:
            steps.stats = stats
            if stats.num_scheduled_tokens:
                # A step that completes a prompt computes it and generates a token as well.
                count = stats.num_scheduled_tokens + steps.num_started
                power = min((-(-count // stats.num_steps) - 1).bit_length(), len(ITERATION_BUCKETS))
                steps.iteration_counts[power] += stats.num_steps
                steps.iteration_sum += count
                steps.num_started = 0
        if latencies:
            places = self._latency_bounds.searchsorted(latencies)
            steps.latency_counts += np.bincount(places, minlength=len(steps.latency_counts))
            steps.latency_sum += sum(latencies)

    def on_latency(self, seconds: float) -> None:
        """Counts the latency of one token that is not in ``on_step``'s ``latencies``."""
        self._steps.latency_counts[self._latency_bounds.searchsorted(seconds)] += 1
        self._steps.latency_sum += seconds

    def on_sleep(self, level: int) -> None:
        """Records that the engine sleeps, or at level 0 that it is awake."""
        self._steps.sleep_level = level

    def on_first_token(self, state: RequestState, now: float) -> None:
        self._steps.num_started += 1
        if state.is_part:
            return
        self._ttft.observe(now - state.arrival_time)
        self._on_prompt(state, now)

    def on_pooled(self, state: RequestState, now: float) -> None:
        """Counts the prompt of a pooling request, which ends with it."""
        self._on_prompt(state, now)

    def _on_prompt(self, state: RequestState, now: float) -> None:
        self._count_prompt(state.num_prompt_tokens, state.num_cached_tokens)
        if state.scheduled_time is not None:
            self._queue.observe(max(0.0, state.scheduled_time - state.arrival_time))
            seconds = max(0.0, now - state.scheduled_time)
            self._prefill.observe(seconds)
            self._prefill_per_token.observe(seconds / max(1, state.num_prompt_tokens - state.num_cached_tokens))

    def _count_prompt(self, num_tokens: int, num_cached: int) -> None:
        self.num_prompt_tokens += num_tokens
        self._prompt_tokens.inc(num_tokens)
        self._cached_tokens.inc(num_cached)

    def on_finished(self, state: RequestState, reason: str) -> None:
        """Counts a finished request, unless it is part of another."""
        if state.is_part:
            return
        request = FinishedRequest(
            reason,
            state.arrival_time,
            state.scheduled_time,
            state.first_token_time,
            state.num_prompt_tokens,
            state.num_cached_tokens,
            len(state.output_token_ids),
            state.message.pooling_params is not None,
        )
        self._on_finished(request)
        if state.siblings is not None and not request.is_pooling:
            longest = state.siblings.end(request.num_output_tokens)
            if longest:
                self._request_longest.observe(longest)
        if self.on_trace is not None:
            self.on_trace(state, request)

    def on_search(self, request: FinishedRequest, longest: int) -> None:
        """Counts a beam search as one request.

        Args:
            request: The whole search; its output tokens are all tokens generated for it.
            longest: Tokens of the longest returned sequence.
        """
        if request.first_token_time is not None and request.scheduled_time is not None:
            self._ttft.observe(request.first_token_time - request.arrival_time)
            self._count_prompt(request.num_prompt_tokens, request.num_cached_tokens)
            self._queue.observe(max(0.0, request.scheduled_time - request.arrival_time))
            self._prefill.observe(max(0.0, request.first_token_time - request.scheduled_time))
        self._on_finished(request)
        if longest:
            self._request_longest.observe(longest)

    def _on_finished(self, request: FinishedRequest) -> None:
        now = time.monotonic()
        self._success_of(request.reason).inc()
        self._e2e.observe(now - request.arrival_time)
        if request.scheduled_time is not None:
            # A request that never ran has no tokens in the totals, so it has none here either.
            self._request_prompt.observe(request.num_prompt_tokens)
            self._request_computed.observe(request.num_prompt_tokens - request.num_cached_tokens)
            self._inference.observe(now - request.scheduled_time)
            if not request.is_pooling:
                self._request_output.observe(request.num_output_tokens)
        if request.first_token_time is not None:
            decode = now - request.first_token_time
            self._decode.observe(decode)
            if request.num_output_tokens > 1:
                self._tpot.observe(decode / (request.num_output_tokens - 1))

    def on_restart(self, cause: str, num_resumed: int) -> None:
        """Counts a restart; ``cause`` is ``engine_core`` or ``worker``."""
        self._restarts_by.labels(str(self.engine), cause).inc()
        self._resumed.inc(num_resumed)
        if cause == "engine_core":
            steps = self._steps
            steps.lost = steps.totals
            steps.stats = SchedulerStats()

    @property
    def scheduler_stats(self) -> SchedulerStats:
        """Statistics of the last step; counts are since the server started."""
        return self._steps.totals

    @property
    def is_saturated(self) -> bool:
        """Whether requests waited at the last step, those aside that wait for grammars: they do not delay others."""
        stats = self._steps.stats
        return stats.num_waiting_reqs > stats.num_deferred_reqs

    @property
    def load(self) -> SchedulerStats:
        """Requests running and waiting in all engines together, and the mean use of their KV caches."""
        stats = [engine.scheduler_stats for engine in self.engines]
        return SchedulerStats(
            num_running_reqs=sum(each.num_running_reqs for each in stats),
            num_waiting_reqs=sum(each.num_waiting_reqs for each in stats),
            num_deferred_reqs=sum(each.num_deferred_reqs for each in stats),
            kv_cache_usage=sum(each.kv_cache_usage for each in stats) / len(stats),
        )

    @property
    def num_generation_tokens(self) -> int:
        """Tokens generated since the start."""
        return self._steps.generation_tokens

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
