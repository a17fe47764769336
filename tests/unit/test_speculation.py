"""Rows with drafts: each position is sampled as if it came alone, and what holds is what comes without drafts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from executor.config import SpeculativeConfig
from executor.device.steps import wait_for
from executor.messages import I32, I64, NewRequest, ResolvedParams, SchedulerOutput, ThinkingBudget
from executor.request_states import RequestStates
from executor.sampling.base import BAD_LOGITS, SamplerOutput, SampleRows, TokenMask
from executor.sampling.reference import ReferenceSampler
from executor.sampling.sampler import Sampler
from executor.speculative.base import Drafts
from executor.speculative.draft_lengths import DraftLengths
from executor.speculative.registry import create_proposer
from executor.speculative.speculation import Speculation, drafts_of, settle, step_rows
from executor.speculative.suffix import SuffixProposer
from tests.unit.test_sampling import (
    CHANNEL,
    NUM_SLOTS,
    VOCAB_SIZE,
    NewBackend,
    Worker,
    new_backend,
    quick_backend,
    random_params,
)

__all__ = ["new_backend", "quick_backend"]

NUM_TOKENS = 40


class DraftingWorker(Worker):
    """Samples rows with drafts."""

    def draft_step(
        self, drafts: dict[int, list[int]], mask: TokenMask | None = None, *, spoilt: int = -1
    ) -> tuple[SamplerOutput, list[int]]:
        """A step of some slots. Returns what was sampled, and how many drafts of each held.

        Args:
            drafts: By slot.
            mask: By rows of the logits.
            spoilt: Row of the logits that is not finite.
        """
        states = self.states
        slots = np.array(list(drafts), np.int32)
        counts = np.array([len(tokens) for tokens in drafts.values()])
        states.set_drafts(slots, counts, np.array(sum(drafts.values(), []), np.int32))
        logits = [
            self._logits_at(slot, int(states.num_tokens[slot]) + i)
            for slot in drafts
            for i in range(1 + len(drafts[slot]))
        ]
        if spoilt >= 0:
            logits[spoilt][:] = np.nan
        step = np.repeat(np.arange(len(slots), dtype=np.int32), counts + 1)
        offsets = np.concatenate([np.arange(count + 1) for count in counts])
        rows = SampleRows(slots[step], states.num_tokens[slots[step]] + offsets, step)
        expected = drafts_of(rows, states)
        epochs = states.epochs[rows.slots]
        states.set_counts(slots, states.num_computed[slots], states.num_tokens[slots] + counts + 1)
        given = torch.tensor(np.array(logits, np.float32))
        output = wait_for(self.backend.sample(given, given, rows, states, mask).output, CHANNEL)
        output, accepted = settle(states, rows, epochs, expected, output)
        assert (states.num_known[slots] == states.num_tokens[slots]).all()
        return output, list(accepted)

    def _logits_at(self, slot: int, length: int) -> np.ndarray:
        tokens = self.states.token_ids[slot, :length]
        return np.random.default_rng([*tokens.tolist()]).normal(0, 2, self.vocab_size).astype(np.float32)


def lonely(backend: NewBackend, prompt: list[int], params: ResolvedParams) -> tuple[list[int], list[object]]:
    """The output of a request that runs alone and without drafts, up to its first error, with log probabilities."""
    worker = Worker(backend(NUM_SLOTS))
    worker.add(0, prompt, params)
    entries: list[object] = []
    for count in range(NUM_TOKENS):
        result = worker.step([0])
        if result.row_errors:
            return worker.output(0)[:count], entries
        entries += [(entry.token_ids, entry.logprobs, entry.rank) for entry in result.logprobs]
    return worker.output(0), entries


@pytest.mark.parametrize("seed", range(12))
def test_whatever_requests_ask_for_drafts_change_nothing(quick_backend: NewBackend, seed: int) -> None:
    generator = np.random.default_rng(seed)
    requests = [
        (generator.integers(0, VOCAB_SIZE, generator.integers(1, 60)).tolist(), random_params(generator))
        for _ in range(NUM_SLOTS)
    ]
    expected = [lonely(quick_backend, prompt, params) for prompt, params in requests]
    worker = DraftingWorker(quick_backend(NUM_SLOTS))
    for slot, (prompt, params) in enumerate(requests):
        worker.add(slot, prompt, params)
    entries: dict[int, list[object]] = {slot: [] for slot in range(NUM_SLOTS)}
    running = {slot for slot in range(NUM_SLOTS) if expected[slot][0]}
    num_accepted = 0
    while running:
        drafts = {}
        for slot in generator.permutation(sorted(running)).tolist():
            if generator.random() < 0.8:
                known = len(worker.output(slot))
                future = expected[slot][0][known : known + int(generator.integers(0, 7))]
                wrong = generator.random(len(future)) < 0.2
                drafts[slot] = [(t + 1) % VOCAB_SIZE if bad else t for t, bad in zip(future, wrong, strict=True)]
        if not drafts:
            continue
        output, accepted = worker.draft_step(drafts)
        num_accepted += sum(accepted)
        failed = {error.row: error.position for error in output.row_errors}
        for entry in output.logprobs:
            entries[list(drafts)[entry.row]].append((entry.token_ids, entry.logprobs, entry.rank))
        for row, slot in enumerate(drafts):
            tokens, told = expected[slot]
            got = worker.output(slot)
            if row in failed:
                assert got[:-1] == tokens and failed[row] == accepted[row], "it ends where it ends alone"
                running.discard(slot)
            elif len(got) >= NUM_TOKENS:
                running.discard(slot)
            assert got[: len(tokens)] == tokens[: len(got)]
            assert entries[slot][: len(told)] == told[: len(entries[slot])]
    assert num_accepted > 30


def test_an_error_behind_a_draft_that_does_not_hold_is_none(new_backend: NewBackend) -> None:
    params = ResolvedParams(seed=3, logprobs=0)
    truth, _ = lonely(new_backend, [4, 5], params)
    worker = DraftingWorker(new_backend(NUM_SLOTS))
    worker.add(1, [4, 5], params)
    output, accepted = worker.draft_step({1: [truth[0], (truth[1] + 1) % VOCAB_SIZE, 7]}, spoilt=3)
    assert accepted == [1] and not output.row_errors and worker.output(1) == truth[:2]
    assert [entry.position for entry in output.logprobs] == [0, 1]
    output, accepted = worker.draft_step({1: truth[2:5]}, spoilt=2)
    assert accepted == [2] and [(error.position, error.message) for error in output.row_errors] == [(2, BAD_LOGITS)]
    assert output.token_ids.tolist() == [*truth[2:4], 0]


def test_masks_belong_to_positions(new_backend: NewBackend) -> None:
    params = ResolvedParams(temperature=0.0)
    worker = DraftingWorker(new_backend(NUM_SLOTS))
    worker.add(2, [1, 2, 3], params)
    words = -(-VOCAB_SIZE // 32)
    bitmask = np.zeros((2, words), np.int32)
    bitmask[0, 0], bitmask[1, 1] = 1 << 5, 1 << 7  # token 5, then token 39
    output, accepted = worker.draft_step({2: [5, 39, 1]}, TokenMask(bitmask, np.array([0, 1, -1, -1], np.int32)))
    assert accepted[0] >= 2 and output.token_ids.tolist()[:2] == [5, 39]


def test_thinking_budgets_force_tokens_within_a_row() -> None:
    budget = ThinkingBudget(3, (60,), (7, 8, 9), starts_open=True)
    params = ResolvedParams(seed=1, thinking_budget=budget)
    sampler = Sampler(NUM_SLOTS)
    worker = DraftingWorker(ReferenceSampler(NUM_SLOTS))
    worker.backend = sampler  # type: ignore[assignment]
    sample = sampler.sample
    sampler.sample = lambda logits, raw, rows, states, mask: sample(logits, rows, states, mask)  # type: ignore[assignment, misc]
    worker.add(0, [1, 2], params)
    first, _ = worker.draft_step({0: []})
    free = first.token_ids.tolist()
    for _ in range(2):
        free += worker.draft_step({0: []})[0].token_ids.tolist()
    assert not {7, 8, 9, 60} & set(free)
    output, accepted = worker.draft_step({0: [7, 8, 9, 9]})
    assert output.token_ids.tolist()[:3] == [7, 8, 9] and accepted[0] >= 3


def script(path: Path, wrong_every: int = 0) -> SpeculativeConfig:
    path.write_text(json.dumps([{"prompt": [1, 2], "output": list(range(10, 20))}]))
    return SpeculativeConfig(method="scripted", num_speculative_tokens=4, script=str(path), wrong_every=wrong_every)


def table_with(prompt: list[int], output: list[int]) -> tuple[RequestStates, NewRequest]:
    states = RequestStates(4, 16, [])
    tokens = np.array(prompt + output, np.int32).tobytes()
    request = NewRequest(2, tokens, len(prompt), 0, (), params=ResolvedParams())
    states.apply(SchedulerOutput(1, b"", b"", b"", new_reqs=(request,)))
    return states, request


def test_a_script_is_repeated_from_where_the_output_is(tmp_path: Path) -> None:
    speculation = Speculation(script(tmp_path / "script.json", wrong_every=3), 4)
    states, request = table_with([1, 2], [10, 11])
    speculation.add(request)
    rows = SampleRows(np.array([2], np.int32), np.array([3]), np.array([0], np.int32))
    drafts = speculation.propose(rows, states.epochs[rows.slots], states)
    assert drafts is not None
    assert drafts.token_ids.tolist() == [12, 12, 14, 15], "the one at place 3 is wrong"
    assert states.token_ids[2, 4:8].tolist() == [12, 12, 14, 15] and states.num_drafts[2] == 4
    slot, count = (np.array([value], np.int32).tobytes() for value in (2, 3))
    plan = SchedulerOutput(2, slot, count, bytes([1]), num_draft_tokens=bytes([2]))
    slots, counts, num_sampled, has_drafts = step_rows(plan, states)
    assert (slots.tolist(), counts.tolist(), num_sampled.tolist(), has_drafts) == ([2], [3], [3], True)


def test_drafts_stay_within_the_table_and_end_with_their_request(tmp_path: Path) -> None:
    speculation = Speculation(script(tmp_path / "script.json"), 4)
    states, request = table_with([1, 2], [0])
    speculation.add(request)
    states.num_known[2] = states.num_tokens[2] = 15
    rows = SampleRows(np.array([2], np.int32), np.array([14]), np.array([0], np.int32))
    states.num_prompt[2] = 12
    drafts = speculation.propose(rows, states.epochs[rows.slots], states)
    assert drafts is not None and drafts.counts.tolist() == [2]
    stale = speculation.propose(rows, states.epochs[rows.slots] - 1, states)
    assert stale is None and states.num_drafts[2] == 2
    states.apply(SchedulerOutput(3, b"", b"", b"", new_reqs=(request,)))
    assert states.num_drafts[2] == 0


def test_rejected_drafts_take_nothing_from_the_next_request_in_the_slot() -> None:
    states, request = table_with([1, 2], [10])
    slots = np.array([2, 2, 2], np.int32)
    rows = SampleRows(slots, np.array([3, 4, 5]), np.zeros(3, np.int32))
    epochs = states.epochs[slots]
    states.set_drafts(slots[:1], np.array([2]), np.array([11, 12], np.int32))
    drafts = drafts_of(rows, states)
    states.set_counts(slots[:1], states.num_computed[slots[:1]] + 3, states.num_tokens[slots[:1]] + 3)
    states.apply(SchedulerOutput(2, b"", b"", b"", finished_slots=slots[:1].tobytes(), new_reqs=(request,)))
    counts = (states.num_tokens[2], states.num_known[2], states.num_computed[2])
    tokens = states.token_ids[2].tolist()
    _, accepted = settle(states, rows, epochs, drafts, SamplerOutput(np.array([11, 13, 14])))
    assert list(accepted) == [1]
    assert (states.num_tokens[2], states.num_known[2], states.num_computed[2]) == counts
    assert states.token_ids[2].tolist() == tokens


def proposed_after(token: int, slot: int, speculation: Speculation, states: RequestStates) -> Drafts | None:
    """What is proposed once a step has sampled a token of one slot."""
    slots = np.array([slot], np.int32)
    states.set_counts(slots, states.num_computed[slots] + 1, states.num_tokens[slots] + 1)
    rows = SampleRows(slots, states.num_known[slots], np.zeros(1, np.int32))
    states.fill(slots, states.epochs[slots], states.num_known[slots], np.array([token]))
    return speculation.propose(rows, states.epochs[slots], states)


def test_texts_that_never_repeat_themselves_are_searched_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []
    propose = SuffixProposer.propose

    def noted(self: SuffixProposer, slots: I32, limits: I64, states: RequestStates) -> Drafts:
        searched.append(int(states.num_known[2]))
        return propose(self, slots, limits, states)

    monkeypatch.setattr(SuffixProposer, "propose", noted)
    speculation = Speculation(SpeculativeConfig(method="suffix", num_speculative_tokens=4), 4)
    states = RequestStates(4, 500, [])
    request = NewRequest(2, np.array([1, 2], np.int32).tobytes(), 2, 0, (), params=ResolvedParams(max_tokens=490))
    states.apply(SchedulerOutput(1, b"", b"", b"", new_reqs=(request,)))
    speculation.add(request)

    def come(token: int) -> bool:
        return proposed_after(token, 2, speculation, states) is not None

    assert not any(come(token) for token in range(10, 40))
    assert searched == [*range(3, 11), *range(14, 33, 4)], "each time at first, then less and less"
    assert [come(token) for token in range(10, 20)].index(True) <= 7, "once a text repeats itself, it is found"
    searched.clear()
    assert not any([come(token) for token in range(100, 400)][20:])
    assert np.diff(searched).max() == 32, "but never stops"
    speculation.add(request)
    searched.clear()
    for token in range(20):
        proposed_after(token + 400, 2, speculation, states)
    assert len(searched) <= 6, "requests that follow are like those before"


def test_drafts_that_a_plan_did_not_allow_are_gone_after_its_step() -> None:
    speculation = Speculation(SpeculativeConfig(method="suffix", num_speculative_tokens=4), 4)
    states = RequestStates(4, 64, [])
    tokens = np.array([1, 2, 3, 4, 1], np.int32).tobytes()
    requests = [NewRequest(slot, tokens, 5, 0, (), params=ResolvedParams(max_tokens=50)) for slot in (1, 2)]
    states.apply(SchedulerOutput(1, b"", b"", b"", new_reqs=tuple(requests)))
    for request in requests:
        speculation.add(request)

    proposed_after(2, 1, speculation, states)
    assert states.num_drafts[1] > 0
    for token in range(10, 18):
        proposed_after(token, 2, speculation, states)  # until nothing is searched for a while
    proposed_after(3, 1, speculation, states)
    assert states.num_drafts[1] == 0


def test_a_slot_alone_gets_the_drafts_that_it_gets_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftLengths, "pays", lambda *args: True)  # times decide nothing
    generator = np.random.default_rng(1)
    text = np.concatenate([generator.integers(0, 4, 50), np.arange(10, 40), generator.integers(0, 3, 50)])

    def all_drafts() -> list[tuple[object, int, bool]]:
        speculation = Speculation(SpeculativeConfig(method="suffix", num_speculative_tokens=8), 4)
        states = RequestStates(4, 160, [])
        request = NewRequest(2, np.array([1, 2], np.int32).tobytes(), 2, 0, (), params=ResolvedParams(max_tokens=140))
        states.apply(SchedulerOutput(1, b"", b"", b"", new_reqs=(request,)))
        speculation.add(request)
        told: list[tuple[object, int, bool]] = []
        for token in text.tolist():
            drafts = proposed_after(token, 2, speculation, states)
            found = None if drafts is None else (drafts.counts.tolist(), drafts.token_ids.tolist())
            told.append((found, int(states.num_drafts[2]), speculation.is_expected(np.array([2], np.int32))))
        return told

    alone = all_drafts()

    def among_others(self: Speculation, slots: I32, states: RequestStates) -> Drafts | None:
        rows = SampleRows(slots, states.num_known[slots], np.zeros(1, np.int32))
        return self._propose(rows, states.epochs[slots], states)

    monkeypatch.setattr(Speculation, "_propose_alone", among_others)
    assert all_drafts() == alone
    assert {expected for _, _, expected in alone} == {True, False} and len({count for _, count, _ in alone}) > 3


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(
        ValueError,
        match=r"unknown speculative method 'magic'; choose from draft_model, eagle3, mtp, ngram, scripted, suffix",
    ):
        create_proposer(SpeculativeConfig(method="magic", num_speculative_tokens=1), 4)
