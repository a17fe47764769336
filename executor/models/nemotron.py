"""Nemotron-4 (Parmar et al., arXiv:2402.16819) and Minitron (Muralidharan et al., arXiv:2407.14679).

The weights of layer norms are stored minus 1; the MLP has no gate, but a squared ReLU; half of each head is rotated.
"""

from __future__ import annotations

from torch import Tensor

from executor.layers.context import ModelContext
from executor.layers.mlp import MLP
from executor.layers.norm import LayerNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderParts


def plus_one(weight: Tensor) -> Tensor:
    """``weight + 1``, rounded once: when it is stored."""
    return weight.float() + 1


class NemotronForCausalLM(CausalDecoder):
    config_defaults = {
        "attention_bias": False,
        "eos_token_id": 3,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
    }
    mapper = WeightsMapper(ignored=[ROTARY_BUFFERS], transforms={r"norm\.weight$": plus_one})

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        bias, mlp_bias = config.boolean("attention_bias"), config.boolean("mlp_bias")
        eps = config.epsilon("norm_eps")

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, qkv_bias=bias, out_bias=bias, prefix=prefix)

        parts = DecoderParts(
            attention,
            lambda index, prefix: MLP(context, bias=mlp_bias, prefix=prefix),
            lambda size: LayerNorm(context, size, eps),
        )
        super().__init__(context, parts)
