"""Shares the machine's cores among the replicas of a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cores(root: Path = _TOPOLOGY) -> list[int]:
    """The CPUs that this process may use, with those of a socket, and of a core, next to each other.

    Args:
        root: Folder with a ``cpuN/topology`` for each CPU.
    """
    return sorted(os.sched_getaffinity(0), key=lambda cpu: (*_place(root, cpu), cpu))


def _place(root: Path, cpu: int) -> tuple[int, int]:
    """Socket and core of a CPU; (0, the CPU) if the kernel does not tell."""
    folder = root / f"cpu{cpu}" / "topology"
    try:
        return int((folder / "physical_package_id").read_text()), int((folder / "core_id").read_text())
    except (OSError, ValueError):
        return 0, cpu


def share_of_cores(cores: Sequence[int], replica: int, num_replicas: int) -> list[int]:
    """The cores of one replica: runs of equal length, as far as they go.

    With more replicas than cores, several have the same one.

    Args:
        cores: All cores, neighbours next to each other; at least one.
        replica: Number of the replica.
        num_replicas: Number of replicas.
    """
    begin, end = (len(cores) * place // num_replicas for place in (replica, replica + 1))
    return list(cores[begin:end]) or [cores[begin]]
