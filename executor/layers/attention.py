"""Attention of one layer, and the grouping of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from executor.attention.base import LATENT, RECURRENT_KINDS, SHORT_CONV, AttentionBackend, AttentionGroup, KVCache
from executor.base import ModelError
from executor.input_batch import InputBatch
from executor.layers.context import ModelContext
from executor.layers.parameter import Part, ShardId, WeightParameter, Weights, single
from executor.parallel import HeadShare, split_columns, split_heads
from ops import AttentionShape


class CacheScale(WeightParameter):
    """A scale for a cache in 8-bit floats, float32 [1]: one for all heads, 1 if the checkpoint has none."""

    is_optional = True

    def load(self, tensor: Tensor, shard_id: ShardId = None) -> None:
        if tensor.numel() != 1:
            raise ValueError(
                f"has shape {list(tensor.shape)}: scales of a KV cache for each head are not supported; leave out "
                "--kv-cache-dtype fp8"
            )
        super().load(tensor.reshape(1), shard_id)
        if not 0 < float(self.data) < float("inf"):
            raise ValueError(f"is {float(self.data)}, no scale; leave out --kv-cache-dtype fp8")


class CacheScales(Weights):
    """The scales of a layer's cache."""

    k_scale: nn.Parameter
    v_scale: nn.Parameter
    k: float = 1.0
    """The scale of K, once the weights are loaded."""
    v: float = 1.0

    def __init__(self) -> None:
        super().__init__()
        for name in ("k_scale", "v_scale"):
            scale = CacheScale.empty(single(Part.whole(1)), dtype=torch.float32, device=torch.device("cpu"))
            scale.data.fill_(1)
            self.register_parameter(name, scale)

    def pack(self) -> None:
        self.k, self.v = float(self.k_scale), float(self.v_scale)
        self.register_parameter("k_scale", None)
        self.register_parameter("v_scale", None)


class Attention(nn.Module):
    """Attention over a paged KV cache, through a backend.

    The loader assigns ``backend``, ``form_groups`` assigns ``group`` and the runner assigns ``kv_cache``.
    """

    backend: AttentionBackend
    group: int
    """KV cache group: layers of the same kind, which share block tables."""
    kv_cache: KVCache
    kv_dtype: torch.dtype
    """Dtype of the cache."""
    scales: CacheScales | None
    """Of a cache in 8-bit floats, as the checkpoint has them."""

    def __init__(self, context: ModelContext, shape: AttentionShape) -> None:
        """Creates the layer.

        Args:
            context: The model's construction context.
            shape: Shape over all ranks; ``self.shape`` has this rank's share of the heads.
        """
        super().__init__()
        window = shape.sliding_window
        slopes = shape.alibi_slopes
        own = _heads(shape, context.parallel.tp_size)[context.parallel.tp_rank]
        # A window that no sequence exceeds hides nothing, and full attention shares more of its cache.
        is_unlimited = window is None or window >= context.max_model_len
        self.shape = replace(
            shape,
            num_heads=own.q.size,
            num_kv_heads=own.kv.size,
            alibi_slopes=None if slopes is None else slopes[own.q.start : own.q.end],
            sliding_window=None if is_unlimited else window,
            is_chunked=shape.is_chunked and not is_unlimited,
        )
        # Other kinds of layers cache few tokens, and their numbers enter sums unscaled.
        is_coded = shape.kind in ("kv", LATENT) and shape.is_cached
        self.kv_dtype = (context.kv_dtype if is_coded else None) or context.dtype
        if shape.kind in RECURRENT_KINDS:
            self.kv_dtype = torch.float32
        is_used = shape.kind == "kv" and self.kv_dtype == torch.float8_e4m3fn
        self.scales = CacheScales() if is_used and context.quantization.has_cache_scales else None

    def loaded(self) -> None:
        """Called once, when the weights are loaded."""
        if self.scales is not None:
            self.shape = replace(self.shape, k_scale=self.scales.k, v_scale=self.scales.v)

    def forward(self, *inputs: Tensor | None, batch: InputBatch) -> Tensor:
        """Takes the inputs of its kind of attention, usually q, k and v, with heads side by side in the columns.

        Returns:
            [num_tokens, num_heads * v_head_dim].
        """
        result = self.backend.run(inputs, self.kv_cache, self.shape, batch.attention[self.group])
        if batch.spans is None:
            return result
        (q, *_), rows, shape = inputs, batch.spans.rows, replace(self.shape, causal=False)
        assert q is not None
        meta = batch.spans.attention[self.group]
        own = self.backend.run((q[rows], None, None), self.kv_cache, shape, meta)
        return result.index_copy(0, rows, own)


def _heads(shape: AttentionShape, num_ranks: int) -> Sequence[HeadShare]:
    """The heads of each rank."""
    if shape.kind != SHORT_CONV:
        return split_heads(shape.num_heads, shape.num_kv_heads, num_ranks)
    columns = split_columns(shape.num_heads, num_ranks, "a short convolution")
    return [HeadShare(share, share) for share in columns]


class SharedAttention(nn.Module):
    """Attention to the K and V of an earlier layer, which has the same shape."""

    def __init__(self, source: Attention) -> None:
        super().__init__()
        self._source = (source,)  # not a submodule: it belongs to its layer

    def forward(self, q: Tensor, *, batch: InputBatch) -> Tensor:
        """``q`` [num_tokens, num_heads * head_dim] -> [num_tokens, num_heads * v_head_dim]."""
        (source,) = self._source
        return source.backend.run((q, None, None), source.kv_cache, source.shape, batch.attention[source.group])


def make_room_for_drafts(layers: Sequence[Attention], max_drafts: int) -> None:
    """Lets layers that keep a state keep the inputs of drafts, too; before groups are formed."""
    for layer in layers:
        if layer.shape.kind in RECURRENT_KINDS:
            layer.shape = replace(layer.shape, max_drafts=max_drafts)


def form_groups(
    layers: Sequence[Attention], block_size: int | None, of_stages: Sequence[Attention] = ()
) -> tuple[AttentionGroup, ...]:
    """Groups layers of the same kind, in order of first appearance, those with a cache first.

    Args:
        layers: All attention layers of the model, with their backends assigned.
        block_size: Tokens per block; None: each backend's preference.
        of_stages: Those of all pipeline stages, if ``layers`` are those of one. A group may then have none here.

    Raises:
        ModelError: The block size does not suit a backend.
    """
    members: dict[tuple[AttentionBackend, AttentionShape, torch.dtype], list[int]] = {}
    places = {layer: index for index, layer in enumerate(layers)}
    for layer in of_stages or layers:
        # Numbers may be computed differently: this concerns no cache.
        shape = replace(layer.shape, scale=1.0, k_scale=1.0, v_scale=1.0, alibi_slopes=None, has_biases=False)
        own = members.setdefault((layer.backend, shape, layer.kv_dtype), [])
        if layer in places:
            own.append(places[layer])
    groups = []
    ordered = sorted(members.items(), key=lambda item: not item[0][1].is_cached)
    for number, ((backend, shape, dtype), indexes) in enumerate(ordered):
        # A block of states holds one, whatever its length.
        size = (None if shape.kind in RECURRENT_KINDS else block_size) or backend.block_size
        if size % backend.block_size_multiple:
            raise ModelError(
                f"--block-size {size} is not supported by the {backend.name} attention backend; "
                f"use a multiple of {backend.block_size_multiple}"
            )
        for index in indexes:
            layers[index].group = number
        groups.append(AttentionGroup(backend, shape, dtype, size, tuple(indexes)))
    return tuple(groups)
