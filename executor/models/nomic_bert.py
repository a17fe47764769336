"""Encoders of BERT's form with rotation and gated MLPs: Nomic Embed (arXiv:2402.01613) and GTE (arXiv:2407.19669)."""

from __future__ import annotations

import torch
from torch import Tensor

from executor.hf_config import HFConfig
from executor.layers.context import ModelContext
from executor.layers.mlp import GatedMLP
from executor.layers.norm import LayerNorm
from executor.layers.positions import TokenTypes
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.bert import EMBEDDINGS, first_token_head
from executor.models.decoder import DecoderParts, PostNormDecoderLayer
from executor.models.encoder import MLM_HEADS, POST_NORMS, Encoder


def rotary_bert_parts(
    context: ModelContext, *, qkv_bias: bool, out_bias: bool, down_bias: bool, is_fused: bool
) -> DecoderParts:
    """The parts of both: BERT's, with rotation instead of learned positions, and gated MLPs.

    Args:
        context: The model's construction context.
        qkv_bias: Whether the projections to q, k and v have biases.
        out_bias: Whether the output projection has one.
        down_bias: Whether an MLP's last projection has one.
        is_fused: Whether the checkpoint holds gate and up as one tensor.
    """
    config = context.config
    rotary, eps = RotaryEmbedding(context), config.epsilon("layer_norm_eps")
    num_types = config.integer("type_vocab_size")

    def attention(index: int, prefix: str) -> SelfAttention:
        return SelfAttention(
            context,
            rotary,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            is_fused=True,
            is_bidirectional=True,
            prefix=prefix,
        )

    return DecoderParts(
        attention,
        lambda index, prefix: GatedMLP(context, is_fused=is_fused, down_bias=down_bias, prefix=prefix),
        lambda size: LayerNorm(context, size, eps),
        layer=PostNormDecoderLayer,
        norms=POST_NORMS,
        has_embedding_norm=True,
        has_final_norm=False,
        token_types=TokenTypes(context, num_types) if num_types else None,
    )


class NomicBertModel(Encoder):
    """Nomic Embed 1 and 1.5, under its own names of fields or transformers'."""

    attribute_map = {
        "hidden_act": "activation_function",
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "layer_norm_eps": "layer_norm_epsilon",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "rope_theta": "rotary_emb_base",
    }
    config_defaults = {
        "hidden_act": "silu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 2048,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "rope_theta": 1000.0,
        "type_vocab_size": 2,
        "vocab_size": 30528,
    }
    mapper = WeightsMapper(
        renames=[
            (r"^(nomic_)?bert\.", ""),
            *EMBEDDINGS[:4],
            (r"^emb_ln\.", "model.embedding_norm."),
            (r"^encoder\.layers\.", "model.layers."),
            (r"\.attn\.Wqkv\.", ".self_attn.qkv_proj."),
            (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
            (r"\.mlp\.fc11\.", ".mlp.up_proj."),
            (r"\.mlp\.fc12\.", ".mlp.gate_proj."),
            (r"\.mlp\.fc2\.", ".mlp.down_proj."),
            (r"\.norm1\.", ".attention_norm."),
            (r"\.norm2\.", ".mlp_norm."),
            (r"^pooler\.dense\.", "head.dense."),
            (r"^classifier\.", "head.out."),
        ],
        ignored=MLM_HEADS,
    )

    @classmethod
    def configure(cls, config: HFConfig) -> HFConfig:
        if config.has("max_trained_positions"):
            config = config.replaced(max_position_embeddings=config.size("max_trained_positions"))
        config = super().configure(config)
        if config.string("hidden_act") == "swiglu":
            config = config.replaced(hidden_act="silu")
        wanted = {
            "rotary_emb_fraction": 1,
            "rotary_emb_interleaved": False,
            "prenorm": False,
            "moe_every_n_layers": 0,
        }
        for name, value in wanted.items():
            if config.has(name) and config.get(name) != value:
                config.bad(name, str(value))
        return config

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        bias = config.boolean("qkv_proj_bias", False)
        if config.boolean("mlp_fc1_bias", False):
            config.bad("mlp_fc1_bias", "false")
        down_bias = config.boolean("mlp_fc2_bias", False)
        parts = rotary_bert_parts(context, qkv_bias=bias, out_bias=bias, down_bias=down_bias, is_fused=False)
        super().__init__(context, parts, first_token_head(context))


def _gate_first(tensor: Tensor) -> Tensor:
    up, gate = tensor.chunk(2)
    return torch.cat((gate, up))


class GteModel(Encoder):
    """GTE 1.5 and multilingual, whose own name is ``NewModel``."""

    config_defaults = {
        "hidden_act": "gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 8192,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "rope_theta": 160000.0,
        "type_vocab_size": 1,
        "vocab_size": 250048,
    }
    mapper = WeightsMapper(
        renames=[
            (r"^(new|gte)\.", ""),
            *EMBEDDINGS[:4],
            (r"^encoder\.layer\.", "model.layers."),
            (r"\.attention\.qkv_proj\.", ".self_attn.qkv_proj."),
            (r"\.attention\.o_proj\.", ".self_attn.o_proj."),
            (r"\.mlp\.up_gate_proj\.", ".mlp.gate_up_proj."),
            (r"\.attn_ln\.", ".attention_norm."),
            (r"\.mlp_ln\.", ".mlp_norm."),
            (r"^pooler\.dense\.", "head.dense."),
            (r"^classifier\.", "head.out."),
        ],
        ignored=MLM_HEADS,
        transforms={r"\.gate_up_proj\.": _gate_first},
    )

    @classmethod
    def configure(cls, config: HFConfig) -> HFConfig:
        config = super().configure(config)
        scaling = config.section("rope_scaling")
        if scaling.get("type") != "ntk":
            return config
        # NTK-aware scaling, mixed by a power (kexue.fm/archives/9706). Without one, the authors multiply the base by
        # the factor and divide all angles by its power 2 / head_dim, which is the same as with the power 1.
        factor, power, half = scaling.positive("factor"), scaling.positive("mixed_b", 1.0), config.head_dim // 2
        factors = [factor ** ((pair / half) ** power) for pair in range(1, half + 1)]
        return config.replaced(rope_scaling={"type": "frequency_factors", "factors": factors})

    def __init__(self, context: ModelContext) -> None:
        parts = rotary_bert_parts(context, qkv_bias=True, out_bias=True, down_bias=True, is_fused=True)
        super().__init__(context, parts, first_token_head(context))
