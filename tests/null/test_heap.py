"""Freed memory goes back to the system while weights are loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

from executor import heap
from executor.heap import returning_blocks

PROGRAM = """
import ctypes
from pathlib import Path

from executor.heap import returning_blocks

MIB = 1 << 20
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def is_mapped(address):
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(first, 16) <= address < int(end, 16) for first, end in ranges)

def stays_mapped():
    block = libc.malloc(2 * MIB)
    assert is_mapped(block)
    libc.free(block)
    return is_mapped(block)

libc.free(libc.malloc(16 * MIB))  # after which the library keeps what is smaller
print(stays_mapped())
with returning_blocks():
    print(stays_mapped())
print(stays_mapped())
"""


@pytest.mark.skipif(heap._glibc() is None, reason="another C library")
def test_freed_blocks_are_returned() -> None:
    """In a process of its own: free parts of the heap would be used first."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True"], done.stderr


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with returning_blocks():
        pass
