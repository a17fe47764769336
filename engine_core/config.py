"""Configuration that the engine core reads; see ``executor/config.py`` for how flags are derived."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from executor.config import (
    Config,
    DeviceConfig,
    ExecutorConfig,
    GGUFHeader,
    GGUFTensor,
    ModelConfig,
    ParallelConfig,
    Positive,
    SimulatedDevice,
    SpeculativeConfig,
    StepSize,
)

__all__ = [
    "CacheConfig",
    "Config",
    "DeviceConfig",
    "EngineConfig",
    "ExecutorConfig",
    "GGUFHeader",
    "GGUFTensor",
    "ModelConfig",
    "ParallelConfig",
    "Positive",
    "SchedulerConfig",
    "SimulatedDevice",
    "SpeculativeConfig",
    "StepSize",
]


class SchedulerConfig(Config, frozen=True):
    """What may run together in a step."""

    group: ClassVar[str] = "Scheduler"

    max_num_seqs: Annotated[Positive, Meta(description="Requests that run at the same time.")] = 256
    max_num_batched_tokens: Annotated[
        Positive,
        Meta(
            description="Tokens computed in one step, all requests together. With more of them, running requests wait "
            "longer for prompts; a CPU gains nothing by it.",
            extra={"parse": "tokens"},
        ),
    ] = 512
    max_in_flight_steps: Annotated[
        int,
        Meta(ge=1, le=8, description="Steps planned ahead of their results. 1: no overlap of planning and computing."),
    ] = 2
    scheduling_policy: Annotated[
        Literal["fcfs", "priority"],
        Meta(
            description="Order of waiting requests: first come first served, or by their priority (lower first). In "
            "either case API keys take turns, and so do the users of a key."
        ),
    ] = "fcfs"
    enable_chunked_prefill: Annotated[
        bool, Meta(description="Let a long prompt be computed over several steps, beside running requests.")
    ] = True
    long_prefill_token_threshold: Annotated[
        int,
        Meta(
            ge=0,
            description="Most prompt tokens of one request in a step; 0: no such bound.",
            extra={"parse": "tokens"},
        ),
    ] = 0
    max_num_queued_reqs: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="Requests that may wait for the server; one more is refused with status 429, unless it is of "
            "somebody who has less than their share waiting. Default: what is served in half a minute, by measured "
            "rates, but at least --max-num-seqs. Not for run-batch."
        ),
    ] = None
    max_num_queued_tokens: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="Prompt tokens that may wait, in the same way. Default: as for requests, but at least what the "
            "KV cache holds; no bound if --max-num-queued-reqs is given."
        ),
    ] = None


class CacheConfig(Config, frozen=True):
    """The paged KV cache."""

    group: ClassVar[str] = "Cache"

    enable_prefix_caching: Annotated[bool, Meta(description="Reuse the KV blocks of prompts that start alike.")] = True
    gpu_memory_utilization: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(
            description="Share of the device's memory for weights, KV cache and steps together. "
            "Default: the KV cache takes min(4 GiB, a quarter of the memory available)."
        ),
    ] = None
    kv_cache_memory: Annotated[
        Positive | None,
        Meta(
            description="Size of the KV cache, such as 4GiB; overrides --gpu-memory-utilization.",
            extra={"parse": "bytes", "flags": ["--kv-cache-memory-bytes"]},
        ),
    ] = None
    num_gpu_blocks_override: Annotated[
        Positive | None,
        Meta(description="Number of KV blocks, whatever the memory would allow.", extra={"group": "Testing"}),
    ] = None


class EngineConfig(Config, frozen=True):
    """Everything the engine core is told at start."""

    scheduler: SchedulerConfig = SchedulerConfig()
    cache: CacheConfig = CacheConfig()
    executor: ExecutorConfig = ExecutorConfig()
    max_worker_restarts: Annotated[
        int,
        Meta(ge=0, description="Restarts of dead workers, with no progress in between, before the server gives up."),
    ] = 5
