"""Ranks that share memory as those of a server do, but are threads of one process: kernels meet as in processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

import ops
from executor.parallel import ParallelState, create_shared_memory
from ops import PeerLostError
from ops.cpu.op_set import CpuOps
from ops.cpu.ranks import SharedRank

T = TypeVar("T")


def state_of(rank: ops.Communicator) -> ParallelState:
    """The place of a rank among those that share layers."""
    return ParallelState(rank.rank, rank.size, rank=rank.rank, is_output_rank=rank.rank == 0)


def on_shared_ranks(size: int, run: Callable[[SharedRank], T]) -> list[T]:
    """What each rank returns. If one fails, the others do not wait for it."""
    chosen = ops.op_set("cpu")
    assert isinstance(chosen, CpuOps)
    descriptor = create_shared_memory()
    ranks = [SharedRank(chosen.library, descriptor, rank, size) for rank in range(size)]
    os.close(descriptor)

    def guarded(rank: SharedRank) -> T:
        torch.set_num_threads(1)
        try:
            return run(rank)
        except BaseException:
            rank.leave()
            raise

    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(size) as threads:
            futures = [threads.submit(guarded, rank) for rank in ranks]
            wait(futures)
            # Those that only waited for a rank that failed come last.
            for future in sorted(futures, key=lambda future: isinstance(future.exception(), PeerLostError)):
                future.result()
            return [future.result() for future in futures]
    finally:
        torch.set_num_threads(num_threads)
