"""The sampler over the life of requests: kernels and reference agree whatever requests ask for and go through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import ops
from executor.device.steps import ImmediateSteps, StepChannel, wait_for
from executor.messages import I32, NewRequest, ResolvedParams, SchedulerOutput, TokenLogprobs
from executor.request_states import RequestStates
from executor.sampling.base import (
    BAD_LOGITS,
    NOTHING_LEFT,
    Rows,
    SamplerBackend,
    SamplerOutput,
    SampleRows,
    TokenMask,
)
from executor.sampling.kernel import KernelSampler
from executor.sampling.reference import ReferenceSampler
from executor.sampling.sampler import Sampler
from ops.cpu.op_set import CpuOps
from ops.cpu.ranks import SharedRank
from ops.reference.sampling import log_probs
from tests.ops.cpu import NEEDS_KERNELS
from tests.shared_ranks import on_shared_ranks

VOCAB_SIZE = 90
NUM_SLOTS = 6
MAX_MODEL_LEN = 400

NewBackend = Callable[[int], SamplerBackend]


def new_kernel_sampler(max_num_seqs: int) -> SamplerBackend:
    chosen = ops.op_set("cpu")
    if not isinstance(chosen, CpuOps):
        pytest.skip("no kernels are available on this machine")
    return KernelSampler(max_num_seqs, chosen.sampling)


def new_device_sampler(max_num_seqs: int) -> SamplerBackend:
    pytest.importorskip("tests.triton_interpreter")
    from executor.sampling.device import DeviceSampler

    return DeviceSampler(max_num_seqs)


BACKENDS: dict[str, NewBackend] = {
    "kernel": new_kernel_sampler,
    "reference": ReferenceSampler,
    "device": new_device_sampler,
}


@pytest.fixture(params=list(BACKENDS))
def new_backend(request: pytest.FixtureRequest) -> NewBackend:
    return BACKENDS[request.param]


@pytest.fixture(params=["kernel", "reference"])
def quick_backend(request: pytest.FixtureRequest) -> NewBackend:
    """For tests with many steps, which take too long in an interpreter."""
    return BACKENDS[request.param]


CHANNEL = ImmediateSteps()


class Worker:
    """The part of a worker around a sampler. Logits are a function of the tokens so far, as a model's."""

    def __init__(self, backend: SamplerBackend, vocab_size: int = VOCAB_SIZE) -> None:
        self.backend = backend
        self.vocab_size = vocab_size
        self.states = RequestStates(NUM_SLOTS, MAX_MODEL_LEN, [])

    def add(self, slot: int, prompt: list[int], params: ResolvedParams, output: list[int] | None = None) -> None:
        """A request enters a slot; with ``output`` it comes back after a preemption."""
        tokens = np.array(prompt + (output or []), np.int32).tobytes()
        request = NewRequest(slot, tokens, len(prompt), 0, (), params=params)
        self.states.apply(SchedulerOutput(1, b"", b"", b"", new_reqs=(request,)))
        self.backend.add(slot, params)

    def output(self, slot: int) -> list[int]:
        states = self.states
        result: list[int] = states.token_ids[slot, states.num_prompt[slot] : states.num_tokens[slot]].tolist()
        return result

    def logits(self, slots: list[int]) -> npt.NDArray[np.float32]:
        rows = []
        for slot in slots:
            tokens = self.states.token_ids[slot, : self.states.num_tokens[slot]]
            rows.append(np.random.default_rng([*tokens.tolist()]).normal(0, 2, self.vocab_size))
        return np.array(rows, np.float32)

    def step(
        self, slots: list[int], logits: npt.NDArray[np.float32] | None = None, mask: TokenMask | None = None
    ) -> SamplerOutput:
        """Samples a token for each slot; its number in the step is ten times its row."""
        given = torch.tensor(self.logits(slots) if logits is None else logits)
        states, where = self.states, np.array(slots, np.int32)
        rows = SampleRows(where, states.num_tokens[where], 10 * np.arange(len(slots), dtype=np.int32))
        states.set_counts(where, states.num_computed[where], states.num_tokens[where] + 1)
        sampled = self.backend.sample(given, given, rows, states, mask)
        output = wait_for(sampled.output, CHANNEL)
        assert sampled.token_ids.tolist() == output.token_ids.tolist()
        states.fill(where, states.epochs[where], rows.positions, output.token_ids)
        return output


def random_params(generator: np.random.Generator) -> ResolvedParams:
    """A request that asks for a few things, some of them odd."""

    def some(chance: float) -> bool:
        return bool(generator.random() < chance)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(generator.integers(0, VOCAB_SIZE, count).tolist())

    def chance_of(chance: float, value: Any, otherwise: Any) -> Any:
        return value if some(chance) else otherwise

    allowed = chance_of(0.2, ids(12), None)
    return ResolvedParams(
        temperature=chance_of(0.2, 0.0, float(generator.uniform(0.3, 1.5))),
        top_k=chance_of(0.3, int(generator.integers(1, 100)), chance_of(0.1, 2**40, 0)),
        top_p=chance_of(0.4, float(generator.uniform(0.2, 1)), 1.0),
        min_p=chance_of(0.2, float(generator.uniform(0, 0.2)), 0.0),
        seed=int(generator.integers(0, 2**64, dtype=np.uint64)),
        presence_penalty=chance_of(0.3, float(generator.uniform(-2, 2)), 0.0),
        frequency_penalty=chance_of(0.3, float(generator.uniform(-2, 2)), 0.0),
        repetition_penalty=chance_of(0.3, float(generator.uniform(0.5, 2)), 1.0),
        min_tokens=chance_of(0.3, int(generator.integers(1, 8)), 0),
        stop_token_ids=ids(2),
        eos_token_ids=chance_of(0.8, ids(1), ()),
        logit_bias=tuple((token, float(generator.normal(0, 4))) for token in sorted(set(ids(chance_of(0.3, 5, 0))))),
        allowed_token_ids=allowed,
        bad_words_token_ids=chance_of(0.3, (ids(1), *((token, other) for token in ids(8) for other in ids(8))), ()),
        logprobs=chance_of(0.4, int(generator.choice([-1, 0, 1, 7, 1000])), None),
        logprob_token_ids=chance_of(0.1, ids(3), ()),
    )


def random_life(worker: Worker, seed: int, steps: int = 60) -> list[tuple[Any, ...]]:
    """Requests come, go, are preempted and come back, often to another slot. Returns what was sampled."""
    generator = np.random.default_rng(seed)
    running: dict[int, tuple[list[int], ResolvedParams]] = {}
    preempted: list[tuple[list[int], ResolvedParams, list[int]]] = []
    history: list[tuple[Any, ...]] = []
    for _ in range(steps):
        for slot in [slot for slot in running if generator.random() < 0.1]:
            prompt, params = running.pop(slot)
            if generator.random() < 0.6:
                preempted.append((prompt, params, worker.output(slot)))
        for slot in sorted(set(range(NUM_SLOTS)) - set(running)):
            if preempted and generator.random() < 0.5:
                prompt, params, output = preempted.pop(0)
                worker.add(slot, prompt, params, output)
            elif generator.random() < 0.5:
                prompt = generator.integers(0, VOCAB_SIZE, generator.integers(1, 150)).tolist()
                params, output = random_params(generator), []
                worker.add(slot, prompt, params)
            else:
                continue
            running[slot] = (prompt, params)
        chance = generator.choice([0.9, 0.1])
        rows = [slot for slot in generator.permutation(sorted(running)).tolist() if generator.random() < chance]
        # Without rows, too: a step may hold unfinished prompts alone.
        result = worker.step(rows, None if rows else np.zeros((1, VOCAB_SIZE), np.float32)[:0])
        history.append((rows, result.token_ids.tolist(), result.row_errors, result.logprobs))
    return history


@pytest.mark.parametrize("seed", range(25))
def test_kernels_sample_what_the_reference_does(seed: int) -> None:
    expected = random_life(Worker(ReferenceSampler(NUM_SLOTS)), seed)
    assert random_life(Worker(new_kernel_sampler(NUM_SLOTS)), seed) == expected
    assert len(expected) > 30


@pytest.mark.parametrize("seed", [0, 2])
def test_gpus_sample_what_the_reference_does(seed: int) -> None:
    expected = random_life(Worker(ReferenceSampler(NUM_SLOTS)), seed, steps=10)
    assert random_life(Worker(new_device_sampler(NUM_SLOTS)), seed, steps=10) == expected


def test_penalties_by_hand(new_backend: NewBackend) -> None:
    """Repetition counts prompt and output, frequency and presence the output alone."""
    params = ResolvedParams(
        temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.25, seed=1
    )
    worker = Worker(new_backend(NUM_SLOTS), vocab_size=6)
    worker.add(0, [1, 2, 2, 3], params)
    logits = np.array([[-1.0, 3.0, -2.0, 1.5, 1.0, 1.95]], np.float32)
    counts = [0] * 6
    seen = {1, 2, 3}
    for _ in range(12):
        changed = []
        for token, logit in enumerate(logits[0].tolist()):
            value = np.float32(logit)
            if token in seen:
                penalty = np.float32(1.5)
                value = value / penalty if value > 0 else value * penalty
            if counts[token]:
                value -= np.float32(0.5 * counts[token] + 0.25)
            changed.append(value)
        expected = int(np.argmax(changed))
        assert worker.step([0], logits).token_ids.tolist() == [expected]
        counts[expected] += 1
        seen.add(expected)
    assert sum(count > 0 for count in counts) >= 4


def test_preempted_requests_go_on_as_if_nothing_had_happened(quick_backend: NewBackend) -> None:
    params = ResolvedParams(
        seed=5,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        min_tokens=9,
        stop_token_ids=(1, 2, 3),
        bad_words_token_ids=((4, 5), (6,)),
        top_p=0.9,
    )
    prompt = [7, 8, 9]
    whole = Worker(quick_backend(NUM_SLOTS))
    whole.add(2, prompt, params)
    for _ in range(30):
        whole.step([2])
    for stop in (1, 5, 10, 29):
        worker = Worker(quick_backend(NUM_SLOTS))
        worker.add(2, prompt, params)
        for _ in range(stop):
            worker.step([2])
        output = worker.output(2)
        worker.add(2, [11] * 50, ResolvedParams(repetition_penalty=3.0, logprobs=3))  # another takes the slot
        worker.step([2])
        worker.add(2, prompt, params, output)
        for _ in range(30 - stop):
            worker.step([2])
        assert worker.output(2) == whole.output(2)


def test_a_slot_forgets_its_request(new_backend: NewBackend) -> None:
    odd = ResolvedParams(
        temperature=0.0,
        repetition_penalty=5.0,
        presence_penalty=2.0,
        allowed_token_ids=(1,),
        logit_bias=((2, 100.0),),
        min_tokens=100,
        stop_token_ids=(3,),
        bad_words_token_ids=((4,),),
        logprobs=2,
    )
    worker = Worker(new_backend(NUM_SLOTS), vocab_size=8)
    worker.add(0, [3, 4], odd)
    result = worker.step([0])
    assert result.token_ids.tolist() == [1]
    assert len(result.logprobs) == 1
    worker.add(0, [5], ResolvedParams(temperature=0.0))
    for token in (2, 3, 4, 7):
        result = worker.step([0], np.eye(8, dtype=np.float32)[None, token])
        assert result.token_ids.tolist() == [token]
        assert result.logprobs == []


def test_rows_fail_alone(new_backend: NewBackend) -> None:
    """By their logits, or by what their request forbids; the step's other rows are as they would be without them."""
    worker = Worker(new_backend(NUM_SLOTS), vocab_size=40)
    plain = ResolvedParams(seed=1, logprobs=1)
    worker.add(0, [1], plain)
    worker.add(1, [1], plain)
    worker.add(2, [1], ResolvedParams(allowed_token_ids=(5,), stop_token_ids=(5,), min_tokens=2, logprobs=1))
    worker.add(3, [1], plain)
    logits = np.random.default_rng(0).normal(0, 1, (4, 40)).astype(np.float32)
    logits[3] = logits[0]
    logits[1, 7] = np.nan
    result = worker.step([0, 1, 2, 3], logits)
    assert [(error.row, error.message) for error in result.row_errors] == [(10, BAD_LOGITS), (20, NOTHING_LEFT)]
    assert result.token_ids[1:3].tolist() == [0, 0]
    assert result.token_ids[0] == result.token_ids[3]
    assert [entry.row for entry in result.logprobs] == [0, 30]


def decode(entry: TokenLogprobs) -> tuple[list[int], list[float]]:
    ids = np.frombuffer(entry.token_ids, np.int32).tolist()
    return ids, np.frombuffer(entry.logprobs, np.float32).tolist()


def test_log_probabilities_are_of_the_unprocessed_logits(new_backend: NewBackend) -> None:
    worker = Worker(new_backend(NUM_SLOTS), vocab_size=5)
    biased = ResolvedParams(temperature=0.0, logit_bias=((4, 50.0),), logprobs=2)
    worker.add(0, [1], biased)
    worker.add(1, [1], ResolvedParams(temperature=0.0, allowed_token_ids=(0,), logprobs=-1))
    worker.add(2, [1], ResolvedParams(temperature=0.0, logprobs=0))
    worker.add(3, [1], ResolvedParams(temperature=0.0, logprobs=2, logprob_token_ids=(3, 3, 0, 4, 2, 1)))
    logits = np.tile(np.array([1.0, 3.0, 2.0, 3.0, -1.0], np.float32), (4, 1))
    exact = log_probs(torch.from_numpy(logits[0])).tolist()
    result = worker.step([0, 1, 2, 3], logits)
    assert result.token_ids.tolist() == [4, 0, 1, 1]
    expected_ids = [[4, 1, 3], [0, 1, 3, 2, 0, 4], [1], [1, 3, 3, 0, 4, 2, 1]]
    for entry, ids, rank in zip(result.logprobs, expected_ids, [5, 4, 1, 1], strict=True):
        assert decode(entry) == (ids, [exact[token] for token in ids])
        assert entry.rank == rank
    assert [entry.row for entry in result.logprobs] == [0, 10, 20, 30]


def test_prompt_log_probabilities(new_backend: NewBackend) -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    tokens = np.array([3, 9, 0, 49, 20], np.int32)
    backend = new_backend(1)
    for count in (0, 3, -1):
        entries = wait_for(backend.prompt_logprobs(logits, tokens, count, 7, 100), CHANNEL)
        for index, (entry, token) in enumerate(zip(entries, tokens.tolist(), strict=True)):
            order = logits[index].sort(descending=True).indices[: 50 if count < 0 else count].tolist()
            exact = log_probs(logits[index]).tolist()
            assert decode(entry) == ([token, *order], [exact[i] for i in [token, *order]])
            assert (entry.row, entry.position) == (7, 100 + index)
            assert entry.rank == 1 + int((logits[index] > logits[index, token]).sum())


def test_a_mask_goes_together_with_everything_else(new_backend: NewBackend) -> None:
    worker = Worker(new_backend(NUM_SLOTS), vocab_size=70)
    worker.add(0, [1], ResolvedParams(temperature=0.0, logit_bias=((69, 100.0), (68, 50.0)), logprobs=1))
    worker.add(1, [1], ResolvedParams(temperature=0.0))
    bitmask = np.array([[-1, -1, 0b011111], [0, 1 << 5, 0]], np.int32)  # all but 69; 37 alone
    logits = np.zeros((2, 70), np.float32)
    logits[1, 3] = 9
    both = TokenMask(bitmask, np.array([0, 1], np.int32))
    result = worker.step([0, 1], logits, both)
    assert result.token_ids.tolist() == [68, 37]
    one = TokenMask(bitmask, np.array([-1, 0], np.int32))
    assert worker.step([0, 1], logits, one).token_ids.tolist() == [69, 3]


class Shift:
    """A stage without a kernel: token ids that the request's bias names go up by ten."""

    def __init__(self) -> None:
        self.slots: dict[int, ResolvedParams] = {}

    def add(self, slot: int, params: ResolvedParams) -> None:
        self.slots[slot] = params

    def active(self, slots: I32) -> Rows:
        return np.flatnonzero([bool(self.slots[slot].logit_bias) for slot in slots.tolist()])

    def apply(
        self, logits: torch.Tensor, rows: SampleRows, active: Rows, states: RequestStates, channel: StepChannel
    ) -> None:
        for row in active.tolist():
            logits[row, [token for token, _ in self.slots[int(rows.slots[row])].logit_bias]] += 10


def test_stages_without_a_kernel_come_first() -> None:
    sampler = Sampler(NUM_SLOTS, stages=[Shift()])
    states = RequestStates(NUM_SLOTS, MAX_MODEL_LEN, [])
    states.num_prompt[:] = 1
    sampler.add(0, ResolvedParams(temperature=0.0, logit_bias=((2, 1.0),), logprobs=1))
    sampler.add(1, ResolvedParams(temperature=0.0, logprobs=1))
    logits = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    raw = logits.clone()
    slots = np.array([0, 1], np.int32)
    rows = SampleRows(slots, np.ones(2, np.int64), slots)
    result = wait_for(sampler.sample(logits, rows, states).output, CHANNEL)
    assert result.token_ids.tolist() == [2, 1]
    assert logits[0, 2] == 11
    for entry, ids, row in zip(result.logprobs, [[2, 1], [1, 1]], raw, strict=True):
        assert decode(entry) == (ids, log_probs(row)[ids].tolist())


def test_rows_do_not_depend_on_their_neighbours(quick_backend: NewBackend) -> None:
    generator = np.random.default_rng(4)
    many = [random_params(generator) for _ in range(NUM_SLOTS)]
    prompts = [generator.integers(0, VOCAB_SIZE, 20).tolist() for _ in many]
    together = Worker(quick_backend(NUM_SLOTS))
    for slot, (prompt, params) in enumerate(zip(prompts, many, strict=True)):
        together.add(slot, prompt, params)
    for _ in range(20):
        together.step(list(range(NUM_SLOTS)))
    for slot, (prompt, params) in enumerate(zip(prompts, many, strict=True)):
        alone = Worker(quick_backend(NUM_SLOTS))
        alone.add(0, prompt, params)
        for _ in range(20):
            alone.step([0])
        assert alone.output(0) == together.output(slot)


@NEEDS_KERNELS
def test_ranks_have_the_tokens_and_errors_of_the_first() -> None:
    logits = torch.randn(3, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    logits[1, 5] = torch.nan
    slots = np.arange(3, dtype=np.int32)
    rows = SampleRows(slots, np.ones(3, np.int64), slots)

    def run(rank: SharedRank) -> tuple[list[int], list[int], list[tuple[int, str]]]:
        sampler = Sampler(NUM_SLOTS, communicator=rank)
        for slot in slots.tolist():
            sampler.add(slot, ResolvedParams(temperature=0.0))
        sampled = sampler.sample(logits.clone(), rows, RequestStates(NUM_SLOTS, MAX_MODEL_LEN, []))
        output = sampled.output.make(())
        errors = [(error.row, error.message) for error in output.row_errors]
        return sampled.token_ids.tolist(), output.token_ids.tolist(), errors

    first, second = on_shared_ranks(2, run)
    assert first == second and first[2] == [(1, BAD_LOGITS)]
    assert first[0] == first[1] == [int(logits[0].argmax()), 0, int(logits[2].argmax())]
