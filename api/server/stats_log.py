"""Logs throughput, queue length and cache usage every ten seconds while there is traffic."""

from __future__ import annotations

import asyncio
import time

from api.engine.metrics import EngineMetrics
from engine_core.launch import get_logger

logger = get_logger()

INTERVAL = 10.0
"""Seconds between log lines."""


class StatsLog:
    """Averages since the previous line, in vLLM's format."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics
        self._at = time.monotonic()
        self._prompt_tokens = metrics.num_prompt_tokens
        self._generation_tokens = metrics.num_generation_tokens
        self._was_busy = False
        self._queries = 0
        self._hits = 0
        self._hit_rate = 0.0

    def line(self) -> str | None:
        """The line for the time since the last call; None if the server was idle then and in the interval before."""
        metrics = self._metrics
        now, stats = time.monotonic(), metrics.scheduler_stats
        seconds = max(now - self._at, 1e-9)
        prompt = metrics.num_prompt_tokens - self._prompt_tokens
        generated = metrics.num_generation_tokens - self._generation_tokens
        queries = stats.prefix_cache_queries - self._queries
        if queries:
            self._hit_rate = (stats.prefix_cache_hits - self._hits) / queries
        self._at = now
        self._prompt_tokens, self._generation_tokens = metrics.num_prompt_tokens, metrics.num_generation_tokens
        self._queries, self._hits = stats.prefix_cache_queries, stats.prefix_cache_hits
        is_busy = bool(prompt or generated or stats.num_running_reqs or stats.num_waiting_reqs)
        was_busy, self._was_busy = self._was_busy, is_busy
        if not is_busy and not was_busy:
            return None
        return (
            f"Engine {metrics.engine:03d}: "
            f"Avg prompt throughput: {prompt / seconds:.1f} tokens/s, "
            f"Avg generation throughput: {generated / seconds:.1f} tokens/s, "
            f"Running: {stats.num_running_reqs} reqs, Waiting: {stats.num_waiting_reqs} reqs, "
            f"KV cache usage: {stats.kv_cache_usage:.1%}, "
            f"Prefix cache hit rate: {self._hit_rate:.1%}"
        )

    async def run(self) -> None:
        """Logs lines until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL)
            line = self.line()
            if line is not None:
                logger.info("%s", line)
