"""Several engines in virtual time, and who gets a request: the server's router against simpler ways."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from simulate import PromptMaker, Simulation, TraceRequest

from api.commands.bench.figures import describe
from api.engine.routing import PrefixIndex, Router
from engine_core.config import EngineConfig

ROUTINGS = ("prefix", "round_robin", "least_loaded")
ONE_CACHE, NO_LIMIT = "one cache", "no limit"
"""Bounds of the hit rate: of one cache as large as those of all engines together, and of one that forgets nothing."""


class Replicas:
    """Engines with a scheduler and a device each, and a clock in common."""

    def __init__(
        self,
        config: EngineConfig,
        workload: Sequence[TraceRequest],
        prompts: PromptMaker,
        num_replicas: int,
        routing: str,
    ) -> None:
        """Creates idle engines.

        Args:
            config: Configuration of each engine.
            workload: The requests of all of them.
            prompts: Their tokens.
            num_replicas: Number of engines.
            routing: One of ``ROUTINGS``: the server's router, in turn, or to the engine with the fewest requests.

        Raises:
            ValueError: The configuration does not fit the device.
        """
        self._workload = sorted(workload, key=lambda request: request.arrival)
        self._prompts = prompts
        self._routing = routing
        self.engines = [Simulation(config, (), prompts, num_requests=len(workload)) for _ in range(num_replicas)]
        self.router = Router(num_replicas, uses_prefixes=config.cache.enable_prefix_caching)
        self.num_unfinished = [0] * num_replicas
        self.num_requests = [0] * num_replicas
        """Requests that each engine was given."""
        self._turn = 0
        for rank, engine in enumerate(self.engines):
            alignment = engine.shape.alignment
            self.router.engine_ready(rank, engine.shape.num_tokens // alignment, alignment)
            engine.on_begin = self.router.begin
            engine.on_end = self._end

    def _end(self, index: int) -> None:
        rank = self.router.engine_of(index)
        assert rank is not None
        self.num_unfinished[rank] -= 1
        self.router.leave(index)

    def run(self) -> None:
        """Replays the whole workload.

        Raises:
            RuntimeError: Requests are left that can make no progress.
        """
        for index, request in enumerate(self._workload):
            for engine in self.engines:
                engine.advance(request.arrival)
            prompt = self._prompts.token_ids(index, self.engines[0].prompt_len(request))
            prefix = self.router.prefix(prompt)
            ranks = range(len(self.engines))
            if self._routing == "prefix":
                rank = self.router.choose(prefix, ranks)
            else:
                ordered = [(self._turn + rank) % len(ranks) for rank in ranks]
                is_fewest = self._routing == "least_loaded"
                rank = min(ordered, key=self.num_unfinished.__getitem__) if is_fewest else ordered[0]
                self._turn = rank + 1
            self.router.enter(index, rank, prefix)
            self.num_unfinished[rank] += 1
            self.num_requests[rank] += 1
            self.engines[rank].arrive(index, request)
        for engine in self.engines:
            engine.run()

    def summary(self) -> dict[str, Any]:
        """Figures of all engines together; times in virtual milliseconds."""
        engines = self.engines
        arrival = np.array([request.arrival for request in self._workload])
        first_token = np.nanmin([engine.first_token for engine in engines], axis=0)
        finished = np.nanmin([engine.finished for engine in engines], axis=0)
        queried = sum(engine.scheduler.kv.num_queried_tokens for engine in engines)
        hits = sum(engine.scheduler.kv.num_hit_tokens for engine in engines)
        return {
            "requests": len(arrival),
            "prefix_cache_hit_rate": hits / max(queried, 1),
            "ttft_ms": describe(((first_token - arrival) * 1e3).tolist()),
            "e2e_ms": describe(((finished - arrival) * 1e3).tolist()),
            "requests_per_engine": self.num_requests,
            "busy_s": [engine.busy for engine in engines],
            "virtual_s": max(engine.now for engine in engines) - float(arrival.min(initial=0.0)),
            "preemptions": sum(engine.scheduler.num_preemptions for engine in engines),
        }


def compare(
    config: EngineConfig,
    workload: Sequence[TraceRequest],
    prompts: PromptMaker,
    num_replicas: int,
    routing: str = "all",
) -> dict[str, Any]:
    """Replays a workload with one way of routing or with each. Returns the figures of each.

    Raises:
        ValueError: The configuration does not fit the device.
    """
    figures = {}
    for name in ROUTINGS if routing == "all" else (routing,):
        replicas = Replicas(config, workload, prompts, num_replicas, name)
        replicas.run()
        figures[name] = replicas.summary()
    if config.cache.enable_prefix_caching:
        engine = replicas.engines[0]
        num_blocks = num_replicas * engine.shape.num_tokens // engine.shape.alignment
        for name, capacity in ((ONE_CACHE, num_blocks), (NO_LIMIT, sys.maxsize)):
            rate = best_hit_rate(engine, workload, prompts, capacity)
            figures[name] = {"prefix_cache_hit_rate": rate}
    return figures


def best_hit_rate(engine: Simulation, workload: Sequence[TraceRequest], prompts: PromptMaker, num_blocks: int) -> float:
    """Share of the prompts' tokens that a single cache has, if a prompt enters it whole as soon as it arrives, and the
    least recently used blocks make room. No routing finds more in caches that have as many blocks together, but for
    luck in what they drop.

    Args:
        engine: Any engine: its block size counts, and how long prompts may be.
        workload: The requests.
        prompts: Their tokens.
        num_blocks: Size of the cache.
    """
    router = Router(1)
    router.engine_ready(0, num_blocks, engine.shape.alignment)
    index = PrefixIndex(num_blocks)
    hits = total = 0
    for number, request in enumerate(sorted(workload, key=lambda request: request.arrival)):
        prefix = router.prefix(prompts.token_ids(number, engine.prompt_len(request)))
        most = (prefix.num_tokens - 1) // engine.shape.alignment
        hits += min(index.longest(prefix.hashes), most) * engine.shape.alignment
        total += prefix.num_tokens
        index.use(prefix.hashes)
    return hits / max(total, 1)


def format_comparison(figures: dict[str, Any]) -> str:
    """The figures of ``compare`` as a table."""
    columns = ("hits", "TTFT p50", "p90", "p99 ms", "e2e p50 ms", "busy s", "spread")
    lines = [f"{'':14}" + "".join(f"{name:>12}" for name in columns)]
    for name, row in figures.items():
        if "ttft_ms" not in row:  # a bound
            lines.append(f"{name:14}{row['prefix_cache_hit_rate']:>12.1%}")
            continue
        busy, ttft = row["busy_s"], row["ttft_ms"]
        spread = (max(busy) - min(busy)) / max(max(busy), 1e-9)
        values = (
            f"{row['prefix_cache_hit_rate']:.1%}",
            *(f"{ttft[key]:.0f}" for key in ("median", "p90", "p99")),
            f"{row['e2e_ms']['median']:.0f}",
            f"{sum(busy):.1f}",
            f"{spread:.2f}",
        )
        lines.append(f"{name:14}" + "".join(f"{value:>12}" for value in values))
    return "\n".join(lines)
