"""The server's traffic: open requests, their bodies, draining, and counters."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Counter, Gauge

from api.engine.histograms import Histogram, Histograms
from api.http.body_budget import BodyBudget

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
NO_HANDLER = "none"
CLIENT_GONE = 499
"""Status recorded for a request whose client disconnected before the answer began."""
DURATION_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Traffic:
    """Counts requests. Labels come from fixed sets, so that clients cannot make the metrics grow."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.num_open = 0
        self.is_draining = False
        """Whether the server is shutting down and accepts no new requests."""
        self.bodies = BodyBudget()
        """Memory budget of request bodies being read."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._requests = Counter("http_requests", "HTTP requests.", ["handler", "method", "status"], registry=registry)
        self._durations = Histograms(
            "http_request_duration_seconds",
            "Time from a request's head to the end of its response.",
            ["handler", "method"],
            DURATION_BUCKETS,
            registry,
        )
        Gauge("http_requests_in_progress", "Open HTTP requests.", registry=registry).set_function(lambda: self.num_open)

        self._series: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        """By handler, method and class of the status: looking series up by their labels takes long."""

    def begin(self) -> None:
        """Registers a new request."""
        self.num_open += 1
        self._idle.clear()

    def end(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Registers the end of a request."""
        self.num_open -= 1
        if not self.num_open:
            self._idle.set()
        method = method if method in METHODS else "OTHER"
        key = handler, method, status // 100
        series = self._series.get(key)
        if series is None:
            requests = self._requests.labels(handler, method, f"{status // 100}xx")
            series = self._series[key] = requests, self._durations.labels(handler, method)
        series[0].inc()
        series[1].observe(seconds)

    async def wait_idle(self, timeout: float) -> bool:
        """Waits until no request is open; False on timeout."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except asyncio.TimeoutError:
            return False
        return True
