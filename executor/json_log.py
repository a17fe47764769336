"""Log entries as JSON, one object per line, for log collectors."""

from __future__ import annotations

import json
import logging
import os
from datetime import datetime, timezone

LOG_FORMAT_VARIABLE = "OCTAVO_LOG_FORMAT"
"""Passes the format to child processes."""


class JsonFormatter(logging.Formatter):
    """Keys: time (ISO 8601, UTC), level, process, pid, message, and, where present, details, exception and stack."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": os.getpid(),
            "message": record.getMessage(),
        }
        if "details" in record.__dict__:
            entry["details"] = str(record.__dict__["details"])
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = self.formatStack(record.stack_info)
        return json.dumps(entry)
