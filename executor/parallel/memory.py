"""Memory that the ranks of a machine share. Needs no torch."""

from __future__ import annotations

import os

MOST_BYTES = 1 << 40
"""Size of the memory. Pages exist once they are written."""


def create_shared_memory() -> int:
    """A descriptor of zeroed memory, which lasts as long as a process has it open or mapped.

    Raises:
        OSError: The system refuses.
    """
    descriptor = os.memfd_create("octavo-ranks")
    os.ftruncate(descriptor, MOST_BYTES)
    return descriptor
