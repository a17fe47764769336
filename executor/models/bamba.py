"""Bamba (IBM, Princeton, CMU and UIUC, 2024): Mamba-2 layers, and a few of attention with half of each head rotated."""

from __future__ import annotations

from torch import nn

from executor.layers.context import ModelContext
from executor.layers.mamba import HYBRID_DEFAULTS, Mamba2, hybrid_sizes
from executor.layers.mlp import GatedMLP
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderParts, Norms
from executor.models.lfm2 import transpose_conv

HYBRID_MAPPER = WeightsMapper(
    renames=[
        (r"^model\.final_layernorm\.", "model.norm."),
        (r"\.feed_forward\.", ".mlp."),
        (r"\.(\d+)\.mamba\.", r".\1.self_attn."),
    ],
    ignored=[ROTARY_BUFFERS],
    transforms={r"\.conv1d\.weight$": transpose_conv},
)
HYBRID_NORMS = Norms(before_attention="input_layernorm", before_mlp="pre_ff_layernorm")


class BambaForCausalLM(CausalDecoder):
    mapper = HYBRID_MAPPER
    config_defaults = {
        **HYBRID_DEFAULTS,
        "attention_bias": False,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 262144,
        "mlp_bias": False,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary, sizes = RotaryEmbedding(context), hybrid_sizes(config)
        attends = set(config.numbers("attn_layer_indices")) if config.has("attn_layer_indices") else set()
        bias, mlp_bias = config.boolean("attention_bias"), config.boolean("mlp_bias")
        conv_bias, proj_bias = config.boolean("mamba_conv_bias"), config.boolean("mamba_proj_bias")

        def attention(index: int, prefix: str) -> nn.Module:
            if index in attends:
                return SelfAttention(context, rotary, qkv_bias=bias, out_bias=bias, prefix=prefix)
            return Mamba2(context, sizes, conv_bias=conv_bias, in_bias=proj_bias, out_bias=proj_bias, prefix=prefix)

        def mlp(index: int, prefix: str) -> GatedMLP:
            return GatedMLP(context, bias=mlp_bias, prefix=prefix)

        super().__init__(context, DecoderParts(attention, mlp, norms=HYBRID_NORMS))
