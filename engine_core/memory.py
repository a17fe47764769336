"""Sizes the KV cache and the longest sequence."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import replace

import msgspec

from engine_core.cache_shape import CacheShape, GroupShape, max_step_tokens
from engine_core.config import EngineConfig
from engine_core.snapshots import Snapshots
from executor.messages import STATES_LAYOUT, KVCacheGroupSpec, WorkerReady

AUTO_MAX_MODEL_LEN = -1
"""``--max-model-len auto``: the longest that fits."""


def format_bytes(count: float) -> str:
    """1536 -> 1.5 KiB. Rounds up, so that the printed size is sufficient."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    factor = 1000 if count < 10 else 100 if count < 100 else 10 if count < 1000 else 1
    return f"{math.ceil(count * factor) / factor:g} {unit}"


def settle_step_size(config: EngineConfig, ready: list[WorkerReady]) -> EngineConfig:
    """Takes over the workers' default of the step size."""
    known = [worker.max_num_batched_tokens for worker in ready if worker.max_num_batched_tokens]
    scheduler = config.scheduler
    if ready[0].pooling.needs_whole_prompts:  # the workers have made room for the longest
        scheduler = msgspec.structs.replace(
            scheduler,
            enable_chunked_prefill=False,
            long_prefill_token_threshold=0,
            max_num_batched_tokens=min(known),
        )
    elif known and scheduler.max_num_batched_tokens is None:
        scheduler = msgspec.structs.replace(scheduler, max_num_batched_tokens=min(known))
    return msgspec.structs.replace(config, scheduler=scheduler)


def plan_kv_cache(ready: list[WorkerReady], config: EngineConfig) -> tuple[CacheShape, int] | str:
    """Sizes the KV cache for the rank with the least free memory.

    Groups without a window hold as many tokens as fit. So do groups with a window; but if there are groups without one
    as well, they hold no more than all running requests can attend to together, and the others get the memory saved.
    States of recurrent layers take at most as much memory as groups without a window: fewer requests may run at a time.

    Returns:
        The cache's shape and the longest sequence, or a one-line message that says what does not fit and what would.
    """
    problem = _different_groups(ready)
    if problem is not None:
        return problem
    sizes = _Sizes(ready, config)
    if config.cache.num_gpu_blocks_override is not None:
        num_blocks = config.cache.num_gpu_blocks_override
    else:
        num_blocks = min(sizes.most_blocks(worker, _kv_bytes(worker, ready, config)) for worker in ready)
    shape = sizes.shape(num_blocks)
    model_len = min(worker.max_model_len for worker in ready)
    capacity = shape.max_len(sizes.step_tokens)
    if capacity < 2:
        kv_bytes = min(_kv_bytes(worker, ready, config) for worker in ready)
        return (
            f"no memory for a KV cache: {format_bytes(max(kv_bytes, 0))} are left and one block takes "
            f"{format_bytes(sizes.bytes_for(1))}; free memory or set --kv-cache-memory"
        )
    wanted = config.executor.model.max_model_len
    if wanted == AUTO_MAX_MODEL_LEN:
        return shape, int(min(model_len, capacity))
    if wanted is not None and wanted > model_len:
        return f"--max-model-len {wanted} exceeds the model's maximum of {model_len} tokens; use at most {model_len}"
    max_model_len = wanted or model_len
    if max_model_len > capacity:
        needed = format_bytes(sizes.bytes_for(sizes.least_blocks(max_model_len)))
        return (
            f"--max-model-len {max_model_len} does not fit the KV cache: it needs {needed} and "
            f"{format_bytes(sizes.bytes_for(num_blocks))} are available; use --max-model-len {capacity} or less, or "
            f"--kv-cache-memory {needed.replace(' ', '')} or more"
        )
    return shape, max_model_len


def _different_groups(ready: list[WorkerReady]) -> str | None:
    """The first rank whose KV cache groups are not those of rank 0, as a message.

    A plan names blocks by group, and all ranks get the same plan. Which layers a group has, and how many bytes they
    take, may differ.
    """
    first, *others = ready
    expected = _describe(first)
    for worker in others:
        if (groups := _describe(worker)) != expected:
            return (
                f"worker {worker.rank} has other KV cache groups than worker {first.rank}: {groups} instead of "
                f"{expected}; all workers need the same model files and versions"
            )
    return None


def different_kernels(ready: list[WorkerReady]) -> str | None:
    """The first rank with other kernels than rank 0, as a message: they may round differently.

    Args:
        ready: The workers' first messages, by rank. A machine may have taken the place of another since the last ones.
    """
    first, *others = ready
    for worker in others:
        if worker.kernels != first.kernels:
            return (
                f"machine {worker.node_rank} would compute with {worker.kernels} and machine {first.node_rank} with "
                f"{first.kernels}, and tokens would depend on the place of a layer; install the same versions on all "
                "machines, and choose kernels that all of their CPUs have with OCTAVO_CPU_CAPABILITY"
            )
    return None


def _describe(worker: WorkerReady) -> str:
    groups = [
        f"{spec.kind} (block_size {spec.block_size}, sliding_window {spec.sliding_window}, {spec.dtype}, {spec.layout})"
        for spec in worker.kv_cache_groups
    ]
    return ", ".join(groups) or "none"


class _Sizes:
    """Sizes of a cache whose groups each hold ``num_blocks * block_size`` tokens, or fewer if they need less."""

    def __init__(self, ready: list[WorkerReady], config: EngineConfig) -> None:
        self.ready = ready
        executor = config.executor
        self.step_tokens = max_step_tokens(config.scheduler, executor.max_draft_tokens, executor.num_lookahead_tokens)
        in_flight = config.scheduler.max_in_flight_steps * (1 + executor.max_draft_tokens)
        self.max_num_seqs = config.scheduler.max_num_seqs
        groups = ready[0].kv_cache_groups
        self.block_size = math.lcm(*(group.block_size for group in groups))
        """Tokens in whole blocks of every group."""
        self._has_full = any(group.sliding_window is None for group in groups)
        self._snapshots = Snapshots(self.block_size, output_tokens=in_flight + executor.num_lookahead_tokens)

    def _shape(self, spec: KVCacheGroupSpec, num_blocks: int) -> GroupShape:
        own = num_blocks * (self.block_size // spec.block_size)
        snapshots = self._snapshots if spec.layout == STATES_LAYOUT else None
        return GroupShape(own, spec.block_size, spec.sliding_window, snapshots)

    def group(self, spec: KVCacheGroupSpec, num_blocks: int) -> GroupShape:
        shape = self._shape(spec, num_blocks)
        if shape.window is None or not self._has_full:
            return shape
        seqs = self._num_states(num_blocks) if spec.layout == STATES_LAYOUT else self.max_num_seqs
        most = seqs * shape.max_live_blocks(num_blocks * self.block_size, self.step_tokens)
        return replace(shape, num_blocks=min(shape.num_blocks, most))

    def _num_states(self, num_blocks: int) -> int:
        """Sequences whose states take no more memory than the groups without a window, but at least one."""
        live = full = 0
        for spec in self.ready[0].kv_cache_groups:
            shape = self._shape(spec, num_blocks)
            if spec.layout == STATES_LAYOUT:
                blocks = shape.max_live_blocks(num_blocks * self.block_size, self.step_tokens)
                live += spec.bytes_per_block * blocks
            elif shape.window is None:
                full += spec.bytes_per_block * shape.num_blocks
        return max(1, min(self.max_num_seqs, full // max(1, live)))

    def shape(self, num_blocks: int) -> CacheShape:
        specs = self.ready[0].kv_cache_groups
        groups = tuple(self.group(spec, num_blocks) for spec in specs)
        return CacheShape(groups, has_states=any(spec.layout == STATES_LAYOUT for spec in specs))

    def _bytes_of(self, worker: WorkerReady, num_blocks: int) -> int:
        return sum(spec.bytes_per_block * self.group(spec, num_blocks).num_blocks for spec in worker.kv_cache_groups)

    def bytes_for(self, num_blocks: int) -> int:
        """Memory of the cache on the rank with the largest share."""
        return max(self._bytes_of(worker, num_blocks) for worker in self.ready)

    def most_blocks(self, worker: WorkerReady, kv_bytes: int) -> int:
        """The largest ``num_blocks`` that fit on a rank; 0 for a model without a KV cache."""
        kv_bytes = max(kv_bytes, 0)
        specs = worker.kv_cache_groups
        uncapped = [spec.bytes_per_block for spec in specs if spec.sliding_window is None or not self._has_full]
        if not uncapped:
            return 0
        candidates = range(kv_bytes // max(1, *uncapped) + 1)
        return bisect_right(candidates, kv_bytes, key=lambda num_blocks: self._bytes_of(worker, num_blocks)) - 1

    def least_blocks(self, max_model_len: int) -> int:
        """The smallest ``num_blocks`` that fits a sequence of that length."""
        candidates = range(1, -(-max_model_len // self.block_size) + 1)
        fits = bisect_left(candidates, True, key=lambda n: self.shape(n).max_len(self.step_tokens) >= max_model_len)
        return candidates[fits]


def _kv_bytes(worker: WorkerReady, ready: list[WorkerReady], config: EngineConfig) -> int:
    """Bytes for the KV cache of a rank. Unless configured, leaves room for steps.

    Ranks that share a machine's memory have parts of one cache: each gets as much as its blocks take. The last one to
    load its weights has seen what is left.
    """
    if not worker.shares_memory:
        return _bytes_of_caches([worker], config)
    together = [rank for rank in ready if rank.node_rank == worker.node_rank]
    blocks = [sum(spec.bytes_per_block for spec in rank.kv_cache_groups) for rank in together]
    own = sum(spec.bytes_per_block for spec in worker.kv_cache_groups)
    by_memory = sorted(together, key=lambda rank: rank.free_bytes)
    return _bytes_of_caches(by_memory, config) * own // max(1, sum(blocks))


def _bytes_of_caches(ranks: list[WorkerReady], config: EngineConfig) -> int:
    """Bytes for the KV caches of ranks with one memory.

    Replicas on one CPU share what is free. A GPU belongs to one of them.
    """
    cache, worker = config.cache, ranks[0]
    if cache.kv_cache_memory is not None:
        return cache.kv_cache_memory
    steps = sum(_bytes_of_steps(rank, config) for rank in ranks)
    num_sharers = config.num_replicas if worker.device == "cpu" else 1
    utilization = cache.gpu_memory_utilization or worker.memory_utilization
    if utilization:
        used = worker.total_bytes - worker.free_bytes
        return (int(worker.total_bytes * utilization) - used) // num_sharers - steps
    return min(worker.default_kv_bytes // num_sharers, worker.free_bytes // num_sharers - steps)


def _bytes_of_steps(worker: WorkerReady, config: EngineConfig) -> int:
    wanted = config.executor.model.max_model_len
    longest = worker.max_model_len if wanted in (None, AUTO_MAX_MODEL_LEN) else wanted
    return worker.step_bytes + worker.position_bytes * min(longest, worker.max_model_len)
