"""How much memory this process may use. Needs no torch."""

from __future__ import annotations

from pathlib import Path

_UNLIMITED = 1 << 60
"""cgroup v1 reports "no limit" as a number near 2**63."""


def host_memory() -> tuple[int, int]:
    """Total and free bytes, of the machine or of this process's control group."""
    total, available = _system_memory()
    limit, used = _cgroup_memory(Path("/sys/fs/cgroup"))
    return min(total, limit), max(0, min(available, limit - used))


def _system_memory() -> tuple[int, int]:
    """Total and available bytes."""
    fields = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    return fields["MemTotal"], fields["MemAvailable"]


def _cgroup_memory(root: Path) -> tuple[int, int]:
    """Limit and usage of this process's control group in bytes; the limit is huge if none is set."""
    for limit_file, used_file, stat_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = (root / limit_file).read_text().strip()
            used = int((root / used_file).read_text())
            stat = (root / limit_file).with_name("memory.stat").read_text()
        except (OSError, ValueError):
            continue
        if limit == "max" or int(limit) >= _UNLIMITED:
            continue
        reclaimable = next((int(line.split()[1]) for line in stat.splitlines() if line.startswith(f"{stat_key} ")), 0)
        return int(limit), used - reclaimable
    return _UNLIMITED, 0
