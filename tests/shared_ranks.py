"""Ranks that share memory, or are on several machines, as those of a server do, but are threads of one process: kernels
meet as in processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

import torch

import ops
from executor.config import ParallelConfig
from executor.multiproc import Network
from executor.nodes.gloo import meeting_of
from executor.nodes.head import open_listeners
from executor.nodes.links import LinkError, NetworkLinks
from executor.nodes.ranks import MachineRank, join_machines
from executor.parallel import ParallelState, create_shared_memory, near_place, places
from ops import PeerLostError, SingleRank
from ops.cpu.op_set import CpuOps
from ops.cpu.ranks import SharedRank

T = TypeVar("T")

CHECK_TIMEOUT = 60.0


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
        try:
            return run(rank)
        except BaseException:
            rank.leave()
            raise

    return _in_threads([partial(guarded, rank) for rank in ranks])


def on_machines(num_ranks: int, nnodes: int, run: Callable[[MachineRank], T], interface: str = "") -> list[T]:
    """What each of the ranks returns, of which each machine has some; ``interface``: see ``join_machines``. If one
    fails, the others do not wait for it."""
    chosen = ops.op_set("cpu")
    assert isinstance(chosen, CpuOps)
    library = chosen.library
    ranks = places(ParallelConfig(tensor_parallel_size=num_ranks, nnodes=nnodes))
    opened = [open_listeners(ranks, node, "127.0.0.1", interface) for node in range(nnodes)]
    found = {name: pair for each in opened for name, pair in each.items()}
    endpoints = {name: endpoint for name, (_, endpoint) in found.items()}
    listeners = {name: descriptor for name, (descriptor, _) in found.items()}
    network = Network(cluster_key=bytes(32), addresses=("127.0.0.1",) * nnodes, endpoints=endpoints)
    memory = [create_shared_memory() for _ in range(nnodes)]
    connections = [NetworkLinks(network, ranks, own, listeners) for own in ranks]

    def guarded(own: ParallelState, links: NetworkLinks) -> T:
        place = near_place(ranks, own)
        near: SharedRank | SingleRank = SingleRank()
        if place.tp_size > 1:
            near = SharedRank(library, memory[own.node_rank], place.tp_rank, place.tp_size)
        try:
            links.check(CHECK_TIMEOUT)
            rank = join_machines(ranks, own, near, links, meeting_of(links, own, interface))
            assert isinstance(rank, MachineRank)
            return run(rank)
        except BaseException:
            for target in links.targets.values():
                target.send(-2, torch.empty(0))  # which nobody expects
            if isinstance(near, SharedRank):
                near.leave()
            raise

    try:
        return _in_threads([partial(guarded, own, links) for own, links in zip(ranks, connections, strict=True)])
    finally:
        for links in connections:  # only now: others may have waited for what was under way
            links.close()
        for descriptor in memory:
            os.close(descriptor)


def _in_threads(runs: Sequence[Callable[[], T]]) -> list[T]:
    """What they return, each with one thread for kernels."""

    def guarded(run: Callable[[], T]) -> T:
        torch.set_num_threads(1)
        return run()

    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(len(runs)) as threads:
            futures = [threads.submit(guarded, run) for run in runs]
            wait(futures)
            # Those that only waited for a rank that failed come last.
            lost = PeerLostError, LinkError
            for future in sorted(futures, key=lambda future: isinstance(future.exception(), lost)):
                future.result()
            return [future.result() for future in futures]
    finally:
        torch.set_num_threads(num_threads)
