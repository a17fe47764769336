"""Engines on other machines as the api's client sees them: order of messages, times, and which may be replicas."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import msgspec
import pytest

from api.engine.metrics import EngineMetrics
from api.engine.pool import EnginePool
from api.engine.remote import RemoteReplicas, RemoteSocket
from api.errors import EngineDeadError
from engine_core.config import EngineConfig
from engine_core.messages import EngineCoreOutput, EngineCoreOutputs, EngineReady, FromEngineCore, LoadProgress


def replicas() -> RemoteReplicas:
    return RemoteReplicas(EngineConfig(), 1, 2)


async def test_times_are_those_of_this_machine() -> None:
    """The other's clock began an hour later, and a message takes from none to half a second."""
    heard: list[Any] = []
    socket = RemoteSocket(replicas(), 1, heard.append)
    socket.open("")
    begin = time.monotonic()
    for delay in (0.5, 0.0, 0.25):
        there = time.monotonic() - 3600 - delay
        output = EngineCoreOutput(7, 0, scheduled_time=there - 1)
        socket.deliver(msgspec.msgpack.encode(EngineCoreOutputs(1, outputs=(output,), timestamp=there)))
    assert not socket.take()
    now = time.monotonic()
    first, second, third = heard
    assert begin <= first.timestamp <= now, "as if it had taken no time: nothing else is known"
    assert begin <= second.timestamp <= now and begin - 0.25 <= third.timestamp <= now
    assert [each.outputs[0].scheduled_time for each in heard] == pytest.approx([each.timestamp - 1 for each in heard])


async def test_a_message_at_a_time() -> None:
    heard: list[FromEngineCore] = []
    socket = RemoteSocket(replicas(), 1, heard.append)
    socket.open("")
    for number in range(3):
        socket.deliver(msgspec.msgpack.encode(LoadProgress(number, "", 0, 1)) if number != 1 else b"\xc1 nonsense")
    assert not heard and socket.wait(0)
    assert not socket.take() and len(heard) == 2, "what cannot be read does not stop what follows"
    socket.deliver(msgspec.msgpack.encode(LoadProgress(0, "", 0, 1)))
    socket.begin_life()
    assert not socket.wait(0) and not socket.take(), "of an earlier life"


async def test_what_comes_while_something_is_sent_is_not_left_there() -> None:
    """ZeroMQ's descriptor may say nothing of it any more."""
    found = replicas()
    waiting = [True, True, False]
    turns = []
    done = asyncio.Event()

    class Replicas:
        def turn(self) -> None:
            turns.append(waiting.pop(0))
            if not turns[-1]:
                done.set()

        @property
        def has_messages(self) -> bool:
            return turns[-1]

    found._loop, found._replicas = asyncio.get_running_loop(), cast(Any, Replicas())
    found.turn_soon()
    await asyncio.wait_for(done.wait(), 60)
    assert turns == [True, True, False] and not found._turns_soon


async def test_engines_with_other_kernels_are_no_replicas() -> None:
    pool = EnginePool(EngineConfig(), 2, None, EngineMetrics("model"), num_local=1)
    ready = EngineReady(1, 1, 64, 50, 8, 16, 4, kernels="avx2 kernels and torch 2.13")
    assert pool.objection(0, ready) is None and pool.objection(1, ready) is None
    other = msgspec.structs.replace(ready, kernels="avx512 kernels and torch 2.13")
    assert "engine 1 would compute with avx512 kernels and torch 2.13 and engine 0 with avx2" in str(
        pool.objection(1, other)
    )
    await pool.close()


async def test_no_key() -> None:
    config = EngineConfig()
    parallel = msgspec.structs.replace(config.executor.parallel, cluster_key="/none", master_addr="127.0.0.1")
    config = msgspec.structs.replace(config, executor=msgspec.structs.replace(config.executor, parallel=parallel))
    pool = EnginePool(config, 2, None, EngineMetrics("model"), num_local=0)
    with pytest.raises(EngineDeadError, match="--cluster-key /none: No such file") as caught:
        await pool.start()
    assert caught.value.exit_code == 78
    await pool.close()
