"""BERT (Devlin et al., arXiv:1810.04805) and the encoders that differ from it in names or positions: RoBERTa and XLM-R
(arXiv:1907.11692, arXiv:1911.02116), DistilBERT (arXiv:1910.01108) and MPNet (arXiv:2004.09297)."""

from __future__ import annotations

from executor.hf_config import HFConfig
from executor.layers.context import ModelContext
from executor.layers.mlp import MLP
from executor.layers.norm import LayerNorm
from executor.layers.pooler_head import PoolingHead
from executor.layers.positions import DistanceBiases, LearnedPositions, TokenTypes
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import DecoderParts, PostNormDecoderLayer
from executor.models.encoder import MLM_HEADS, POST_NORMS, Encoder

EMBEDDINGS = [
    (r"^embeddings\.word_embeddings\.", "model.embed_tokens."),
    (r"^embeddings\.position_embeddings\.", "model.embed_positions."),
    (r"^embeddings\.token_type_embeddings\.", "model.embed_types."),
    (r"^embeddings\.LayerNorm\.", "model.embedding_norm."),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),  # old checkpoints
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
]
MLP_NAMES = [
    (r"\.intermediate\.dense\.", ".mlp.up_proj."),
    (r"(layers\.\d+)\.output\.dense\.", r"\1.mlp.down_proj."),
    (r"(layers\.\d+)\.output\.LayerNorm\.", r"\1.mlp_norm."),
]
BERT_NAMES = [
    (r"^(bert|roberta)\.", ""),
    *EMBEDDINGS[4:],
    *EMBEDDINGS[:4],
    (r"^encoder\.layer\.", "model.layers."),
    (r"\.attention\.self\.query\.", ".self_attn.q_proj."),
    (r"\.attention\.self\.key\.", ".self_attn.k_proj."),
    (r"\.attention\.self\.value\.", ".self_attn.v_proj."),
    (r"\.attention\.output\.dense\.", ".self_attn.o_proj."),
    (r"\.attention\.output\.LayerNorm\.", ".attention_norm."),
    *MLP_NAMES,
]
BERT_DEFAULTS = {
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
}


def bert_parts(
    context: ModelContext,
    *,
    num_types: int,
    position_offset: int = 0,
    biases: DistanceBiases | None = None,
) -> DecoderParts:
    """The parts of BERT: norms after the sums, learned positions, biases everywhere.

    Args:
        context: The model's construction context.
        num_types: Types of tokens; 0: there are none.
        position_offset: Rows of the table before that of position 0.
        biases: Biases of the scores.
    """
    config = context.config
    eps = config.epsilon("layer_norm_eps")

    def attention(index: int, prefix: str) -> SelfAttention:
        return SelfAttention(
            context, None, qkv_bias=True, out_bias=True, is_bidirectional=True, biases=biases, prefix=prefix
        )

    return DecoderParts(
        attention,
        lambda index, prefix: MLP(context, bias=True, prefix=prefix),
        lambda size: LayerNorm(context, size, eps),
        layer=PostNormDecoderLayer,
        norms=POST_NORMS,
        has_embedding_norm=True,
        has_final_norm=False,
        positions=LearnedPositions(context, offset=position_offset),
        token_types=TokenTypes(context, num_types) if num_types else None,
        position_biases=biases,
    )


def first_token_head(context: ModelContext, activation: str = "tanh") -> PoolingHead | None:
    """The classifier of these families: a dense layer on the first token, then one with an output for each label. One
    for tokens has the second layer only."""
    if context.head == "token":
        return PoolingHead(context, "ALL")
    return PoolingHead(context, "CLS", activation=activation) if context.head == "sequence" else None


class BertModel(Encoder):
    config_defaults = {**BERT_DEFAULTS, "vocab_size": 30522}
    mapper = WeightsMapper(
        renames=[
            *BERT_NAMES,
            (r"^pooler\.dense\.", "head.dense."),
            (r"^classifier\.", "head.out."),
        ],
        ignored=MLM_HEADS,
    )

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        if config.string("position_embedding_type") != "absolute":
            config.bad("position_embedding_type", "'absolute'")
        parts = bert_parts(context, num_types=config.integer("type_vocab_size"))
        super().__init__(context, parts, first_token_head(context))


def without_padding_rows(config: HFConfig, rows: int) -> HFConfig:
    """The configuration with the positions that tokens can have: tables have some rows before that of position 0."""
    return config.replaced(max_position_embeddings=config.max_position_embeddings - rows)


CLASSIFIER_NAMES = [(r"^classifier\.dense\.", "head.dense."), (r"^classifier\.(out_proj\.)?", "head.out.")]
"""Of a classifier of the first token."""


class RobertaModel(Encoder):
    """Positions begin after the padding token's id."""

    config_defaults = {**BERT_DEFAULTS, "pad_token_id": 1}
    mapper = WeightsMapper(
        renames=[
            *BERT_NAMES,
            *CLASSIFIER_NAMES,
        ],
        ignored=MLM_HEADS,
    )

    @classmethod
    def configure(cls, config: HFConfig) -> HFConfig:
        config = super().configure(config)
        return without_padding_rows(config, config.integer("pad_token_id") + 1)

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        if config.string("position_embedding_type") != "absolute":
            config.bad("position_embedding_type", "'absolute'")
        offset = config.integer("pad_token_id") + 1
        parts = bert_parts(context, num_types=config.integer("type_vocab_size"), position_offset=offset)
        super().__init__(context, parts, first_token_head(context))


class DistilBertModel(Encoder):
    """BERT without types of tokens."""

    attribute_map = {
        "hidden_act": "activation",
        "hidden_size": "dim",
        "intermediate_size": "hidden_dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }
    config_defaults = {
        "hidden_act": "gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "num_attention_heads": 12,
        "num_hidden_layers": 6,
        "vocab_size": 30522,
    }
    mapper = WeightsMapper(
        renames=[
            (r"^distilbert\.", ""),
            *EMBEDDINGS[4:],
            *EMBEDDINGS[:4],
            (r"^transformer\.layer\.", "model.layers."),
            (r"\.attention\.([qkv])_lin\.", r".self_attn.\1_proj."),
            (r"\.attention\.out_lin\.", ".self_attn.o_proj."),
            (r"\.sa_layer_norm\.", ".attention_norm."),
            (r"\.ffn\.lin1\.", ".mlp.up_proj."),
            (r"\.ffn\.lin2\.", ".mlp.down_proj."),
            (r"\.output_layer_norm\.", ".mlp_norm."),
            (r"^pre_classifier\.", "head.dense."),
            (r"^classifier\.", "head.out."),
        ],
        ignored=MLM_HEADS,
    )

    def __init__(self, context: ModelContext) -> None:
        super().__init__(context, bert_parts(context, num_types=0), first_token_head(context, "relu"))


class MPNetModel(Encoder):
    """RoBERTa's positions, and biases of the scores by distance."""

    config_defaults = {
        **{name: value for name, value in BERT_DEFAULTS.items() if not name.startswith(("type_", "position_"))},
        "pad_token_id": 1,
        "relative_attention_num_buckets": 32,
        "vocab_size": 30527,
    }
    mapper = WeightsMapper(
        renames=[
            (r"^mpnet\.", ""),
            *EMBEDDINGS[4:],
            *EMBEDDINGS[:4],
            (r"^encoder\.layer\.", "model.layers."),
            (r"^encoder\.relative_attention_bias\.", "model.position_biases."),
            (r"\.attention\.attn\.([qkvo])\.", r".self_attn.\1_proj."),
            (r"\.attention\.LayerNorm\.", ".attention_norm."),
            *MLP_NAMES,
            *CLASSIFIER_NAMES,
        ],
        ignored=MLM_HEADS,
    )

    @classmethod
    def configure(cls, config: HFConfig) -> HFConfig:
        return without_padding_rows(super().configure(config), 2)

    def __init__(self, context: ModelContext) -> None:
        biases = DistanceBiases(context, context.config.size("relative_attention_num_buckets"))
        parts = bert_parts(context, num_types=0, position_offset=2, biases=biases)
        super().__init__(context, parts, first_token_head(context))
