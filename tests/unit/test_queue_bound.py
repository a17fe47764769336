"""How many requests may wait, whose they are, and what the others are told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from api.config import ServerConfig
from api.engine.queue_bound import BURST_TIME, MAX_RETRY_AFTER, MAX_WAIT, QueueBound, Tenant
from api.errors import RequestError
from api.http.tenants import short_name
from engine_core.config import SchedulerConfig
from engine_core.messages import EngineReady
from tests.fakes import MODEL, FakeServer
from tests.routes import ROUTES, request
from tests.unit.conftest import Api

A: Tenant = ("", "a")
B: Tenant = ("", "b")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Queue:
    """A bounded queue before an engine with some slots, all of which are taken."""

    def __init__(self, num_slots: int = 4, num_kv_blocks: int = 1000, **config: Any) -> None:
        self.clock = Clock()
        self.bound = QueueBound(SchedulerConfig(max_num_seqs=num_slots, **config), clock=self.clock)
        self.bound.on_ready(
            EngineReady(
                engine_epoch=1,
                pid=1,
                max_model_len=1024,
                vocab_size=10,
                num_kv_blocks=num_kv_blocks,
                block_size=32,
                max_num_seqs=num_slots,
            )
        )
        self.bound.num_unfinished = num_slots
        self.bound.is_saturated = True
        self.next = 0
        self.waiting: list[int] = []

    def come(self, tenant: Tenant = A, count: int = 1, num_tokens: int = 10) -> int | None:
        """Requests come. Returns the seconds after which to try again, or None if they wait."""
        try:
            is_extra = self.bound.check(tenant, count, count * num_tokens)
        except RequestError as error:
            assert error.status == 429
            return int(error.headers["Retry-After"])
        for _ in range(count):
            self.next += 1
            self.bound.enter(self.next, tenant, num_tokens, is_extra=is_extra)
            self.waiting.append(self.next)
        return None

    def fill(self, tenant: Tenant = A, num_tokens: int = 10) -> int:
        """Requests come until one is refused."""
        before = len(self.bound)
        while self.come(tenant, 1, num_tokens) is None:
            assert len(self.bound) < 10000
        return len(self.bound) - before

    def serve(self, seconds: float, rate: float) -> None:
        """Requests have their first output, as many each second, while others come."""
        for _ in range(int(seconds * rate)):
            self.come()
            self.clock.now += 1 / rate
            self.bound.begin(self.waiting.pop(0))


def test_as_many_may_wait_as_may_run() -> None:
    queue = Queue(num_slots=6)
    assert queue.fill() == 6
    assert queue.come() is not None


def test_what_is_served_in_a_minute_may_wait() -> None:
    queue = Queue()
    queue.come()
    queue.serve(30, rate=2)
    assert queue.fill() + 1 == pytest.approx(2 * MAX_WAIT, abs=3)


def test_long_prompts_count_for_what_they_are() -> None:
    queue = Queue(num_slots=100, num_kv_blocks=10)
    assert queue.fill(num_tokens=100) == 3


def test_a_prompt_longer_than_everything_may_wait_alone() -> None:
    queue = Queue(num_kv_blocks=2)
    queue.bound.is_saturated, queue.bound.num_unfinished = False, 0
    assert queue.come(num_tokens=1000) is None


def test_many_at_once_are_no_overload_yet() -> None:
    queue = Queue(num_slots=4)
    queue.bound.is_saturated, queue.bound.num_unfinished = False, 3
    assert queue.come() is None, "a slot was free"
    queue.bound.is_saturated, queue.bound.num_unfinished = True, 4
    assert queue.come(count=1000) is None
    queue.clock.now += BURST_TIME + 1
    assert queue.come() is not None
    given = Queue(num_slots=4, max_num_queued_reqs=10)
    given.bound.is_saturated, given.bound.num_unfinished = False, 3
    assert given.come() is None
    given.bound.is_saturated, given.bound.num_unfinished = True, 4
    assert given.fill() == 9


def test_given_bounds() -> None:
    assert Queue(max_num_queued_reqs=2).fill() == 2
    assert Queue(max_num_queued_reqs=0).fill() == 0
    assert Queue(max_num_queued_reqs=50, max_num_queued_tokens=45).fill(num_tokens=10) == 4
    queue = Queue(max_num_queued_reqs=0)
    queue.bound.is_saturated, queue.bound.num_unfinished = False, 3
    assert queue.come() is None, "there is a slot"


def test_a_queue_without_bound() -> None:
    bound = QueueBound(SchedulerConfig(max_num_seqs=1, max_num_queued_reqs=1), enabled=False)
    bound.num_unfinished = 1000
    for index in range(1000):
        assert bound.check(A) is False
        bound.enter(index, A, 10)


def test_all_requests_of_a_batch_or_none() -> None:
    queue = Queue(num_slots=10)
    queue.come(count=6)
    assert queue.come(count=5) is not None and len(queue.bound) == 6
    assert queue.come(count=4) is None and len(queue.bound) == 10


def test_others_may_come_into_a_full_queue() -> None:
    queue = Queue(num_slots=16)
    assert queue.fill(A) == 16
    assert queue.fill(B) == 8
    assert queue.fill(("", "c")) == 5
    assert queue.come(A) is not None


def test_who_names_many_users_gets_no_more_than_twice_the_queue() -> None:
    queue = Queue(num_slots=16)
    count = sum(queue.come(("", str(number))) is None for number in range(1000))
    assert count == 32
    assert queue.come(("another key", "")) is not None, "what comes on top is bounded as a whole"


def test_keys_have_shares_whatever_users_they_name() -> None:
    queue = Queue(num_slots=16)
    for number in range(15):
        queue.come(("one", str(number)))
    assert queue.fill(("two", "")) == 8
    assert queue.come(("one", "")) is None, "a user who has nothing there"
    assert queue.come(("one", "another")) is not None, "but the key has twice its share"


def test_a_batch_that_never_fits_comes_in_where_nothing_waits_for_its_tenant() -> None:
    queue = Queue(num_slots=4)
    queue.fill(A)
    assert queue.come(("key", ""), count=50) is None
    assert queue.come(("key", "")) is not None


def test_long_prompts_do_not_pass_for_few_requests() -> None:
    queue = Queue(num_slots=100, num_kv_blocks=10)
    assert queue.fill(A, 100) == 3
    assert queue.fill(B, 100) == 1


def test_a_key_that_has_twice_its_share_is_refused_unread() -> None:
    queue = Queue(num_slots=16)
    queue.fill(("one", ""))
    queue.bound.check_key("two")
    queue.bound.check_key("one")  # another user of it may come
    for key in ("two", "three", "four"):
        queue.come((key, ""))
    queue.bound.check_key("two")
    with pytest.raises(RequestError):
        queue.bound.check_key("one")


def test_room_comes_back() -> None:
    queue = Queue(num_slots=4)
    queue.fill(A)
    queue.bound.leave(queue.waiting.pop())
    assert queue.come(A) is None
    for index in queue.waiting:
        queue.bound.begin(index)
        queue.bound.leave(index)
    assert len(queue.bound) == 0 and not queue.bound._keys
    assert queue.fill(A) == 4


def test_when_to_try_again() -> None:
    queue = Queue(num_slots=4)
    assert queue.fill() == 4
    queue.serve(30, rate=2)
    queue.fill()
    told = [queue.come() for _ in range(20)]
    assert told[0] is not None and told[0] <= 3
    assert told[-1] == pytest.approx(told[0] + 10, abs=1), "two a second: each has a time of its own"
    told += [queue.come() for _ in range(1000)]
    assert told[-1] == MAX_RETRY_AFTER
    queue.clock.now += MAX_RETRY_AFTER
    assert (queue.come() or 0) <= 3


# -- over HTTP


@pytest.fixture
def full(server: FakeServer) -> Api:
    server.engine.max_queued = 0
    return Api(server)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_refusal_in_each_dialect(full: Api, route: str, stream: bool) -> None:
    path, body = request(route, "hi", stream=stream)
    response = await full.post(path, body)
    assert response.status_code == 429 and response.headers["retry-after"] == "7"
    error = response.json()["error"]
    kinds = {"messages": "rate_limit_error", "responses": "rate_limit_exceeded"}
    assert error["type"] == kinds.get(route, "RateLimitError")
    assert "Please try again in 7 s" in error["message"]
    assert not full.server.engine.submitted


@pytest.mark.parametrize(
    ("path", "body", "count"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 3, "seed": 1}, 3),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "best_of": 3}, 6),
        ("/v1/embeddings", {"input": ["a", "b", "c"]}, 3),
        ("/v1/score", {"queries": "a", "documents": ["b", "c"]}, 3),
        ("/v1/rerank", {"query": "a", "documents": ["b", "c"]}, 3),
    ],
)
async def test_what_counts(api: Api, path: str, body: dict[str, Any], count: int) -> None:
    await api.ok(path, {"max_tokens": 1, "user": "me", **body} if "completions" in path else {"user": "me", **body})
    engine = api.server.engine
    me = ("", short_name("me"))
    assert engine.checked[-1] == (me, count) and engine.checked[-2] == (me, count), "before the work, and for sure"
    assert len(engine.submitted) == count
    assert {message.tenant for message in engine.submitted} == {me}


@pytest.mark.parametrize("route", ROUTES)
async def test_who_a_request_is_for(route: str) -> None:
    server = FakeServer(ServerConfig(api_key=["one", "two"]))
    api = Api(server)
    field = {"messages": {"metadata": {"user_id": "me"}}}.get(route, {"safety_identifier": "me", "user": "you"})
    for key, fields in (("one", {}), ("two", {}), ("two", field), ("one", field)):
        path, body = request(route, "hi", max_tokens=1)
        response = await api.post(path, {**body, **fields}, headers={"Authorization": f"Bearer {key}"})
        assert response.status_code == 200, response.text
    tenants = [message.tenant for message in server.engine.submitted]
    one, two, me = short_name("one"), short_name("two"), short_name("me")
    assert tenants == [(one, ""), (two, ""), (two, me), (one, me)]
    assert not {"one", "two", "me"} & {name for tenant in tenants for name in tenant}


async def test_what_has_begun_is_never_refused(api: Api) -> None:
    engine = api.server.engine
    engine.steps_left = 1
    path, body = request("chat", "hi", stream=True, max_tokens=4)
    first = asyncio.create_task(api.post(path, body))
    while engine.steps_left:  # noqa: ASYNC110
        await asyncio.sleep(0)
    engine.max_queued = 1
    assert (await api.post(path, body)).status_code == 429
    engine.steps_left = None
    assert (await first).text.endswith("data: [DONE]\n\n")


def test_the_model_is_named_in_no_refusal(full: Api) -> None:
    assert MODEL not in str(pytest.raises(RequestError, full.server.engine.check_queue, A).value)
