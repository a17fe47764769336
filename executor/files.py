"""Reads untrusted files.

A model comes from a hub or a shared disk, so its files may be anything: a pipe without a writer, a device, a document
of any size or depth. Every problem raises an ``OSError`` or a ``ValueError`` with a short message that does not name
the file; naming it is up to the caller.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

MAX_DOCUMENT = 64 << 20
"""Bytes of a JSON document or a template. The largest in practice, indexes of sharded weights, have a few megabytes."""


def open_regular(path: str | Path) -> BufferedReader:
    """Opens a regular file, or a link to one, for reading. Never blocks.

    Raises:
        OSError: The file cannot be opened or is not regular: opening a pipe would wait for a writer.
    """
    _check_kind(path, os.stat(path))  # before opening, which alone has side effects on some devices
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115 - the caller closes it
    try:
        _check_kind(path, os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _check_kind(path: str | Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def read_document(path: str | Path, max_bytes: int = MAX_DOCUMENT) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is longer than ``max_bytes``.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"longer than {max_bytes >> 20} MiB")
    return content


def read_json(path: str | Path, max_bytes: int = MAX_DOCUMENT) -> Any:
    """The value of a JSON document.

    Raises:
        OSError: The file cannot be read.
        ValueError: The content is not JSON, nested too deeply or too long. ``Infinity`` is taken, as configurations
            have it; ``NaN`` is not.
    """
    content = read_document(path, max_bytes)
    try:
        return json.loads(content, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError(f"not JSON: {name} is not allowed")
    return float(name)


def why(error: OSError | ValueError) -> str:
    """The message of an error raised by this module, without the path."""
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
