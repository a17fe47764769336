"""Granite 3 and 4 (IBM, Granite 3.0 Language Models, 2024): Llama with factors for embeddings, scores, residuals and
logits, as in muP (Yang et al., arXiv:2203.03466)."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from executor.layers.context import ModelContext
from executor.layers.mamba import HYBRID_DEFAULTS, Mamba2, hybrid_sizes
from executor.layers.mlp import GatedMLP
from executor.layers.moe import MoE
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderParts, MakeBlock
from executor.models.lfm2 import transpose_conv
from executor.weights_mapper import STACKS
from ops import Routing

GRANITE_DEFAULTS = {
    "attention_bias": False,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "logits_scaling": 1.0,
    "max_position_embeddings": 2048,
    "residual_multiplier": 1.0,
    "rms_norm_eps": 1e-6,
}


def granite_parts(context: ModelContext, mlp: MakeBlock, *, is_rotated: bool = True) -> DecoderParts:
    """What the two generations share."""
    config = context.config
    rotary = RotaryEmbedding(context) if is_rotated else None
    bias, scale = config.boolean("attention_bias"), config.number("attention_multiplier")
    logits_scaling = config.number("logits_scaling")
    if logits_scaling == 0:
        config.bad("logits_scaling", "a number other than 0")

    def attention(index: int, prefix: str) -> SelfAttention:
        return SelfAttention(context, rotary, qkv_bias=bias, out_bias=bias, scale=scale, prefix=prefix)

    return DecoderParts(
        attention,
        mlp,
        embedding_scale=config.number("embedding_multiplier"),
        residual_scale=config.number("residual_multiplier"),
        logit_scale=1 / logits_scaling,
    )


class GraniteForCausalLM(CausalDecoder):
    config_defaults = {**GRANITE_DEFAULTS, "mlp_bias": False}

    def __init__(self, context: ModelContext) -> None:
        bias = context.config.boolean("mlp_bias")

        def mlp(index: int, prefix: str) -> GatedMLP:
            return GatedMLP(context, bias=bias, prefix=prefix)

        super().__init__(context, granite_parts(context, mlp))


class GraniteMoeForCausalLM(CausalDecoder):
    """Granite 3 with experts."""

    mapper = WeightsMapper(
        renames=[
            (r"\.block_sparse_moe\.", ".mlp."),
            (r"\.mlp\.router\.(layer\.)?", ".mlp.gate."),
            (r"\.mlp\.input_linear\.weight$", ".mlp.experts.gate_up_proj"),
            (r"\.mlp\.output_linear\.weight$", ".mlp.experts.down_proj"),
        ],
        ignored=[ROTARY_BUFFERS],
        stacks=STACKS,
    )
    config_defaults = {**GRANITE_DEFAULTS, "num_experts_per_tok": 2, "num_local_experts": 8}

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        routing = Routing(config.size("num_experts_per_tok"), normalize=True)

        def mlp(index: int, prefix: str) -> MoE:
            return MoE(context, routing, config.size("num_local_experts"), config.intermediate_size, prefix=prefix)

        super().__init__(context, granite_parts(context, mlp))


def shared_mlp(context: ModelContext) -> MakeBlock:
    """Experts, one of which all tokens share; or that one alone."""
    config = context.config
    inner, num_experts = config.integer("shared_intermediate_size"), config.integer("num_local_experts")
    is_fused = not config.boolean("has_split_gate_up", False)

    def dense(size: int, prefix: str) -> GatedMLP:
        return GatedMLP(context, size, is_fused=is_fused, is_summed=num_experts == 0, prefix=prefix)

    def mlp(index: int, prefix: str) -> nn.Module:
        if num_experts == 0:
            return dense(config.size("shared_intermediate_size"), prefix)
        routing = Routing(config.size("num_experts_per_tok"), normalize=True)
        shared, size = ("shared_mlp", inner) if inner else None, config.intermediate_size
        return MoE(context, routing, num_experts, size, shared=shared, make_shared=dense, prefix=prefix)

    return mlp


class GraniteMoeSharedForCausalLM(CausalDecoder):
    """Granite 3 with experts, one of which all tokens share."""

    mapper = WeightsMapper(
        renames=[
            (r"\.shared_mlp\.input_linear\.", ".mlp.shared_mlp.gate_up_proj."),
            (r"\.shared_mlp\.output_linear\.", ".mlp.shared_mlp.down_proj."),
            *GraniteMoeForCausalLM.mapper.renames,
        ],
        ignored=[ROTARY_BUFFERS],
        stacks=STACKS,
    )
    config_defaults = {**GraniteMoeForCausalLM.config_defaults, "shared_intermediate_size": 0}

    def __init__(self, context: ModelContext) -> None:
        context.config.size("num_local_experts")
        super().__init__(context, granite_parts(context, shared_mlp(context)))


class GraniteMoeHybridForCausalLM(CausalDecoder):
    """Granite 4: in models that end in H most layers are Mamba-2. A dense MLP is the expert that all tokens share."""

    mapper = WeightsMapper(
        renames=[*GraniteMoeSharedForCausalLM.mapper.renames, (r"\.(\d+)\.mamba\.", r".\1.self_attn.")],
        ignored=[ROTARY_BUFFERS],
        transforms={r"\.conv1d\.weight$": transpose_conv},
        stacks=STACKS,
    )
    config_defaults = {
        **GRANITE_DEFAULTS,
        **HYBRID_DEFAULTS,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "shared_intermediate_size": 1024,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        kinds = ("attention", "full_attention", "mamba", "linear_attention")  # full and linear since transformers 5
        types = config.layer_types(*kinds, default=lambda index: "mamba")
        has_state = [kind in ("mamba", "linear_attention") for kind in types]
        is_rotated = config.string("position_embedding_type", "nope") == "rope"
        parts = granite_parts(context, shared_mlp(context), is_rotated=is_rotated)
        if any(has_state):
            attention, sizes = parts.attention, hybrid_sizes(config)
            conv_bias, bias = config.boolean("mamba_conv_bias"), config.boolean("mamba_proj_bias")

            def mixer(index: int, prefix: str) -> nn.Module:
                if not has_state[index]:
                    return attention(index, prefix)
                return Mamba2(context, sizes, conv_bias=conv_bias, in_bias=bias, out_bias=bias, prefix=prefix)

            parts = replace(parts, attention=mixer)
        super().__init__(context, parts)
        if config.integer("num_local_experts") == 0:
            renames = [*self.mapper.renames, (r"\.mlp\.shared_mlp\.", ".mlp.")]
            self.mapper = replace(self.mapper, renames=renames)
