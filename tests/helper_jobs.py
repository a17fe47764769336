"""Jobs that tests give to helper processes, the hostile ones among them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

_state = {"prepared": b""}


def echo(data: bytes) -> bytes:
    return data


def remember(data: bytes) -> bytes:
    _state["prepared"] = data
    return b""


def recall(data: bytes) -> bytes:
    return _state["prepared"]


def pid(data: bytes) -> bytes:
    return str(os.getpid()).encode()


def refuse(data: bytes) -> bytes:
    raise ValueError("is wrong: " + data.decode())


def fail(data: bytes) -> bytes:
    sys.stdout.write("this is no reply")
    raise KeyError(data)


def spin(data: bytes) -> bytes:
    while True:
        pass


def sleep(data: bytes) -> bytes:
    time.sleep(float(data))
    return b"slept"


def wait(data: bytes) -> bytes:
    """Ends when there is such a file."""
    while not os.path.exists(data):
        time.sleep(0.005)
    return b"waited"


def allocate(data: bytes) -> bytes:
    return b"%d" % len("a".center(int(data)))


def keep_allocating(data: bytes) -> bytes:
    kept = []
    while True:
        kept.append(bytes(1 << 20))


def answer(data: bytes) -> bytes:
    return bytes(int(data))


def recurse(data: bytes) -> bytes:
    """Recursion in native code, which no counter of the interpreter's ends."""
    libc = ctypes.CDLL(None)
    compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    array = (ctypes.c_int * 2)(2, 1)

    def deeper(left: int, right: int) -> int:
        libc.qsort(array, 2, 4, callback)
        return 0

    callback = compare(deeper)
    sys.setrecursionlimit(1 << 30)
    libc.qsort(array, 2, 4, callback)
    return b""


def die(data: bytes) -> bytes:
    os.kill(os.getpid(), getattr(signal, data.decode()))
    return b"alive"


def die_once(data: bytes) -> bytes:
    """Dies unless a file is there, which it makes."""
    path, _, name = data.decode().partition("|")
    if os.path.exists(path):
        return b"alive"
    open(path, "w").close()
    return die(name.encode())
