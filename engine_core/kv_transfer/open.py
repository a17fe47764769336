"""Opens the configured store of K and V."""

from __future__ import annotations

from collections.abc import Sequence

from engine_core.config import EngineConfig
from engine_core.kv_cache_manager import KVCacheManager
from engine_core.kv_transfer.disk import DiskStore, StoreError
from engine_core.kv_transfer.transfers import KVTransfers
from engine_core.memory import format_bytes
from executor.log import get_logger
from executor.messages import WorkerReady

logger = get_logger()


def open_transfers(
    config: EngineConfig, kv: KVCacheManager, ready: Sequence[WorkerReady], max_model_len: int
) -> KVTransfers | str | None:
    """Opens the store of ``--kv-cache-dir``.

    Args:
        config: The engine's configuration.
        kv: The KV cache.
        ready: The workers' first messages, by rank.
        max_model_len: Longest sequence served.

    Returns:
        None if there is no store, or nothing to store; a one-line message if the folder cannot be used.
    """
    cache = config.cache
    worker = ready[0]
    if not cache.kv_cache_dir or not cache.enable_prefix_caching or not worker.kv_cache_groups:
        return None
    if not all(each.fingerprint for each in ready):
        logger.warning("--kv-cache-dir has no effect: the workers do not say what determines their KV cache")
        return None
    dtypes = ", ".join(dict.fromkeys(spec.dtype for spec in worker.kv_cache_groups))
    about = {"model": config.executor.model.model, "dtype": worker.dtype, "kv_cache_dtype": dtypes}
    # Some models rotate short and long contexts differently.
    about["max_model_len"] = str(max_model_len)
    try:
        store = DiskStore(cache.kv_cache_dir, cache.kv_cache_disk, ready, about)
    except StoreError as error:
        return str(error)
    logger.info("--kv-cache-dir %s: %d blocks, %s", cache.kv_cache_dir, store.num_blocks, format_bytes(store.num_bytes))
    return KVTransfers(kv, store, len(ready))
