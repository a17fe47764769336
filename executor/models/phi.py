"""Phi-1.5 and Phi-2 (Li et al., arXiv:2309.05463): attention and MLP side by side behind one norm.

There are biases everywhere, and part of each head is rotated.
"""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.mlp import MLP
from executor.layers.norm import LayerNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderParts, Norms, ParallelDecoderLayer


class PhiForCausalLM(CausalDecoder):
    config_defaults = {
        "eos_token_id": 2,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.5,
        "qk_layernorm": False,
    }
    mapper = WeightsMapper(
        renames=[
            (r"^model\.final_layernorm\.", "model.norm."),
            (r"\.self_attn\.dense\.", ".self_attn.o_proj."),
            (r"\.([qk])_layernorm\.", r".\1_norm."),
            (r"\.fc1\.", ".up_proj."),
            (r"\.fc2\.", ".down_proj."),
        ],
        ignored=[ROTARY_BUFFERS],
    )

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        eps = config.epsilon("layer_norm_eps")

        def norm(size: int) -> LayerNorm:
            return LayerNorm(context, size, eps)

        head_norm = norm if config.boolean("qk_layernorm") else None

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, qkv_bias=True, out_bias=True, head_norm=head_norm, prefix=prefix)

        parts = DecoderParts(
            attention,
            lambda index, prefix: MLP(context, bias=True, prefix=prefix),
            norm,
            ParallelDecoderLayer,
            Norms(before_attention="input_layernorm"),
            logit_bias=True,
        )
        super().__init__(context, parts)
