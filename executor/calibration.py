"""Measures on a short text how large the inputs of a model's layers are, before their weights are quantised.

The model runs once in the dtype of its activations, while its weights are still in the checkpoint: each layer reads
its own for the product, and drops them. So the only weights in memory are those of one layer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from executor.checkpoint import StoredTensor
from executor.input_batch import InputBatch
from executor.layers.attention import form_groups
from executor.layers.parameter import ShardId, WeightParameter
from executor.models.base import Model
from executor.quantization.at_load import QuantizingWeights
from executor.quantization.probe import Probe
from ops import AttentionMetadata
from ops.cpu.memory import map_zeros

logger = logging.getLogger(__name__)

Sources = Mapping[WeightParameter, Sequence[tuple[StoredTensor, ShardId]]]
"""The tensors that fill each parameter."""


def calibrate(model: Model, sources: Sources, token_ids: Sequence[int]) -> None:
    """Tells the model's weights how important their columns are, as a text shows.

    Args:
        model: All of its parameters are loaded but those that are quantised meanwhile.
        sources: In the order of the files.
        token_ids: The text.
    """
    begin = time.perf_counter()
    probed = [module for module in model.modules() if isinstance(module, QuantizingWeights)]
    ours = {weights.weight for weights in probed}
    stored = [tensor for weight, tensors in sources.items() if weight in ours for tensor, _ in tensors]
    room = map_zeros(2 * max((tensor.num_bytes for tensor in stored), default=0))  # committed where it is written
    for weights in probed:
        tensors = [(tensor.read, shard_id) for tensor, shard_id in sources[weights.weight]]
        weights.probe = Probe(weights.weight, weights.dtype, room, tensors)
    _run(model, stored, token_ids)
    for weights in probed:
        weights.calibrated()
    logger.info("calibrated on %d tokens in %.1f s", len(token_ids), time.perf_counter() - begin)


def _run(model: Model, stored: Iterable[StoredTensor], token_ids: Sequence[int]) -> None:
    layers = model.attention_layers()
    groups = form_groups(layers, None)
    count = len(token_ids)
    ids, positions = torch.tensor(token_ids, dtype=torch.int32), torch.arange(count, dtype=torch.int32)
    starts, lengths = torch.tensor([0, count], dtype=torch.int32), torch.tensor([count], dtype=torch.int32)
    attention = []
    for group in groups:
        num_blocks = -(-count // group.block_size)
        for index in group.layers:
            shapes = group.backend.kv_shape(num_blocks, group.block_size, group.shape, group.kv_dtype)
            layers[index].kv_cache = tuple(torch.zeros(shape, dtype=group.kv_dtype) for shape in shapes)
        table = torch.arange(num_blocks, dtype=torch.int32)[None]
        attention.append(group.plan(AttentionMetadata(starts, lengths, table, positions.long(), group.block_size)))
    model.reserve_positions(count)
    with ThreadPoolExecutor(1, "prefetch") as reader:
        reading = reader.submit(_prefetch, stored)
        batch = InputBatch(ids, positions, attention, torch.empty(0, dtype=torch.int64))
        model.forward(replace(batch, token_types=torch.zeros_like(ids)))
        reading.result()
    for layer in layers:
        layer.kv_cache = ()


def _prefetch(tensors: Iterable[StoredTensor]) -> None:
    """Reads tensors from the disk, ahead of the layers that need them."""
    for tensor in tensors:
        tensor.prefetch()
