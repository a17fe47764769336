"""Falcon-H1 (TII, arXiv:2507.22448): each layer adds up attention and Mamba-2, with factors everywhere, as in muP (Yang
et al., arXiv:2203.03466)."""

from __future__ import annotations

from torch import Tensor, nn

import ops
from executor.hf_config import HFConfig
from executor.input_batch import InputBatch
from executor.layers.context import ModelContext
from executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from executor.layers.mamba import HYBRID_DEFAULTS, Mamba2, hybrid_sizes, scaled
from executor.layers.mlp import GATED_ACTIVATIONS
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.bamba import HYBRID_MAPPER, HYBRID_NORMS
from executor.models.base import WeightsMapper
from executor.models.decoder import CausalDecoder, DecoderParts


def factors(config: HFConfig, name: str, count: int) -> list[float]:
    """A list of factors; all 1 if the configuration has none."""
    if not config.has(name):
        return [1.0] * count
    values = config.numbers(name)
    if len(values) != count:
        config.bad(name, f"{count} numbers")
    return values


class BothMixers(nn.Module):
    """The sum of attention and of Mamba-2, each with factors of its input and of its result."""

    def __init__(self, context: ModelContext, rotary: RotaryEmbedding, *, prefix: str) -> None:
        super().__init__()
        config = context.config
        bias, has_norm = config.boolean("attention_bias"), config.boolean("mamba_rms_norm")
        # A factor of keys is one of scores.
        scale = config.head_dim**-0.5 * config.number("key_multiplier")
        self.attention = SelfAttention(
            context, rotary, qkv_bias=bias, out_bias=bias, scale=scale, prefix=f"{prefix}.attention"
        )
        inner = config.size("mamba_d_ssm") if config.has("mamba_d_ssm") else None
        self.mamba = Mamba2(
            context,
            hybrid_sizes(config, inner),
            conv_bias=config.boolean("mamba_conv_bias"),
            in_bias=config.boolean("mamba_proj_bias"),
            out_bias=config.boolean("projectors_bias"),
            has_norm=has_norm,
            norm_before_gate=config.boolean("mamba_norm_before_gate"),
            factors=factors(config, "ssm_multipliers", 5),
            prefix=f"{prefix}.mamba",
        )
        self.into_attention, self.from_attention = (
            config.number(f"attention_{each}_multiplier") for each in ("in", "out")
        )
        self.into_mamba, self.from_mamba = (config.number(f"ssm_{each}_multiplier") for each in ("in", "out"))

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        """``hidden`` [num_tokens, hidden_size] -> the same."""
        state = scaled(self.mamba(scaled(hidden, self.into_mamba), batch), self.from_mamba)
        return state + scaled(self.attention(scaled(hidden, self.into_attention), batch), self.from_attention)


class ScaledMLP(nn.Module):
    """A gated MLP with factors of the gate and of the result."""

    def __init__(self, context: ModelContext, *, bias: bool, prefix: str) -> None:
        super().__init__()
        config = context.config
        hidden, inner = config.hidden_size, config.intermediate_size
        self.activation = config.choice("hidden_act", GATED_ACTIVATIONS)
        self.gate_factor, self.down_factor = factors(config, "mlp_multipliers", 2)
        self.gate_up_proj = MergedColumnParallelLinear(
            context, hidden, {"gate_proj": inner, "up_proj": inner}, bias=bias, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(context, inner, hidden, bias=bias, prefix=f"{prefix}.down_proj")

    def forward(self, x: Tensor, batch: InputBatch) -> Tensor:
        """``x`` [num_tokens, hidden_size] -> the same."""
        gate, up = self.gate_up_proj(x, batch).split(self.gate_up_proj.output_sizes, dim=-1)
        inner = ops.multiply(ops.activation(scaled(gate, self.gate_factor), self.activation), up)
        return scaled(self.down_proj(inner, batch), self.down_factor)


class FalconH1ForCausalLM(CausalDecoder):
    mapper = WeightsMapper(
        renames=[
            (r"\.self_attn\.", ".self_attn.attention."),
            (r"\.(\d+)\.mamba\.", r".\1.self_attn.mamba."),
            *HYBRID_MAPPER.renames,
        ],
        ignored=HYBRID_MAPPER.ignored,
        transforms=HYBRID_MAPPER.transforms,
    )
    config_defaults = {
        **HYBRID_DEFAULTS,
        "attention_bias": False,
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "key_multiplier": 1.0,
        "lm_head_multiplier": 1.0,
        "mamba_d_ssm": 1024,
        "mamba_norm_before_gate": True,
        "mamba_rms_norm": False,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "num_key_value_heads": 8,
        "projectors_bias": False,
        "rms_norm_eps": 1e-5,
        "ssm_in_multiplier": 1.0,
        "ssm_out_multiplier": 1.0,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary, bias = RotaryEmbedding(context), config.boolean("mlp_bias")
        parts = DecoderParts(
            lambda index, prefix: BothMixers(context, rotary, prefix=prefix),
            lambda index, prefix: ScaledMLP(context, bias=bias, prefix=prefix),
            norms=HYBRID_NORMS,
            embedding_scale=config.number("embedding_multiplier"),
            logit_scale=config.number("lm_head_multiplier"),
        )
        super().__init__(context, parts)
