"""AFM-4.5B (Arcee AI, 2025): Llama with an MLP without a gate, with squared ReLU."""

from __future__ import annotations

from executor.layers.mlp import MLP
from executor.models.llama import LlamaForCausalLM


class ArceeForCausalLM(LlamaForCausalLM):
    mlp = MLP
    config_defaults = {
        "attention_bias": False,
        "eos_token_id": 128001,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
    }
