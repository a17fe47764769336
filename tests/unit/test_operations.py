"""What operators see: the line about throughput, logs as JSON, traces, the load in answers, metrics behind a key."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from api import otlp
from api.config import ServerConfig, make_config
from api.flags import ConfigError
from api.http import tracing
from api.server.stats_log import StatsLog
from engine_core.messages import SchedulerStats
from executor.json_log import JsonFormatter
from tests.fakes import MODEL, FakeServer
from tests.unit.conftest import Api

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


# -- the line about throughput


async def test_a_line_tells_what_happened(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("api.server.stats_log.time", SimpleNamespace(monotonic=lambda: clock.now))
    log = StatsLog(server.metrics)
    assert log.line() is None, "no traffic, no line"
    await Api(server).complete("hello", max_tokens=20)
    server.metrics.on_step(
        SchedulerStats(num_waiting_reqs=2, kv_cache_usage=0.125, prefix_cache_queries=8, prefix_cache_hits=2), 0, []
    )
    clock.now += 10
    line = log.line()
    assert line == (
        "Engine 000: Avg prompt throughput: 0.4 tokens/s, Avg generation throughput: 2.0 tokens/s, "
        "Running: 0 reqs, Waiting: 2 reqs, KV cache usage: 12.5%, Prefix cache hit rate: 25.0%"
    )
    server.metrics.on_step(SchedulerStats(prefix_cache_queries=8, prefix_cache_hits=2), 0, [])
    clock.now += 10
    assert "generation throughput: 0.0" in (log.line() or ""), "one more, that shows the end of it"
    clock.now += 10
    assert log.line() is None


# -- logs


def entry(**fields: Any) -> dict[str, Any]:
    values = {"msg": "hello %s", "args": ("\x1b[31mthere\n",), "levelname": "INFO", "levelno": 20, "created": 0.25}
    text = JsonFormatter("api").format(logging.makeLogRecord({**values, **fields}))
    assert "\n" not in text and "\x1b" not in text
    result: dict[str, Any] = json.loads(text)
    return result


def test_an_entry_is_one_object_on_one_line() -> None:
    found = entry()
    assert found.pop("pid") > 0
    assert found == {
        "time": "1970-01-01T00:00:00.250+00:00",
        "level": "info",
        "process": "api",
        "message": "hello \x1b[31mthere\n",
    }
    try:
        raise ValueError("lines\nof it")
    except ValueError:
        assert "ValueError: lines\nof it" in entry(exc_info=sys.exc_info())["exception"]


def test_child_processes_have_the_format_of_their_parent() -> None:
    child = "from executor.log import *; setup_logging('worker 0'); get_logger().warning('from the child')"
    code = (
        "import subprocess, sys; from executor.log import *; setup_logging('api', log_format='json');"
        f"get_logger().info('from the parent'); subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in result.stderr.splitlines()]
    assert [(line["process"], line["message"]) for line in found] == [
        ("api", "from the parent"),
        ("worker 0", "from the child"),
    ]


# -- traces


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'octavo\[otel\]'"):
        make_config({"otlp_traces_endpoint": "http://127.0.0.1:4317"})
    monkeypatch.setenv(otlp.PROTOCOL_VARIABLE, "carrier pigeon")
    with pytest.raises(ConfigError, match=r"use grpc or http/protobuf"):
        make_config({"otlp_traces_endpoint": "http://127.0.0.1:4317"})


def test_nothing_is_imported_unless_asked_for() -> None:
    code = "import api.server.run, sys; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_a_span_for_each_request(server: FakeServer) -> None:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    tracer = tracing.Tracer(exporter, MODEL)
    server.metrics.on_trace = tracer.record
    api = Api(server)
    body = {"prompt": "hello", "max_tokens": 5, "temperature": 0.5}
    for path, fields in (("/v1/completions", {}), ("/v1/completions", {"stream": True})):
        response = await api.post(path, {**body, **fields}, headers={"traceparent": PARENT})
        assert response.status_code == 200
    await api.complete("x", n=2)
    tracer.close()
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["llm_request"] * 4
    for span in spans[:2]:
        assert format(span.context.trace_id, "032x") == PARENT.split("-")[1]
        assert format(span.parent.span_id, "016x") == PARENT.split("-")[2]
        assert 0 <= span.end_time - span.start_time < 60e9
    assert spans[2].parent is None
    attributes = spans[0].attributes
    assert attributes["gen_ai.response.model"] == MODEL
    assert attributes["gen_ai.request.id"].startswith("cmpl-")
    assert attributes["gen_ai.request.max_tokens"] == attributes["gen_ai.usage.completion_tokens"] == 5
    assert attributes["gen_ai.request.temperature"] == 0.5
    assert attributes["gen_ai.usage.prompt_tokens"] == 4
    latencies = {name for name in attributes if name.startswith("gen_ai.latency.")}
    assert {name.rpartition(".")[2] for name in latencies} == {
        "e2e", "time_in_queue", "time_to_first_token", "time_in_model_prefill", "time_in_model_decode",
        "time_in_model_inference",
    }  # fmt: skip
    assert all(attributes[name] >= 0 for name in latencies)


# -- the load in answers


@pytest.mark.parametrize("form", ["TEXT", "json"])
async def test_the_load_is_told_to_who_asks(server: FakeServer, form: str) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    api = Api(server)
    response = await api.post("/v1/completions", body, headers={"endpoint-load-metrics-format": form})
    load = response.headers["endpoint-load-metrics"]
    if form == "TEXT":
        assert load == "TEXT named_metrics.kv_cache_usage_perc=0.0, named_metrics.num_requests_waiting=0"
    else:
        assert load.startswith("JSON ")
        assert json.loads(load[5:]) == {"named_metrics": {"kv_cache_usage_perc": 0.0, "num_requests_waiting": 0}}
    for headers in ({}, {"endpoint-load-metrics-format": "smoke"}):
        assert "endpoint-load-metrics" not in (await api.post("/v1/completions", body, headers=headers)).headers


# -- metrics behind a key


@pytest.mark.parametrize("path", ["/metrics", "/load"])
async def test_metrics_behind_a_key(path: str) -> None:
    server = FakeServer(ServerConfig(api_key=["secret"], metrics_require_key=True))
    api = Api(server)
    assert (await api.get(path)).status_code == 401
    key = {"Authorization": "Bearer secret"}
    assert (await api.get(path, headers=key)).status_code == 200
    server.traffic.is_draining = True
    assert (await api.get(path, headers=key)).status_code == 200, "the end of a server is worth watching"
    assert (await api.get("/health")).status_code == 503
    assert (await Api(FakeServer(ServerConfig(api_key=["secret"]))).get(path)).status_code == 200


def test_a_key_is_needed_to_need_one() -> None:
    with pytest.raises(ConfigError, match="--metrics-require-key needs --api-key"):
        make_config({"metrics_require_key": True})
