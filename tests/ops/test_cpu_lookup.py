"""The kernel that searches texts for drafts proposes what the definition proposes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import ops
from executor.config import SpeculativeConfig
from executor.messages import I32
from executor.request_states import RequestStates
from executor.speculative.kernel import KernelSearch
from executor.speculative.pool import Pool
from executor.speculative.suffix import Search
from ops.cpu.op_set import create

LENGTH = 600


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    before = ops.op_set("cpu")
    ops.use("cpu", create())
    yield
    ops.use("cpu", before)


def random_text(generator: np.random.Generator, vocabulary: int, most: int) -> I32:
    return generator.integers(0, vocabulary, generator.integers(1, most)).astype(np.int32)


def texts(generator: np.random.Generator, count: int, vocabulary: int) -> RequestStates:
    """Slots with random texts, some of which end with a part that occurs before."""
    states = RequestStates(count, LENGTH, [])
    for slot in range(count):
        text = random_text(generator, vocabulary, LENGTH - 100)
        if len(text) > 60 and generator.random() < 0.5:
            text[-30:] = text[10:40]
        states.token_ids[slot, : len(text)] = text
        states.num_known[slot] = len(text)
    return states


def go_on(states: RequestStates, slot: int, draft: I32, generator: np.random.Generator, vocabulary: int) -> None:
    """Accepts a part of a draft, and possibly another token."""
    begin = int(states.num_known[slot])
    kept = draft[: min(int(generator.integers(0, len(draft) + 1)), LENGTH - begin - 1)]
    states.token_ids[slot, begin : begin + len(kept)] = kept
    states.num_known[slot] += len(kept)
    if generator.random() < 0.3:
        states.token_ids[slot, states.num_known[slot]] = generator.integers(0, vocabulary)
        states.num_known[slot] += 1


@pytest.mark.parametrize("seed", range(40))
def test_the_kernel_proposes_the_same_drafts(seed: int) -> None:
    generator = np.random.default_rng(seed)
    count, vocabulary = int(generator.integers(1, 6)), int(generator.choice([2, 3, 6, 40, 500]))
    config = SpeculativeConfig(
        method="suffix",
        num_speculative_tokens=16,
        prompt_lookup_min=int(generator.integers(1, 4)),
        prompt_lookup_max=int(generator.integers(4, 30)),
        max_spec_factor=float(generator.choice([0.1, 1.0, 2.0, 32.0])),
    )
    pools: list[Pool | None] = [Pool(100) if generator.random() < 0.7 else None for _ in range(count)]
    for pool in pools:
        for _ in range(generator.integers(0, 6)):
            if pool is not None:
                pool.add(random_text(generator, vocabulary, 200))
    states = texts(generator, count, vocabulary)
    definition, kernel = Search(config, count), KernelSearch(config, count)
    for _ in range(12):
        slots = generator.permutation(count)[: generator.integers(1, count + 1)].astype(np.int32)
        limits = generator.integers(0, 17, len(slots))
        own = [pools[slot] for slot in slots]
        expected = definition.propose(slots, limits, states, own)
        found = kernel.propose(slots, limits, states, own)
        assert found.kinds is not None and expected.kinds is not None
        assert found.counts.tolist() == expected.counts.tolist()
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        assert found.kinds.tolist() == expected.kinds.tolist()
        if generator.random() < 0.1:
            definition.forget(int(slots[0]))
            kernel.forget(int(slots[0]))
        for slot, draft in zip(slots.tolist(), np.split(found.token_ids, np.cumsum(found.counts)), strict=False):
            go_on(states, slot, draft, generator, vocabulary)
