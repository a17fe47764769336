"""Logging for all processes: one format, to standard error.

Logs are read in terminals and by line-based programs, and quote text from clients and files. So characters that could
move the cursor, hide text or start a new line are escaped.
"""

from __future__ import annotations

import logging
import os
import re
import sys

from executor.json_log import LOG_FORMAT_VARIABLE, JsonFormatter

NAME = "octavo"

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line ends, text direction marks and lone surrogates, which UTF-8 cannot encode."""

_CONTINUED = "\n  | "

DETAILS = "details"
"""Key of ``extra`` for multi-line text that belongs to an entry."""


def printable(text: str) -> str:
    """Escapes a text to one line without terminal control characters."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class _Formatter(logging.Formatter):
    """One line per entry; each further line (``details``, a traceback) is marked as a continuation."""

    def format(self, record: logging.LogRecord) -> str:
        record.message = record.getMessage()
        record.asctime = self.formatTime(record, self.datefmt)
        text = printable(self.formatMessage(record))
        if DETAILS in record.__dict__:
            text += _block(str(record.__dict__[DETAILS]))
        if record.exc_info:
            text += _block(self.formatException(record.exc_info))
        if record.stack_info:
            text += _block(self.formatStack(record.stack_info))
        return text


def _block(text: str) -> str:
    return "".join(_CONTINUED + printable(line) for line in text.rstrip().split("\n"))


def setup_logging(process: str, level: str = "info", log_format: str | None = None) -> None:
    """Configures the root logger of this process.

    Args:
        process: Short process name shown in every line, such as ``api`` or ``worker 0``.
        level: ``debug``, ``info``, ``warning`` or ``error``.
        log_format: ``text`` or ``json``. None: inherited from the parent process.
    """
    if log_format is not None:
        os.environ[LOG_FORMAT_VARIABLE] = log_format
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(f"%(levelname).1s %(asctime)s.%(msecs)03d [{process}] %(message)s", "%H:%M:%S"))
    if os.environ.get(LOG_FORMAT_VARIABLE) == "json":
        handler.setFormatter(JsonFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def get_logger() -> logging.Logger:
    return logging.getLogger(NAME)
