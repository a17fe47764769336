"""Access to OpenTelemetry's optional packages, which export traces; imported only on demand."""

from __future__ import annotations

import importlib
import os
from typing import Any

from api.flags import ConfigError

PROTOCOL_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
"""grpc (default, as in vLLM) or http/protobuf."""


MISSING = "--otlp-traces-endpoint needs packages that are not installed: pip install 'octavo[otel]'"


def check_packages() -> None:
    """Checks that traces can be exported.

    Raises:
        ConfigError: A package is missing, or the protocol is unknown.
    """
    exporter_class()
    _find("opentelemetry.sdk.trace.export", "BatchSpanProcessor")


def exporter_class() -> Any:
    """The class that exports spans by the protocol of ``PROTOCOL_VARIABLE``.

    Raises:
        ConfigError: A package is missing, or the protocol is unknown.
    """
    protocol = os.environ.get(PROTOCOL_VARIABLE, "grpc")
    modules = {"grpc": "grpc", "http/protobuf": "http"}
    if protocol not in modules:
        raise ConfigError(f"{PROTOCOL_VARIABLE}: unknown protocol {protocol!r}; use {' or '.join(modules)}")
    return _find(f"opentelemetry.exporter.otlp.proto.{modules[protocol]}.trace_exporter", "OTLPSpanExporter")


def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        raise ConfigError(MISSING) from None
