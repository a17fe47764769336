"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

The heads' keys and values are products of a latent, which alone is cached. Always in the absorbed form, whatever the
number of tokens: the matrices between latents and heads multiply the queries and the results, not the cached rows.
Expanding keys and values would suit prompts better, but its sums have other bits. The next turn of a chat takes what a
turn has generated from the cache, or computes it again as part of its prompt: both must give the same latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ops
from executor.attention.base import LATENT
from executor.hf_config import HFConfig
from executor.input_batch import InputBatch
from executor.layers.attention import Attention
from executor.layers.context import ModelContext
from executor.layers.linear import ColumnParallelLinear, LinearLayer, RowParallelLinear, head_columns, merged_parts
from executor.layers.norm import RMSNorm
from executor.layers.parameter import Part, Weights
from executor.layers.rotary import RotaryEmbedding
from executor.parallel import split_heads
from executor.quantization.base import LinearShape
from ops import AttentionShape

NORM_EPS = 1e-6
"""Of the norms of latents, whatever ``rms_norm_eps`` is."""


def latent_scale(config: HFConfig, head_dim: int) -> float:
    """Factor of the scores: YaRN's, with ``mscale_all_dim``, is part of it, since only some columns are rotated."""
    rope = config.rope
    scale: float = head_dim**-0.5
    weight = 0.0 if rope.string("rope_type") == "default" else rope.number("mscale_all_dim", 0.0)
    factor = rope.number("factor", 1.0)
    if weight and factor > 1:
        scale *= (0.1 * weight * math.log(factor) + 1.0) ** 2
    return scale


class UpWeights(Weights):
    """The matrices between the latents and the heads, each head's on its own once they are packed.

    Before, they are those of the checkpoint, quantised or not: products with them are exact enough only as numbers.
    """

    keys: tuple[ops.Weight, ...]
    """[rank, key columns] of each head: turn its query into one of the latents."""
    values: tuple[ops.Weight, ...]
    """[value columns, rank] of each head."""

    def __init__(self, parts: Sequence[Weights], rank: int, head_sizes: tuple[int, int]) -> None:
        """Takes the checkpoint's weights.

        Args:
            parts: One with the rows of each head's key and then value, columns: latent. Or two, of all keys, transposed
                head by head (rows: heads, latent), and of all values, as GGUF files have them.
            rank: Size of a latent.
            head_sizes: Columns of a head's key, without those that are rotated, and of its value.
        """
        super().__init__()
        for index, part in enumerate(parts):
            self.add_module(str(index), part)
        self.rank, self.head_sizes = rank, head_sizes

    def pack(self) -> None:
        parts: list[Any] = list(self.children())
        for index, part in enumerate(parts):
            part.pack()
            delattr(self, str(index))  # so it is not packed again
        key, value = self.head_sizes
        numbers = [numbers_of(part.packed) for part in parts]
        if len(numbers) == 1:
            heads = numbers[0].unflatten(0, (-1, key + value))
            keys, values = heads[:, :key].transpose(1, 2), heads[:, key:]
        else:
            keys, values = (
                each.unflatten(0, (-1, size)) for each, size in zip(numbers, (self.rank, value), strict=True)
            )
        self.keys = tuple(ops.pack_linear(head.contiguous()) for head in keys)
        self.values = tuple(ops.pack_linear(head.contiguous()) for head in values)
        for name, weights in (("keys", self.keys), ("values", self.values)):
            for index, weight in enumerate(weights):
                assert not isinstance(weight, ops.QuantizedWeight)
                self.register_parameter(f"{name}_{index}", nn.Parameter(weight.data, requires_grad=False))


def numbers_of(weight: ops.Weight) -> Tensor:
    """A packed weight as numbers [out_features, in_features]."""
    identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return ops.linear(identity, weight).T


class UpProjection(nn.Module):
    """``kv_b_proj``: from latents to the keys and values of this rank's heads."""

    def __init__(
        self, context: ModelContext, rank: int, num_heads: int, key: int, value: int, *, is_split: bool, prefix: str
    ) -> None:
        """Creates the layer.

        Args:
            context: The model's construction context.
            rank: Size of a latent.
            num_heads: Heads over all ranks.
            key: Columns of a head's key, without those that are rotated.
            value: Columns of a head's value.
            is_split: Whether the checkpoint has matrices of their own for keys and values; see ``UpWeights``.
            prefix: The layer's name in the model.
        """
        super().__init__()
        own = split_heads(num_heads, num_heads, context.parallel.tp_size)[context.parallel.tp_rank].q
        heads = Part.share(num_heads, own)
        method = context.quantization.plain_linear_method([prefix])

        def create(columns: int, rows_of_head: int, name: str | None) -> Weights:
            rows = {name: heads.times(rows_of_head)}
            weights: Weights = method.create(
                LinearShape(Part.whole(columns), rows, False, False, context.dtype, context.device)
            )
            return weights

        if is_split:
            parts = [create(key, rank, "k_b_proj"), create(rank, value, "v_b_proj")]
        else:
            parts = [create(rank, key + value, None)]
        self.weights = UpWeights(parts, rank, (key, value))


class LatentAttention(nn.Module):
    """Latent attention, from its projections to its output."""

    def __init__(
        self, context: ModelContext, rotary: RotaryEmbedding, *, has_split_up: bool = False, prefix: str
    ) -> None:
        """Creates the layer with the sizes given by the configuration.

        Args:
            context: The model's construction context.
            rotary: Of the rotated columns alone.
            has_split_up: See ``UpProjection``.
            prefix: The layer's name in the model.
        """
        super().__init__()
        config = context.config
        hidden, heads = config.hidden_size, config.num_heads
        self.rank, self.rotary = config.size("kv_lora_rank"), rotary
        nope, rope, value = (config.size(f"{name}_head_dim") for name in ("qk_nope", "qk_rope", "v"))
        bias = config.boolean("attention_bias")
        down = self.rank + rope
        q_rank = config.size("q_lora_rank") if config.has("q_lora_rank") else None
        if q_rank is None and bias:
            config.bad("attention_bias", "false in a model without q_lora_rank")
        ranks = context.parallel.tp_size
        shares = head_columns(heads, heads, nope + rope, ranks)
        q_rows = Part.share(heads * (nope + rope), shares[context.parallel.tp_rank])
        if q_rank is not None:
            q_rows = Part.whole(q_rank)
        names = ["q_proj" if q_rank is None else "q_a_proj", "kv_a_proj_with_mqa"]
        rows = merged_parts(names, [q_rows, Part.whole(down, q_rows.size)])
        self.down_proj = LinearLayer(context, Part.whole(hidden), rows, bias=bias, prefix=f"{prefix}.down_proj")
        self.down_sizes = [q_rows.size, self.rank, rope]
        self.q_a_layernorm = self.q_b_proj = None
        if q_rank is not None:
            self.q_a_layernorm = RMSNorm(context, q_rank, NORM_EPS)
            self.q_b_proj = ColumnParallelLinear(
                context, q_rank, heads * (nope + rope), shares=shares, prefix=f"{prefix}.q_b_proj"
            )
        self.kv_a_layernorm = RMSNorm(context, self.rank, NORM_EPS)
        self.kv_b_proj = UpProjection(
            context, self.rank, heads, nope, value, is_split=has_split_up, prefix=f"{prefix}.kv_b_proj"
        )
        self.q_size = nope + rope
        shape = AttentionShape(
            heads,
            1,
            self.rank + rope,
            latent_scale(config, nope + rope),
            v_head_dim=self.rank,
            kind=LATENT,
            rotates_pairs=rotary.is_interleaved,
        )
        self.attn = Attention(context, shape)
        columns = head_columns(heads, heads, value, ranks)
        self.o_proj = RowParallelLinear(
            context, heads * value, hidden, bias=bias, input_shares=columns, prefix=f"{prefix}.o_proj"
        )

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        """``hidden`` [num_tokens, hidden_size] -> the same."""
        q, latents, k_rope = self.down_proj(hidden, batch).split(self.down_sizes, dim=-1)
        if self.q_a_layernorm is not None and self.q_b_proj is not None:
            q = self.q_b_proj(self.q_a_layernorm(q), batch)
        up = self.kv_b_proj.weights
        absorbed = ops.heads_linear(q, up.keys, self.q_size)
        latents = self.kv_a_layernorm(latents)
        out = self.attn(absorbed, q, latents, k_rope, batch.positions, self.rotary.cos_sin, batch=batch)
        heads = ops.heads_linear(out, up.values, self.rank)
        result: Tensor = self.o_proj(heads, batch)
        return result
