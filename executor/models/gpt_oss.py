"""gpt-oss (OpenAI, arXiv:2508.10925): experts with biases and a gated activation of their own, attention with sinks,
and windows in every other layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from executor.layers.context import ModelContext
from executor.layers.moe import MoE
from executor.layers.norm import RMSNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderParts
from executor.weights_mapper import Cut, Stack, whole
from ops import Routing, SwiGLUOAI


def gates(tensor: Tensor) -> Tensor:
    """The rows of the gate, which alternate with those of up."""
    return tensor[::2]


def ups(tensor: Tensor) -> Tensor:
    """The rows of up."""
    return tensor[1::2]


def stack(stored: str, leaf: str, turn: Callable[[Tensor], Tensor] = whole) -> list[Stack]:
    """The stacks of both projections of experts.

    Args:
        stored: What follows the names of the projections.
        leaf: Name of the parameter.
        turn: What makes an expert's tensor one with a row for each output.
    """

    def cut(rows: Cut) -> Cut:
        return lambda tensor: rows(turn(tensor))

    pair = {f"gate_proj.{leaf}": cut(gates), f"up_proj.{leaf}": cut(ups)}
    return [
        Stack(rf"^(.*\.experts\.)gate_up_proj{stored}$", pair),
        Stack(rf"^(.*\.experts\.)down_proj{stored}$", {f"down_proj.{leaf}": cut(whole)}),
    ]


def blocks(tensor: Tensor) -> Tensor:
    """[rows, blocks, bytes] -> [rows, bytes of a row]."""
    return tensor.flatten(1)


TYPES = ("sliding_attention", "full_attention")
"""Of layers, in turn."""


class GptOssForCausalLM(CausalDecoder):
    attribute_map = {"num_experts": "num_local_experts"}
    mapper = WeightsMapper(
        renames=[(r"\.mlp\.router\.", ".mlp.gate.")],
        ignored=[ROTARY_BUFFERS],
        stacks=[
            *stack("", "weight", Tensor.t),
            *stack("_bias", "bias"),
            *stack("_blocks", "weight_packed", blocks),
            *stack("_scales", "weight_scale"),
        ],
    )
    config_defaults = {
        "attention_bias": True,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "num_experts": 128,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "sliding_window": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        bias = config.boolean("attention_bias")
        types = config.layer_types(*TYPES, default=lambda index: TYPES[index % 2])
        routing = Routing(config.size("num_experts_per_tok"), normalize=True)
        activation = SwiGLUOAI(config.number("swiglu_alpha"), config.positive("swiglu_limit"))

        def attention(index: int, prefix: str) -> SelfAttention:
            window = config.size("sliding_window") if types[index] == "sliding_attention" else None
            return SelfAttention(
                context,
                rotary,
                qkv_bias=bias,
                out_bias=bias,
                sliding_window=window,
                has_sinks=True,
                prefix=prefix,
            )

        def mlp(index: int, prefix: str) -> MoE:
            return MoE(
                context,
                routing,
                config.size("num_experts"),
                config.intermediate_size,
                bias=True,
                router_bias=True,
                activation=activation,
                prefix=prefix,
            )

        def norm(size: int) -> RMSNorm:
            return RMSNorm(context, size, config.rms_norm_eps, round_first=False)

        super().__init__(context, DecoderParts(attention, mlp, norm=norm))
