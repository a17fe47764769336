"""Sleep, seen from the api."""

from __future__ import annotations

import asyncio

import pytest

from api.engine.calls import Answer
from api.engine.sleeper import Sleeper
from api.errors import CallError, RequestError
from api.server.sleeping import _done
from engine_core.messages import WakeUpRequest


async def turns() -> None:
    """Lets tasks run until they wait."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_client_that_leaves_does_not_stop_a_call_halfway() -> None:
    levels: list[int] = []
    answers: list[asyncio.Future[Answer]] = []

    async def call(make: object) -> Answer:
        answers.append(asyncio.get_running_loop().create_future())
        return await answers[-1]

    sleeper = Sleeper(call, levels.append)
    for work, is_sleeping in ((sleeper.sleep(2), True), (sleeper.wake_up(), False)):
        request = asyncio.create_task(_done(work))
        await turns()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        answers.pop().set_result({})
        await turns()
        assert sleeper.is_sleeping == is_sleeping
    assert levels == [2, 0]


async def test_an_engine_that_will_reload_its_weights_gets_no_requests() -> None:
    awake: list[bool] = []

    async def call(make: object) -> Answer:
        awake.append(sleeper.is_awake)
        return {}

    sleeper = Sleeper(call, lambda level: None)
    assert sleeper.is_awake
    await sleeper.reload_weights()
    assert awake == [False, False] and sleeper.is_awake


async def test_a_refusal_is_a_conflict() -> None:
    async def call(make: object) -> Answer:
        assert make is WakeUpRequest
        raise CallError("not now")

    with pytest.raises(RequestError, match="not now") as caught:
        await _done(Sleeper(call, lambda level: None).wake_up())
    assert caught.value.status == 409
