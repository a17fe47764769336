"""Ranks of one layer on several machines: the bits of one rank, whatever connects them."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from executor.config import ExecutorConfig
from executor.device.base import create_device
from executor.fingerprint import fingerprint
from executor.nodes.addresses import listen
from executor.nodes.gloo import GlooGather, GlooMeeting
from executor.nodes.ranks import MachineRank
from executor.parallel import ParallelState
from ops import PeerLostError
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


class Canary:
    """Does something if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(CAGE),)


def listening() -> set[tuple[str, int]]:
    """Where this process waits for connections."""
    found = psutil.Process().net_connections("tcp")
    return {(each.laddr.ip, each.laddr.port) for each in found if each.status == "LISTEN"}


CAGE = Path(tempfile.gettempdir()) / f"canary{os.getpid()}"


def test_strangers_at_the_sockets_of_gloo() -> None:
    """And at those of its store: what they send is not executed, and disturbs nobody."""
    data = [pickle.dumps(Canary()), bytes(range(256)) * 16, b"", b"GET / HTTP/1.1\r\n\r\n", bytes(64), b"\xff" * 64]

    before = listening()

    def exchange(rank: MachineRank) -> float:
        own = torch.full((3, 4), float(rank.rank))
        rank.wait()
        with ExitStack() as stack:
            if rank.rank == 0:
                found = listening() - before
                assert {host for host, _ in found} == {"127.0.0.1"} and len(found) >= 3, "store, and Gloo of both"
                for address in found:
                    for sent in data:
                        stranger = stack.enter_context(socket.create_connection(address))
                        with suppress(OSError):  # it may be closed already
                            stranger.sendall(sent)
            for _ in range(20):
                total = rank.all_gather(own, (4, 4)).sum().item()
            rank.wait()
        return total

    assert on_machines(2, 2, exchange, "lo") == [12.0, 12.0]
    assert not CAGE.exists()


def test_a_machine_that_does_not_reach_the_others_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executor.nodes.gloo.CONNECT_TIMEOUT", timedelta(milliseconds=10))
    descriptor, endpoint = listen("127.0.0.1")
    with pytest.raises(PeerLostError, match=f"^--private-interface lo: {endpoint} cannot be reached by machine 3 "):
        GlooGather(GlooMeeting("lo", endpoint, descriptor), "0", 0, (2, 3))


def test_where_others_are_changes_no_bit() -> None:
    """So the KV cache outlives a worker, though the others are elsewhere in its next life."""
    place = ParallelState(0, 2)
    moved = replace(place, memory_fd=5, rendezvous_fd=7, store=("10.0.0.1", 5000), interface="eth1")
    found = {fingerprint(ExecutorConfig(), each, create_device("cpu"), ()) for each in (place, moved)}
    assert len(found) == 1


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
