"""Ranks that share memory: what they exchange, and what happens if one leaves."""

from __future__ import annotations

import pytest
import torch

from ops import PeerLostError
from ops.cpu import ranks
from ops.cpu.ranks import SharedRank
from tests.ops.cpu import NEEDS_KERNELS
from tests.shared_ranks import on_shared_ranks

pytestmark = NEEDS_KERNELS


@pytest.mark.parametrize("slot_bytes", [64, 1 << 20])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_what_ranks_exchange(size: int, slot_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "SLOT_BYTES", slot_bytes)  # small ones take several turns
    widths = [3, 0, 8, 1, 2][:size]
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randn(7, width, generator=generator).bfloat16() for width in widths]
    rows = torch.randn(7, 4, generator=generator)
    owner = torch.arange(7) % size

    def run(rank: SharedRank) -> None:
        for _ in range(3):
            assert torch.equal(rank.all_gather(columns[rank.rank], widths), torch.cat(columns, dim=1))
            is_here = owner == rank.rank
            garbage = torch.where(is_here.unsqueeze(1), rows, torch.nan)
            assert torch.equal(rank.select_rows(garbage, is_here), rows)
            tokens = torch.arange(30) * (rank.rank + 1)
            assert torch.equal(rank.broadcast(tokens), torch.arange(30))
            assert rank.broadcast(torch.empty(0, dtype=torch.int64)).numel() == 0
        assert not rank.memory(100).any()

    on_shared_ranks(size, run)


def test_ranks_see_each_others_memory() -> None:
    def run(rank: SharedRank) -> list[int]:
        memory = rank.memory(3)
        memory[rank.rank] = rank.rank + 1
        rank.wait()
        return memory.tolist()

    assert on_shared_ranks(3, run) == [[1, 2, 3]] * 3


def test_a_rank_that_leaves_is_not_waited_for() -> None:
    def run(rank: SharedRank) -> None:
        if rank.rank == 0:
            rank.leave()
            return
        with pytest.raises(PeerLostError, match=f"rank {rank.rank} of 3: another rank has left"):
            rank.wait()

    on_shared_ranks(3, run)


def test_ranks_that_differ_say_so() -> None:
    def run(rank: SharedRank) -> None:
        rank.agree(7, "something")
        with pytest.raises(RuntimeError, match=r"ranks differ in places: \[\[0, 1\]\]"):
            rank.agree(rank.rank, "places")

    on_shared_ranks(2, run)
