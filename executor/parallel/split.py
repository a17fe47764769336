"""Which rank holds what: layers by stage, heads by KV heads, the rest by blocks of columns. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

UNIT = 32
"""Columns of a block: a row's 64 bytes in 16 bits, so that no two ranks write to a cache line."""


@dataclass(frozen=True)
class Share:
    """Consecutive elements of a dimension."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class HeadShare:
    """A rank's heads of queries, and the KV heads that these read."""

    q: Share
    kv: Share


def split_evenly(count: int, parts: int) -> tuple[Share, ...]:
    """Consecutive shares of ``count`` elements; the first ones may have one more than the others."""
    each, rest = divmod(count, parts)
    return tuple(Share(part * each + min(part, rest), each + (part < rest)) for part in range(parts))


def split_columns(size: int, num_ranks: int, what: str) -> tuple[Share, ...]:
    """The columns of a matrix, or the rows of a table, that each rank holds: whole blocks, but for the last.

    Args:
        size: Columns over all ranks.
        num_ranks: Tensor parallel size.
        what: Name of the matrix, for the error.

    Raises:
        ValueError: There are fewer blocks than ranks.
    """
    blocks = -(-size // UNIT)
    if num_ranks > 1 and blocks < num_ranks:
        raise ValueError(
            f"{what} has {size} columns, {blocks} block{'s' * (blocks != 1)} of {UNIT}: use --tensor-parallel-size "
            f"{blocks} or less"
        )
    ends = [min(share.end * UNIT, size) for share in split_evenly(blocks, num_ranks)]
    return tuple(Share(start, end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True))


def split_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> tuple[HeadShare, ...]:
    """The heads of each rank, in order: whole groups of query heads that share a KV head, as evenly as they go.

    With more ranks than KV heads, ranks that hold the same KV head divide its query heads.

    Raises:
        ValueError: A rank would have no query head, or groups differ in size.
    """
    if num_ranks == 1:
        return (HeadShare(Share(0, num_heads), Share(0, num_kv_heads)),)
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} attention heads cannot be divided among {num_kv_heads} KV heads")
    group = num_heads // num_kv_heads
    if num_ranks <= num_kv_heads:
        shares = split_evenly(num_kv_heads, num_ranks)
        return tuple(HeadShare(Share(kv.start * group, kv.size * group), kv) for kv in shares)
    holders = [rank * num_kv_heads // num_ranks for rank in range(num_ranks)]
    result = []
    for head in range(num_kv_heads):
        own = split_evenly(group, holders.count(head))
        result += [HeadShare(Share(head * group + q.start, q.size), Share(head, 1)) for q in own]
    if any(share.q.size == 0 for share in result):
        most = max(_sizes_that_work(num_heads, num_kv_heads))
        raise ValueError(
            f"{num_heads} attention heads, {group} for each of {num_kv_heads} KV heads, are too few: use "
            f"--tensor-parallel-size {most} or less"
        )
    return tuple(result)


def split_layers(sizes: Sequence[int], num_stages: int, last: int = 0) -> tuple[Share, ...]:
    """The layers of each pipeline stage: consecutive ones, such that the largest stage is as small as possible.

    Args:
        sizes: Bytes that a step reads of each layer.
        num_stages: Pipeline parallel size.
        last: Bytes that it reads after the last layer.

    Raises:
        ValueError: There are fewer layers than stages.
    """
    count = len(sizes)
    if count < num_stages:
        raise ValueError(f"{count} layers are too few: use --pipeline-parallel-size {count} or less")
    costs = [[0] * (count + 1) for _ in range(num_stages)]
    """By stage and first layer: the largest of this stage and those after it."""
    ends = [[count] * (count + 1) for _ in range(num_stages)]
    """Where the stage ends then: as early as possible, since what follows the last layer is not all that it does."""
    sums = [0, *accumulate(sizes)]
    for first in range(count):
        costs[-1][first] = sums[-1] - sums[first] + last
    for stage in range(num_stages - 2, -1, -1):
        num_after = num_stages - 1 - stage
        for first in range(stage, count - num_after):
            costs[stage][first], ends[stage][first] = min(
                (max(sums[end] - sums[first], costs[stage + 1][end]), end)
                for end in range(first + 1, count - num_after + 1)
            )
    shares, first = [], 0
    for stage in range(num_stages):
        end = ends[stage][first]
        shares.append(Share(first, end - first))
        first = end
    return tuple(shares)


def _sizes_that_work(num_heads: int, num_kv_heads: int) -> Sequence[int]:
    """Numbers of ranks from that of the KV heads on, of which each has a query head."""
    group = num_heads // num_kv_heads
    return [size for size in range(num_kv_heads, num_heads + 1) if -(-size // num_kv_heads) <= group]
