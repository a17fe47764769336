"""Qwen3 (arXiv:2505.09388): the heads of q and k are normalised before they turn."""

from __future__ import annotations

from torch import Tensor

from executor.input_batch import InputBatch
from executor.layers.attention import Attention
from executor.layers.context import ModelContext
from executor.layers.linear import QKVParallelLinear, RowParallelLinear
from executor.layers.norm import RMSNorm
from executor.layers.rotary import RotaryEmbedding
from executor.models.decoder import CausalDecoder, SelfAttention
from executor.models.qwen2 import QWEN_DEFAULTS, sliding_windows


class Qwen3Attention(SelfAttention):
    def __init__(
        self, context: ModelContext, rotary: RotaryEmbedding, *, sliding_window: int | None, prefix: str
    ) -> None:
        super().__init__()
        config = context.config
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        bias = config.boolean("attention_bias")
        self.qkv_proj = QKVParallelLinear(
            context, config.hidden_size, head_dim, heads, kv_heads, bias=bias, prefix=f"{prefix}.qkv_proj"
        )
        self.q_norm = RMSNorm(context, head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(context, head_dim, config.rms_norm_eps)
        self.rotary = rotary
        self.attn = Attention(context, heads, kv_heads, head_dim, sliding_window=sliding_window)
        self.o_proj = RowParallelLinear(
            context, heads * head_dim, config.hidden_size, bias=bias, prefix=f"{prefix}.o_proj"
        )

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        q, k, v = self.qkv_proj(hidden).split(self.qkv_proj.output_sizes, dim=-1)
        q, k = self.rotary(batch.positions, self.q_norm(q), self.k_norm(k))
        out: Tensor = self.o_proj(self.attn(q, k, v, batch))
        return out


class Qwen3ForCausalLM(CausalDecoder):
    config_defaults = {**QWEN_DEFAULTS, "attention_bias": False, "head_dim": 128}

    def __init__(self, context: ModelContext) -> None:
        windows = sliding_windows(context.config)

        def attention(rotary: RotaryEmbedding, index: int, prefix: str) -> Qwen3Attention:
            return Qwen3Attention(context, rotary, sliding_window=windows[index], prefix=prefix)

        super().__init__(context, attention)
