"""StarCoder2 (Lozhkov et al., arXiv:2402.19173): layer norm, an MLP without a gate, biases, a window in every layer."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.mlp import MLP
from executor.layers.norm import LayerNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import CausalDecoder, DecoderParts


class Starcoder2ForCausalLM(CausalDecoder):
    config_defaults = {
        "eos_token_id": 50256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "use_bias": True,
    }
    mapper = WeightsMapper(renames=[(r"\.c_fc\.", ".up_proj."), (r"\.c_proj\.", ".down_proj.")])

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        bias, eps = config.boolean("use_bias"), config.epsilon("norm_epsilon")
        window = config.size("sliding_window") if config.has("sliding_window") else None

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, qkv_bias=bias, out_bias=bias, sliding_window=window, prefix=prefix)

        parts = DecoderParts(
            attention,
            lambda index, prefix: MLP(context, bias=bias, prefix=prefix),
            lambda size: LayerNorm(context, size, eps),
        )
        super().__init__(context, parts)
