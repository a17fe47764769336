"""Which cores each rank of a machine runs on. Needs no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from executor.parallel.split import split_evenly

NODES = Path("/sys/devices/system/node")
CPUS = Path("/sys/devices/system/cpu")


def numa_nodes(folder: Path = NODES) -> dict[int, frozenset[int]]:
    """The cores of each NUMA node that has any; empty if the system does not say."""
    result = {}
    with suppress(OSError, ValueError):
        for path in folder.glob("node[0-9]*"):
            cores = parse_cores((path / "cpulist").read_text())
            if cores:
                result[int(path.name.removeprefix("node"))] = cores
    return dict(sorted(result.items()))


def parse_cores(text: str) -> frozenset[int]:
    """``0-3,8`` -> {0, 1, 2, 3, 8}."""
    result: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        result.update(range(int(first), int(last or first) + 1))
    return frozenset(result)


def format_cores(cores: Collection[int]) -> str:
    """{0, 1, 2, 8} -> ``0-2,8``."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and runs[-1][-1] == core - 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def physical_core(cpu: int, folder: Path = CPUS) -> int:
    """The core of its socket that a CPU is a thread of; the CPU's own number if the system does not say."""
    try:
        return int((folder / f"cpu{cpu}" / "topology" / "core_id").read_text())
    except (OSError, ValueError):
        return cpu


def split_cores(
    num_ranks: int,
    usable: Collection[int] | None = None,
    nodes: dict[int, frozenset[int]] | None = None,
    folder: Path = CPUS,
) -> list[tuple[int, ...]]:
    """The cores of each rank: neighbours, of as few NUMA nodes as possible, and both threads of a core together. With
    too few cores, ranks share them.

    Args:
        num_ranks: Ranks, or engines, on this machine.
        usable: Cores that this process may use. Default: as the system says.
        nodes: Cores by NUMA node. Default: likewise.
        folder: Where the system describes its CPUs.
    """
    usable = os.sched_getaffinity(0) if usable is None else usable
    nodes = numa_nodes() if nodes is None else nodes
    node_of = {core: node for node, cores in nodes.items() for core in cores}
    ordered = sorted(usable, key=lambda core: (node_of.get(core, -1), physical_core(core, folder), core))
    if len(ordered) < num_ranks:
        return [(ordered[rank % len(ordered)],) for rank in range(num_ranks)]
    return [tuple(ordered[share.start : share.end]) for share in split_evenly(len(ordered), num_ranks)]


def thread_places(
    usable: Collection[int] | None = None, nodes: dict[int, frozenset[int]] | None = None, folder: Path = CPUS
) -> dict[str, str]:
    """Variables that keep each thread of a worker without ranks on a core of its own.

    Weights are laid out by the thread that will multiply with them, so they lie in the memory of its NUMA node as long
    as it stays there. Empty if there is one such node.

    Args:
        usable: Cores that the worker may use. Default: those of this process.
        nodes: Cores by NUMA node. Default: as the system says.
        folder: Where the system describes its CPUs.
    """
    usable = os.sched_getaffinity(0) if usable is None else usable
    nodes = numa_nodes() if nodes is None else nodes
    if sum(not own.isdisjoint(usable) for own in nodes.values()) < 2:
        return {}
    cores = split_cores(len(usable), usable, nodes, folder)
    return {"OMP_PLACES": ",".join(f"{{{core}}}" for (core,) in cores), "OMP_PROC_BIND": "spread"}


def about_ranks(cores: Sequence[Collection[int]], nodes: Mapping[int, frozenset[int]] | None = None) -> str:
    """Says on which cores ranks run, and what that is good for.

    Args:
        cores: Of each rank.
        nodes: Cores by NUMA node. Default: as the system says.
    """
    nodes = numa_nodes() if nodes is None else nodes
    text = f"ranks run on cores {' | '.join(map(format_cores, cores))}"
    if len({core for own in cores for core in own}) < sum(map(len, cores)):
        return f"{text}: they share some, and wait for each other; use fewer"
    if len(nodes) < 2:
        return f"{text}; on CPUs of one NUMA node, they are no faster than threads"
    return text
