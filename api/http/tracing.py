"""OpenTelemetry traces: one span per request, with vLLM's names. The packages are imported only when used.

A span is created when a request is over, from times that are recorded anyway, so tracing costs nothing per token. It
joins the trace of the client's ``traceparent`` header, if any. The library exports in a thread; if the endpoint is down
traces are lost, not requests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from api.otlp import exporter_class
from api.version import VERSION

if TYPE_CHECKING:
    from api.engine.metrics import FinishedRequest
    from api.engine.request_state import RequestState

TRACE_HEADERS = (b"traceparent", b"tracestate")


def trace_headers(scope: Scope) -> dict[str, str]:
    """The trace context headers of a request."""
    return {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in TRACE_HEADERS}


class Tracer:
    """Creates spans of finished requests."""

    def __init__(self, exporter: Any, model_name: str) -> None:
        """Prepares.

        Args:
            exporter: An OpenTelemetry span exporter.
            model_name: Name of the model in spans.
        """
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        service = os.environ.get("OTEL_SERVICE_NAME", "octavo")
        self._provider = TracerProvider(resource=Resource.create({"service.name": service, "service.version": VERSION}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("octavo", VERSION)
        self._propagator = TraceContextTextMapPropagator()
        self._kind = SpanKind.SERVER
        self._model_name = model_name

    def record(self, state: RequestState, request: FinishedRequest) -> None:
        """Creates the span of a request that has just finished."""
        end, now = time.time_ns(), time.monotonic()
        context = self._propagator.extract(state.trace_headers or {})
        begin = end - int((now - request.arrival_time) * 1e9)
        span = self._tracer.start_span("llm_request", context, self._kind, start_time=begin)
        span.set_attributes(self._attributes(state, request, now))
        span.end(end)

    def _attributes(self, state: RequestState, request: FinishedRequest, now: float) -> Mapping[str, Any]:
        attributes: dict[str, Any] = {
            "gen_ai.response.model": self._model_name,
            "gen_ai.request.id": state.message.request_id,
            "gen_ai.usage.prompt_tokens": request.num_prompt_tokens,
            "gen_ai.usage.completion_tokens": request.num_output_tokens,
            "gen_ai.response.finish_reasons": [request.reason],
            "gen_ai.latency.e2e": now - request.arrival_time,
        }
        params = state.message.sampling_params
        if params is not None:
            attributes["gen_ai.request.max_tokens"] = params.max_tokens
            attributes["gen_ai.request.temperature"] = params.temperature
            attributes["gen_ai.request.top_p"] = params.top_p
        scheduled, first = request.scheduled_time, request.first_token_time
        if scheduled is not None:
            attributes["gen_ai.latency.time_in_queue"] = scheduled - request.arrival_time
            attributes["gen_ai.latency.time_in_model_inference"] = now - scheduled
        if scheduled is not None and first is not None:
            attributes["gen_ai.latency.time_to_first_token"] = first - request.arrival_time
            attributes["gen_ai.latency.time_in_model_prefill"] = first - scheduled
            attributes["gen_ai.latency.time_in_model_decode"] = now - first
        return attributes

    def close(self) -> None:
        """Sends the remaining spans, within the exporter's timeout."""
        self._provider.shutdown()


def create_tracer(endpoint: str, model_name: str) -> Tracer:
    """A tracer that exports over OTLP.

    Args:
        endpoint: URL of a collector.
        model_name: Name of the model in spans.

    Raises:
        ConfigError: A package is missing, or the protocol is unknown.
    """
    return Tracer(exporter_class()(endpoint=endpoint), model_name)
