"""Gemma 3 (arXiv:2503.19786): five layers with a window and their own angles to one without, heads normalised."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.decoder import CausalDecoder
from executor.models.gemma2 import FULL, SLIDING, gemma_norm, gemma_parts


class Gemma3ForCausalLM(CausalDecoder):
    attribute_map = {"hidden_act": "hidden_activation"}
    config_defaults = {
        "attention_bias": False,
        "eos_token_id": 1,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10000.0,
        "rope_theta": 1000000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": False,
        "vocab_size": 262208,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        is_bidirectional = config.boolean("use_bidirectional_attention")
        if is_bidirectional and context.head == "lm":
            config.bad("use_bidirectional_attention", "false: an encoder (EmbeddingGemma) cannot generate text")
        pattern = config.size("sliding_window_pattern")
        types = config.layer_types(FULL, SLIDING, default=lambda index: SLIDING if (index + 1) % pattern else FULL)
        window = config.size("sliding_window") if SLIDING in types else 0
        if is_bidirectional:
            window = window // 2 + 1
        rotary = {kind: RotaryEmbedding(context, config.rope_for(kind)) for kind in set(types)}
        bias = config.boolean("attention_bias")

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(
                context,
                rotary[types[index]],
                qkv_bias=bias,
                out_bias=bias,
                head_norm=lambda size: gemma_norm(context, size),
                scale=config.positive("query_pre_attn_scalar") ** -0.5,
                sliding_window=window if types[index] == SLIDING else None,
                is_bidirectional=is_bidirectional,
                prefix=prefix,
            )

        super().__init__(context, gemma_parts(context, attention))
