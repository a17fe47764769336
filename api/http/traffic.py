"""What passes through the server: open requests, their bodies, whether new ones are taken, and counters."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from api.http.body_budget import BodyBudget

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
NO_HANDLER = "none"
CLIENT_GONE = 499
"""Status under which a request counts whose client left before an answer began."""
DURATION_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Traffic:
    """Counts requests. Labels come from closed sets, so that no client can make the metrics grow."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.num_open = 0
        self.is_draining = False
        """No new requests are taken, as the server is about to stop."""
        self.bodies = BodyBudget()
        """Memory of request bodies while they are read."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._requests = Counter("http_requests", "HTTP requests.", ["handler", "method", "status"], registry=registry)
        self._durations = Histogram(
            "http_request_duration_seconds",
            "Time from a request's head to the end of its answer.",
            ["handler", "method"],
            registry=registry,
            buckets=DURATION_BUCKETS,
        )
        Gauge("http_requests_in_progress", "HTTP requests that are open.", registry=registry).set_function(
            lambda: self.num_open
        )

    def begin(self) -> None:
        """A request came."""
        self.num_open += 1
        self._idle.clear()

    def end(self, handler: str, method: str, status: int, seconds: float) -> None:
        """It is over."""
        self.num_open -= 1
        if not self.num_open:
            self._idle.set()
        method = method if method in METHODS else "OTHER"
        self._requests.labels(handler, method, f"{status // 100}xx").inc()
        self._durations.labels(handler, method).observe(seconds)

    async def wait_idle(self, timeout: float) -> bool:
        """Waits until no request is open; False if that took too long."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except asyncio.TimeoutError:
            return False
        return True
