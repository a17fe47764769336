"""LFM2 (Liquid AI, arXiv:2511.23404): most layers have a gated short convolution in the place of attention."""

from __future__ import annotations

from torch import Tensor, nn

from executor.hf_config import HFConfig
from executor.layers.context import ModelContext
from executor.layers.mlp import GatedMLP
from executor.layers.norm import RMSNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.layers.short_conv import ShortConv
from executor.models.base import WeightsMapper
from executor.models.decoder import CausalDecoder, DecoderParts, Norms


def intermediate_size(config: HFConfig) -> int:
    """The MLP's inner size: two thirds of the configured one, as a gate adds half, rounded up."""
    size = config.intermediate_size
    if not config.boolean("block_auto_adjust_ff_dim"):
        return size
    multiple = config.size("block_multiple_of")
    size = int(config.number("block_ffn_dim_multiplier") * int(2 * size / 3))
    return -(-size // multiple) * multiple


def transpose_conv(weight: Tensor) -> Tensor:
    """[width, 1, length] -> [length, width]."""
    return weight.squeeze(1).T


class Lfm2ForCausalLM(CausalDecoder):
    attribute_map = {
        "intermediate_size": "block_ff_dim",
        "rms_norm_eps": "norm_eps",
        "tie_word_embeddings": "tie_embedding",
    }
    config_defaults = {
        "block_auto_adjust_ff_dim": True,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256,
        "conv_L_cache": 3,
        "conv_bias": False,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    }
    mapper = WeightsMapper(
        renames=[
            (r"^model\.embedding_norm\.", "model.norm."),
            (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
            (r"\.([qk])_layernorm\.", r".\1_norm."),
            (r"\.(\d+)\.conv\.", r".\1.self_attn."),
            (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
            (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
            (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
        ],
        transforms={r"\.conv\.weight$": transpose_conv},
    )

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        bias, length = config.boolean("conv_bias"), config.size("conv_L_cache")
        attends = config.numbers("full_attn_idxs") if config.has("full_attn_idxs") else range(config.num_layers)
        types = config.layer_types(
            "full_attention", "conv", default=lambda index: "full_attention" if index in attends else "conv"
        )
        inner = intermediate_size(config)

        def head_norm(size: int) -> RMSNorm:
            return RMSNorm(context, size, config.rms_norm_eps)

        def attention(index: int, prefix: str) -> nn.Module:
            if types[index] == "conv":
                return ShortConv(context, length, bias=bias, prefix=prefix)
            return SelfAttention(context, rotary, head_norm=head_norm, prefix=prefix)

        def mlp(index: int, prefix: str) -> GatedMLP:
            return GatedMLP(context, inner, prefix=prefix)

        norms = Norms(before_attention="operator_norm", before_mlp="ffn_norm")
        super().__init__(context, DecoderParts(attention, mlp, norms=norms))
