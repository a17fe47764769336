"""Tests of recurrent layers: requests whose states lie in blocks, and what all their kernels must do."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

import ops
from ops import AttentionMetadata, AttentionShape, OpSet
from tests.ops.cpu import randn, threads, use, using
from tests.ops.test_cpu_invariance import same_bits

BLOCK = 16


class Requests(ABC):
    """Requests with random inputs, computed step by step."""

    def __init__(
        self, shape: AttentionShape, lengths: list[int], dtype: torch.dtype, widths: tuple[int, int, int]
    ) -> None:
        """``widths``: columns of the inputs."""
        self.shape = shape
        self.data = [
            [randn(length, width, seed=10 * row + i, dtype=dtype) for i, width in enumerate(widths)]
            for row, length in enumerate(lengths)
        ]
        self.decay, self.bias = -randn(shape.num_heads, seed=8).exp(), randn(shape.num_heads, seed=9)
        each = -(-max(lengths) // BLOCK)
        count = len(lengths) * each
        self.table = torch.randperm(count, generator=torch.Generator().manual_seed(1)).int().view(len(lengths), each)
        # What an earlier owner left in a block must not matter.
        self.cache = torch.full((count, ops.state_size(shape)), float("nan"))
        self.done = [0] * len(lengths)
        self.replayed = dict.fromkeys(range(len(lengths)), 0)

    def accept(self, row: int, drafts: int, accepted: int) -> None:
        """Takes back the other drafts of a request's last step."""
        self.done[row] -= drafts - accepted
        self.replayed[row] = accepted

    @abstractmethod
    def run(self, inputs: list[Tensor], meta: AttentionMetadata) -> Tensor:
        """The op on the inputs of a step."""

    def step(self, counts: dict[int, int], drafts: dict[int, int] | None = None) -> dict[int, Tensor]:
        """Computes the next tokens of some requests, in this order; returns each one's result.

        With ``drafts``, so many of the last tokens of each are drafts; ``accept`` says how many of them stay.
        """
        places = {row: torch.arange(self.done[row], self.done[row] + count) for row, count in counts.items()}
        for row, count in counts.items():
            self.done[row] += count
        sizes = list(counts.values())
        starts = torch.tensor([0, *sizes]).cumsum(0).int()
        slots = torch.cat([self.table[row][at // BLOCK].long() * BLOCK + at % BLOCK for row, at in places.items()])
        ends = torch.tensor([self.done[row] for row in counts], dtype=torch.int32)
        meta = AttentionMetadata(starts, ends, self.table[list(counts)], slots, BLOCK)
        if drafts is not None:
            meta.num_replayed = torch.tensor([self.replayed[row] for row in counts], dtype=torch.int32)
            meta.num_drafts = torch.tensor([drafts[row] for row in counts], dtype=torch.int32)
        self.replayed |= dict.fromkeys(counts, 0)
        inputs = [torch.cat([self.data[row][i][at] for row, at in places.items()]) for i in range(3)]
        return dict(zip(counts, self.run(inputs, meta).split(sizes), strict=True))


def check_kernels(make: Callable[[list[int]], Requests], capability: str, dtype: torch.dtype) -> None:
    """Random mixtures of requests and chunks, by one thread and two, against whole requests alone."""
    lengths = [5, 100, 33]
    with using("reference"):
        plain = make(lengths)
        definition = [plain.step({row: length})[row] for row, length in enumerate(lengths)]
    with use(capability):
        alone = make(lengths)
        with threads(1):
            expected = [alone.step({row: length})[row] for row, length in enumerate(lengths)]
        for count in (1, 2):
            rng = random.Random(count)
            batched = make(lengths)
            parts: list[list[Tensor]] = [[] for _ in lengths]
            with threads(count):
                while rows := [row for row, length in enumerate(lengths) if batched.done[row] < length]:
                    rows = rng.sample(rows, rng.randint(1, len(rows)))
                    counts = {row: min(lengths[row] - batched.done[row], rng.choice([1, 2, 16, 70])) for row in rows}
                    for row, result in batched.step(counts).items():
                        parts[row].append(result)
            for part, whole in zip(parts, expected, strict=True):
                assert same_bits(torch.cat(part), whole)
    tolerance = {torch.bfloat16: 0.02, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    for result, exact in zip(expected, definition, strict=True):
        torch.testing.assert_close(result, exact, rtol=tolerance, atol=tolerance)


def check_shared_block(make: Callable[[list[int]], Requests], op_set: OpSet | str) -> None:
    """A request goes on from a block that another fills in the same step."""
    with using(op_set):
        expected = make([40, 40]).step({0: 40})[0]
        requests = make([40, 40])
        for mine, theirs in zip(requests.data[1], requests.data[0], strict=True):
            mine.copy_(theirs)
        requests.table[1, :2] = requests.table[0, :2]
        requests.done[1] = 2 * BLOCK
        results = requests.step({0: 36, 1: 8})
    assert torch.equal(results[0], expected[:36])
    assert torch.equal(results[1], expected[2 * BLOCK :])


def check_drafts(make: Callable[[list[int]], Requests], op_set: OpSet | str) -> None:
    """States leave out drafts that are not accepted: the bits are those of requests without any."""
    lengths = [90, 60, 5]
    with using(op_set):
        plain = make(lengths)
        expected = [plain.step({row: length})[row] for row, length in enumerate(lengths)]
        rng = random.Random(1)
        requests = make(lengths)
        right = [[data.clone() for data in row] for row in requests.data]
        num_accepted = num_rejected = 0
        while rows := [row for row, length in enumerate(lengths) if requests.done[row] < length]:
            counts, drafts, accepted = {}, {}, {}
            for row in rng.sample(rows, rng.randint(1, len(rows))):
                done = requests.done[row]
                known = min(rng.choice([1, 1, 1, 20]), lengths[row] - done)
                offset = (done + known) % BLOCK
                room = min(requests.shape.max_drafts, BLOCK - 1 - offset if offset else 0)
                drafts[row] = min(rng.randint(0, room), lengths[row] - done - known)
                accepted[row] = rng.randint(0, drafts[row])
                counts[row] = known + drafts[row]
                for mine, true in zip(requests.data[row], right[row], strict=True):
                    mine.copy_(true)
                    mine[done + known + accepted[row] : done + counts[row]] += 1.0  # the rest is wrong
            begins = {row: requests.done[row] for row in counts}
            for row, result in requests.step(counts, drafts).items():
                rejected = drafts[row] - accepted[row]
                begin, end = begins[row], begins[row] + counts[row] - rejected
                assert same_bits(result[: len(result) - rejected], expected[row][begin:end])
                requests.accept(row, drafts[row], accepted[row])
                num_accepted, num_rejected = num_accepted + accepted[row], num_rejected + rejected
        assert min(num_accepted, num_rejected) > 10
