"""Sampling and log probabilities in Triton, interpreted: equal to the reference, bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ops.reference.sampling import sample as reference_sample
from ops.reference.sampling import uniform
from ops.reference.sampling import weight_sum as reference_weight_sum
from tests.ops.test_cpu_sampling import KINDS, Arguments, make_logits, random_arguments
from tests.triton_interpreter import ORDERS, Order, grid_order

sampling: Any = pytest.importorskip("ops.triton.sample")
logprobs: Any = pytest.importorskip("ops.triton.logprobs")


def assert_equal(arguments: Arguments) -> None:
    tokens = sampling.sample(*arguments)
    assert tokens.tolist() == reference_sample.reference(*arguments).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "vocab_size"), [(6, 100), (2, 3000)])
def test_tokens(kind: str, rows: int, vocab_size: int) -> None:
    assert_equal(random_arguments(kind, rows, vocab_size, seed=3))


@pytest.mark.parametrize("kind", ["flat", "ties", "peaked"])
def test_several_chunks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are copied together, or too many to be copied; the token comes from any chunk."""
    monkeypatch.setattr(sampling, "_LARGEST_CHUNK", 256)
    monkeypatch.setattr(sampling, "MOST_KEPT", 64)
    assert_equal(random_arguments(kind, 4, 1000, seed=4))


ODD_ROWS = [
    # temperature, top_k, top_p, min_p, number
    (1e-38, 0, 1.0, 0.0, 0.9),
    (1e30, 0, 1.0, 0.0, 1 - 2.0**-53),
    (1.0, 2**31 - 1, 1 - 2.0**-24, 0.0, 1 - 2.0**-53),
    (1.0, 1, 2.0**-30, 1.0, 0.5),
    (0.7, 50, 1.0, 2.0**-63, 0.0),
    (50.0, 299, 0.5, 1e-30, 0.3),
    (0.125, 300, 0.999, 1e-6, 2.0**-53),
    (1.0, 3, 1.0, 0.4, 0.99),
]


@pytest.mark.parametrize("kind", ["flat", "ties", "masked", "huge", "all equal"])
def test_odd_parameters(kind: str) -> None:
    logits = torch.from_numpy(make_logits(kind, len(ODD_ROWS), 300, np.random.default_rng(0)))
    columns = (np.array(column) for column in zip(*ODD_ROWS, strict=True))
    types = (np.float32, np.int32, np.float32, np.float32, np.float64)
    tensors = (torch.from_numpy(column.astype(dtype)) for column, dtype in zip(columns, types, strict=True))
    assert_equal(Arguments(logits, *tensors))


def test_zeros_of_either_sign_are_tied() -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0, -3.0]]).repeat(6, 1)
    numbers = torch.arange(6, dtype=torch.float64) / 6
    columns = (torch.full((6,), value) for value in (1.0, 2, 1.0, 0.0))
    temperature, top_k, top_p, min_p = columns
    assert_equal(Arguments(logits, temperature, top_k.int(), top_p, min_p, numbers))


@pytest.mark.parametrize("order", ORDERS)
def test_random_numbers_are_those_of_the_seed(order: Order) -> None:
    """The kernel's Philox against the reference's, by drawing from a flat distribution."""
    rows, vocab_size = 24, 512
    generator = np.random.default_rng(0)
    seeds = generator.integers(0, 2**64, rows, dtype=np.uint64)
    counters = np.concatenate([np.arange(rows - 2), [2**33 + 5, 2**62]])
    ones = torch.ones(rows)
    off = torch.zeros(rows, dtype=torch.int32)
    with grid_order(order):
        tokens, status = sampling.sample_rows(
            torch.zeros(rows, vocab_size),
            sampling.Filters(ones, off, ones, torch.zeros(rows)),
            sampling.Randomness(torch.from_numpy(seeds.view(np.int64)), torch.from_numpy(counters)),
        )
    assert tokens.tolist() == np.floor(uniform(seeds, counters) * vocab_size).astype(int).tolist()
    assert status.tolist() == [sampling.OK] * rows


def test_rows_do_not_depend_on_others() -> None:
    arguments = random_arguments("flat", 5, 200, seed=9)
    together = sampling.sample(*arguments)
    for row in range(5):
        assert sampling.sample(*arguments.rows(slice(row, row + 1))).tolist() == [int(together[row])]


@pytest.mark.parametrize("kind", KINDS)
def test_most_likely_tokens(kind: str) -> None:
    logits = random_arguments(kind, 3, 3000, seed=1).logits
    tokens = torch.tensor([5, 0, 2999])
    ids, values, ranks, tops, sums = logprobs.most_likely(logits, tokens, 20)
    expected = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :20]
    assert torch.equal(ids, torch.cat([tokens.unsqueeze(1), expected], dim=1))
    assert torch.equal(values, logits.gather(1, ids))
    assert torch.equal(ranks, (logits > values[:, :1]).sum(dim=1) + 1)
    assert torch.equal(tops, logits.amax(dim=1))
    assert torch.equal(sums, reference_weight_sum.reference(logits))
    assert torch.equal(sums, logprobs.weight_sum(logits))


@pytest.mark.parametrize("most", [0, 1, 300])
def test_some_rows_and_any_number_of_tokens(most: int) -> None:
    logits = torch.from_numpy(make_logits("ties", 4, 300, np.random.default_rng(2)))
    logits[1, 7] = torch.nan
    ids, _, _, tops, _ = logprobs.most_likely(logits, torch.arange(4), most, torch.tensor([3, 1]))
    expected = torch.sort(logits[3], descending=True, stable=True).indices[:most]
    assert ids[0].tolist() == [3, *expected.tolist()]
    assert tops[0] == logits[3].max() and tops[1].isnan()
