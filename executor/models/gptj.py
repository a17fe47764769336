"""GPT-J (Wang and Komatsuzaki, 2021): attention and MLP side by side behind one norm.

The first columns of each head are rotated, in adjacent pairs.
"""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.mlp import MLP
from executor.layers.norm import LayerNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import CausalDecoder, DecoderParts, Norms, ParallelDecoderLayer
from executor.models.gpt2 import GPT_NAMES


class GPTJForCausalLM(CausalDecoder):
    attribute_map = GPT_NAMES
    config_defaults = {
        "eos_token_id": 50256,
        "hidden_act": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 2048,
        "rotary_dim": 64,
    }
    mapper = WeightsMapper(
        renames=[
            (r"^transformer\.wte\.", "model.embed_tokens."),
            (r"^transformer\.h\.", "model.layers."),
            (r"^transformer\.ln_f\.", "model.norm."),
            (r"\.ln_1\.", ".input_layernorm."),
            (r"\.attn\.out_proj\.", ".attn.o_proj."),
            (r"\.attn\.", ".self_attn."),
            (r"\.fc_in\.", ".up_proj."),
            (r"\.fc_out\.", ".down_proj."),
        ],
        ignored=[r"\.self_attn\.(masked_)?bias$"],  # the causal mask
    )

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        eps = config.epsilon("layer_norm_epsilon")
        inner = config.size("intermediate_size", 4 * config.hidden_size)
        rotary = RotaryEmbedding(context, rotary_dim=config.size("rotary_dim"), is_interleaved=True)

        parts = DecoderParts(
            lambda index, prefix: SelfAttention(context, rotary, prefix=prefix),
            lambda index, prefix: MLP(context, inner, bias=True, prefix=prefix),
            lambda size: LayerNorm(context, size, eps),
            ParallelDecoderLayer,
            Norms(before_attention="input_layernorm"),
            logit_bias=True,
        )
        super().__init__(context, parts)
