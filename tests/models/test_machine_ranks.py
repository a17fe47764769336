"""Ranks of one layer on several machines: the bits of one rank, whatever connects them."""

from __future__ import annotations

import pytest
import torch

from executor.nodes.ranks import MachineRank
from tests import tiny
from tests.models.test_ranks import UNEVEN, run
from tests.ops.cpu import NEEDS_KERNELS
from tests.shared_ranks import on_machines

pytestmark = NEEDS_KERNELS


@pytest.mark.parametrize("interface", ["", "lo"])
def test_what_machines_exchange(interface: str) -> None:
    """Two ranks on the first of two machines, one on the second."""
    widths = [3, 5, 8]
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randn(7, width, generator=generator).bfloat16() for width in widths]
    rows = torch.randn(7, 4, generator=generator)
    rows[2] = -0.0
    owner = torch.arange(7) % 3

    def exchange(rank: MachineRank) -> None:
        assert rank.size == 3
        for _ in range(3):
            padded = torch.nn.functional.pad(columns[rank.rank], (1, 0))[:, 1:]  # rows are apart
            assert torch.equal(rank.all_gather(padded, widths), torch.cat(columns, dim=1))
            assert rank.all_gather(columns[rank.rank][:0], widths).shape == (0, 16)
            is_here = owner == rank.rank
            garbage = torch.where(is_here.unsqueeze(1), rows, torch.nan)
            found = rank.select_rows(garbage, is_here)
            assert torch.equal(found.view(torch.int32), rows.view(torch.int32))
            assert torch.equal(rank.broadcast(torch.arange(30) * (rank.rank + 1)), torch.arange(30))
        rank.wait()
        rank.agree(7, "something")
        with pytest.raises(RuntimeError, match=r"ranks differ in places: \[0, 1, 2\]"):
            rank.agree(rank.rank, "places")

    on_machines(3, 2, exchange, interface)


@pytest.mark.parametrize(
    ("name", "num_ranks", "nnodes", "interface"),
    [("llama", 4, 2, ""), ("llama", 3, 3, "lo"), ("mixtral", 2, 2, ""), ("qwen3_moe", 2, 2, "")],
)
def test_layers_that_machines_divide(name: str, num_ranks: int, nnodes: int, interface: str) -> None:
    folder = tiny.checkpoint(name, **(UNEVEN if name == "llama" else {}))
    expected = run(folder, captured=True, dtype="bfloat16")
    results = on_machines(num_ranks, nnodes, lambda rank: run(folder, True, rank, dtype="bfloat16"), interface)
    for logits in results:
        for ours, theirs in zip(logits, expected, strict=True):
            assert torch.equal(ours, theirs)
