"""Memory for weights, arenas and KV caches: anonymous mappings in huge pages, or files for weights that do not fit.

Each step reads the weights once, from end to end. With 4 KiB pages the CPU's prefetcher stops at every page boundary,
which slows reading by a fifth or more.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

_ALIGNMENT = 64
_CHUNK = 64 << 20


def map_zeros(num_bytes: int) -> Tensor:
    """uint8 [num_bytes], zeroed; memory is committed only where it is written.

    Raises:
        MemoryError: The system refuses so much.
    """
    return torch.frombuffer(_map(num_bytes), dtype=torch.uint8)[:num_bytes]


def _map(num_bytes: int) -> mmap.mmap:
    # Private: Linux gives shared mappings no huge pages unless an administrator allows it.
    try:
        mapping = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot allocate {num_bytes} bytes: {error.strerror}") from error
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def map_file(num_bytes: int, folder: Path) -> Tensor:
    """uint8 [num_bytes], zeroed, in a file without a name: the system may write its pages back and forget them.

    Raises:
        MemoryError: The disk is full.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            mapping = mmap.mmap(file.fileno(), num_bytes)  # which keeps the file
    except OSError as error:
        raise MemoryError(f"cannot allocate {num_bytes} bytes in {folder}: {error.strerror}") from error
    return torch.frombuffer(mapping, dtype=torch.uint8)


class Pool:
    """Hands out pieces of large mappings. A mapping is released once none of its pieces is in use."""

    def __init__(self, chunk: int = _CHUNK) -> None:
        """Takes the least size of a mapping."""
        self._least = chunk
        self._lock = threading.Lock()
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._folder: Path | None = None

    def spill(self, folder: Path | None) -> None:
        """From now on, uses files of a folder, which vanish with the process, instead of memory; None: memory again."""
        with self._lock:
            self._folder = folder
            self._chunk, self._used = self._chunk[:0], 0

    def renew(self) -> None:
        """Begins another mapping, so that what is handed out from now on can be released together."""
        with self._lock:
            self._chunk, self._used = self._chunk[:0], 0

    @contextmanager
    def lending(self, chunk: Tensor) -> Iterator[None]:
        """Until the end, hands out pieces of ``chunk``, uint8 of one dimension, from its beginning on; others once it
        is used up."""
        with self._lock:
            kept = self._chunk, self._used
            self._chunk, self._used = chunk, 0
        try:
            yield
        finally:
            with self._lock:
                self._chunk, self._used = kept

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A one-dimensional tensor with undefined content.

        Raises:
            MemoryError: The system refuses so much.
        """
        num_bytes = numel * dtype.itemsize
        with self._lock:
            if self._used + num_bytes > len(self._chunk):
                size = max(num_bytes, self._least)
                self._chunk = map_zeros(size) if self._folder is None else map_file(size, self._folder)
                self._used = 0
            piece = self._chunk[self._used : self._used + num_bytes]
            self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return piece.view(dtype)


class Recycler:
    """Hands out memory that earlier holders no longer use: committing fresh pages takes longer than copying into them.

    Thread-safe. Memory is released once neither the recycler nor a tensor refers to it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unused: list[mmap.mmap] = []

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] with undefined content."""
        with self._lock:
            fitting = [each for each in self._unused if num_bytes <= len(each) <= 2 * num_bytes]
            mapping = min(fitting, key=len, default=None)
            if mapping is not None:
                self._unused.remove(mapping)
        if mapping is None:
            mapping = _map(num_bytes)
        view = memoryview(mapping)  # which torch holds as long as a tensor uses the memory
        weakref.finalize(view, self._unused.append, mapping).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8)[:num_bytes]


weights = Pool()
adapters = Pool(8 << 20)
