"""The self-attention of a decoder layer, from its projections to its output."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from executor.input_batch import InputBatch
from executor.layers.attention import Attention
from executor.layers.context import ModelContext
from executor.layers.linear import QKVParallelLinear, RowParallelLinear
from executor.layers.rotary import RotaryEmbedding
from ops import AttentionShape


class SelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al., arXiv:2305.13245)."""

    def __init__(
        self,
        context: ModelContext,
        rotary: RotaryEmbedding | None,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        head_norm: Callable[[int], nn.Module] | None = None,
        scale: float | None = None,
        sliding_window: int | None = None,
        logit_softcap: float | None = None,
        prefix: str,
    ) -> None:
        """Creates the layer with the heads given by the configuration.

        Args:
            context: The model's construction context.
            rotary: Rotates q and k by their positions; None: no rotation.
            qkv_bias: Whether the projections to q, k and v have biases.
            out_bias: Whether the output projection has one.
            head_norm: Creates the norm of the heads of q and of k, applied before rotation; takes the head size.
            scale: Factor of the scores. Default: ``head_dim ** -0.5``.
            sliding_window: A token attends to this many tokens, itself included.
            logit_softcap: Scores are soft-capped to plus and minus this.
            prefix: The layer's name in the model.
        """
        super().__init__()
        config = context.config
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv_proj = QKVParallelLinear(
            context, config.hidden_size, head_dim, heads, kv_heads, bias=qkv_bias, prefix=f"{prefix}.qkv_proj"
        )
        self.q_norm = None if head_norm is None else head_norm(head_dim)
        self.k_norm = None if head_norm is None else head_norm(head_dim)
        self.rotary = rotary
        self.attn = Attention(
            context,
            AttentionShape(
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                scale=head_dim**-0.5 if scale is None else scale,
                sliding_window=sliding_window,
                logit_softcap=logit_softcap,
            ),
        )
        self.o_proj = RowParallelLinear(
            context, heads * head_dim, config.hidden_size, bias=out_bias, prefix=f"{prefix}.o_proj"
        )

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        """``hidden`` [num_tokens, hidden_size] -> the same."""
        q, k, v = self.qkv_proj(hidden, batch).split(self.qkv_proj.output_sizes, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(batch.positions, q, k)
        out: Tensor = self.o_proj(self.attn(q, k, v, batch=batch), batch)
        return out
