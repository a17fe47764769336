"""Proposers of drafts, and how many of their drafts are verified."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from executor.config import SpeculativeConfig
from executor.messages import I32, NewRequest, ResolvedParams, SchedulerOutput
from executor.request_states import RequestStates
from executor.speculative.base import ComputedRows, Drafts, ProposerContext
from executor.speculative.doubt import Doubt
from executor.speculative.draft_lengths import DraftLengths
from executor.speculative.draft_model import DraftModelProposer
from executor.speculative.lookup import NO_TOKEN, NUM_KINDS, continuation, find
from executor.speculative.pool import MAX_OUTPUT, MAX_POOLS, POOL_TOKENS, Pool, Pools
from executor.speculative.registry import create_proposer
from executor.speculative.step_costs import START_TIME, StepCosts, time_steps

GENERATOR = np.random.default_rng(7)


def i32(tokens: Any) -> I32:
    return np.array(tokens, np.int32)


def slow_find(text: list[int], query: list[int], least: int) -> tuple[int, list[int]]:
    """The same by definition: ``query`` is the last tokens, the latest first."""
    lengths = []
    for place in range(1, len(text)):
        before = text[:place][::-1]
        length = 0
        while length < min(len(before), len(query)) and before[length] == query[length]:
            length += 1
        lengths.append(length)
    best = max(lengths, default=0)
    if best < max(1, least):
        return 0, []
    return best, [place + 1 for place, length in enumerate(lengths) if length == best]


@pytest.mark.parametrize("vocabulary", [2, 5, 40])
@pytest.mark.parametrize("least", [1, 3])
def test_the_longest_end_is_found_wherever_it_occurs(vocabulary: int, least: int) -> None:
    for length in [*range(1, 12), 50, 300]:
        text = GENERATOR.integers(0, vocabulary, length).tolist()
        query = text[-8:][::-1] if length % 2 else GENERATOR.integers(0, vocabulary, 8).tolist()
        found = find(i32(text), i32(query), least)
        best, places = slow_find(text, query, least)
        assert found.length == best and found.places.tolist() == places[-len(found.places) :]
        assert len(found.places) >= min(len(places), 64)


def test_the_most_frequent_continuation_wins_and_the_latest_of_equals() -> None:
    text = i32([1, 2, 3, 9, 1, 2, 4, 8, 1, 2, 4, 7, 1, 2])
    found = find(text, text[:-9:-1], 1)
    assert found.length == 2 and found.places.tolist() == [2, 6, 10]
    tokens, kinds = continuation(text, found, 4)
    assert tokens == [4, 7, 1, 2], "4 twice, then 7 later than 8"
    assert [kind % 3 for kind in kinds] == [2, 2, 0, 0] and all(0 <= kind < NUM_KINDS for kind in kinds)


def test_what_would_follow_the_end_repeats() -> None:
    text = i32([5, 6, 7, 6, 7])
    tokens, _ = continuation(text, find(text, text[:-5:-1], 1), 7)
    assert tokens == [6, 7, 6, 7, 6, 7, 6]


def test_no_draft_goes_from_one_output_into_another() -> None:
    pool = Pool(max_outputs=2)
    pool.add(i32([1, 2, 3]))
    pool.add(i32([4, 5]))
    assert pool.text.tolist() == [1, 2, 3, NO_TOKEN, 4, 5, NO_TOKEN]
    assert continuation(pool.text, find(pool.text, i32([1]), 1), 9)[0] == [2, 3]
    assert continuation(pool.text, find(pool.text, i32([5]), 1), 9)[0] == []
    pool.add(i32([6]))
    assert pool.text.tolist() == [NO_TOKEN] * 4 + [4, 5, NO_TOKEN, 6, NO_TOKEN], "only two are kept"


def test_a_pool_is_bounded_and_keeps_the_latest_outputs_whole() -> None:
    pool = Pool(max_outputs=1000)
    outputs = [i32(np.full(GENERATOR.integers(1, MAX_OUTPUT), index)) for index in range(60)]
    for index, output in enumerate(outputs):
        pool.add(output)
        assert len(pool.text) <= POOL_TOKENS
        for number in set(np.unique(pool.text).tolist()) - {NO_TOKEN}:
            assert np.count_nonzero(pool.text == number) == len(outputs[number]), "whole or gone"
        assert np.count_nonzero(pool.text == index) == len(output)
    pools = Pools(10)
    for number in range(2 * MAX_POOLS):
        pools.add(number, i32([number]))
        pools.add(0, i32([0]))
    assert len(pools) == MAX_POOLS and pools.get(0) is not None and pools.get(1) is None


def table(**texts: list[int]) -> RequestStates:
    """Slots with prompts of two tokens and the rest as output."""
    states = RequestStates(len(texts), 400, [])
    requests = tuple(
        NewRequest(slot, i32(text).tobytes(), 2, 0, (), params=ResolvedParams())
        for slot, text in enumerate(texts.values())
    )
    states.apply(SchedulerOutput(1, b"", b"", b"", new_reqs=requests))
    return states


def drafts_of(proposer: Any, states: RequestStates, slots: list[int], limit: int = 16) -> list[list[int]]:
    drafts = proposer.propose(i32(slots), np.full(len(slots), limit), states)
    assert drafts.kinds is not None and len(drafts.kinds) == len(drafts.token_ids) == drafts.counts.sum()
    return [row.tolist() for row in np.split(drafts.token_ids, np.cumsum(drafts.counts))[:-1]]


def suffix(**fields: Any) -> SpeculativeConfig:
    return SpeculativeConfig(method="suffix", num_speculative_tokens=16, **fields)


def test_suffix_drafts_grow_with_the_match() -> None:
    text = [*range(10, 40)]
    states = table(a=[*text, 99, 10, 11], b=[*text, 99, *text[:6]], c=text)
    proposer = create_proposer(suffix(max_spec_factor=2.0), 3)
    assert drafts_of(proposer, states, [0, 1, 2]) == [[12, 13, 14, 15], [*range(16, 28)], []]
    assert drafts_of(proposer, states, [1, 2, 0], limit=3) == [[16, 17, 18], [], [12, 13, 14]]
    assert drafts_of(create_proposer(suffix(max_spec_factor=0.1), 3), states, [0]) == [[12]]
    assert drafts_of(proposer, states, [0], limit=0) == [[]]


def test_ngrams_are_of_the_given_lengths_and_take_all_that_is_allowed() -> None:
    text = [*range(10, 40)]
    states = table(a=[*text, 99, 10, 11], b=[*text, 99, 10, 11, 12])
    config = SpeculativeConfig(method="ngram", num_speculative_tokens=9, prompt_lookup_min=3, prompt_lookup_max=3)
    proposer = create_proposer(config, 2)
    assert drafts_of(proposer, states, [0, 1], limit=9) == [[], [*range(13, 22)]]


def test_a_long_match_is_followed_as_long_as_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    text = [*range(10, 40)]
    states = table(a=[*text, 99, *text[:9]])
    proposer = create_proposer(suffix(), 1)
    (first,) = drafts_of(proposer, states, [0], limit=4)
    with monkeypatch.context() as patch:
        patch.setattr("executor.speculative.suffix.find", None)
        states.fill(i32([0, 0]), states.epochs[[0, 0]], states.num_known[0] + np.arange(2), np.array(first[:2]))
        assert drafts_of(proposer, states, [0], limit=4) == [[21, 22, 23, 24]]
    states.fill(i32([0]), states.epochs[[0]], states.num_known[:1], np.array([77]))
    assert drafts_of(proposer, states, [0]) == [[]]


def test_outputs_are_drafts_for_requests_of_the_same_pool_alone() -> None:
    states = table(a=[1, 2, *range(10, 30)], b=[3, 4, 10, 11], c=[3, 4, 10, 11])
    proposer = create_proposer(suffix(max_cached_requests=8), 3)
    for slot, pool in enumerate([5, 5, 6]):
        proposer.add(NewRequest(slot, b"", 2, 0, (), params=ResolvedParams(), draft_pool=pool))
    assert drafts_of(proposer, states, [1, 2]) == [[], []]
    proposer.remove(0, states.token_ids[0, 2:22])
    assert drafts_of(proposer, states, [1, 2]) == [[12, 13, 14, 15], []]
    assert drafts_of(create_proposer(suffix(), 3), states, [1]) == [[]]


def learn_costs(costs: StepCosts, true: Callable[[int], float]) -> None:
    for _ in range(40):
        for count in (1, 2, 4, 6, 8, 12, 16):
            costs.add(count, true(count))


def cost_of(count: int, extra: float) -> float:
    return 10.0 + extra * (count - 1)


def test_costs_follow_the_measurements() -> None:
    costs = StepCosts()

    def true(count: int) -> float:
        return 12.0 if count <= 4 else 12.0 + 3.0 * (count - 4)

    learn_costs(costs, true)
    sizes = (1, 2, 3, 4, 6, 8, 12, 16)
    times = costs.relative(sizes)
    assert [time / times[0] for time in times] == pytest.approx([true(count) / 12.0 for count in sizes], rel=0.1)
    for _ in range(40):  # longer contexts, or another program: all sizes take longer
        costs.add(1, 40.0)
    assert costs.relative([8])[0] / costs.relative([1])[0] == pytest.approx(2.0, rel=0.35)
    assert (np.diff(costs.relative(range(1, 2000))) >= 0).all(), "more tokens never cost less"


def test_the_start_times_as_many_sizes_as_there_is_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5.0
    monkeypatch.setattr("executor.speculative.step_costs.time.perf_counter", lambda: now)

    def timed(seconds: Callable[[int], float], most: int = 16) -> tuple[dict[int, float], float]:
        nonlocal now
        begin = now

        def run(count: int) -> None:
            nonlocal now
            now += seconds(count)

        return time_steps(run, most), now - begin

    times, took = timed(lambda count: 0.001 * (10 + count) if count > 1 else 0.011)
    assert times == pytest.approx({1: 11, 8: 18, 4: 14, 2: 12, 16: 26}) and took <= START_TIME
    assert timed(lambda count: 0.001 * count, most=5)[0] == pytest.approx({1: 1, 4: 4, 2: 2})
    times, took = timed(lambda count: 0.04)
    assert times.keys() == {1, 8} and took <= START_TIME
    times, took = timed(lambda count: 3.0)
    assert times == pytest.approx({1: 3000}) and took == pytest.approx(3), "one step of a large model"


def test_costs_begin_with_what_the_start_has_measured() -> None:
    costs = StepCosts()
    costs.start({})
    assert not costs.is_known
    costs.start({1: 10.0, 8: 12.0, 4: 10.5, 2: 9.9})
    assert costs.relative([1, 2, 4, 8]) == pytest.approx([1, 1, 1.05, 1.2])
    assert 1.2 < costs.relative([16])[0] < 4, "as a guess"
    assert not costs.is_known, "whole steps take longer"
    costs.add(1, 12.0)
    assert costs.milliseconds([1, 2, 4, 8]) == pytest.approx([12, 12, 12.6, 14.4])
    disturbed = StepCosts()
    disturbed.start({1: 10.0, 8: 90.0})
    assert disturbed.relative([8])[0] == pytest.approx(1 + 7 / 4)
    for _ in range(2000):  # another program took the time of that one
        costs.add(1, 10.0)
    assert costs.relative([8])[0] == pytest.approx(StepCosts().relative([8])[0], rel=0.1), "so it is tried again"
    learn_costs(costs, lambda count: cost_of(count, 1.0))
    assert costs.relative([8])[0] / costs.relative([1])[0] == pytest.approx(1.7, rel=0.1)


def test_one_long_step_changes_no_costs() -> None:
    costs = StepCosts()
    learn_costs(costs, lambda count: cost_of(count, 0.5))
    before = costs.milliseconds(range(1, 17))
    for count in (1, 8, 3, 8, 1, 16):
        costs.add(count, 20 * cost_of(count, 0.5))  # another program had the cores, or a prompt the caches
        costs.add(count, cost_of(count, 0.5))
        assert costs.milliseconds(range(1, 17)) == pytest.approx(before, rel=0.02)
    for _ in range(3):
        costs.add(8, 40.0)
    assert costs.milliseconds([8])[0] > 1.5 * before[7], "several of them are believed"


def test_long_times_need_others_that_confirm_them() -> None:
    doubt = Doubt(2)
    assert [doubt.believed(0, surprise) for surprise in (0.1, -2.0, 0.3)] == [0.1, -2.0, 0.3]
    assert doubt.believed(0, 3.0) is None
    assert doubt.believed(1, 2.0) is None, "each size for itself"
    assert doubt.believed(0, 1.0) == 1.0
    assert doubt.believed(0, 5.0) == 1.0, "the smaller of the last two"
    assert doubt.believed(0, 0.0) == 0.0
    assert doubt.believed(0, 5.0) is None


def follow(lengths: DraftLengths, states: RequestStates, draft: list[int], came: list[int]) -> int:
    """Proposes a draft for slot 0, lets other tokens come, and returns how many drafts were worth verifying."""
    slots = i32([0])
    drafts = Drafts(np.array([len(draft)]), i32(draft), np.arange(len(draft), dtype=np.int8))
    (count,) = lengths.choose([0], drafts, states)
    for token in came:
        states.fill(slots, states.epochs[slots], states.num_known[slots], np.array([token]))
    lengths.learn([0], states)
    return count


def test_drafts_that_hold_become_longer_and_those_that_do_not_end() -> None:
    lengths = DraftLengths(1, 6, 0.1, is_adaptive=True)
    learn_costs(lengths.costs, lambda count: 10.0 + count)
    states = table(a=[1, 2])
    counts = [follow(lengths, states, [3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8]) for _ in range(25)]
    assert counts[-1] == 6 and counts[0] < 6
    counts = [follow(lengths, states, [3, 4, 5, 6, 7, 8], [9]) for _ in range(40)]
    assert counts[-1] == 0
    counts = [follow(lengths, states, [3, 4, 5, 6, 7, 8], [3, 4, 5]) for _ in range(60)]
    assert counts[0] == 0 and counts[-1] >= 3, "proposals that were not verified are compared, too"


def test_drafts_that_cost_more_than_they_bring_are_not_verified() -> None:
    states = table(a=[1, 2])
    for milliseconds, expected in ((0.1, 6), (10.0, 0)):
        lengths = DraftLengths(1, 6, 0.0, is_adaptive=True)
        learn_costs(lengths.costs, partial(cost_of, extra=milliseconds))
        for _ in range(6):
            found = follow(lengths, states, [3, 4, 5, 6, 7, 8], [3, 4, 9])
        assert bool(found) == bool(expected)


def test_drafts_that_save_less_than_their_proposal_takes_do_not_pay() -> None:
    lengths = DraftLengths(1, 6, 0.0, is_adaptive=True)
    states = table(a=[1, 2])
    assert lengths.pays(1, 1.0), "nothing is known"
    learn_costs(lengths.costs, lambda count: 10.0 + 0.1 * count)
    assert lengths.pays(1, 1.0)
    for _ in range(60):
        follow(lengths, states, [3, 4, 5, 6, 7, 8], [9])
    assert not lengths.pays(1, 1.0)
    gains = [follow(lengths, states, [3, 4, 5], [3, 4, 5, 6]) and lengths.pays(1, 1.0) for _ in range(30)]
    assert not gains[0] and gains[-1], "what they would have saved counts as well"


def test_fixed_lengths_depend_on_tokens_alone() -> None:
    states = table(a=[1, 2])
    lengths = DraftLengths(1, 6, 0.2, is_adaptive=False)
    lengths.costs.add(1, 1.0)
    lengths.costs.add(8, 1000.0)
    counts = {follow(lengths, states, [3, 4, 5, 6, 7, 8], [9]) for _ in range(20)}
    assert len(counts) == 1


def test_all_rows_of_a_step_share_what_it_costs() -> None:
    """Of many rows, those with the likeliest drafts verify them."""
    lengths = DraftLengths(4, 4, 0.0, is_adaptive=True)
    learn_costs(lengths.costs, lambda count: 10.0 + 1.5 * count)
    states = table(a=[1, 2], b=[1, 2], c=[1, 2], d=[1, 2])
    kinds = np.array([21, 21, 21, 21, 2, 2, 2, 2], np.int8)
    drafts = Drafts(np.array([4, 0, 0, 4]), i32(range(8)), kinds)
    assert lengths.choose([0, 1, 2, 3], drafts, states) == [4, 0, 0, 0]


def constant(count: int, milliseconds: float) -> float:
    return milliseconds


def test_drafts_that_take_time_are_proposed_as_far_as_they_pay() -> None:
    slots, limits = i32([0, 1]), np.array([6, 3])
    lengths = DraftLengths(2, 6, 0.0, is_adaptive=True, first_logits=(1.4,) * 32)
    draft_costs = StepCosts()
    assert lengths.affordable(slots, limits, draft_costs).tolist() == [6, 3], "nothing is known"
    learn_costs(lengths.costs, partial(cost_of, extra=0.1))
    for milliseconds, expected in ((0.5, [4, 3]), (2.0, [3, 3]), (30.0, [1, 1])):
        draft_costs = StepCosts()
        learn_costs(draft_costs, partial(constant, milliseconds=milliseconds))
        found = lengths.affordable(slots, limits, draft_costs).tolist()
        assert found == expected, "the first draft is a part of what is computed anyway"
    learn_costs(lengths.costs, partial(cost_of, extra=20.0))
    counts = [lengths.affordable(slots, limits, draft_costs).tolist() for _ in range(64)]
    assert counts.count([2, 2]) == 2 and counts.count([0, 0]) == 62, "it is tried now and then"


class DraftForward:
    """Computes the next rows of slots, of which it notes the tokens. The next token is always 5."""

    def __init__(self, states: RequestStates) -> None:
        self._states = states
        self.computed: dict[tuple[int, int], int] = {}
        """Tokens of which it has K and V, by slot and position."""

    def of(self, states: RequestStates) -> DraftForward:
        self._states = states
        return self

    def prepare(self, slots: I32, counts: I32, num_sampled: Any) -> int:
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            begin = int(self._states.num_computed[slot])
            for position in range(begin, begin + count):
                self.computed[slot, position] = int(self._states.token_ids[slot, position])
        return int(num_sampled.sum())

    def run(self, num_samples: int) -> tuple[None, torch.Tensor]:
        return None, torch.eye(10)[[5] * num_samples]


@pytest.mark.parametrize("count", [1, 3])
def test_a_draft_model_computes_what_came_in_place_of_its_drafts(count: int) -> None:
    """Others may be verified in their place: what was sampled behind a rejected draft, or what a grammar asks for."""
    states = table(a=[1, 2, 3], b=[4, 5])
    forward = DraftForward(states)
    model = SimpleNamespace(
        loaded=SimpleNamespace(max_model_len=100),
        groups=[],
        forward=forward.of,
        device=SimpleNamespace(torch_device=torch.device("cpu")),
        channel=SimpleNamespace(download=lambda found: SimpleNamespace(collect=lambda: [found[0].numpy()])),
    )
    config = SpeculativeConfig(method="draft_model", num_speculative_tokens=4)
    context: Any = ProposerContext(states=states, draft=model)  # type: ignore[arg-type]
    proposer = DraftModelProposer(config, len(states.num_known), context)
    slots = i32([0, 1])

    def check() -> None:
        rows = ComputedRows(slots, i32([0, 0]), np.zeros(2, np.int64), ())
        states.num_tokens[slots] = states.num_known[slots]
        states.num_computed[slots] = states.num_known[slots] - 1
        proposer.follow(rows, states)
        for slot in (0, 1):
            known = int(states.num_known[slot])
            own = [forward.computed.get((slot, position)) for position in range(known)]
            assert own == states.token_ids[slot, :known].tolist()

    check()
    for tokens in ([7, 8, 9, 6], [5, 5, 7, 1], [5, 5, 5, 5], [7, 5, 5, 5]):
        assert proposer.propose(slots, np.array([4, 0]), states).token_ids.tolist() == [5, 5, 5, 5]
        for slot in (0, 1):
            positions = states.num_known[slot] + np.arange(count)
            states.fill(np.full(count, slot), states.epochs[[slot] * count], positions, np.array(tokens[:count]))
        check()
    check()
