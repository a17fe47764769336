"""Memory of weights and KV caches: private mappings, for which Linux uses huge pages."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from ops.cpu import memory

MIB = 1 << 20


def smaps_of(address: int) -> dict[str, str]:
    """The entry of /proc/self/smaps that holds an address."""
    entry: dict[str, str] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line):
            if entry:
                return entry
            if int(found[1], 16) <= address < int(found[2], 16):
                entry["mode"] = found[3]
        elif entry:
            name, value = line.split(":", 1)
            entry[name] = value.strip()
    return entry


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mappings_are_private_and_in_huge_pages() -> None:
    tensor = memory.map_zeros(64 * MIB)
    assert not tensor.any()
    tensor.fill_(1)
    entry = smaps_of(tensor.data_ptr())
    assert entry["mode"] == "rw-p"
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip("this kernel has no transparent huge pages")
    assert "hg" in entry["VmFlags"].split()


def test_unused_memory_is_handed_out_again() -> None:
    recycler = memory.Recycler()
    first, second = recycler.take(1000), recycler.take(1000)
    address = first.data_ptr()
    assert second.data_ptr() != address
    view = first[500:]
    del first
    third = recycler.take(1000)
    assert third.data_ptr() != address, "a view still uses it"
    del view
    assert recycler.take(100).data_ptr() != address, "far too large"
    assert recycler.take(900).data_ptr() == address
