"""Configuration that the engine core reads; see ``executor/config.py`` for how flags are derived."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta
from msgspec.structs import replace

from executor.config import (
    DEFAULT_STEP_TOKENS,
    KV_CACHE_DTYPES,
    MAX_DRAFT_TOKENS,
    MAX_STEPS_AHEAD,
    QUANTIZATIONS,
    VECTOR_POOLINGS,
    Config,
    DeviceConfig,
    ExecutorConfig,
    GGUFHeader,
    GGUFTensor,
    LoRAConfig,
    ModelConfig,
    ParallelConfig,
    Positive,
    SimulatedDevice,
    SpeculativeConfig,
    StepSize,
    VisionFile,
    projector_type,
)

__all__ = [
    "KV_CACHE_DTYPES",
    "MAX_DRAFT_TOKENS",
    "MAX_STEPS_AHEAD",
    "QUANTIZATIONS",
    "VECTOR_POOLINGS",
    "CacheConfig",
    "Config",
    "DeviceConfig",
    "EngineConfig",
    "ExecutorConfig",
    "GGUFHeader",
    "GGUFTensor",
    "LoRAConfig",
    "ModelConfig",
    "ParallelConfig",
    "Positive",
    "SchedulerConfig",
    "SimulatedDevice",
    "SpeculativeConfig",
    "StepSize",
    "VisionFile",
    "projector_type",
]


STAGE_STEP_TOKENS = DEFAULT_STEP_TOKENS // 2
"""Default of ``--max-num-batched-tokens`` with pipeline stages: they have nothing to do before the first part of a
prompt comes, nor after the last one."""


MAX_NUM_STEPS = 16
"""Most steps of a plan."""


class SchedulerConfig(Config, frozen=True):
    """Limits and policy of a step."""

    group: ClassVar[str] = "Scheduler"

    max_num_seqs: Annotated[Positive, Meta(description="Maximum number of requests running at the same time.")] = 256
    max_num_batched_tokens: Annotated[
        Positive | None,
        Meta(
            description="Maximum number of tokens computed per step, across all requests. Larger values make running "
            "requests wait longer for prompts; a CPU gains nothing from them. Default: 512 on a CPU, 256 with "
            "pipeline stages, 8192 on a GPU.",
            extra={"parse": "tokens"},
        ),
    ] = None
    max_in_flight_steps: Annotated[
        int,
        Meta(
            ge=1,
            le=8,
            description="Steps in flight at a time, at least one more than pipeline stages, if there are several. 1: "
            "planning does not overlap with compute.",
        ),
    ] = 2
    num_scheduler_steps: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_NUM_STEPS)] | None,
        Meta(
            description="Most decode steps in a row between two messages to the workers. Their tokens reach clients "
            "together. Default: on a CPU as many as fit into 33 ms, else 1."
        ),
    ] = None
    scheduling_policy: Annotated[
        Literal["fcfs", "priority"],
        Meta(
            description="Order of waiting requests: first come, first served, or by priority (lowest first). Either "
            "way, API keys take turns, and so do the users of a key."
        ),
    ] = "fcfs"
    enable_chunked_prefill: Annotated[
        bool, Meta(description="Compute long prompts over several steps, alongside running requests.")
    ] = True
    long_prefill_token_threshold: Annotated[
        int,
        Meta(
            ge=0,
            description="Maximum prompt tokens of one request per step; 0: no limit.",
            extra={"parse": "tokens"},
        ),
    ] = 0
    max_num_queued_reqs: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="Maximum number of waiting requests; beyond it, requests are rejected with status 429, unless "
            "the client has less than its share waiting. Default: as many as are served in half a minute at the "
            "measured rate, but at least --max-num-seqs. Does not apply to run-batch."
        ),
    ] = None
    max_num_queued_tokens: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="Maximum number of waiting prompt tokens, in the same way. Default: as for requests, but at "
            "least what the KV cache holds; no limit if --max-num-queued-reqs is given."
        ),
    ] = None

    @property
    def step_tokens(self) -> int:
        """``max_num_batched_tokens``, or a CPU's default while the device is not known."""
        return self.max_num_batched_tokens or DEFAULT_STEP_TOKENS


class CacheConfig(Config, frozen=True):
    """The paged KV cache."""

    group: ClassVar[str] = "Cache"

    enable_prefix_caching: Annotated[bool, Meta(description="Reuse the KV blocks of shared prompt prefixes.")] = True
    gpu_memory_utilization: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(
            description="Fraction of the device's memory for weights, KV cache and activations together. Default: "
            "0.92 on a GPU. On a CPU the KV cache takes min(4 GiB, a quarter of the memory available)."
        ),
    ] = None
    kv_cache_memory: Annotated[
        Positive | None,
        Meta(
            description="Size of the KV cache, such as 4GiB; overrides --gpu-memory-utilization.",
            extra={"parse": "bytes", "flags": ["--kv-cache-memory-bytes"]},
        ),
    ] = None
    kv_cache_dir: Annotated[
        str,
        Meta(
            description="Folder that keeps the KV blocks of prompts and answers over restarts of the server. It must "
            "belong to the server's user, and nobody else may write it. Default: none.",
        ),
    ] = ""
    kv_cache_disk: Annotated[
        Positive,
        Meta(
            description="Size of --kv-cache-dir, such as 20GiB; what was used least recently is removed.",
            extra={"parse": "bytes"},
        ),
    ] = 20 << 30
    num_gpu_blocks_override: Annotated[
        Positive | None,
        Meta(description="Number of KV blocks, regardless of the available memory.", extra={"group": "Testing"}),
    ] = None


class EngineConfig(Config, frozen=True):
    """The configuration of the engine core."""

    scheduler: SchedulerConfig = SchedulerConfig()
    cache: CacheConfig = CacheConfig()
    executor: ExecutorConfig = ExecutorConfig()
    max_worker_restarts: Annotated[
        int,
        Meta(ge=0, description="Worker restarts without progress in between after which the server gives up."),
    ] = 5
    num_replicas: Annotated[Positive, Meta(extra={"internal": True})] = 1
    """Engines on this machine, which share its cores and memory."""

    def settled(self) -> EngineConfig:
        """The configuration with what follows from the number of pipeline stages: at least one more step in flight."""
        num_stages, scheduler = self.executor.parallel.pipeline_parallel_size, self.scheduler
        if num_stages == 1:
            return self
        if scheduler.enable_chunked_prefill and scheduler.max_num_batched_tokens is None:
            scheduler = replace(scheduler, max_num_batched_tokens=STAGE_STEP_TOKENS)
        depth = max(scheduler.max_in_flight_steps, num_stages + 1)
        return replace(self, scheduler=replace(scheduler, max_in_flight_steps=depth))
