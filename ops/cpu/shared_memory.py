"""Files in memory, mapped in huge pages: memory that outlives the process that uses it."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import cache

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
_MADV_COLLAPSE = 25
_FAILED = ctypes.c_void_p(-1).value
_SHARED_FIXED = mmap.MAP_SHARED | 0x10


def map_shared(descriptor: int, offset: int, num_bytes: int) -> Tensor:
    """uint8 [num_bytes] of a file in memory, whose content is kept; all that map it see each other's writes.

    Args:
        descriptor: A descriptor of ``os.memfd_create``. The file grows as needed.
        offset: Where the bytes begin, a multiple of ``HUGE_PAGE``.
        num_bytes: At least 1.

    Raises:
        MemoryError: The system refuses so much.
    """
    assert offset % HUGE_PAGE == 0 and num_bytes > 0
    if os.fstat(descriptor).st_size < offset + num_bytes:
        os.ftruncate(descriptor, offset + num_bytes)
    libc = _libc()
    # A page table maps a huge page only where address and offset agree: reserve addresses, then map in their midst.
    size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    reserved = libc.mmap(None, size + HUGE_PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    begin = -(-(reserved or 0) // HUGE_PAGE) * HUGE_PAGE
    access = mmap.PROT_READ | mmap.PROT_WRITE
    if reserved in (None, _FAILED) or libc.mmap(begin, size, access, _SHARED_FIXED, descriptor, offset) != begin:
        raise MemoryError(f"cannot map {num_bytes} bytes: {os.strerror(ctypes.get_errno())}")
    libc.madvise(begin, size, mmap.MADV_HUGEPAGE)
    memory = (ctypes.c_uint8 * num_bytes).from_address(begin)
    weakref.finalize(memory, libc.munmap, reserved, size + HUGE_PAGE).atexit = False
    return torch.frombuffer(memory, dtype=torch.uint8)


def use_huge_pages(memory: Tensor, begin: int, end: int) -> bool:
    """Commits the huge pages that lie entirely within bytes ``begin`` to ``end`` of a ``map_shared``.

    Linux gives files in memory none by itself unless an administrator allows it, but does when told to, page by page.

    Returns:
        Whether the system does so. Otherwise pages of the usual size will be committed where they are written.
    """
    first, last = -(-begin // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
    if first >= last:
        return True
    memory[first:last:HUGE_PAGE].sum()  # an empty page has nothing to collapse; reading creates a small one
    return bool(_libc().madvise(memory.data_ptr() + first, last - first, _MADV_COLLAPSE) == 0)


def empty_file(memory: Tensor) -> None:
    """Gives the memory of a whole ``map_shared`` back to the system; it reads as zeros from now on."""
    size = -(-len(memory) // mmap.PAGESIZE) * mmap.PAGESIZE
    if _libc().madvise(memory.data_ptr(), size, mmap.MADV_REMOVE):
        memory.zero_()


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes = (address, size, number, number, number, ctypes.c_long)
    libc.mmap.restype = address
    libc.munmap.argtypes = (address, size)
    libc.madvise.argtypes = (address, size, number)
    return libc
