"""Qwen2, Qwen2.5 and Qwen2-MoE (arXiv:2407.10671, arXiv:2412.15115): Llama with biases on q, k and v."""

from __future__ import annotations

from executor.hf_config import HFConfig
from executor.layers.context import ModelContext
from executor.layers.mlp import GatedMLP
from executor.layers.moe import MoE, sparse_layers
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderParts, MakeBlock
from executor.weights_mapper import STACKS
from ops import Routing

QWEN_DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "use_sliding_window": False,
}


def sliding_windows(config: HFConfig) -> list[int | None]:
    """The window of each layer. Unless the configuration lists layer types, only the upper layers have one."""
    has_window = config.boolean("use_sliding_window") and config.has("sliding_window")
    window = config.size("sliding_window") if has_window else None
    full = config.integer("max_window_layers")
    types = config.layer_types(
        "full_attention",
        "sliding_attention",
        default=lambda index: "full_attention" if index < full else "sliding_attention",
    )
    return [window if kind == "sliding_attention" else None for kind in types]


class Qwen2ForCausalLM(CausalDecoder):
    config_defaults = QWEN_DEFAULTS

    def __init__(self, context: ModelContext) -> None:
        rotary = RotaryEmbedding(context)
        windows = sliding_windows(context.config)

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, qkv_bias=True, sliding_window=windows[index], prefix=prefix)

        super().__init__(context, DecoderParts(attention))


QWEN_MOE_DEFAULTS = {
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "use_sliding_window": False,
}
QWEN_MOE_MAPPER = WeightsMapper(ignored=[ROTARY_BUFFERS], stacks=STACKS)


def qwen_mlp(context: ModelContext, num_experts: int, *, has_shared: bool) -> MakeBlock:
    """MLPs of Qwen's models with experts: some layers may be dense."""
    config = context.config
    routing = Routing(config.size("num_experts_per_tok"), normalize=config.boolean("norm_topk_prob"))
    inner = config.size("moe_intermediate_size")
    is_sparse = sparse_layers(config)
    shared = ("shared_expert", config.size("shared_expert_intermediate_size")) if has_shared else None
    gate = "shared_expert_gate" if has_shared else None

    def mlp(index: int, prefix: str) -> MoE | GatedMLP:
        if not is_sparse[index]:
            return GatedMLP(context, prefix=prefix)
        return MoE(context, routing, num_experts, inner, shared=shared, shared_gate=gate, prefix=prefix)

    return mlp


class Qwen2MoeForCausalLM(CausalDecoder):
    """Qwen1.5-MoE and Qwen2-MoE: an expert that all tokens share has a gate of its own."""

    mapper = QWEN_MOE_MAPPER
    config_defaults = {
        **QWEN_MOE_DEFAULTS,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "shared_expert_intermediate_size": 5632,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        bias = config.boolean("qkv_bias")
        windows = alternating_windows(config)

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, qkv_bias=bias, sliding_window=windows[index], prefix=prefix)

        mlp = qwen_mlp(context, config.size("num_experts"), has_shared=True)
        super().__init__(context, DecoderParts(attention, mlp))


def alternating_windows(config: HFConfig) -> list[int | None]:
    """The window of each layer of a Qwen2-MoE. Unless the configuration lists layer types, every other lower layer has
    one."""
    if not config.boolean("use_sliding_window") or not config.has("sliding_window"):
        return [None] * config.num_layers
    most = config.integer("max_window_layers")
    types = config.layer_types(
        "full_attention",
        "sliding_attention",
        default=lambda index: "sliding_attention" if index % 2 == 0 and index < most else "full_attention",
    )
    return [config.size("sliding_window") if kind == "sliding_attention" else None for kind in types]
