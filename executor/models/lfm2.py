"""LFM2 (Liquid AI, arXiv:2511.23404): most layers have a gated short convolution in the place of attention."""

from __future__ import annotations

from torch import Tensor, nn

from executor.hf_config import HFConfig
from executor.layers.context import ModelContext
from executor.layers.mlp import GatedMLP
from executor.layers.moe import MoE
from executor.layers.norm import RMSNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.layers.short_conv import ShortConv
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderParts, MakeBlock, Norms
from executor.models.mixtral import MIXTRAL_NAMES
from executor.weights_mapper import STACKS
from ops import Routing


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


LFM2_NAMES = [
    (r"^model\.embedding_norm\.", "model.norm."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    (r"\.([qk])_layernorm\.", r".\1_norm."),
    (r"\.(\d+)\.conv\.", r".\1.self_attn."),
]


def lfm2_parts(context: ModelContext, mlp: MakeBlock) -> DecoderParts:
    """What models with and without experts share."""
    config = context.config
    rotary = RotaryEmbedding(context)
    bias, length = config.boolean("conv_bias"), config.size("conv_L_cache")
    attends = config.numbers("full_attn_idxs") if config.has("full_attn_idxs") else range(config.num_layers)
    types = config.layer_types(
        "full_attention", "conv", default=lambda index: "full_attention" if index in attends else "conv"
    )

    def head_norm(size: int) -> RMSNorm:
        return RMSNorm(context, size, config.rms_norm_eps)

    def attention(index: int, prefix: str) -> nn.Module:
        if types[index] == "conv":
            return ShortConv(context, length, bias=bias, prefix=prefix)
        return SelfAttention(context, rotary, head_norm=head_norm, prefix=prefix)

    norms = Norms(before_attention="operator_norm", before_mlp="ffn_norm")
    return DecoderParts(attention, mlp, norms=norms)


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
            *LFM2_NAMES,
            (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
            (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
            (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
        ],
        transforms={r"\.conv\.weight$": transpose_conv},
    )

    def __init__(self, context: ModelContext) -> None:
        inner = intermediate_size(context.config)

        def mlp(index: int, prefix: str) -> GatedMLP:
            return GatedMLP(context, inner, prefix=prefix)

        super().__init__(context, lfm2_parts(context, mlp))


class Lfm2MoeForCausalLM(CausalDecoder):
    """LFM2 with experts, which routers choose by corrected sigmoids, but for the first layers."""

    attribute_map = {"rms_norm_eps": "norm_eps", "tie_word_embeddings": "tie_embedding"}
    mapper = WeightsMapper(
        renames=[
            *LFM2_NAMES,
            (r"\.feed_forward\.", ".mlp."),
            (r"\.mlp\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
            *MIXTRAL_NAMES,
        ],
        ignored=[ROTARY_BUFFERS],
        transforms={r"\.conv\.weight$": transpose_conv},
        stacks=STACKS,
    )
    config_defaults = {
        "conv_L_cache": 3,
        "conv_bias": False,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "moe_intermediate_size": 1792,
        "norm_topk_prob": True,
        "num_dense_layers": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": True,
        "use_expert_bias": True,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        num_dense, inner = config.integer("num_dense_layers"), config.size("moe_intermediate_size")
        is_corrected = config.boolean("use_expert_bias")
        # transformers adds 1e-6 to the sum by which weights are divided, which changes them less than rounding does.
        routing = Routing(
            config.size("num_experts_per_tok"),
            "sigmoid",
            normalize=config.boolean("norm_topk_prob"),
            factor=config.number("routed_scaling_factor"),
        )

        def mlp(index: int, prefix: str) -> nn.Module:
            if index < num_dense:
                return GatedMLP(context, prefix=prefix)
            return MoE(context, routing, config.size("num_experts"), inner, is_corrected=is_corrected, prefix=prefix)

        super().__init__(context, lfm2_parts(context, mlp))
