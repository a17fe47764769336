"""ModernBERT (Warner et al., arXiv:2412.13663): pre-norm, rotation, gated MLPs, and windows in two of three layers."""

from __future__ import annotations

from executor.hf_config import HFConfig
from executor.layers.context import ModelContext
from executor.layers.mlp import ACTIVATIONS, GatedMLP
from executor.layers.norm import LayerNorm
from executor.layers.pooler_head import HeadNorm, PoolingHead
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import DecoderParts, Norms
from executor.models.encoder import MLM_HEADS, Encoder
from executor.models.gemma2 import FULL, SLIDING

PRE_NORMS = Norms(before_attention="attn_norm", before_mlp="mlp_norm")


class ModernBertModel(Encoder):
    attribute_map = {"hidden_act": "hidden_activation"}
    config_defaults = {
        "attention_bias": False,
        "classifier_activation": "gelu",
        "classifier_bias": False,
        "classifier_pooling": "cls",
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "hidden_act": "gelu",
        "hidden_size": 768,
        "intermediate_size": 1152,
        "local_attention": 128,
        "local_rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "norm_bias": False,
        "norm_eps": 1e-5,
        "num_attention_heads": 12,
        "num_hidden_layers": 22,
        "vocab_size": 50368,
    }
    mapper = WeightsMapper(
        renames=[
            (r"^model\.", ""),
            (r"^embeddings\.tok_embeddings\.", "model.embed_tokens."),
            (r"^embeddings\.norm\.", "model.embedding_norm."),
            (r"^final_norm\.", "model.norm."),
            (r"^layers\.", "model.layers."),
            (r"\.attn\.Wqkv\.", ".self_attn.qkv_proj."),
            (r"\.attn\.Wo\.", ".self_attn.o_proj."),
            (r"\.mlp\.Wi\.", ".mlp.gate_up_proj."),
            (r"\.mlp\.Wo\.", ".mlp.down_proj."),
            (r"^classifier\.", "head.out."),
        ],
        ignored=MLM_HEADS,
    )

    @classmethod
    def configure(cls, config: HFConfig) -> HFConfig:
        config = super().configure(config)
        if not config.has("rope_parameters"):
            config = config.replaced(
                rope_theta=config.positive("global_rope_theta"),
                rope_local_base_freq=config.positive("local_rope_theta"),
            )
        return config.replaced(sliding_window=config.size("local_attention") // 2 + 1)

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        every = config.size("global_attn_every_n_layers")
        types = config.layer_types(FULL, SLIDING, default=lambda index: SLIDING if index % every else FULL)
        rotary = {kind: RotaryEmbedding(context, config.rope_for(kind)) for kind in sorted(set(types))}
        eps, bias, norm_bias = config.epsilon("norm_eps"), config.boolean("attention_bias"), config.boolean("norm_bias")

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(
                context,
                rotary[types[index]],
                qkv_bias=bias,
                out_bias=bias,
                is_fused=True,
                is_bidirectional=True,
                sliding_window=config.size("sliding_window") if types[index] == SLIDING else None,
                prefix=prefix,
            )

        mlp_bias = config.boolean("mlp_bias")
        parts = DecoderParts(
            attention,
            lambda index, prefix: GatedMLP(context, bias=mlp_bias, is_fused=True, prefix=prefix),
            lambda size: LayerNorm(context, size, eps, bias=norm_bias),
            norms=lambda index: PRE_NORMS if index else Norms(before_mlp="mlp_norm"),
            has_embedding_norm=True,
        )
        super().__init__(context, parts, _head(context))


def _head(context: ModelContext) -> PoolingHead | None:
    if context.head == "none":
        return None
    config = context.config
    pooling = config.choice("classifier_pooling", {"cls": "CLS", "mean": "MEAN"})
    norm = HeadNorm(context, config.hidden_size, config.epsilon("norm_eps"), bias=config.boolean("norm_bias"))
    config.choice("classifier_activation", ACTIVATIONS)
    return PoolingHead(
        context,
        pooling if context.head == "sequence" else "ALL",
        activation=config.string("classifier_activation"),
        dense_bias=config.boolean("classifier_bias"),
        norm=norm,
    )
