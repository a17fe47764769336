"""What the engine core gets to know of a model that is loaded, or that ``octavo plan`` stands in for."""

from __future__ import annotations

from executor.attention.base import cached_specs
from executor.device.base import Device, Memory
from executor.loader import LoadedModel
from executor.messages import WorkerReady
from executor.model_runner import ModelRunner


def worker_ready(
    runner: ModelRunner,
    loaded: LoadedModel,
    device: Device,
    memory: Memory,
    step_memory: tuple[int, int],
    default_kv_bytes: int,
    *,
    shares_memory: bool,
) -> WorkerReady:
    """The message of a worker that can allocate its KV cache, but for its fingerprint.

    Args:
        runner: Its runner.
        loaded: Its model.
        device: The device.
        memory: The device's memory with the weights, but without steps.
        step_memory: Bytes of the largest step, and bytes per token of the longest sequence.
        default_kv_bytes: Size of the KV cache unless flags say one.
        shares_memory: Whether other ranks use the same memory.
    """
    draft = runner.draft
    return WorkerReady(
        rank=runner.rank,
        free_bytes=memory.free_bytes,
        total_bytes=memory.total_bytes,
        weight_bytes=loaded.weight_bytes + (0 if draft is None else draft.loaded.weight_bytes),
        default_kv_bytes=default_kv_bytes,
        kv_cache_groups=(*cached_specs(runner.groups), *(() if draft is None else draft.specs)),
        max_model_len=loaded.max_model_len,
        vocab_size=loaded.hf_config.vocab_size,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=device.name,
        architecture=loaded.hf_config.architecture,
        hidden_size=loaded.vector_size,
        step_bytes=step_memory[0],
        position_bytes=step_memory[1],
        memory_utilization=device.memory_utilization or 0.0,
        shares_memory=shares_memory,
        has_late_results=runner.channel.fileno() is not None,
        max_num_batched_tokens=runner.max_tokens,
        pooling=loaded.pooling,
        verifies_drafts=runner.speculative is not None,
        multimodal=None if runner.images is None else runner.images.support,
    )
