"""How the C library's heap treats freed memory while weights are loaded. Needs no torch."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of ``mallopt``, as malloc.h numbers them."""
LEAST_MAPPED = 1 << 20
"""Bytes from which a block lies in a mapping of its own, which is gone once it is freed."""
MOST_MAPPED = 32 << 20
"""The largest such limit, to which the C library would raise it as large blocks are freed."""


@contextmanager
def returning_blocks() -> Iterator[None]:
    """Until the end, freed blocks of some size go back to the system at once.

    Left alone, glibc keeps up to 64 MiB of them in each thread's arena once blocks as large have been freed: packing
    weights would leave more behind than a layer takes. The limits are then those that it finds by itself. Nothing
    changes with other C libraries.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, LEAST_MAPPED)
    libc.mallopt(_TRIM_THRESHOLD, 2 * LEAST_MAPPED)
    libc.malloc_trim(0)  # blocks would be cut from what was freed before
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, MOST_MAPPED)
        libc.mallopt(_TRIM_THRESHOLD, 2 * MOST_MAPPED)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            libc = ctypes.CDLL(None)
            _ = libc.gnu_get_libc_version, libc.mallopt, libc.malloc_trim
            return libc
    return None
