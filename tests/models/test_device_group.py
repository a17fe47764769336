"""Ranks with memory of their own: what they exchange, with threads as ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from executor.device.group import GroupRank
from executor.parallel import ParallelState

T = TypeVar("T")
gloo: Any = dist.ProcessGroupGloo


def on_groups(size: int, run: Callable[[GroupRank], T], *, are_stages: bool = False) -> list[T]:
    """What each rank returns."""
    descriptor = os.memfd_create("ranks")

    def rank(number: int) -> T:
        store = FileStore(f"/proc/self/fd/{descriptor}", size)
        options = gloo._Options()
        options._devices = [gloo.create_device(interface="lo")]
        group = gloo(store, number, size, options)
        place = ParallelState(tp_rank=number, tp_size=size, rank=number)
        if are_stages:
            place = ParallelState(pp_rank=number, pp_size=size, rank=number)
        return run(GroupRank(place, group, group, torch.device("cpu")))

    try:
        with ThreadPoolExecutor(size) as threads:
            return list(threads.map(rank, range(size)))
    finally:
        os.close(descriptor)


def given(rank: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(5, width, generator=torch.Generator().manual_seed(rank)) * 100).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_ranks_exchange(dtype: torch.dtype) -> None:
    size, widths, owner = 3, (3, 1, 6), torch.tensor([2, 0, 1, 1, 2])

    def run(rank: GroupRank) -> list[torch.Tensor]:
        x = given(rank.rank, 6, dtype)
        x[owner == rank.rank, 0] = -0.0
        rank.connect()
        rank.agree(7, "a number")
        columns = rank.all_gather(x[:, : widths[rank.rank]], widths)
        return [columns, rank.all_reduce(x), rank.select_rows(x, owner == rank.rank), rank.broadcast(x)]

    parts = [given(rank, 6, dtype) for rank in range(size)]
    for rank, part in enumerate(parts):
        part[owner == rank, 0] = -0.0
    columns = torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)
    total = (parts[0].float() + parts[1].float() + parts[2].float()).to(dtype)
    rows = torch.stack([parts[rank][row] for row, rank in enumerate(owner.tolist())])
    for found in on_groups(size, run):
        for ours, expected in zip(found, [columns, total, rows, parts[0]], strict=True):
            assert torch.equal(ours, expected)
        assert bool(torch.signbit(found[2][:, 0]).all())


def test_parts_for_each_rank() -> None:
    def run(rank: GroupRank) -> list[int]:
        out = torch.empty(3, 2, dtype=torch.int32)
        rank.swap(torch.arange(6, dtype=torch.int32).view(3, 2) + 10 * rank.rank, out)
        return [int(number) for number in out.flatten()]

    assert on_groups(3, run)[1] == [2, 3, 12, 13, 22, 23]


def test_ranks_that_differ() -> None:
    def run(rank: GroupRank) -> str:
        with pytest.raises(RuntimeError) as error:
            rank.agree(5 + rank.rank, "what they exchange in a step")
        return str(error.value)

    assert on_groups(2, run) == ["ranks differ in what they exchange in a step: [5, 6]"] * 2


def test_stages_pass_hidden_states_on() -> None:
    def run(rank: GroupRank) -> torch.Tensor:
        stage = rank._parallel.pp_rank
        rank.check()
        hidden = torch.ones(2, 3) if stage == 0 else rank.memory(24).view(torch.float32).view(2, 3)
        if stage:
            rank.receive(hidden, stage - 1)
        hidden += stage
        if stage < 2:
            rank.send(hidden.t().contiguous().t(), stage + 1)
        return hidden

    assert on_groups(3, run, are_stages=True)[2].tolist() == [[4.0] * 3] * 2
