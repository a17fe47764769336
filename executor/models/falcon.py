"""Falcon (Almazrouei et al., arXiv:2311.16867): attention and MLP side by side, an MLP without a gate.

Falcon 7B has one KV head, and one norm for both blocks. The newer architecture of Falcon 40B has several KV heads, and
a norm for each block. In Falcon RW the blocks follow each other, and positions are biases of the scores.
"""

from __future__ import annotations

from executor.hf_config import HFConfig
from executor.layers.context import ModelContext
from executor.layers.mlp import MLP
from executor.layers.norm import LayerNorm
from executor.layers.positions import alibi_slopes
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.bloom import LAYER_NAMES
from executor.models.decoder import CausalDecoder, DecoderLayer, DecoderParts, Norms, ParallelDecoderLayer

SEQUENTIAL = Norms(before_attention="input_layernorm", before_mlp="post_attention_layernorm")
ONE_NORM = Norms(before_attention="input_layernorm")
TWO_NORMS = Norms(before_attention="ln_attn", before_mlp="ln_mlp")


def norms_of(config: HFConfig) -> Norms:
    """The norms of a layer."""
    is_new = config.boolean("new_decoder_architecture")
    if not is_new and not config.boolean("parallel_attn"):
        return SEQUENTIAL
    return TWO_NORMS if is_new and config.size("num_ln_in_parallel_attn", 2) == 2 else ONE_NORM


def count_kv_heads(config: HFConfig) -> int:
    if config.boolean("new_decoder_architecture"):
        return config.num_kv_heads
    return 1 if config.boolean("multi_query") else config.num_heads


class FalconForCausalLM(CausalDecoder):
    attribute_map = {
        "hidden_act": "activation",
        "intermediate_size": "ffn_hidden_size",
        "num_key_value_heads": "num_kv_heads",
    }
    config_defaults = {
        "alibi": False,
        "bias": False,
        "eos_token_id": 11,
        "hidden_act": "gelu",
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 2048,
        "multi_query": True,
        "new_decoder_architecture": False,
        "parallel_attn": True,
        "tie_word_embeddings": True,
    }
    mapper = WeightsMapper(
        renames=[
            (r"^transformer\.word_embeddings\.", "model.embed_tokens."),
            (r"^transformer\.ln_f\.", "model.norm."),
            (r"^transformer\.h\.", "model.layers."),
            *LAYER_NAMES,
        ]
    )

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        has_biases = config.boolean("alibi")
        rotary = None if has_biases else RotaryEmbedding(context)
        slopes = tuple(slope * config.head_dim**-0.5 for slope in alibi_slopes(config.num_heads))
        bias, eps = config.boolean("bias"), config.epsilon("layer_norm_epsilon")
        inner = config.size("intermediate_size", 4 * config.hidden_size)
        kv_heads, norms = count_kv_heads(config), norms_of(config)

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(
                context,
                rotary,
                qkv_bias=bias,
                out_bias=bias,
                num_kv_heads=kv_heads,
                is_grouped=True,
                alibi_slopes=slopes if has_biases else None,
                prefix=prefix,
            )

        parts = DecoderParts(
            attention,
            lambda index, prefix: MLP(context, inner, bias=bias, prefix=prefix),
            lambda size: LayerNorm(context, size, eps),
            DecoderLayer if norms is SEQUENTIAL else ParallelDecoderLayer,
            norms,
        )
        super().__init__(context, parts)
