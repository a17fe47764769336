"""Llama (Touvron et al., arXiv:2302.13971) and Mistral (Jiang et al., arXiv:2310.06825)."""

from __future__ import annotations

from torch import Tensor

from executor.input_batch import InputBatch
from executor.layers.attention import Attention
from executor.layers.context import ModelContext
from executor.layers.linear import QKVParallelLinear, RowParallelLinear
from executor.layers.rotary import RotaryEmbedding
from executor.models.decoder import CausalDecoder, SelfAttention


class LlamaAttention(SelfAttention):
    """Grouped-query attention with rotary positions."""

    def __init__(
        self,
        context: ModelContext,
        rotary: RotaryEmbedding,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        sliding_window: int | None = None,
        prefix: str,
    ) -> None:
        super().__init__()
        config = context.config
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv_proj = QKVParallelLinear(
            context, config.hidden_size, head_dim, heads, kv_heads, bias=qkv_bias, prefix=f"{prefix}.qkv_proj"
        )
        self.rotary = rotary
        self.attn = Attention(context, heads, kv_heads, head_dim, sliding_window=sliding_window)
        self.o_proj = RowParallelLinear(
            context, heads * head_dim, config.hidden_size, bias=out_bias, prefix=f"{prefix}.o_proj"
        )

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        q, k, v = self.qkv_proj(hidden).split(self.qkv_proj.output_sizes, dim=-1)
        q, k = self.rotary(batch.positions, q, k)
        out: Tensor = self.o_proj(self.attn(q, k, v, batch))
        return out


class LlamaForCausalLM(CausalDecoder):
    config_defaults = {
        "attention_bias": False,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "rms_norm_eps": 1e-6,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        bias = config.boolean("attention_bias")

        def attention(rotary: RotaryEmbedding, index: int, prefix: str) -> LlamaAttention:
            return LlamaAttention(context, rotary, qkv_bias=bias, out_bias=bias, prefix=prefix)

        super().__init__(context, attention, mlp_bias=config.boolean("mlp_bias"))


class MistralForCausalLM(CausalDecoder):
    """Llama with a sliding window in every layer."""

    config_defaults = {
        "eos_token_id": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        window = config.size("sliding_window") if config.has("sliding_window") else None

        def attention(rotary: RotaryEmbedding, index: int, prefix: str) -> LlamaAttention:
            return LlamaAttention(context, rotary, sliding_window=window, prefix=prefix)

        super().__init__(context, attention)
