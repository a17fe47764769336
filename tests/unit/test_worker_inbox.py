"""What a worker process waits for, and what it does when it cannot reach another rank."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import msgspec
import pytest
import zmq

import executor.worker
from executor.config import ExecutorConfig
from executor.messages import FreeKVCache, FromWorker, ToWorker, WorkerFailed, WorkerShutdown
from executor.parallel import ParallelState
from executor.worker import Inbox, Worker
from ops import PeerLostError


@pytest.fixture
def sockets() -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    with zmq.Context() as context, context.socket(zmq.PUSH) as push, context.socket(zmq.PULL) as pull:
        push.bind("inproc://inbox")
        pull.connect("inproc://inbox")
        yield push, pull


def test_descriptors_that_are_not_asked_for_wake_nobody(
    sockets: tuple[zmq.Socket[bytes], zmq.Socket[bytes]],
) -> None:
    push, pull = sockets
    (end, closes), ready = os.pipe(), os.eventfd(1)
    try:
        inbox = Inbox(pull, end)
        assert inbox.receive([ready]) is None
        push.send(msgspec.msgpack.encode(FreeKVCache()))
        assert isinstance(inbox.receive(()), FreeKVCache)
        assert inbox.receive([ready]) is None
        os.close(closes)
        assert isinstance(inbox.receive(()), WorkerShutdown)
    finally:
        os.close(end)
        os.close(ready)


class Alone(Worker):
    def start(self) -> None:
        raise PeerLostError("rank 0 cannot reach another rank: no shared memory")


def exit_of(receive_next: ToWorker | None) -> list[FromWorker]:
    """What a worker sends that cannot reach others, and that then receives this."""
    sent: list[FromWorker] = []

    def receive(wake_fds: Sequence[int]) -> ToWorker | None:
        if receive_next is None:  # nothing comes, until the time is over
            os.eventfd_read(wake_fds[0])
        return receive_next

    assert Alone(ParallelState(), ExecutorConfig(), sent.append).run(receive) == 1
    return sent


def test_a_rank_that_misses_another_one_lets_the_engine_core_say_why() -> None:
    assert exit_of(WorkerShutdown()) == []


def test_a_rank_that_cannot_reach_others_that_are_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor.worker, "PEER_TIMEOUT", 0.0)
    (failed,) = exit_of(None)
    assert isinstance(failed, WorkerFailed) and "no shared memory" in failed.message and failed.traceback
