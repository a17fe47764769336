"""The process of a ``Helper``: ``executor.helper_process`` with its start message on standard input.

Requests arrive on standard input, replies go to standard output. Limits enforced by the kernel kill the process; the
signal tells the parent which one: SIGPROF for CPU time, SIGSEGV for the stack.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable

import msgspec

from executor.helper import MAX_ERROR_CHARS, HelperLaunch, HelperLimits, HelperReply, HelperRequest, resident_bytes
from executor.process import become_child, read_payload
from executor.registry import resolve

MAX_GROWTH = 48 << 20
"""Bytes by which a process may grow after its preparation before a fresh one replaces it."""
_ADDRESS_ROOM = 256 << 20
"""Address space in addition to the memory limit: allocators and threads reserve more than they use."""
_LENGTH = struct.Struct("<Q")

Job = Callable[[bytes], bytes]


def main() -> int:
    launch = msgspec.msgpack.decode(read_payload(), type=HelperLaunch)
    become_child(launch.title)
    output = os.dup(1)
    os.dup2(2, 1)  # keep a job's prints out of the replies
    _set_limit(resource.RLIMIT_CORE, 0)
    jobs: dict[str, Job] = {}
    _send(output, HelperReply())
    base = resident_bytes()
    while True:
        try:
            request = msgspec.msgpack.decode(read_payload(), type=HelperRequest)
        except EOFError:
            return 0
        if request.job not in jobs:
            jobs[request.job] = resolve(launch.jobs, request.job, "job")
            base = max(base, resident_bytes())
        reply = _run(jobs[request.job], request)
        if request.limits is None:
            base = resident_bytes()
        elif resident_bytes() - base > MAX_GROWTH:
            ctypes.CDLL(None).malloc_trim(0)
            reply = msgspec.structs.replace(reply, retires=resident_bytes() - base > MAX_GROWTH)
        _send(output, reply)


def _run(job: Job, request: HelperRequest) -> HelperReply:
    begin = time.process_time()
    try:
        with _Limits(request.limits):
            data = job(request.data)
    except ValueError as error:
        return HelperReply(refusal=str(error)[:MAX_ERROR_CHARS])
    except MemoryError:
        return HelperReply(limit="memory")
    except RecursionError:
        return HelperReply(limit="stack")
    except Exception:
        return HelperReply(limit="crash", error=traceback.format_exc()[-MAX_ERROR_CHARS:])
    except BaseException as error:  # Rust extensions raise panics as BaseException
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return HelperReply(limit="crash", error=traceback.format_exc()[-MAX_ERROR_CHARS:])
    if request.limits is not None and len(data) > request.limits.max_output_bytes:
        return HelperReply(limit="output")
    return HelperReply(data=data, cpu_seconds=time.process_time() - begin)


class _Limits:
    """Applies a call's limits to the process."""

    def __init__(self, limits: HelperLimits | None) -> None:
        self._limits = limits

    def __enter__(self) -> None:
        limits = self._limits
        if limits is None:
            return
        size, _, _, _, _, data, _ = (int(pages) * resource.getpagesize() for pages in _statm())
        _set_limit(resource.RLIMIT_DATA, data + limits.memory_bytes)
        _set_limit(resource.RLIMIT_AS, size + limits.memory_bytes + _ADDRESS_ROOM)
        _set_limit(resource.RLIMIT_STACK, limits.stack_bytes)
        _set_limit(resource.RLIMIT_FSIZE, limits.max_file_bytes)
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds)

    def __exit__(self, *_: object) -> None:
        if self._limits is None:
            return
        signal.setitimer(signal.ITIMER_PROF, 0)
        for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS, resource.RLIMIT_STACK, resource.RLIMIT_FSIZE):
            _set_limit(kind, resource.RLIM_INFINITY)


def _set_limit(kind: int, value: int) -> None:
    """Sets a soft limit, capped by the hard one."""
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY and (value == resource.RLIM_INFINITY or value > hard):
        value = hard
    resource.setrlimit(kind, (value, hard))


def _statm() -> list[bytes]:
    with open("/proc/self/statm", "rb") as file:
        return file.read().split()


def _send(output: int, reply: HelperReply) -> None:
    frame = msgspec.msgpack.encode(reply)
    view = memoryview(_LENGTH.pack(len(frame)) + frame)
    while view:
        view = view[os.write(output, view) :]


if __name__ == "__main__":
    sys.exit(main())
