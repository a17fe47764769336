"""Runs work on untrusted data in expendable child processes.

A ``Helper`` runs named jobs (``"module:function"``, bytes in, bytes out) in child processes with limits on CPU time,
memory and stack, and a deadline per call. A call that exceeds a limit fails with a ``HelperError`` that names the
limit, and the next call gets a fresh process. No process starts before the first call.

The child runs ``executor/helper_process.py``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Literal, TypeAlias

import msgspec

from executor.config import Config
from executor.log import get_logger
from executor.process import ChildProcess

logger = get_logger()

Limit: TypeAlias = Literal["CPU time", "time", "memory", "stack", "queue", "output", "crash", "start", "closed"]

START_TIMEOUT = 60.0
"""Seconds a fresh process may take to import its jobs and run its preparations."""
IDLE_TIMEOUT = 300.0
"""Seconds without a call after which a process is ended to release its memory."""
MAX_ERROR_CHARS = 2000
_PIPE_BYTES = 1 << 20
_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "2",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "RUST_BACKTRACE": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""A process runs one call at a time: extra threads and their arenas would only cost memory."""
_LENGTH = struct.Struct("<Q")
_HUNG = 0.1
"""A process whose CPU time is less than this share of its deadline was stopped, not busy."""


class HelperLimits(Config, frozen=True):
    """What one call may use."""

    cpu_seconds: float = 2.0
    deadline: float = 10.0
    """Seconds of wall time. More than the CPU time, since other processes compete for the CPU."""
    memory_bytes: int = 128 << 20
    """Memory beyond what the process has when the call begins."""
    stack_bytes: int = 8 << 20
    """Stack of the thread that runs the job, the interpreter's frames above it included."""
    max_output_bytes: int = 64 << 20
    max_file_bytes: int = 1 << 20
    """Size of a file that the job writes."""


class HelperLaunch(Config, frozen=True):
    """The start message of a helper process."""

    title: str
    jobs: dict[str, str]
    """``module:function`` by name."""


class HelperRequest(Config, frozen=True):
    """One call, as the process receives it."""

    job: str
    data: bytes
    limits: HelperLimits | None = None
    """None: trusted work that prepares the process for calls."""


class HelperReply(Config, frozen=True):
    """Result of one call."""

    data: bytes = b""
    refusal: str | None = None
    """The job found the data at fault (it raised ``ValueError``)."""
    limit: Limit | None = None
    error: str = ""
    cpu_seconds: float = 0.0
    retires: bool = False
    """The process grew too much and must not be reused."""


class HelperError(Exception):
    """A call could not be completed.

    Attributes:
        limit: The limit that was hit. ``queue``, ``start`` and ``closed`` are not the data's fault.
    """

    def __init__(self, limit: Limit, message: str) -> None:
        super().__init__(message)
        self.limit = limit

    @property
    def is_fault_of_data(self) -> bool:
        """Whether the same call is likely to fail again."""
        return self.limit not in ("queue", "start", "closed")


class JobError(ValueError):
    """The job found its data at fault; the message says how."""


class _Call:
    __slots__ = ("future", "owner", "patience", "request", "since")

    def __init__(self, request: HelperRequest, owner: str, patience: float) -> None:
        self.request = request
        self.owner = owner
        self.patience = patience
        self.since = time.monotonic()
        self.future: Future[bytes] = Future()

    @property
    def size(self) -> int:
        return len(self.request.data)


class Helper:
    """Runs jobs in one or a few killable child processes. All methods are thread-safe.

    From a thread: ``helper.call("job", data)``. From asyncio: ``await asyncio.wrap_future(helper.submit(...))``. From
    a poller: ``helper.submit(...).add_done_callback`` with a function that wakes it, called in another thread.

    A job is a top-level function ``(data: bytes) -> bytes``. It raises ``ValueError`` for invalid data and must keep no
    state between calls, except caches of pure results.

    Owners take turns by the helper time they have used, so an owner whose calls hit limits waits behind the others.

    Args:
        title: Process title.
        jobs: ``"module:function"`` by job name.
        limits: Default limits of a call.
        num_processes: Number of calls that may run at once.
        max_waiting: Calls that may wait; further ones are rejected.
        max_waiting_bytes: The same limit for the total size of their data.
    """

    def __init__(
        self,
        title: str,
        jobs: Mapping[str, str],
        limits: HelperLimits | None = None,
        *,
        num_processes: int = 1,
        max_waiting: int = 256,
        max_waiting_bytes: int = 64 << 20,
    ) -> None:
        self._launch = HelperLaunch(title=title, jobs=dict(jobs))
        self._limits = limits or HelperLimits()
        self._num_processes = num_processes
        self._max_waiting = max_waiting
        self._max_waiting_bytes = max_waiting_bytes
        self._prepared: list[HelperRequest] = []
        self._turn = threading.Condition()
        self._waiting: dict[str, deque[_Call]] = {}
        self._num_waiting = 0
        self._num_waiting_bytes = 0
        self._num_idle = 0
        self._used: dict[str, float] = {}
        """Seconds used by owner, for owners with calls and for those that used the most."""
        self._floor = 0.0
        """Seconds used by the owner of the last turn: returning owners start there."""
        self._slots: list[_Slot] = []
        self._is_closed = False

    def prepare(self, job: str, data: bytes) -> None:
        """Makes every fresh process run a job before its first call, without limits, for trusted data that calls need.

        Does not affect processes that already run, so call it before the first ``submit``.
        """
        self._prepared.append(HelperRequest(job=job, data=data))

    def submit(
        self,
        job: str,
        data: bytes,
        *,
        limits: HelperLimits | None = None,
        owner: str = "",
        patience: float = 30.0,
    ) -> Future[bytes]:
        """Queues a call.

        Args:
            job: One of ``jobs``.
            data: Input of the job.
            limits: Limits of this call.
            owner: Who is charged for the call. Calls of one owner run in order.
            patience: Seconds the call may wait for its turn.

        Returns:
            A future of the result, ``JobError`` or ``HelperError``. A call cancelled before its turn costs nothing.

        Raises:
            HelperError: The queue is full, or the helper is closed.
        """
        assert job in self._launch.jobs, job
        call = _Call(HelperRequest(job=job, data=data, limits=limits or self._limits), owner, patience)
        with self._turn:
            if self._is_closed:
                raise HelperError("closed", "the helper process is shut down")
            if self._num_waiting >= self._max_waiting or (
                self._num_waiting and self._num_waiting_bytes + call.size > self._max_waiting_bytes
            ):
                raise HelperError("queue", "too many calls of this kind are waiting; try again later")
            if owner not in self._waiting:
                # A returning owner is not owed the time that others used in its absence.
                self._used[owner] = max(self._used.get(owner, 0.0), self._floor)
                self._waiting[owner] = deque()
            self._waiting[owner].append(call)
            self._num_waiting += 1
            self._num_waiting_bytes += call.size
            if self._num_idle < self._num_waiting and len(self._slots) < self._num_processes:
                self._slots.append(_Slot(self, len(self._slots)))
            self._turn.notify()
        return call.future

    def call(self, job: str, data: bytes, *, limits: HelperLimits | None = None, owner: str = "") -> bytes:
        """Runs a job and waits for it. See ``submit``.

        Raises:
            JobError: The data is at fault.
            HelperError: A limit was exceeded.
        """
        return self.submit(job, data, limits=limits, owner=owner).result()

    @property
    def pids(self) -> list[int]:
        """Ids of the running processes."""
        return [slot.child.pid for slot in list(self._slots) if slot.child is not None]

    def close(self) -> None:
        """Ends the processes. Running and waiting calls fail."""
        with self._turn:
            self._is_closed = True
            calls = [call for queue in self._waiting.values() for call in queue]
            self._waiting.clear()
            self._turn.notify_all()
        for call in calls:
            if call.future.set_running_or_notify_cancel():
                call.future.set_exception(HelperError("closed", "the helper process is shut down"))
        for slot in self._slots:
            slot.interrupt()
        for slot in self._slots:
            slot.thread.join()
            slot.close()
        self._slots.clear()

    # -- for slots

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def _take(self, timeout: float) -> _Call | None:
        """The next call; None after the timeout or once the helper is closed."""
        with self._turn:
            self._num_idle += 1
            try:
                self._turn.wait_for(lambda: self._is_closed or self._waiting, timeout)
            finally:
                self._num_idle -= 1
            if not self._waiting:
                return None
            owner = min(self._waiting, key=lambda name: self._used.get(name, 0.0))
            self._floor = max(self._floor, self._used.get(owner, 0.0))
            queue = self._waiting[owner]
            call = queue.popleft()
            if not queue:
                del self._waiting[owner]
            self._num_waiting -= 1
            self._num_waiting_bytes -= call.size
            return call

    def _charge(self, owner: str, seconds: float) -> None:
        with self._turn:
            self._used[owner] = self._used.get(owner, 0.0) + seconds
            if len(self._used) > 2 * self._max_waiting:
                kept = sorted(self._used, key=lambda name: self._used[name], reverse=True)[: self._max_waiting]
                self._used = {name: self._used[name] for name in {*kept, *self._waiting} if name in self._used}


class _Lost(Exception):  # noqa: N818 -- never reaches callers
    """The process ended or hung through no visible fault of the call, which may be retried."""

    def __init__(self, error: HelperError) -> None:
        self.error = error


class _Slot:
    """A thread that owns a process and runs calls one at a time.

    The kernel kills a child when the thread that started it ends, so no other thread may start it.
    """

    def __init__(self, helper: Helper, number: int) -> None:
        self._helper = helper
        self.child: ChildProcess | None = None
        self._output = -1
        self._errors = -1
        self._stop = os.eventfd(0, os.EFD_NONBLOCK)
        self.thread = threading.Thread(target=self._serve, name=f"helper-{number}", daemon=True)
        self.thread.start()

    def interrupt(self) -> None:
        os.eventfd_write(self._stop, 1)

    def close(self) -> None:
        """Cleans up after the thread has ended."""
        os.close(self._stop)

    def _serve(self) -> None:
        helper = self._helper
        while not helper.is_closed:
            call = helper._take(IDLE_TIMEOUT)
            if call is None:
                self._end()
                continue
            if not call.future.set_running_or_notify_cancel():
                continue
            if time.monotonic() - call.since > call.patience:
                error = HelperError("queue", f"it waited for more than {call.patience:.0f} s; try again later")
                call.future.set_exception(error)
                continue
            begin = time.monotonic()
            try:
                result = self._run(call.request)
            except BaseException as error:
                helper._charge(call.owner, time.monotonic() - begin)
                call.future.set_exception(error)
            else:
                helper._charge(call.owner, time.monotonic() - begin)
                call.future.set_result(result)
        self._end()

    def _run(self, request: HelperRequest) -> bytes:
        """Runs one call. If the process dies through no visible fault of the call (killed, crashed, stopped), retries
        once.

        Raises:
            JobError: The data is at fault.
            HelperError: A limit was exceeded.
        """
        try:
            return self._try(request)
        except _Lost as lost:
            logger.warning("a helper process was lost during a call; retrying: %s", lost.error)
        try:
            return self._try(request)
        except _Lost as lost:
            raise lost.error from None

    def _try(self, request: HelperRequest) -> bytes:
        self._start()
        limits = request.limits
        assert limits is not None
        reply = self._exchange(request, limits.deadline)
        if reply.retires or reply.limit is not None:
            self._end()
        if reply.refusal is not None:
            raise JobError(reply.refusal)
        if reply.limit is not None:
            if reply.error:
                logger.warning("a helper's job failed: %s", reply.error)
            raise _limit_error(reply.limit, limits)
        return reply.data

    def _start(self) -> None:
        """Starts a process if none is running.

        Raises:
            HelperError: The process does not start.
        """
        if self.child is not None and self.child.poll() is None:
            return
        self._end()
        helper = self._helper
        self._errors = os.memfd_create("helper-stderr", os.MFD_CLOEXEC)
        read, write = os.pipe()
        try:
            self.child = ChildProcess(
                "executor.helper_process",
                msgspec.msgpack.encode(helper._launch),
                _ENVIRONMENT,
                stdout=write,
                stderr=self._errors,
            )
        finally:
            os.close(write)
            self._output = read
        for fd in (self.child.stdin, read):
            os.set_blocking(fd, False)
            with contextlib.suppress(OSError):  # pipe memory per user is limited
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        try:
            for request in (None, *helper._prepared):
                reply = self._exchange(request, START_TIMEOUT)
                if reply.refusal is not None or reply.limit is not None:
                    raise _Lost(HelperError("crash", reply.refusal or reply.error))
        except _Lost as lost:
            self._end()
            logger.error("a helper process failed to start: %s", lost.error)
            raise HelperError("start", f"the helper process failed to start: {lost.error}") from None

    def _exchange(self, request: HelperRequest | None, timeout: float) -> HelperReply:
        """Sends a request and waits for the reply. None: waits for the first reply only.

        Raises:
            HelperError: The call exceeded a limit, and the process is gone.
            _Lost: The process is gone for an unknown reason.
        """
        child = self.child
        assert child is not None
        limits = None if request is None else request.limits
        frame = b"" if request is None else _encoded(request)
        max_bytes = (64 << 20 if limits is None else limits.max_output_bytes) + MAX_ERROR_CHARS * 4 + 1024
        deadline = time.monotonic() + timeout
        begin = cpu_seconds(child.pid)
        sent = 0
        received = bytearray()
        poller = select.poll()
        poller.register(self._output, select.POLLIN)
        poller.register(self._stop, select.POLLIN)
        if frame:
            poller.register(child.stdin, select.POLLOUT)
        while True:
            left = deadline - time.monotonic()
            events = dict(poller.poll(max(0.0, left) * 1000))
            if self._stop in events or self._helper.is_closed:
                self._end()
                raise HelperError("closed", "the helper process is shut down")
            if left <= 0:
                used = cpu_seconds(child.pid) - begin
                self._end()
                error = _limit_error("time", limits)
                raise error if used > _HUNG * timeout else _Lost(error)
            if child.stdin in events:
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    sent += os.write(child.stdin, memoryview(frame)[sent : sent + (1 << 20)])
                if sent == len(frame) or events[child.stdin] & (select.POLLERR | select.POLLHUP):
                    poller.unregister(child.stdin)
            if self._output in events:
                with contextlib.suppress(BlockingIOError):
                    part = os.read(self._output, 1 << 20)
                    if not part:
                        raise self._death(limits)
                    received += part
                if len(received) > max_bytes:
                    self._end()
                    raise _limit_error("output", limits)
                if len(received) >= _LENGTH.size and len(received) == _LENGTH.size + _LENGTH.unpack_from(received)[0]:
                    return msgspec.msgpack.decode(memoryview(received)[_LENGTH.size :], type=HelperReply)

    def _death(self, limits: HelperLimits | None) -> HelperError | _Lost:
        """The reason why the process ended."""
        child = self.child
        assert child is not None
        with contextlib.suppress(Exception):
            child.wait(5)
        code = child.poll()
        words = self._last_words()
        self._end()
        number = -code if code is not None and code < 0 else 0
        if limits is not None and number in (signal.SIGPROF, signal.SIGXCPU):
            return _limit_error("CPU time", limits)
        if limits is not None and number == signal.SIGABRT and "memory allocation" in words:
            return _limit_error("memory", limits)
        if limits is not None and number in (signal.SIGSEGV, signal.SIGBUS):
            return _Lost(_limit_error("stack", limits))
        text = f"the process ended with {signal.Signals(number).name if number else f'exit code {code}'}"
        logger.warning("a helper: %s%s", text, f"\n{words}" if words else "")
        return _Lost(HelperError("crash", text))

    def _last_words(self) -> str:
        """The tail of what the process wrote to standard error."""
        size = os.fstat(self._errors).st_size
        return os.pread(self._errors, MAX_ERROR_CHARS, max(0, size - MAX_ERROR_CHARS)).decode(errors="replace").strip()

    def _end(self) -> None:
        child, self.child = self.child, None
        if child is not None:
            child.kill()
        for fd in (self._output, self._errors):
            if fd >= 0:
                os.close(fd)
        self._output = self._errors = -1


def _encoded(request: HelperRequest) -> bytes:
    frame = msgspec.msgpack.encode(request)
    return _LENGTH.pack(len(frame)) + frame


def _limit_error(limit: Limit, limits: HelperLimits | None) -> HelperError:
    limits = limits or HelperLimits()
    texts: dict[str, str] = {
        "CPU time": f"it takes more than {limits.cpu_seconds:g} s of CPU time",
        "time": f"it takes more than {limits.deadline:g} s",
        "memory": f"it takes more than {limits.memory_bytes >> 20} MiB of memory",
        "stack": "it is nested or chained too deeply",
        "output": f"its result is larger than {limits.max_output_bytes >> 20} MiB",
        "crash": "it failed unexpectedly",
    }
    return HelperError(limit, texts[limit])


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used; 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes() -> int:
    """Memory that this process has in use."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
