"""The attention of one layer, and the groups that layers form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from executor.attention.base import AttentionBackend, AttentionGroup, KVCache
from executor.base import ModelError
from executor.input_batch import InputBatch
from executor.layers.context import ModelContext
from ops import AttentionShape


class Attention(nn.Module):
    """Attends through a backend to a paged KV cache.

    The loader assigns ``backend``, ``form_groups`` the group, the runner ``kv_cache``.
    """

    backend: AttentionBackend
    group: int
    """KV cache group: its layers are alike, and share block tables."""
    kv_cache: KVCache
    kv_dtype: torch.dtype
    """Type of what is cached."""

    def __init__(self, context: ModelContext, shape: AttentionShape) -> None:
        """Creates the layer.

        Args:
            context: What the model is built from.
            shape: Of all ranks together; ``self.shape`` is this rank's share of the heads.
        """
        super().__init__()
        window = shape.sliding_window
        tp_size = context.parallel.tp_size
        self.shape = replace(
            shape,
            num_heads=shape.num_heads // tp_size,
            num_kv_heads=max(1, shape.num_kv_heads // tp_size),
            # A window that no sequence outgrows hides nothing, and full attention shares more of its cache.
            sliding_window=None if window is not None and window >= context.max_model_len else window,
        )
        self.kv_dtype = context.dtype

    def forward(self, *inputs: Tensor, batch: InputBatch) -> Tensor:
        """Takes what its kind of attention needs, q, k and v in the usual case: heads lie side by side in the columns.

        Returns:
            [num_tokens, num_heads * v_head_dim].
        """
        return self.backend.run(inputs, self.kv_cache, self.shape, batch.attention[self.group])


def form_groups(layers: Sequence[Attention], block_size: int | None) -> tuple[AttentionGroup, ...]:
    """Puts layers that are alike into groups, in the order in which they come.

    Args:
        layers: Of the whole model; they have backends.
        block_size: Tokens of a block; None: what each backend prefers.

    Raises:
        ModelError: The block size does not suit a backend.
    """
    members: dict[tuple[AttentionBackend, AttentionShape, torch.dtype], list[int]] = {}
    for index, layer in enumerate(layers):
        members.setdefault((layer.backend, layer.shape, layer.kv_dtype), []).append(index)
    groups = []
    for number, ((backend, shape, dtype), indexes) in enumerate(members.items()):
        size = block_size or backend.block_size
        if size % backend.block_size_multiple:
            raise ModelError(
                f"--block-size {size} does not suit the {backend.name} attention backend; "
                f"use a multiple of {backend.block_size_multiple}"
            )
        for index in indexes:
            layers[index].group = number
        groups.append(AttentionGroup(backend, shape, dtype, size, tuple(indexes)))
    return tuple(groups)
