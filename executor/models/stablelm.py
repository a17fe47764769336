"""StableLM 2 (Bellagente et al., arXiv:2402.17834): layer norm, a quarter of each head is rotated. StableLM 2 12B has
attention and MLP side by side, and a norm for each head of q and of k."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.norm import HeadsLayerNorm, LayerNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import (
    ROTARY_BUFFERS,
    CausalDecoder,
    DecoderLayer,
    DecoderParts,
    Norms,
    ParallelDecoderLayer,
)


class StableLmForCausalLM(CausalDecoder):
    config_defaults = {
        "eos_token_id": 0,
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.25,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "use_qkv_bias": False,
    }
    mapper = WeightsMapper(
        renames=[(r"\.([qk])_layernorm\.norms\.", r".\1_norm.")],
        ignored=[ROTARY_BUFFERS],
    )

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        bias, eps = config.boolean("use_qkv_bias"), config.epsilon("layer_norm_eps")

        def norms_of_heads(num_heads: int) -> HeadsLayerNorm:
            return HeadsLayerNorm(context, num_heads, eps, is_stacked=False)

        heads_norm = norms_of_heads if config.boolean("qk_layernorm") else None

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, qkv_bias=bias, heads_norm=heads_norm, prefix=prefix)

        is_parallel = config.boolean("use_parallel_residual")
        parts = DecoderParts(
            attention,
            norm=lambda size: LayerNorm(context, size, eps),
            layer=ParallelDecoderLayer if is_parallel else DecoderLayer,
            norms=Norms(
                before_attention="input_layernorm", before_mlp=None if is_parallel else "post_attention_layernorm"
            ),
        )
        super().__init__(context, parts)
