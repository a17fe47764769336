"""Jina Embeddings 3 (Sturua et al., arXiv:2409.10173) and Jina-ColBERT 2: XLM-R with rotation; Jina Reranker 2: XLM-R.

Checkpoints of the authors' own code may also hold adapters of tasks, in the form of torch's parametrisations.
"""

from __future__ import annotations

from executor.hf_config import HFConfig
from executor.layers.context import ModelContext
from executor.layers.mlp import MLP
from executor.layers.norm import LayerNorm
from executor.layers.positions import LearnedPositions, TokenTypes
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.bert import BERT_DEFAULTS, CLASSIFIER_NAMES, EMBEDDINGS, first_token_head, without_padding_rows
from executor.models.decoder import DecoderParts, PostNormDecoderLayer
from executor.models.encoder import MLM_HEADS, POST_NORMS, Encoder


def _has_positions(config: HFConfig) -> bool:
    """Whether a table has a vector for each position."""
    return config.string("position_embedding_type", "rotary") == "absolute"


class JinaEmbeddingsV3Model(Encoder):
    attribute_map = {"rope_theta": "rotary_emb_base"}
    config_defaults = {
        **{name: value for name, value in BERT_DEFAULTS.items() if name != "position_embedding_type"},
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 8194,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "pad_token_id": 1,
        "type_vocab_size": 1,
        "vocab_size": 250002,
    }
    mapper = WeightsMapper(
        renames=[
            (r"^roberta\.", ""),
            (r"\.parametrizations\.weight\.original$", ".weight"),
            *EMBEDDINGS[:4],
            (r"^emb_ln\.", "model.embedding_norm."),
            (r"^(encoder\.)?layers\.", "model.layers."),
            (r"\.mixer\.Wqkv\.", ".self_attn.qkv_proj."),
            (r"\.mixer\.out_proj\.", ".self_attn.o_proj."),
            (r"\.norm1\.", ".attention_norm."),
            (r"\.norm2\.", ".mlp_norm."),
            (r"\.mlp\.fc1\.", ".mlp.up_proj."),
            (r"\.mlp\.fc2\.", ".mlp.down_proj."),
            *CLASSIFIER_NAMES,
        ],
        ignored=[*MLM_HEADS, r"\.parametrizations\."],
    )

    @classmethod
    def configure(cls, config: HFConfig) -> HFConfig:
        config = super().configure(config)
        if not _has_positions(config):
            return config
        return without_padding_rows(config, config.integer("pad_token_id") + 1)

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        eps, is_rotary = config.epsilon("layer_norm_eps"), not _has_positions(config)
        rotary = RotaryEmbedding(context) if is_rotary else None
        num_types = config.integer("type_vocab_size")

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(
                context, rotary, qkv_bias=True, out_bias=True, is_fused=True, is_bidirectional=True, prefix=prefix
            )

        parts = DecoderParts(
            attention,
            lambda index, prefix: MLP(context, bias=True, prefix=prefix),
            lambda size: LayerNorm(context, size, eps),
            layer=PostNormDecoderLayer,
            norms=POST_NORMS,
            has_embedding_norm=True,
            has_final_norm=False,
            positions=None if is_rotary else LearnedPositions(context, offset=config.integer("pad_token_id") + 1),
            token_types=TokenTypes(context, num_types) if num_types else None,
        )
        super().__init__(context, parts, first_token_head(context))
