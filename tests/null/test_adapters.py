"""Which adapters the engine core has loaded, and which requests wait for one."""

from __future__ import annotations

import pytest

from engine_core.adapters import ABANDONED, PATIENCE, AdapterPool
from engine_core.config import LoRAConfig
from engine_core.messages import AbortRequests, EnsureAdapter, FinishReason, ForgetAdapter, LoRARequest, UtilityOutput
from engine_core.request import Request
from executor.base import WorkerDiedError
from executor.messages import AdapterLoaded
from tests.null.core_harness import Harness, expected, make_request, prompts


def adapter(name: str, path: str = "") -> LoRARequest:
    return LoRARequest(name, 1, path or f"/{name}", f"hash of {name}")


def harness(max_loras: int = 1, max_cpu_loras: int | None = None, **options: int) -> Harness:
    return Harness(lora=LoRAConfig(enable_lora=True, max_loras=max_loras, max_cpu_loras=max_cpu_loras), **options)


def test_any_mixture_runs() -> None:
    engine = harness(max_loras=2)
    for index, prompt in enumerate(prompts(12)):
        name = "ab-"[index % 3]
        engine.add(index + 1, prompt, lora_request=None if name == "-" else adapter(name))
    engine.run_to_the_end()
    for index, prompt in enumerate(prompts(12)):
        assert engine.outputs[index + 1] == expected(prompt)
    assert sorted(engine.executor.loads) == ["a", "b"], "each is loaded once"


def test_no_more_run_than_may() -> None:
    engine = harness(max_loras=1, max_cpu_loras=3, max_num_seqs=4)
    for index, name in enumerate("abcabcabc"):
        engine.add(index + 1, lora_request=adapter(name))
    engine.add(10)
    running: list[set[int]] = []
    submit = engine.executor.submit

    def watched(message: object) -> None:
        submit(message)  # type: ignore[arg-type]
        assert engine.core._scheduler is not None
        adapters = engine.core._scheduler.pool.adapters
        running.append({adapters.number(request) for request in engine.core._scheduler.running_requests()} - {0})

    engine.executor.submit = watched  # type: ignore[method-assign]
    engine.run_to_the_end()
    assert max(map(len, running)) == 1
    assert all(engine.outputs[index] == expected() for index in range(1, 11))
    assert sorted(engine.executor.loads) == ["a", "b", "c"]


def test_the_one_unused_for_longest_makes_room() -> None:
    engine = harness(max_loras=1, max_cpu_loras=2)
    for index, name in enumerate("abacb"):
        engine.add(index + 1, lora_request=adapter(name))
        engine.run_to_the_end()
    assert engine.executor.loads == ["a", "b", "c", "b"]


def test_nobody_starves() -> None:
    """Requests with one adapter never end, as there is always another; the one with the second gets its turn."""
    engine = harness(max_loras=1, max_num_seqs=2)
    engine.add(1, lora_request=adapter("a"))
    engine.add(2, lora_request=adapter("a"))
    engine.turns(8)
    engine.add(3, lora_request=adapter("b"))
    index, started = 3, 0
    while 3 not in engine.reasons:
        if len(engine.reasons) + 4 > index:
            index += 1
            engine.add(index, lora_request=adapter("a"))
        engine.turns(1)
        started = index
    assert started <= PATIENCE + 12
    engine.run_to_the_end()
    assert all(engine.outputs[each] == expected() for each in range(1, index + 1))


def test_what_cannot_be_loaded_ends_its_requests_alone() -> None:
    engine = harness(max_loras=2)
    engine.add(1, lora_request=adapter("a", "error: changed"))
    engine.add(2, lora_request=adapter("a", "error: changed"))
    engine.add(3, lora_request=adapter("b"))
    engine.run_to_the_end()
    assert engine.errors[1] == engine.errors[2] == "error: changed"
    assert engine.reasons[1] == FinishReason.ERROR
    assert engine.outputs[3] == expected()


def test_an_abort_while_it_waits() -> None:
    engine = harness(max_loras=1)
    engine.add(1, lora_request=adapter("a"))
    engine.turns(8)
    engine.add(2, lora_request=adapter("b"))
    engine.turns(2)
    engine.inbox.append(AbortRequests(indices=(2,)))
    engine.run_to_the_end()
    assert engine.outputs[1] == expected() and 2 not in engine.outputs


def test_one_that_runs_alone_takes_the_place_that_others_claim() -> None:
    pool = AdapterPool(LoRAConfig(enable_lora=True, max_loras=1))
    waiting, suspect = (
        Request(make_request(index, [8, 9], 4, lora_request=adapter(name))) for index, name in ((1, "a"), (2, "b"))
    )
    assert not pool.may_start(waiting)
    pool.park(waiting)
    pool.answered(AdapterLoaded(0, 1, "hash of a"))
    assert pool.take_ready() == [waiting]
    assert not pool.may_start(suspect) and len(pool.commands) == 1
    assert not pool.may_start(suspect, is_alone=True) and len(pool.commands) == 2
    pool.answered(AdapterLoaded(0, 1, "hash of b"))
    assert pool.may_start(suspect, is_alone=True)


def test_an_abort_of_the_one_for_which_an_adapter_was_loaded() -> None:
    engine = harness(max_loras=1, max_num_seqs=3)
    engine.add(1, max_tokens=30)
    engine.add(2, max_tokens=6, lora_request=adapter("a"))
    engine.turns(4)
    for index, name in ((3, "b"), (4, "c")):
        engine.add(index, lora_request=adapter(name))
    engine.turns(2)
    engine.add(5, max_tokens=30)
    engine.add(6, max_tokens=30)
    assert engine.core._scheduler is not None
    adapters = engine.core._scheduler.pool.adapters
    while adapters.num_parked == 2:
        engine.turns(1)
    assert len(engine.core._scheduler.running_requests()) == 3, "there is no slot for the request of which b was loaded"
    engine.inbox.append(AbortRequests(indices=(3,)))
    engine.run_to_the_end()
    assert engine.outputs[4] == expected()


def test_a_load_that_kills_is_given_up() -> None:
    engine = harness(max_loras=1)
    engine.run()
    engine.inbox.append(EnsureAdapter(77, adapter("c")))
    for _ in range(2):
        assert not engine.messages(UtilityOutput)
        engine.executor.inbox.append(WorkerDiedError("worker 0 ended with exit code -9"))
        engine.core.step()
    engine.run_to_the_end()
    assert [message.result["error"] for message in engine.messages(UtilityOutput)] == [ABANDONED]


@pytest.mark.parametrize("turns", range(3, 16))
def test_workers_that_die(turns: int) -> None:
    engine = harness(max_loras=1, max_cpu_loras=2)
    engine.run()
    for index, name in enumerate("abab"):
        engine.add(index + 1, lora_request=adapter(name))
    engine.inbox.append(EnsureAdapter(77, adapter("c")))
    for _ in range(turns):
        engine.core.step()
    engine.executor.inbox.append(WorkerDiedError("worker 0 ended with exit code -9"))
    engine.run_to_the_end()
    assert all(engine.outputs[index] == expected() for index in range(1, 5))
    assert [message.result["error"] for message in engine.messages(UtilityOutput)] == [""]


def test_calls_of_the_api() -> None:
    engine = harness(max_loras=1)
    engine.run()
    engine.inbox.append(EnsureAdapter(1, adapter("a")))
    engine.run()
    assert set(engine.executor.adapters.values()) == {"hash of a"}
    engine.add(1, max_tokens=40, lora_request=adapter("a"))
    engine.turns(8)
    engine.inbox += [EnsureAdapter(2, adapter("b")), EnsureAdapter(3, adapter("c", "error: rank"))]
    engine.turns(6)
    assert set(engine.executor.adapters.values()) == {"hash of a"}, "there is no room: the others were tried"
    answers = {message.call_id: message.result["error"] for message in engine.messages(UtilityOutput)}
    assert answers == {1: "", 2: "", 3: "error: rank"}
    engine.inbox.append(ForgetAdapter("hash of a"))
    engine.turns(2)
    assert engine.executor.adapters, "a request runs with it"
    engine.run_to_the_end()
    assert not engine.executor.adapters
    assert engine.outputs[1] == expected(max_tokens=40)


def test_adapters_must_be_enabled() -> None:
    engine = Harness()
    engine.add(1, lora_request=adapter("a"))
    engine.run()
    engine.inbox.append(EnsureAdapter(1, adapter("a")))
    engine.run_to_the_end()
    assert engine.errors[1] == "adapters need a server started with --enable-lora"
    assert engine.messages(UtilityOutput)[0].result["error"] == "adapters need a server started with --enable-lora"
