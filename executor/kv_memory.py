"""Memory of a KV cache that outlives the worker: a file in memory that belongs to the engine core.

Only the worker writes it. Caches lie in it one after another, so a new worker that allocates the same ones finds what
the last one has written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from executor.attention.base import AttentionGroup
from executor.device.base import Device
from executor.layers.attention import Attention
from executor.messages import I32, SchedulerOutput, i32
from ops.cpu.shared_memory import HUGE_PAGE, empty_file, map_shared, use_huge_pages


@dataclass
class _Cache:
    """One tensor of a KV cache group."""

    memory: torch.Tensor
    block_bytes: int
    num_committed: int = 0
    """Bytes from its start that are in huge pages, as far as the system gives any."""


class KVMemory:
    """Hands out the memory of a file, and commits it as blocks come into use."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.num_bytes = 0
        """Bytes of the file that were handed out."""
        self._groups: list[list[_Cache]] = []
        self._num_used: list[int] = []
        """Blocks of each group that have been in use: pools hand them out in order at first."""
        self._has_huge_pages = True

    def new_group(self) -> None:
        """Begins the next KV cache group."""
        self._groups.append([])
        self._num_used.append(0)

    def take(self, num_bytes: int, num_blocks: int) -> torch.Tensor:
        """uint8 [num_bytes]: the memory of the group's next tensor, which has ``num_blocks`` equal blocks."""
        memory = map_shared(self._descriptor, self.num_bytes, max(1, num_bytes))
        self.num_bytes += -(-max(1, num_bytes) // HUGE_PAGE) * HUGE_PAGE
        self._groups[-1].append(_Cache(memory, num_bytes // max(1, num_blocks)))
        return memory

    def follow(self, plan: SchedulerOutput) -> None:
        """Commits the memory of blocks that a plan uses for the first time."""
        if not self._has_huge_pages:
            return
        for group, column in enumerate(plan.block_updates):
            self._use(group, i32(column)[2::3])
        for request in plan.new_reqs:
            for group, block_ids in enumerate(request.block_ids):
                self._use(group, i32(block_ids))

    def free(self) -> None:
        """Gives the memory back to the system; it reads as zeros from now on."""
        for group, caches in enumerate(self._groups):
            self._num_used[group] = 0
            for cache in caches:
                empty_file(cache.memory)
                cache.num_committed = 0

    def use(self, groups: bytes, block_ids: Sequence[int] | I32) -> None:
        """Commits the memory of blocks, given with their groups, likewise."""
        for group in set(groups) if self._has_huge_pages else ():
            self._use(group, [block for own, block in zip(groups, [*map(int, block_ids)], strict=True) if own == group])

    def _use(self, group: int, block_ids: Sequence[int] | I32) -> None:
        if len(block_ids) == 0 or (num_used := int(np.max(block_ids)) + 1) <= self._num_used[group]:
            return
        self._num_used[group] = num_used
        for cache in self._groups[group]:
            end = -(-num_used * cache.block_bytes // HUGE_PAGE) * HUGE_PAGE
            end = min(end, len(cache.memory))
            if end > cache.num_committed:
                self._has_huge_pages &= use_huge_pages(cache.memory, cache.num_committed, end)
                cache.num_committed = end


def allocate_group(
    group: AttentionGroup, num_blocks: int, layers: Sequence[Attention], device: Device, memory: KVMemory | None
) -> None:
    """Gives the layers of a group their caches.

    Args:
        group: A group that is cached.
        num_blocks: Its blocks.
        layers: All attention layers of the model.
        device: Allocates the caches.
        memory: Where to put them; None: the device decides.
    """
    shapes = group.backend.kv_shape(num_blocks, group.block_size, group.shape, group.kv_dtype)
    if memory is not None:
        memory.new_group()
    for index in group.layers:
        caches = []
        for shape in shapes:
            num_bytes = torch.Size(shape).numel() * group.kv_dtype.itemsize
            place = None if memory is None else memory.take(num_bytes, num_blocks)
            caches.append(device.allocate_kv(shape, group.kv_dtype, place))
        layers[index].kv_cache = tuple(caches)
