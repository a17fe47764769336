"""The ORCA header, which reports the server's load to load balancers that request it."""

from __future__ import annotations

import json

from starlette.types import Scope

from api.engine.metrics import EngineMetrics

FORMAT_HEADER = b"endpoint-load-metrics-format"
LOAD_HEADER = "endpoint-load-metrics"


def load_header(scope: Scope, metrics: EngineMetrics) -> str | None:
    """The value of ``LOAD_HEADER`` in the requested format, TEXT or JSON; None if not requested."""
    wanted = next((value for name, value in scope["headers"] if name == FORMAT_HEADER), b"").upper()
    if wanted not in (b"TEXT", b"JSON"):
        return None
    stats = metrics.load
    named = {"kv_cache_usage_perc": stats.kv_cache_usage, "num_requests_waiting": stats.num_waiting_reqs}
    if wanted == b"JSON":
        return f"JSON {json.dumps({'named_metrics': named})}"
    return "TEXT " + ", ".join(f"named_metrics.{name}={value}" for name, value in named.items())
