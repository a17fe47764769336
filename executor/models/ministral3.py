"""Ministral 3 (arXiv:2601.08584): Mistral with YaRN, whose queries grow with their positions as in Llama 4."""

from __future__ import annotations

import torch
from torch import Tensor

from executor.hf_config import MAX_POSITIONS
from executor.layers.context import ModelContext
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.decoder import CausalDecoder, DecoderParts


class Ministral3ForCausalLM(CausalDecoder):
    config_defaults = {
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 262144,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        beta = config.rope.number("llama_4_scaling_beta")
        length = config.rope.size("original_max_position_embeddings", most=MAX_POSITIONS)
        window = config.size("sliding_window") if config.has("sliding_window") else None

        def query_scale(positions: Tensor) -> Tensor:
            """Scores keep their sharpness in contexts longer than the training's."""
            return 1 + beta * torch.log(1 + torch.floor(positions / length))

        rotary = RotaryEmbedding(context, query_scale=query_scale)

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, sliding_window=window, prefix=prefix)

        super().__init__(context, DecoderParts(attention))
