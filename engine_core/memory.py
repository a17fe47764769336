"""How many KV blocks fit, and how long a sequence may be."""

from __future__ import annotations

from engine_core.config import EngineConfig
from engine_core.scheduler import CacheShape
from executor.messages import WorkerReady

AUTO_MAX_MODEL_LEN = -1
"""``--max-model-len auto``: the longest that fits."""


def format_bytes(count: float) -> str:
    """1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def plan_kv_cache(ready: list[WorkerReady], config: EngineConfig) -> tuple[CacheShape, int] | str:
    """Sizes the KV cache by the rank with the least room.

    Returns:
        The cache's shape and the longest sequence, or one line that says what does not fit and what would.
    """
    sizes = [(worker, _kv_bytes(worker, config)) for worker in ready]
    groups = ready[0].kv_cache_groups
    block_size = max(group.block_size for group in groups)
    per_block = max(sum(group.bytes_per_block for group in worker.kv_cache_groups) for worker in ready)
    kv_bytes = min(size for _, size in sizes)
    if config.cache.num_gpu_blocks_override is not None:
        num_blocks = config.cache.num_gpu_blocks_override
    else:
        num_blocks = kv_bytes // per_block
    model_len = min(worker.max_model_len for worker in ready)
    capacity = num_blocks * block_size
    if capacity < 2:
        return (
            f"no room for a KV cache: {format_bytes(max(kv_bytes, 0))} are left and one block takes "
            f"{format_bytes(per_block)}; free memory or set --kv-cache-memory"
        )
    wanted = config.executor.model.max_model_len
    if wanted == AUTO_MAX_MODEL_LEN:
        max_model_len = min(model_len, capacity)
    elif wanted is not None and wanted > model_len:
        return (
            f"--max-model-len {wanted} is longer than the {model_len} tokens that the model was made for; "
            f"use at most {model_len}"
        )
    else:
        max_model_len = wanted or model_len
        if max_model_len > capacity:
            needed = -(-max_model_len // block_size) * per_block
            return (
                f"--max-model-len {max_model_len} does not fit the KV cache: it needs {format_bytes(needed)} and "
                f"{format_bytes(num_blocks * per_block)} are there; use --max-model-len {capacity} or less, or "
                f"--kv-cache-memory {format_bytes(needed).replace(' ', '')} or more"
            )
    return CacheShape(num_blocks=num_blocks, block_size=block_size, num_groups=len(groups)), max_model_len


def _kv_bytes(worker: WorkerReady, config: EngineConfig) -> int:
    """Bytes for the KV cache of a rank. Unless somebody chose them, what steps need is left free."""
    cache = config.cache
    if cache.kv_cache_memory is not None:
        return cache.kv_cache_memory
    if cache.gpu_memory_utilization is not None:
        used = worker.total_bytes - worker.free_bytes
        return int(worker.total_bytes * cache.gpu_memory_utilization) - used - _bytes_of_steps(worker, config)
    return min(worker.default_kv_bytes, worker.free_bytes - _bytes_of_steps(worker, config))


def _bytes_of_steps(worker: WorkerReady, config: EngineConfig) -> int:
    wanted = config.executor.model.max_model_len
    longest = worker.max_model_len if wanted in (None, AUTO_MAX_MODEL_LEN) else wanted
    return worker.step_bytes + worker.position_bytes * min(longest, worker.max_model_len)
