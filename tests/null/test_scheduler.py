"""The scheduler with a device that checks every plan: no leak, no lost token, the same tokens whatever happens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_core import scheduler
from engine_core.adapters import AdapterPool
from engine_core.cache_shape import CacheShape, GroupShape
from engine_core.config import CacheConfig, LoRAConfig, SchedulerConfig
from engine_core.in_flight import InFlight
from engine_core.messages import (
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
    RepetitionDetection,
    ResolvedParams,
    ResolvedPoolingParams,
    i32,
    i64,
    to_array,
    u8,
)
from engine_core.request import Request
from engine_core.scheduler import Scheduler
from executor.messages import AdapterLoaded, LoadAdapter, LoRARequest, ModelRunnerOutput, RowError, SchedulerOutput
from tests import fake_device
from tests.fake_device import FakeDevice, next_token

VOCAB = 50
STOP = 7
MAX_LEN = 64


def make_request(
    index: int,
    prompt: list[int],
    max_tokens: int = 8,
    *,
    priority: int = 0,
    salt: str = "",
    resumed: list[int] | None = None,
    pooling: str = "",
    tenant: tuple[str, str] = ("", ""),
    **params: object,
) -> Request:
    resolved = ResolvedParams(max_tokens=max_tokens, eos_token_ids=(STOP,), **params)  # type: ignore[arg-type]
    return Request(
        EngineCoreRequest(
            request_id=f"request-{index}",
            index=index,
            prompt_token_ids=np.array(prompt, np.int32).tobytes(),
            sampling_params=None if pooling else resolved,
            pooling_params=ResolvedPoolingParams(pooling_type=pooling) if pooling else None,
            arrival_time=float(index),
            priority=priority,
            cache_salt=salt,
            tenant=tenant,
            resumed_output_token_ids=np.array(resumed or [], np.int32).tobytes(),
        )
    )


def expected_output(prompt: list[int], max_tokens: int, min_tokens: int = 0) -> list[int]:
    """What a request gives when it runs alone: the definition."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens and len(tokens) < MAX_LEN:
        tokens.append(next_token(tokens, VOCAB, STOP))
        if tokens[-1] == STOP and len(tokens) - len(prompt) >= min_tokens:
            break
    return tokens[len(prompt) :]


def token_rows(outputs: EngineCoreOutputs) -> list[tuple[int, int, list[int]]]:
    """The rows that only got tokens: index, place of the first token in the output, tokens."""
    tokens = iter(i32(outputs.token_ids).tolist())
    indices, places = i64(outputs.indices).tolist(), i32(outputs.output_indices).tolist()
    counts = u8(outputs.num_tokens).tolist() or [1] * len(indices)
    rows = [
        (index, place, list(islice(tokens, count))) for index, place, count in zip(indices, places, counts, strict=True)
    ]
    assert not list(tokens)
    return rows


@dataclass
class Engine:
    """A scheduler, a device and a pipeline of the given depth."""

    scheduler: Scheduler
    device: FakeDevice
    depth: int
    in_flight: deque[tuple[SchedulerOutput, InFlight]] = field(default_factory=deque)
    outputs: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    prompt_positions: dict[int, list[int]] = field(default_factory=dict)
    """Whose log probabilities were told."""
    pooled: dict[int, list[float]] = field(default_factory=dict)
    max_scheduled: int = 0

    @classmethod
    def create(
        cls,
        *,
        depth: int = 2,
        num_blocks: int = 64,
        block_size: int = 4,
        groups: tuple[GroupShape, ...] | None = None,
        caching: bool = True,
        max_draft_tokens: int = 0,
        max_samples: int | None = None,
        propose: Callable[[list[int]], list[int]] = lambda tokens: [],
        num_stages: int = 1,
        **config: object,
    ) -> Engine:
        """An engine with one KV cache group without a window, unless ``groups`` says otherwise."""
        groups = (GroupShape(num_blocks, block_size),) if groups is None else groups
        shape = CacheShape(groups, has_states=any(group.snapshots is not None for group in groups))
        settings = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_in_flight_steps": depth} | config
        scheduler = Scheduler(
            SchedulerConfig(**settings),  # type: ignore[arg-type]
            CacheConfig(enable_prefix_caching=caching),
            shape,
            MAX_LEN,
            max_draft_tokens=max_draft_tokens,
            max_samples=max_samples,
            num_stages=num_stages,
        )
        return cls(scheduler, FakeDevice(shape.groups, VOCAB, STOP, propose), depth)

    def restart(self) -> None:
        """New workers that know nothing."""
        self.in_flight.clear()
        self.scheduler.restart()
        self.device = FakeDevice(self.scheduler.shape.groups, VOCAB, STOP, self.device.propose)

    def restart_with_cache(self) -> int:
        """New workers that find the cache of the last ones, with half of a step in flight written into it.

        Returns:
            Tokens of running requests that must be computed again.
        """
        device = FakeDevice(self.scheduler.shape.groups, VOCAB, STOP, self.device.propose)
        device.groups = self.device.groups
        for plan, _ in self.in_flight:
            self.device.spoil(plan)
        before = int(sum(self.scheduler.table.num_scheduled[self.scheduler.table.running]))
        self.scheduler.restart([step for _, step in self.in_flight])
        self.in_flight.clear()
        self.device = device
        self.scheduler.check_integrity()
        return before - sum(request.num_kept_tokens for request in self.scheduler.requests.values())

    def plan(self) -> bool:
        planned = self.scheduler.schedule()
        if planned is None:
            return False
        plan, step = planned
        assert step.num_tokens <= self.scheduler.config.step_tokens * step.num_steps
        self.max_scheduled = max(self.max_scheduled, step.num_tokens)
        self.in_flight.append((plan, step))
        return True

    def retire(self, row_errors: tuple[RowError, ...] = ()) -> None:
        plan, step = self.in_flight.popleft()
        result = self.device.execute(plan)
        result = msgspec.structs.replace(result, row_errors=row_errors)
        outputs = self.scheduler.update_from_output(step, result)
        for index, position, tokens in token_rows(outputs):
            self._append(index, position, tokens)
        for output in outputs.outputs:
            self._append(output.index, output.first_output_index, list(output.new_token_ids))
            told = self.prompt_positions.setdefault(output.index, [])
            told += [entry.position for entry in output.prompt_logprobs]
            if output.num_cached_tokens is not None:
                self.cached[output.index] = output.num_cached_tokens
            if output.pooling_output is not None:
                self.pooled[output.index] = to_array(output.pooling_output).tolist()
            if output.finish_reason is not None:
                assert output.index not in self.reasons
                self.reasons[output.index] = output.finish_reason
        self.scheduler.check_integrity()

    def _append(self, index: int, position: int, tokens: list[int]) -> None:
        assert index not in self.reasons, "nothing comes after the end"
        known = self.outputs.setdefault(index, [])
        assert position == len(known), "no gap and no overlap"
        known += tokens

    def turn(self) -> bool:
        """One turn of the engine core's loop. False: nothing is left to do."""
        planned = len(self.in_flight) < self.depth and self.plan()
        if not planned and self.in_flight:
            self.retire()
            return True
        return planned

    def run(self) -> None:
        while self.turn():
            pass
        assert not self.scheduler.has_unfinished
        self.scheduler.check_integrity()
        assert self.scheduler.kv.num_free == self.scheduler.kv.num_blocks


def prompts(count: int, length: int = 10, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(8, VOCAB, length).tolist() for _ in range(count)]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("chunk", [3, 32])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("num_blocks", [20, 64])
def test_tokens_do_not_depend_on_how_they_are_scheduled(depth: int, chunk: int, caching: bool, num_blocks: int) -> None:
    engine = Engine.create(depth=depth, num_blocks=num_blocks, caching=caching, max_num_batched_tokens=chunk)
    inputs = prompts(12, 13)
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 20))
    engine.run()
    for index, prompt in enumerate(inputs):
        assert engine.outputs[index] == expected_output(prompt, 20)
    if num_blocks == 20:
        assert engine.scheduler.num_preemptions or chunk == 3


def test_finish_reasons() -> None:
    engine = Engine.create()
    ends_by_stop = next(p for p in prompts(200) if expected_output(p, 30)[-1] == STOP)
    ends_by_length = next(p for p in prompts(200) if STOP not in expected_output(p, 3))
    engine.scheduler.add_request(make_request(0, ends_by_stop, 30))
    engine.scheduler.add_request(make_request(1, ends_by_length, 3))
    engine.run()
    assert engine.reasons == {0: FinishReason.STOP, 1: FinishReason.LENGTH}


def test_workers_hear_of_the_adapter() -> None:
    engine = Engine.create()
    adapters = engine.scheduler.pool.adapters = AdapterPool(LoRAConfig(enable_lora=True))
    plain, adapted = (make_request(index, prompt, 3) for index, prompt in enumerate(prompts(2)))
    adapter = LoRARequest(name="polite", lora_id=3, path="/adapters/polite", content_hash="f00d")
    adapted.message = msgspec.structs.replace(adapted.message, lora_request=adapter)
    engine.scheduler.add_request(plain)
    engine.scheduler.add_request(adapted)
    assert engine.plan()
    (command,) = adapters.commands
    assert isinstance(command, LoadAdapter) and command.adapter == adapter
    adapters.answered(AdapterLoaded(0, command.number, adapter.content_hash))
    engine.scheduler.pool.unpark()
    assert engine.plan()
    assert [[new.lora_id for new in plan.new_reqs] for plan, _ in engine.in_flight] == [[0], [command.number]]
    engine.run()


def test_min_tokens_lets_stop_tokens_pass() -> None:
    prompt = next(p for p in prompts(300) if STOP in expected_output(p, 4)[:4])
    engine = Engine.create()
    engine.scheduler.add_request(make_request(0, prompt, 12, min_tokens=8))
    engine.run()
    assert engine.outputs[0] == expected_output(prompt, 12, min_tokens=8)
    assert len(engine.outputs[0]) >= 8


def test_many_stop_ids_are_all_honoured() -> None:
    prompt = prompts(1)[0]
    output = expected_output(prompt, 12)
    others = [token for token in range(VOCAB) if token not in output][:10]
    engine = Engine.create()
    engine.scheduler.add_request(make_request(0, prompt, 12, stop_token_ids=(*others, output[2])))
    engine.run()
    assert engine.outputs[0] == output[: output.index(output[2]) + 1]


def test_the_context_limit_ends_a_request() -> None:
    prompt = next(p for p in prompts(50, MAX_LEN - 4) if STOP not in expected_output(p, 100))
    engine = Engine.create()
    engine.scheduler.add_request(make_request(0, prompt, 100))
    engine.run()
    assert len(engine.outputs[0]) == 4 and engine.reasons[0] == FinishReason.LENGTH


def test_simultaneous_prompts_share_their_prefix() -> None:
    engine = Engine.create(max_num_batched_tokens=64)
    prompt = prompts(1, 17)[0]
    for index in range(4):
        engine.scheduler.add_request(make_request(index, prompt, 5))
    assert engine.plan()
    plan, _ = engine.in_flight[0]
    # 17 tokens once; the others start behind the four full blocks that the first one computes in the same step.
    assert i32(plan.num_scheduled_tokens).tolist() == [17, 1, 1, 1]
    engine.run()
    assert [engine.cached[index] for index in range(4)] == [0, 16, 16, 16]
    assert engine.scheduler.kv.num_hit_tokens == 48


def test_generated_tokens_are_cached_too() -> None:
    engine = Engine.create()
    prompt = next(p for p in prompts(100) if len(expected_output(p, 12)) == 12)
    engine.scheduler.add_request(make_request(0, prompt, 12))
    engine.run()
    engine.scheduler.add_request(make_request(1, prompt + engine.outputs[0], 3))
    engine.run()
    assert engine.cached[1] == 20  # of 22 tokens the 21 that were computed fill five blocks
    assert engine.outputs[1] == expected_output(prompt + engine.outputs[0], 3)


def test_salts_keep_prompts_apart() -> None:
    engine = Engine.create()
    prompt = prompts(1, 17)[0]
    for index, salt in enumerate(["a", "b", "a"]):
        engine.scheduler.add_request(make_request(index, prompt, 2, salt=salt))
        engine.run()
    assert [engine.cached[index] for index in range(3)] == [0, 0, 16]


def test_no_prefix_caching() -> None:
    engine = Engine.create(caching=False)
    prompt = prompts(1, 17)[0]
    for index in range(2):
        engine.scheduler.add_request(make_request(index, prompt, 2))
        engine.run()
    assert engine.cached == {0: 0, 1: 0}


def test_prompt_logprobs_compute_the_whole_prompt() -> None:
    engine = Engine.create()
    prompt = prompts(1, 17)[0]
    engine.scheduler.add_request(make_request(0, prompt, 2))
    engine.run()
    engine.scheduler.add_request(make_request(1, prompt, 2, prompt_logprobs=0))
    engine.run()
    assert engine.cached[1] == 0
    assert engine.scheduler.kv.num_queried_tokens == 17  # the second one did not ask


@pytest.mark.parametrize("num_turns", range(1, 14))
def test_prompt_logprobs_are_told_once_whatever_happens(num_turns: int) -> None:
    engine = Engine.create(max_num_batched_tokens=5)
    prompt = next(p for p in prompts(100, 17) if len(expected_output(p, 6)) == 6)
    engine.scheduler.add_request(make_request(0, prompt, 6, prompt_logprobs=0))
    for _ in range(num_turns):
        engine.turn()
    engine.restart()
    engine.run()
    assert engine.outputs[0] == expected_output(prompt, 6)
    assert engine.prompt_positions[0] == list(range(1, 17))


@pytest.mark.parametrize(("pooling", "cached"), [("LAST", 16), ("MEAN", 0), ("CLS", 0), ("ALL", 0)])
def test_pooling_ends_with_the_prompt(pooling: str, cached: int) -> None:
    """All poolings fill the prefix cache; only that of the last position reads it."""
    engine = Engine.create(max_num_batched_tokens=5)
    prompt = prompts(1, 17)[0]
    for index in range(2):
        engine.scheduler.add_request(make_request(index, prompt, pooling=pooling))
        engine.run()
    assert engine.reasons == {0: FinishReason.STOP, 1: FinishReason.STOP} and engine.outputs == {0: [], 1: []}
    assert engine.pooled == {0: [*prompt, 17], 1: [*prompt, 17 - cached]}
    assert engine.cached == {0: 0, 1: cached}
    engine.scheduler.add_request(make_request(2, prompt, 3))
    engine.run()
    assert engine.cached[2] == 16 and engine.outputs[2] == expected_output(prompt, 3)


def test_a_pooled_prompt_may_fill_the_context() -> None:
    engine = Engine.create()
    prompt = prompts(1, MAX_LEN)[0]
    engine.scheduler.add_request(make_request(0, prompt, pooling="MEAN"))
    engine.run()
    assert engine.pooled[0] == [*prompt, MAX_LEN]


@pytest.mark.parametrize("num_turns", range(1, 10))
def test_pooling_begins_anew_after_a_restart(num_turns: int) -> None:
    engine = Engine.create(max_num_batched_tokens=5)
    prompt = prompts(1, 30)[0]
    engine.scheduler.add_request(make_request(0, prompt, pooling="MEAN"))
    for _ in range(num_turns):
        engine.turn()
    engine.restart()
    engine.run()
    assert engine.pooled[0] == [*prompt, 30]


def test_a_pooled_row_that_failed_has_an_error() -> None:
    engine = Engine.create()
    engine.scheduler.add_request(make_request(0, prompts(1)[0], pooling="LAST"))
    engine.plan()
    engine.device.execute = lambda plan: ModelRunnerOutput(step_id=plan.step_id)  # type: ignore[method-assign]
    engine.retire((RowError(row=0, message="not a number"),))
    assert engine.reasons == {0: FinishReason.ERROR} and not engine.pooled


def test_priority_goes_first_and_preempts_the_least_urgent() -> None:
    engine = Engine.create(scheduling_policy="priority", max_num_seqs=1)
    for index, priority in enumerate([5, 1, 3]):
        engine.scheduler.add_request(make_request(index, prompts(3)[index], 4, priority=priority))
    order: list[int] = []
    while engine.turn():
        order += [index for index in engine.reasons if index not in order]
    assert order == [1, 2, 0]

    engine = Engine.create(scheduling_policy="priority", num_blocks=16, block_size=4, max_num_batched_tokens=64)
    inputs = prompts(3, 15, seed=5)
    for index, priority in enumerate([9, 0, 4]):
        engine.scheduler.add_request(make_request(index, inputs[index], 30, priority=priority))
    engine.run()
    for index in range(3):
        assert engine.outputs[index] == expected_output(inputs[index], 30)


def test_long_prefill_threshold_leaves_room_for_others() -> None:
    engine = Engine.create(long_prefill_token_threshold=4)
    long, short = prompts(1, 40)[0], prompts(1, 3, seed=1)[0]
    engine.scheduler.add_request(make_request(0, long, 2))
    engine.scheduler.add_request(make_request(1, short, 2))
    assert engine.plan()
    assert i32(engine.in_flight[0][0].num_scheduled_tokens).tolist() == [4, 3]
    engine.run()
    assert engine.outputs[0] == expected_output(long, 2)


def test_without_chunked_prefill_prompts_are_whole() -> None:
    engine = Engine.create(enable_chunked_prefill=False, max_num_batched_tokens=32)
    inputs = prompts(4, 20)
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 4))
    assert engine.plan() and i32(engine.in_flight[0][0].num_scheduled_tokens).tolist() == [20]
    engine.run()
    for index, prompt in enumerate(inputs):
        assert engine.outputs[index] == expected_output(prompt, 4)


def test_a_step_starts_a_bounded_number_of_prompt_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached tokens cost no budget; still somebody has to look them up, and each request costs something besides."""
    monkeypatch.setattr(scheduler, "MAX_DESCRIBED_TOKENS", 60)
    monkeypatch.setattr(scheduler, "REQUEST_COST", 10)
    engine = Engine.create()
    inputs = prompts(4, 20)
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 4))
    assert engine.plan() and len(engine.in_flight[0][0].new_reqs) == 2
    assert engine.plan() and len(engine.in_flight[1][0].new_reqs) == 2
    engine.run()
    for index, prompt in enumerate(inputs):
        assert engine.outputs[index] == expected_output(prompt, 4)


def test_abort_frees_everything_at_once() -> None:
    engine = Engine.create()
    for index, prompt in enumerate(prompts(12)):
        engine.scheduler.add_request(make_request(index, prompt, 30))
    for _ in range(3):
        engine.turn()
    for index in range(12):
        engine.scheduler.abort_request(index)
    assert engine.scheduler.kv.num_free == engine.scheduler.kv.num_blocks
    assert not engine.scheduler.abort_request(0)
    engine.run()


def test_a_failed_row_harms_no_other() -> None:
    engine = Engine.create()
    inputs = prompts(3)
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 10))
    engine.plan()
    engine.retire((RowError(row=1, message="not a number"),))
    assert engine.reasons == {1: FinishReason.ERROR}
    cached = set(engine.scheduler.kv.managers[0].pool._cached)
    assert not cached & set(make_hashes(engine, inputs[1]))
    engine.run()
    assert engine.outputs[0] == expected_output(inputs[0], 10)
    assert engine.outputs[2] == expected_output(inputs[2], 10)


def make_hashes(engine: Engine, prompt: list[int]) -> list[bytes]:
    request = make_request(999, prompt)
    return engine.scheduler.kv.hashes(request, request.token_ids, len(prompt), 4)


def test_restart_resumes_what_ran() -> None:
    engine = Engine.create()
    inputs = prompts(10, 9)
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 20))
    for _ in range(9):
        engine.turn()
    engine.restart()
    engine.run()
    for index, prompt in enumerate(inputs):
        assert engine.outputs[index] == expected_output(prompt, 20)


def test_resumed_output_continues_its_numbering() -> None:
    prompt = next(p for p in prompts(100) if len(expected_output(p, 12)) == 12)
    output = expected_output(prompt, 12)
    engine = Engine.create()
    engine.outputs[0] = output[:5]
    engine.scheduler.add_request(make_request(0, prompt, 12, resumed=output[:5]))
    engine.run()
    assert engine.outputs[0] == output


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_arrivals_aborts_and_stops_leak_nothing(data: st.DataObject) -> None:
    """Whatever happens, every request that is not aborted gets the tokens that it gets alone."""
    draw = data.draw
    block_size = draw(st.sampled_from([1, 2, 4]))
    engine = Engine.create(
        depth=draw(st.integers(1, 3)),
        block_size=block_size,
        num_blocks=draw(st.integers(-(-MAX_LEN // block_size), 3 * -(-MAX_LEN // block_size))),
        caching=draw(st.booleans()),
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 40)),
        scheduling_policy=draw(st.sampled_from(["fcfs", "priority"])),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 3])),
        num_scheduler_steps=draw(st.sampled_from([1, 2, 5])),
    )
    shared = prompts(1, 20, seed=3)[0]
    sent: dict[int, tuple[list[int], int, int]] = {}
    poolings: dict[int, str] = {}
    asked: set[int] = set()
    aborted: set[int] = set()
    for index in range(draw(st.integers(1, 12))):
        prompt = shared[: draw(st.integers(0, 20))] + prompts(1, draw(st.integers(1, 25)), seed=index)[0]
        max_tokens, min_tokens = draw(st.integers(1, 30)), draw(st.sampled_from([0, 0, 5]))
        min_tokens = min(min_tokens, max_tokens)
        sent[index] = prompt, max_tokens, min_tokens
        if draw(st.integers(0, 3)) == 0:
            asked.add(index)
        elif draw(st.integers(0, 3)) == 0:
            poolings[index] = draw(st.sampled_from(["LAST", "MEAN"]))
        engine.scheduler.add_request(
            make_request(
                index,
                prompt,
                max_tokens,
                pooling=poolings.get(index, ""),
                min_tokens=min_tokens,
                priority=draw(st.integers(0, 3)),
                prompt_logprobs=0 if index in asked else None,
            )
        )
        for _ in range(draw(st.integers(0, 8))):
            engine.turn()
        if draw(st.integers(0, 3)) == 0:
            victim = draw(st.sampled_from(sorted(sent)))
            if engine.scheduler.abort_request(victim):
                aborted.add(victim)
        engine.scheduler.check_integrity()
    engine.run()
    for index, (prompt, max_tokens, min_tokens) in sent.items():
        expected = expected_output(prompt, max_tokens, min_tokens)
        if index in poolings:
            assert index in aborted or engine.pooled[index][:-1] == prompt
            assert poolings[index] == "LAST" or index in aborted or engine.pooled[index][-1] == len(prompt)
        elif index in aborted:
            assert engine.outputs.get(index, []) == expected[: len(engine.outputs.get(index, []))]
        else:
            assert engine.outputs[index] == expected
            assert engine.prompt_positions[index] == (list(range(1, len(prompt))) if index in asked else [])


def until_loop(prompt: list[int], max_tokens: int, wanted: RepetitionDetection) -> list[int]:
    """The output of a request that runs alone, up to its first loop."""
    output = expected_output(prompt, max_tokens)
    for length in range(1, len(output) + 1):
        for size in range(wanted.min_pattern_size, wanted.max_pattern_size + 1):
            tail = output[:length][-size * wanted.min_count :]
            if len(tail) == size * wanted.min_count and tail == tail[:size] * wanted.min_count:
                return output[:length]
    return output


def test_an_output_that_is_caught_in_a_loop_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a small range repeat by chance; few blocks let requests be preempted in the middle."""
    monkeypatch.setattr(fake_device, "next_token", lambda tokens, vocab, stop: sum(tokens[-3:]) % 4 + 10)
    monkeypatch.setitem(globals(), "next_token", lambda tokens, vocab, stop: sum(tokens[-3:]) % 4 + 10)
    wanted = RepetitionDetection(max_pattern_size=6, min_pattern_size=2, min_count=3)
    prompts = [[8 + i, 9 + i * i % 5, 10] for i in range(8)]
    engine = Engine.create(num_blocks=20, block_size=4)
    for index, prompt in enumerate(prompts):
        engine.scheduler.add_request(make_request(index, prompt, 40, repetition_detection=wanted))
    engine.run()
    assert engine.scheduler.num_preemptions > 0
    for index, prompt in enumerate(prompts):
        expected = until_loop(prompt, 40, wanted)
        assert engine.outputs[index] == expected
        assert engine.reasons[index] == (FinishReason.REPETITION if len(expected) < 40 else FinishReason.LENGTH)
    assert FinishReason.REPETITION in engine.reasons.values()
