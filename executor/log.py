"""Logging of all processes: one format, to standard error."""

from __future__ import annotations

import logging
import sys

NAME = "octavo"


def setup_logging(process: str, level: str = "info") -> None:
    """Configures the root logger of this process.

    Args:
        process: Short name that starts every line, such as ``api`` or ``worker 0``.
        level: ``debug``, ``info``, ``warning`` or ``error``.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(levelname).1s %(asctime)s.%(msecs)03d [{process}] %(message)s", "%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def get_logger() -> logging.Logger:
    return logging.getLogger(NAME)
