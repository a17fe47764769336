"""Tenants take turns: shares of the tokens served, order among requests, and books that stay small."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_core.fair_shares import MAX_IDLE_TENANTS, FairShares
from engine_core.request import Request
from engine_core.request_queue import FairQueue, PriorityQueue, RequestQueue, create_request_queue
from tests.null.test_scheduler import MAX_LEN, Engine, expected_output, make_request, prompts


def jain(shares: Iterable[float]) -> float:
    """Jain's index: 1 if all shares are equal, 1 / n if one has everything."""
    values = list(shares)
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def waiting(shares: FairShares, index: int, user: str = "", key: str = "", **fields: object) -> Request:
    request = make_request(index, [8, 9], tenant=(key, user), **fields)  # type: ignore[arg-type]
    request.account = shares.open(request.message.tenant)
    return request


def drain(queue: RequestQueue, cost: float = 10) -> list[int]:
    """Serves everything that waits, each request at the same cost."""
    order = []
    while len(queue):
        request = queue.pop()
        request.account.charge(cost)
        order.append(request.index)
    return order


def test_one_tenant_is_served_in_the_order_of_arrival() -> None:
    shares, queue = FairShares(), FairQueue()
    for index in range(20):
        queue.add(waiting(shares, index))
    assert drain(queue) == list(range(20))


def test_users_take_turns() -> None:
    shares, queue = FairShares(), FairQueue()
    for index in range(6):
        queue.add(waiting(shares, index, "many"))
    for index in (6, 7):
        queue.add(waiting(shares, index, "few"))
    assert drain(queue) == [0, 6, 1, 7, 2, 3, 4, 5]


def test_turns_are_paid_in_tokens() -> None:
    shares, queue = FairShares(), FairQueue()
    for index in range(4):
        queue.add(waiting(shares, index, "long"))
    for index in range(4, 10):
        queue.add(waiting(shares, index, "short"))
    order = []
    while len(queue):
        request = queue.pop()
        order.append(request.index)
        request.account.charge(30 if request.index < 4 else 10)
    assert order == [0, 4, 5, 6, 1, 7, 8, 9, 2, 3]


def test_keys_take_turns_whatever_users_they_name() -> None:
    shares, queue = FairShares(), FairQueue()
    for index in range(9):
        queue.add(waiting(shares, index, f"user-{index % 3}", "many"))
    for index in range(9, 12):
        queue.add(waiting(shares, index, "", "one"))
    order = drain(queue)
    assert [index >= 9 for index in order[:6]] == [False, True] * 3
    assert order[:6:2] == [0, 1, 2], "the users of a key take turns too"


def test_who_comes_back_has_saved_nothing_up() -> None:
    shares, queue = FairShares(), FairQueue()
    request = waiting(shares, 0, "pauses")
    queue.add(request)
    assert drain(queue) == [0]
    others = [waiting(shares, index, "stays") for index in range(1, 30)]
    shares.close(request.account)
    for other in others:
        queue.add(other)
    for _ in range(20):
        queue.pop().account.charge(10)
    for index in range(30, 34):
        queue.add(waiting(shares, index, "pauses"))
    order = drain(queue)
    assert sum(index >= 30 for index in order[:4]) == 2, "turn by turn from now on"


def test_a_debt_outlives_a_pause() -> None:
    shares, queue = FairShares(), FairQueue()
    other = [waiting(shares, index, "other") for index in range(4)]
    for request in other:
        queue.add(request)
    greedy = waiting(shares, 9, "greedy")
    greedy.account.charge(35)
    shares.close(greedy.account)
    queue.add(waiting(shares, 10, "greedy"))
    assert drain(queue) == [0, 1, 2, 3, 10]


def test_too_much_charged_is_credit() -> None:
    account = FairShares().open(("key", "user"))
    account.charge(100)
    account.charge(-70)
    assert (account.served, account.credit) == (100, 70)
    account.charge(50)
    assert (account.served, account.credit) == (100, 20)
    account.charge(50)
    assert (account.served, account.credit) == (130, 0)


def test_books_stay_small_whatever_clients_name() -> None:
    shares, queue = FairShares(), FairQueue()
    anchor = waiting(shares, 0, "anchor", "key")
    for index in range(1, 5 * MAX_IDLE_TENANTS):
        request = waiting(shares, index, f"user-{index}", "key")
        queue.add(request)
        assert queue.pop() is request
        request.account.charge(1000)
        shares.close(request.account)
    assert shares.num_accounts <= MAX_IDLE_TENANTS + 3
    shares.close(anchor.account)
    assert shares.num_accounts == 0


def test_a_heap_stays_small() -> None:
    shares, queue = FairShares(), FairQueue()
    for index in range(1000):
        request = waiting(shares, index, f"user-{index % 7}")
        queue.add(request)
        request.account.charge(5)
        queue.remove(request)
        shares.close(request.account)
    (top,) = [queue._root]
    assert len(top.heap) <= 66 and len(queue) == 0


def test_priority_goes_before_fairness() -> None:
    shares = FairShares()
    queue = create_request_queue("priority")
    assert isinstance(queue, PriorityQueue)
    for index in range(4):
        queue.add(waiting(shares, index, "many", priority=1))
    queue.add(waiting(shares, 4, "few", priority=1))
    queue.add(waiting(shares, 5, "many", priority=0))
    queue.add(waiting(shares, 6, "many", priority=2))
    assert [request.index for request in queue] == [5, 0, 1, 2, 3, 4, 6]
    assert drain(queue) == [5, 4, 0, 1, 2, 3, 6], "what was served counts at every priority"


def test_what_has_begun_goes_first() -> None:
    shares, queue = FairShares(), FairQueue()
    for index in range(2):
        queue.add(waiting(shares, index, "a"))
    queue.add(waiting(shares, 2, "b", resumed=[8]))
    queue.add(waiting(shares, 3, "b", resumed=[8]))
    preempted = waiting(shares, 4, "c")
    queue.put_back(preempted)
    assert drain(queue) == [4, 2, 3, 0, 1]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2), st.integers(0, 9)), max_size=120))
@settings(deadline=None, max_examples=100)
def test_a_queue_loses_nothing(steps: list[tuple[int, int, int, int]]) -> None:
    for policy in ("fcfs", "priority"):
        shares, queue = FairShares(), create_request_queue(policy)
        known: dict[int, Request] = {}
        for number, (action, user, key, amount) in enumerate(steps):
            if action < 2:
                request = waiting(shares, number, str(user), str(key), priority=amount % 3)
                known[number] = request
                (queue.put_back if action and amount > 7 else queue.add)(request)
            elif known and action == 2:
                request = queue.peek()
                assert queue.pop() is request
                request.account.charge(amount - 3)
                shares.close(known.pop(request.index).account)
            elif known:
                request = known.pop(sorted(known)[amount % len(known)])
                queue.remove(request)
                shares.close(request.account)
            assert len(queue) == len(known)
            assert sorted(request.index for request in queue) == sorted(known)
        assert sorted(drain(queue)) == sorted(known)


def serve(engine: Engine, users: dict[str, int], turns: int, output: tuple[int, int]) -> Counter[str]:
    """Keeps so many requests of each user in the engine. Returns the tokens that were computed for each."""
    source = random.Random(1)
    names: dict[int, str] = {}
    tokens: Counter[str] = Counter()
    open_requests: Counter[str] = Counter()
    for _ in range(turns):
        for user, count in users.items():
            while open_requests[user] < count:
                index = len(names)
                prompt = prompts(1, source.randint(4, 12), index)[0]
                engine.scheduler.add_request(
                    make_request(index, prompt, source.randint(*output), tenant=("", user), min_tokens=MAX_LEN)
                )
                names[index] = user
                open_requests[user] += 1
        done = set(engine.reasons)
        engine.turn()
        for index in set(engine.reasons) - done:
            user = names[index]
            open_requests[user] -= 1
            tokens[user] += len(engine.outputs[index])
    return tokens


@pytest.mark.parametrize("output", [(8, 8), (2, 40)])
def test_one_user_with_ten_times_the_requests_gets_no_more_tokens(output: tuple[int, int]) -> None:
    engine = Engine.create(num_blocks=256)
    users = {"heavy": 40} | {f"light-{number}": 4 for number in range(15)}
    tokens = serve(engine, users, 3000, output)
    assert jain(tokens.values()) >= 0.95, tokens


def test_long_outputs_are_paid_for() -> None:
    engine = Engine.create(num_blocks=256)
    source = Counter[str]()
    names = {}
    for index in range(120):
        user = "long" if index % 2 else "short"
        names[index] = user
        request = make_request(
            index, prompts(1, 4, index)[0], 40 if index % 2 else 4, tenant=("", user), min_tokens=MAX_LEN
        )
        engine.scheduler.add_request(request)
    while any(names[index] == "short" for index in names.keys() - engine.reasons.keys()):
        engine.turn()
    for index, output in engine.outputs.items():
        source[names[index]] += len(output) + 4
    assert source["long"] < 2 * source["short"]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_tokens_do_not_depend_on_turns(policy: str) -> None:
    engine = Engine.create(num_blocks=20, scheduling_policy=policy)
    inputs = prompts(12, 13)
    for index, prompt in enumerate(inputs):
        tenant = (str(index % 2), str(index % 3))
        engine.scheduler.add_request(make_request(index, prompt, 20, tenant=tenant, priority=index % 2))
    engine.run()
    assert engine.scheduler.num_preemptions
    assert [engine.outputs[index] for index in range(12)] == [expected_output(prompt, 20) for prompt in inputs]
    assert engine.scheduler.pool.shares.num_accounts == 0
