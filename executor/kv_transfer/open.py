"""Connects a worker to a store."""

from __future__ import annotations

import torch

from executor.base import ModelError
from executor.kv_transfer.base import REGISTRY, Blocks, ConnectorFactory, KVConnector
from executor.model_runner import ModelRunner
from executor.registry import resolve


def open_connector(store: str, rank: int, runner: ModelRunner) -> KVConnector:
    """Opens a store for the KV cache of a worker.

    Raises:
        ModelError: The device's memory cannot be read and written by the host.
    """
    if not runner.device.maps_kv:
        raise ModelError(f"--kv-cache-dir: device {runner.device.name} has no such store yet; omit it")
    factory: ConnectorFactory = resolve(REGISTRY, "disk", "KV connector")
    return factory(store, rank, [_blocks(caches) for caches in runner.cached_tensors()])


def _blocks(caches: list[torch.Tensor]) -> Blocks:
    return [cache.view(cache.shape[0], -1).view(torch.uint8).numpy() for cache in caches]
