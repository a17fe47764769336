"""The self-attention of a decoder layer, from its projections to its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

import ops
from executor.input_batch import InputBatch
from executor.layers.attention import Attention
from executor.layers.context import ModelContext
from executor.layers.linear import QKVParallelLinear, RowParallelLinear, head_columns
from executor.layers.parameter import Part, WeightParameter, single
from executor.layers.positions import DistanceBiases
from executor.parallel import split_heads
from ops import AttentionShape


def sink_scores(context: ModelContext, num_kv_heads: int) -> WeightParameter:
    """This rank's sinks, uninitialised: [num_heads]."""
    heads = split_heads(context.config.num_heads, num_kv_heads, context.parallel.tp_size)
    own = Part.share(context.config.num_heads, heads[context.parallel.tp_rank].q)
    return WeightParameter.empty(single(own), dtype=context.dtype, device=context.device)


class Rotation(Protocol):
    """Rotates q and k by their tokens' positions, as ``RotaryEmbedding`` does."""

    def __call__(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]: ...


class SelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al., arXiv:2305.13245), with the heads given by the configuration.

    Args:
        context: The model's construction context.
        rotary: Rotates q and k by their positions; None: no rotation.
        qkv_bias: Whether the projections to q, k and v have biases.
        out_bias: Whether the output projection has one.
        input_size: Columns of the input. Default: ``config.hidden_size``.
        num_kv_heads: Heads of k and of v. Default: ``config.num_kv_heads``.
        is_fused: The checkpoint holds q, k and v, concatenated, as one tensor ``qkv_proj``.
        is_grouped: It holds them as one tensor by KV head (see ``QKVParallelLinear``).
        clip: q, k and v are limited to plus and minus this; after the norms of q and k if ``clips_normed`` (OLMoE).
        clips_normed: See ``clip``.
        head_norm: Creates the norm of each head of q and of k, applied before rotation; takes the head size.
        heads_norm: Creates a norm over all heads of q, and one of k, instead; takes the number of heads.
        scale: Factor of the scores. Default: ``head_dim ** -0.5``.
        sliding_window: A token attends to this many tokens, itself included, and as many after it if
            ``is_bidirectional``.
        logit_softcap: Scores are soft-capped to plus and minus this.
        alibi_slopes: See ``AttentionShape``.
        has_sinks: Likewise.
        is_bidirectional: Tokens attend to those after them, too. There is no cache. Likewise if config.json has
            ``"is_causal": false``, as embedders made of decoders do (GTE-Qwen2).
        biases: Added to the scores.
        prefix: The layer's name in the model.
    """

    def __init__(
        self,
        context: ModelContext,
        rotary: Rotation | None,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        input_size: int | None = None,
        num_kv_heads: int | None = None,
        is_fused: bool = False,
        is_grouped: bool = False,
        clip: float | None = None,
        clips_normed: bool = False,
        head_norm: Callable[[int], nn.Module] | None = None,
        heads_norm: Callable[[int], nn.Module] | None = None,
        scale: float | None = None,
        sliding_window: int | None = None,
        logit_softcap: float | None = None,
        alibi_slopes: tuple[float, ...] | None = None,
        has_sinks: bool = False,
        is_bidirectional: bool = False,
        biases: DistanceBiases | None = None,
        prefix: str,
    ) -> None:
        super().__init__()
        config = context.config
        is_bidirectional = is_bidirectional or not config.boolean("is_causal", True)
        heads, kv_heads, head_dim = config.num_heads, num_kv_heads or config.num_kv_heads, config.head_dim
        sizes, out_name = (input_size or config.hidden_size, head_dim, heads, kv_heads), f"{prefix}.o_proj"
        names = None if is_fused or is_grouped else ("q_proj", "k_proj", "v_proj")
        self.qkv_proj = QKVParallelLinear(
            context, *sizes, bias=qkv_bias, names=names, is_grouped=is_grouped, prefix=f"{prefix}.qkv_proj"
        )
        self.q_norm = self.k_norm = None
        norm, of_q, of_k = (head_norm, head_dim, head_dim) if head_norm else (heads_norm, heads, kv_heads)
        if norm is not None:
            self.q_norm, self.k_norm = norm(of_q), norm(of_k)
        self.rotary, self.clip, self.clips_normed = rotary, clip, clips_normed
        shape = AttentionShape(
            heads,
            kv_heads,
            head_dim,
            head_dim**-0.5 if scale is None else scale,
            sliding_window=sliding_window,
            causal=not is_bidirectional,
            is_cached=not is_bidirectional,
            logit_softcap=logit_softcap,
            alibi_slopes=alibi_slopes,
            has_sinks=has_sinks,
            has_biases=biases is not None,
        )
        self._biases = (biases,)  # not a submodule: layers share it
        self.attn = Attention(context, shape)
        self.sinks = sink_scores(context, kv_heads) if has_sinks else None
        columns = head_columns(heads, kv_heads, head_dim, context.parallel.tp_size)
        self.o_proj = RowParallelLinear(
            context, heads * head_dim, config.hidden_size, bias=out_bias, input_shares=columns, prefix=out_name
        )

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        """``hidden`` [num_tokens, input_size] -> [num_tokens, hidden_size]."""
        qkv = self.qkv_proj(hidden, batch)
        if self.clip is not None and not self.clips_normed:
            qkv = ops.clip(qkv, self.clip)
        q, k, v = qkv.split(self.qkv_proj.output_sizes, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None and self.clips_normed:
            q, k, v = (ops.clip(each, self.clip) for each in (q, k, v))
        if self.rotary is not None:
            q, k = self.rotary(batch.positions, q, k)
        (biases,) = self._biases
        more = () if self.sinks is None else (self.sinks.data,)
        more = more if biases is None else (*more, biases.table())
        out: Tensor = self.o_proj(self.attn(q, k, v, *more, batch=batch), batch)
        return out
