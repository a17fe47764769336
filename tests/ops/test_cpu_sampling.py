"""The sampling kernels against the reference, on every capability path: equal tokens, bit by bit."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.cpu import build
from ops.cpu.sampling import (
    NEUTRAL_PARAMS,
    ROW_NOT_FINITE,
    ROW_NOTHING_LEFT,
    ROW_OK,
    SampleStep,
    SamplingKernels,
    address,
)
from ops.reference.sampling import log_probs, sample, uniform
from tests.ops.cpu import use
from tests.ops.test_reference import chi_square

FLOAT32_MAX = float(np.finfo(np.float32).max)


@pytest.fixture(params=list(build.CAPABILITIES), scope="module")
def kernels(request: pytest.FixtureRequest) -> Iterator[SamplingKernels]:
    with use(request.param) as chosen:
        yield chosen.sampling


@dataclass
class Arguments:
    """Those of the op, row by row."""

    logits: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    numbers: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.logits, self.temperature, self.top_k, self.top_p, self.min_p, self.numbers))

    def rows(self, index: Any) -> Arguments:
        return Arguments(*(tensor[index].contiguous() for tensor in self))


def make_logits(kind: str, rows: int, vocab_size: int, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    shape = (rows, vocab_size)
    logits = generator.normal(0, 2, shape)
    if kind == "peaked":
        for row in logits:
            high = generator.integers(0, vocab_size, 1 + vocab_size // 100)
            row[high] = generator.normal(12, 3, len(high))
    elif kind == "ties":
        logits = np.round(logits)
    elif kind == "all equal":
        logits = np.full(shape, generator.normal())
    elif kind == "nearly equal":
        logits = 1 + 1e-7 * np.round(logits)
    elif kind == "masked":
        logits[generator.random(shape) < 0.7] = -np.inf
        logits[:, generator.integers(0, vocab_size)] = 1
    elif kind == "one candidate":
        logits = np.full(shape, -np.inf)
        logits[:, generator.integers(0, vocab_size)] = generator.normal(0, 100)
    elif kind == "huge":
        logits = generator.normal(0, 1e37, shape)
        logits[:, 0], logits[:, -1] = FLOAT32_MAX, -FLOAT32_MAX
    elif kind == "tiny":
        logits *= 1e-38
    elif kind == "many magnitudes":
        logits = -np.exp(generator.uniform(-80, 80, shape))
    return logits.astype(np.float32)


KINDS = [
    "flat",
    "peaked",
    "ties",
    "all equal",
    "nearly equal",
    "masked",
    "one candidate",
    "huge",
    "tiny",
    "many magnitudes",
]
TEMPERATURES = st.one_of(
    st.just(0.0), st.just(1.0), st.floats(0.125, 2.0, width=32), st.sampled_from([1e-38, 1e-3, 50.0, 1e30])
)
TOP_KS = st.one_of(st.just(0), st.integers(1, 60), st.integers(1, 4000), st.just(2**31 - 1))
TOP_PS = st.one_of(
    st.just(1.0),
    st.floats(0.5, 1.0, width=32, exclude_max=True),
    st.floats(2.0**-30, 1.0, width=32),
    st.just(1 - 2.0**-24),
)
MIN_PS = st.one_of(
    st.just(0.0), st.just(0.0), st.floats(0, 1, width=32), st.sampled_from([1e-6, 1e-15, 2.0**-63, 1e-30, 1.0])
)
NUMBERS = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 2.0**-53, 1 - 2.0**-53]))


@st.composite
def arguments(draw: st.DrawFn) -> Arguments:
    rows = draw(st.integers(1, 4))
    vocab_size = draw(st.one_of(st.integers(1, 100), st.integers(1, 3000)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = np.concatenate([make_logits(draw(st.sampled_from(KINDS)), 1, vocab_size, generator) for _ in range(rows)])
    columns = [
        np.array([draw(values) for _ in range(rows)], dtype)
        for values, dtype in (
            (TEMPERATURES, np.float32),
            (TOP_KS, np.int32),
            (TOP_PS, np.float32),
            (MIN_PS, np.float32),
            (NUMBERS, np.float64),
        )
    ]
    return Arguments(*(torch.from_numpy(column) for column in (logits, *columns)))


def random_arguments(kind: str, rows: int, vocab_size: int, seed: int) -> Arguments:
    """Rows that use all sorts of filters."""
    generator = np.random.default_rng(seed)
    chance = generator.random((rows, 4))
    columns = (
        make_logits(kind, rows, vocab_size, generator),
        np.where(chance[:, 0] < 0.1, 0, generator.uniform(0.3, 1.5, rows)).astype(np.float32),
        np.where(chance[:, 1] < 0.5, 0, generator.integers(1, 200, rows)).astype(np.int32),
        np.where(chance[:, 2] < 0.3, 1, generator.uniform(0.3, 1, rows)).astype(np.float32),
        np.where(chance[:, 3] < 0.7, 0, generator.uniform(0, 0.1, rows)).astype(np.float32),
        generator.random(rows),
    )
    return Arguments(*(torch.from_numpy(column) for column in columns))


@settings(max_examples=300, deadline=None)
@given(arguments())
def test_tokens_are_those_of_the_reference(kernels: SamplingKernels, given_arguments: Arguments) -> None:
    before = given_arguments.logits.clone()
    assert kernels.sample(*given_arguments).tolist() == sample.reference(*given_arguments).tolist()
    assert torch.equal(given_arguments.logits, before)


@cache
def large_case(kind: str, vocab_size: int) -> tuple[Arguments, list[int]]:
    """Arguments and what the reference, which takes long, makes of them."""
    args = random_arguments(kind, 8, vocab_size, seed=vocab_size)
    return args, sample.reference(*args).tolist()


@pytest.mark.parametrize("vocab_size", [32000, 151936, 262145])
@pytest.mark.parametrize("kind", ["flat", "peaked", "ties", "masked"])
def test_large_vocabularies(kernels: SamplingKernels, kind: str, vocab_size: int) -> None:
    args, expected = large_case(kind, vocab_size)
    assert kernels.sample(*args).tolist() == expected


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95, 0.999, 1 - 2.0**-24])
def test_top_p_of_all_shapes(kernels: SamplingKernels, top_p: float) -> None:
    """Rows between peaked and flat: where weighing the likely tokens is enough, where it is not, and in between."""
    rows, vocab_size = 40, 5000
    generator = np.random.default_rng(1)
    logits = generator.normal(0, 1, (rows, vocab_size)) * np.linspace(0.2, 12, rows)[:, None]
    args = Arguments(
        torch.from_numpy(logits.astype(np.float32)),
        torch.ones(rows),
        torch.zeros(rows, dtype=torch.int32),
        torch.full((rows,), top_p),
        torch.zeros(rows),
        torch.from_numpy(generator.random(rows)),
    )
    assert kernels.sample(*args).tolist() == sample.reference(*args).tolist()


def test_rows_do_not_depend_on_each_other_or_on_threads(kernels: SamplingKernels) -> None:
    args = random_arguments("flat", 24, 100_001, seed=5)  # enough to be worth a second thread
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [int(kernels.sample(*args.rows(slice(row, row + 1)))) for row in range(24)]
        assert kernels.sample(*args).tolist() == alone
        for num_threads in (2, 3, 24):
            torch.set_num_threads(num_threads)
            assert kernels.sample(*args).tolist() == alone
        order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
        assert kernels.sample(*args.rows(order)).tolist() == [alone[row] for row in order.tolist()]
    finally:
        torch.set_num_threads(threads)


def test_rows_may_lie_apart(kernels: SamplingKernels) -> None:
    args = random_arguments("flat", 6, 500, seed=6)
    wide = torch.full((6, 700), 1e9)
    wide[:, 100:600] = args.logits
    apart = Arguments(wide[:, 100:600], args.temperature, args.top_k, args.top_p, args.min_p, args.numbers)
    assert kernels.sample(*apart).tolist() == kernels.sample(*args).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# whole steps


class Step:
    """A step whose slots are its rows."""

    def __init__(self, logits: npt.NDArray[np.float32], **params: Any) -> None:
        rows = len(logits)
        self.logits = logits.copy()
        self.params = np.repeat(NEUTRAL_PARAMS, rows)
        for name, values in params.items():
            self.params[name] = values
        self.slots = np.arange(rows, dtype=np.int32)
        self.lengths = np.zeros(rows, np.int64)
        self.num_prompt = np.zeros(rows, np.int64)
        self.tokens = np.full(rows, -1, np.int64)
        self.status = np.full(rows, -1, np.int32)
        self.ranks = np.full(rows, -1, np.int32)
        self.optional: dict[str, Any] = {}

    def run(self, kernels: SamplingKernels, num_threads: int = 2) -> int:
        rows, vocab_size = self.logits.shape
        step = SampleStep(
            logits=address(self.logits),
            row_stride=vocab_size,
            num_rows=rows,
            vocab_size=vocab_size,
            slots=address(self.slots),
            params=address(self.params),
            lengths=address(self.lengths),
            num_prompt=address(self.num_prompt),
            tokens=address(self.tokens),
            status=address(self.status),
            ranks=address(self.ranks),
        )
        for name, value in self.optional.items():
            setattr(step, name, address(value) if isinstance(value, np.ndarray) else value)
        failed: int = kernels.sample_step(ctypes.addressof(step), num_threads)
        return failed


def test_numbers_are_those_of_the_reference(kernels: SamplingKernels) -> None:
    """Over equal logits a token tells the first 13 bits of its number."""
    rows, vocab_size = 500, 1 << 13
    generator = np.random.default_rng(0)
    step = Step(np.zeros((rows, vocab_size), np.float32), seed=generator.integers(0, 2**64, rows, dtype=np.uint64))
    step.num_prompt[:] = generator.integers(0, 2**20, rows)
    positions = generator.integers(0, 2**62, rows) >> generator.integers(0, 62, rows)
    step.lengths[:] = step.num_prompt + positions
    assert step.run(kernels) == 0
    numbers = uniform(step.params["seed"], positions)
    assert step.tokens.tolist() == np.floor(numbers * vocab_size).astype(int).tolist()


def test_sampled_frequencies(kernels: SamplingKernels) -> None:
    """50000 tokens of one distribution under top-p, as requests would draw them."""
    rows, vocab_size = 50_000, 64
    logits = np.random.default_rng(3).normal(0, 1.5, vocab_size).astype(np.float32)
    step = Step(np.tile(logits, (rows, 1)), seed=11, temperature=0.9, top_p=0.8)
    step.lengths[:] = np.arange(rows)
    step.run(kernels)
    probabilities = torch.softmax(torch.from_numpy(logits).double() / 0.9, dim=0)
    ordered, ids = probabilities.sort(descending=True)
    kept = ids[: int((ordered.cumsum(0) < 0.8).sum()) + 1]
    counts = np.bincount(step.tokens, minlength=vocab_size)
    assert counts[kept.numpy()].sum() == rows
    expected = (probabilities[kept] / probabilities[kept].sum()).numpy()
    freedom = len(kept) - 1
    assert chi_square(counts[kept.numpy()], expected) < freedom + 3.3 * math.sqrt(2 * freedom) + 4


@pytest.mark.parametrize("vocab_size", [1, 7, 16, 513, 49152])
def test_rows_that_are_not_finite(kernels: SamplingKernels, vocab_size: int) -> None:
    """Each fails alone, wherever the number stands that spoils it."""
    places = sorted({0, vocab_size // 2, vocab_size - 1})
    bad = [(place, value) for place in places for value in (np.nan, -np.nan, np.inf)]
    logits = np.random.default_rng(0).normal(0, 1, (2 * len(bad) + 1, vocab_size)).astype(np.float32)
    for row, (place, value) in enumerate(bad):
        logits[2 * row, place] = value
    logits[-1] = -np.inf
    for temperature in (0.0, 1.0):
        step = Step(logits, temperature=temperature)
        assert step.run(kernels) == len(bad) + 1
        assert step.status.tolist() == [ROW_NOT_FINITE, ROW_OK] * len(bad) + [ROW_NOT_FINITE]
        assert (step.tokens[::2] == 0).all()
        clean = Step(logits[1::2], temperature=temperature)
        clean.run(kernels)
        assert step.tokens[1::2].tolist() == clean.tokens.tolist()


@pytest.mark.parametrize("vocab_size", [5, 32, 100, 3001])
def test_bitmask(kernels: SamplingKernels, vocab_size: int) -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 1, (6, vocab_size)).astype(np.float32)
    allowed = generator.random((4, vocab_size)) < 0.5
    allowed[0] = True
    allowed[1] = False
    allowed[2] = np.arange(vocab_size) == vocab_size - 1
    allowed[3, 0] = True
    padded = np.zeros((4, -(-vocab_size // 32) * 32), np.bool_)
    padded[:, :vocab_size] = allowed
    bitmask = np.packbits(padded, axis=1, bitorder="little").view("<i4").astype(np.int32)
    rows = np.array([3, -1, 2, 1, 0, -1], np.int32)
    step = Step(logits)
    step.optional = {"bitmask": bitmask, "bitmask_stride": bitmask.shape[1], "bitmask_rows": rows}
    assert step.run(kernels) == 1
    assert step.status.tolist() == [ROW_OK, ROW_OK, ROW_OK, ROW_NOTHING_LEFT, ROW_OK, ROW_OK]
    assert step.tokens[2] == vocab_size - 1
    for row in (0, 3):
        assert (np.isneginf(step.logits[row]) == ~allowed[rows[row]]).all()
    for row in (1, 4, 5):
        assert (step.logits[row] == logits[row]).all()


@pytest.mark.parametrize("kind", ["flat", "peaked", "ties", "masked", "all equal"])
@pytest.mark.parametrize("count", [0, 1, 20, 700, 2**31 - 1])
def test_log_probabilities(kernels: SamplingKernels, kind: str, count: int) -> None:
    """Of sampled and of given tokens; the processed logits have no part in them."""
    vocab_size, rows = 2500, 3
    logits = make_logits(kind, rows, vocab_size, np.random.default_rng(count))
    size = 1 + min(count, vocab_size)
    biased = np.array([7], np.int32), np.array([30.0], np.float32)
    for given_tokens in (None, np.array([5, 0, vocab_size - 1])):
        step = Step(logits, num_logprobs=count, num_biases=1, bias_ids=address(biased[0]), biases=address(biased[1]))
        starts = np.arange(rows) * size
        ids, logprobs = np.full(rows * size, -1, np.int32), np.zeros(rows * size, np.float32)
        step.optional = {"logprob_starts": starts, "logprob_ids": ids, "logprobs": logprobs}
        if given_tokens is not None:
            step.optional["given_tokens"] = given_tokens
        assert step.run(kernels) == 0
        for row in range(rows):
            token = int(step.tokens[row] if given_tokens is None else given_tokens[row])
            part = slice(row * size, (row + 1) * size)
            order = torch.sort(torch.from_numpy(logits[row]), descending=True, stable=True).indices[: size - 1]
            assert ids[part].tolist() == [token, *order.tolist()]
            expected = log_probs(torch.from_numpy(logits[row])).numpy()[ids[part]]
            assert logprobs[part].tolist() == expected.tolist()
            assert step.ranks[row] == 1 + (logits[row] > logits[row, token]).sum()
