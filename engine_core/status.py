"""What the api is told about the engine: when it is ready, and when it asks."""

from __future__ import annotations

import os
from collections.abc import Mapping

from engine_core.config import EngineConfig
from engine_core.messages import EngineReady
from engine_core.scheduler import Scheduler
from executor.messages import WorkerReady


def engine_ready(
    config: EngineConfig, scheduler: Scheduler, ready: Mapping[int, WorkerReady], worker_pids: tuple[int, ...]
) -> EngineReady:
    """The message that the engine serves.

    Args:
        config: The engine's configuration.
        scheduler: Its scheduler.
        ready: The workers' messages by rank.
        worker_pids: Their process ids.
    """
    shape, worker = scheduler.shape, ready[0]
    return EngineReady(
        engine_epoch=scheduler.engine_epoch,
        pid=os.getpid(),
        max_model_len=scheduler.max_model_len,
        vocab_size=min(each.vocab_size for each in ready.values()),
        hidden_size=min(each.hidden_size for each in ready.values()),
        num_kv_blocks=shape.num_tokens // shape.alignment,
        block_size=shape.alignment,
        max_num_seqs=config.scheduler.max_num_seqs,
        dtype=worker.dtype,
        device=worker.device,
        architecture=worker.architecture,
        worker_pids=worker_pids,
        kernels=worker.kernels,
        weight_bytes=sum(each.weight_bytes for each in ready.values()),
        kv_cache_dtype=", ".join(dict.fromkeys(spec.dtype for spec in worker.kv_cache_groups)),
        pooling=ready[max(ready)].pooling,
        multimodal=worker.multimodal,
        snapshots=next((group.snapshots for group in shape.groups if group.snapshots is not None), None),
    )


def status(scheduler: Scheduler | None, *, is_serving: bool, num_steps: int) -> dict[str, int | float | str | bool]:
    """Counts for tests and operators; ``integrity`` is empty if all checks pass.

    Args:
        scheduler: None: the model is not loaded.
        is_serving: The workers accept plans.
        num_steps: Steps in flight.
    """
    counts: dict[str, int | float | str | bool] = {"serving": is_serving, "steps_in_flight": num_steps}
    if scheduler is None:
        return counts
    integrity = ""
    try:
        scheduler.check_integrity()
    except AssertionError as error:
        integrity = str(error) or "inconsistent"
    return counts | {
        "num_running_reqs": scheduler.num_running,
        "num_waiting_reqs": scheduler.num_waiting,
        "num_blocks": scheduler.kv.num_blocks,
        "num_free_blocks": scheduler.kv.num_free,
        "num_preemptions": scheduler.num_preemptions,
        "num_adapters": scheduler.pool.adapters.num_loaded,
        "integrity": integrity,
    }
