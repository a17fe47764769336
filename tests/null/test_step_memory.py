"""What steps need is left free by the KV cache."""

from __future__ import annotations

import pytest

from engine_core import core
from engine_core.config import (
    CacheConfig,
    EngineConfig,
    ExecutorConfig,
    ModelConfig,
    SchedulerConfig,
    StepSize,
)
from engine_core.core import create_executor
from engine_core.memory import _kv_bytes
from executor.messages import WorkerReady
from executor.multiproc import MultiprocExecutor

GIB = 1 << 30


def kv_bytes(max_model_len: int | None = None, *, free: int = 60, **cache: float) -> float:
    """GiB for the KV cache on a device of 80 GiB, where steps need 2 GiB, and 1 GiB for 1000 tokens of length."""
    ready = WorkerReady(
        rank=0,
        free_bytes=free * GIB,
        total_bytes=80 * GIB,
        weight_bytes=0,
        default_kv_bytes=4 * GIB,
        kv_cache_groups=(),
        max_model_len=8000,
        vocab_size=10,
        step_bytes=2 * GIB,
        position_bytes=GIB // 1000,
    )
    config = EngineConfig(
        cache=CacheConfig(**cache),  # type: ignore[arg-type]
        executor=ExecutorConfig(model=ModelConfig(max_model_len=max_model_len)),
    )
    return _kv_bytes(ready, [ready], config) / GIB


@pytest.mark.parametrize(("max_model_len", "tables"), [(None, 8), (-1, 8), (1000, 1), (9000, 8)])
def test_a_share_of_the_memory_is_for_weights_cache_and_steps(max_model_len: int | None, tables: int) -> None:
    assert kv_bytes(max_model_len, gpu_memory_utilization=0.5) == pytest.approx(80 * 0.5 - 20 - 2 - tables)


def test_the_advised_size_shrinks_where_steps_need_the_rest() -> None:
    assert kv_bytes(1000) == 4
    assert kv_bytes(1000, free=5) == pytest.approx(2)
    assert kv_bytes(1000, free=5, kv_cache_memory=3 * GIB) == 3


def test_workers_are_told_the_largest_step() -> None:
    scheduler = SchedulerConfig(max_num_seqs=7, max_num_batched_tokens=99)
    executor = create_executor(EngineConfig(scheduler=scheduler), "/nowhere", "info")
    assert isinstance(executor, MultiprocExecutor)
    assert executor._config.step_size == StepSize(max_num_seqs=7, max_num_batched_tokens=99)
    assert executor._config.memory_share is None
    executor._context.term()


def test_replicas_that_load_together_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "host_memory", lambda: (80 * GIB, 60 * GIB))
    shares = []
    for epoch in (1, 2):
        executor = create_executor(EngineConfig(num_replicas=3), "/nowhere", "info", epoch)
        assert isinstance(executor, MultiprocExecutor)
        shares.append(executor._config.memory_share)
        executor._context.term()
    assert shares == [20 * GIB, None], "the second time, the others have loaded"
