#!/usr/bin/env python
"""Times how ranks exchange columns: in memory that they share, encrypted between machines, and by Gloo.

    python scripts/bench_collective.py
    python scripts/bench_collective.py --ranks 3 --interface eth1 --widths 4096 14336 --rows 1 512

Each rank is a process of this machine with a core of its own, if there are enough. They gather a row, or several, of
which each has a share, in bfloat16. Machines are connected by the loopback interface, so the wire costs nothing. It
prints medians in microseconds, and the 90th percentile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ops
from executor.config import ParallelConfig
from executor.multiproc import Network
from executor.nodes.gloo import meeting_of
from executor.nodes.head import open_listeners
from executor.nodes.links import NetworkLinks
from executor.nodes.ranks import join_machines
from executor.parallel import create_shared_memory, places, split_columns, split_cores
from ops import Communicator, SingleRank
from ops.cpu import library
from ops.cpu.ranks import SharedRank

WAYS = ("memory", "links", "gloo")
WARM_UP = 20


def measure(way: str, options: argparse.Namespace) -> None:
    """Has all ranks gather; rank 0 prints the times."""
    ranks = places(ParallelConfig(tensor_parallel_size=options.ranks, nnodes=options.ranks))
    interface = options.interface if way == "gloo" else ""
    opened = [open_listeners(ranks, each.node_rank, "127.0.0.1", interface) for each in ranks]
    endpoints = {name: endpoint for each in opened for name, (_, endpoint) in each.items()}
    listeners = {name: descriptor for each in opened for name, (descriptor, _) in each.items()}
    network = Network(cluster_key=bytes(32), addresses=("127.0.0.1",) * len(ranks), endpoints=endpoints)
    memory, cores = create_shared_memory(), split_cores(len(ranks))
    ended, running = os.pipe()
    sys.stdout.flush()
    children = []
    for own in ranks:
        if child := os.fork():
            children.append(child)
            continue
        os.sched_setaffinity(0, cores[own.rank])
        if way == "memory":
            kernels = library.chosen()
            assert kernels is not None, "ranks need the CPU kernels"
            run(SharedRank(kernels, memory, own.rank, len(ranks)), way, options)
        else:
            links = NetworkLinks(network, ranks, own, listeners)
            links.check()
            run(join_machines(ranks, own, SingleRank(), links, meeting_of(links, own, interface)), way, options)
        sys.stdout.flush()
        os.close(running)
        os.read(ended, 1)  # what this rank has sent last may be under way to others
        os._exit(0)
    os.close(running)
    os.close(ended)
    for child in children:
        os.waitpid(child, 0)
    for descriptor in (memory, *listeners.values()):
        os.close(descriptor)


def run(rank: Communicator, way: str, options: argparse.Namespace) -> None:
    """What a rank does."""
    ops.use("cpu", "cpu")
    torch.set_num_threads(1)
    for rows in options.rows:
        for width in options.widths:
            widths = [share.size for share in split_columns(width, rank.size, "the row")]
            own = torch.ones((rows, widths[rank.rank]), dtype=torch.bfloat16)
            seconds = []
            for _ in range(WARM_UP + options.rounds):
                begin = time.perf_counter()
                rank.all_gather(own, widths)
                seconds.append(time.perf_counter() - begin)
            if rank.rank == 0:
                times = sorted(seconds[WARM_UP:])
                most = times[len(times) * 9 // 10]
                print(f"{way:7} {rows:6} {width:8} {statistics.median(times) * 1e6:9.0f} {most * 1e6:9.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--interface", default="lo", help="that Gloo uses")
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 4096, 14336])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    print(f"{'way':7} {'rows':>6} {'columns':>8} {'us':>9} {'p90':>9}")
    for way in options.ways:
        measure(way, options)


if __name__ == "__main__":
    main()
