"""Encoders, each with a tiny configuration in which every fact matters; see ``families.py``."""

from __future__ import annotations

from collections.abc import Mapping

from tests.family import COMMON, FULL, REMOVED, SLIDING, Family, Fields, no_rope, old_rope

BERT: Fields = {
    "rms_norm_eps": REMOVED,
    "num_key_value_heads": REMOVED,
    "tie_word_embeddings": REMOVED,
    "max_position_embeddings": 300,
    "layer_norm_eps": 0.01,
    "hidden_act": "gelu",
}
ROBERTA: Fields = {**BERT, "pad_token_id": 1, "type_vocab_size": 1}


def old_modernbert(config: Fields) -> None:
    """A base for each type of layer, and a number instead of ``layer_types``."""
    rope = config.pop("rope_parameters")
    config["global_rope_theta"], config["local_rope_theta"] = (rope[kind]["rope_theta"] for kind in (FULL, SLIDING))
    assert config.pop("layer_types") == [FULL, SLIDING, FULL]
    config["global_attn_every_n_layers"] = 2


def old_nomic(config: Fields) -> None:
    """Nomic's own names."""
    own = {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "layer_norm_eps": "layer_norm_epsilon",
        "max_position_embeddings": "max_trained_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    for name, other in own.items():
        config[other] = config.pop(name)
    config["rotary_emb_base"] = config.pop("rope_parameters")["rope_theta"]
    del config["hidden_act"], config["head_dim"]
    config |= {"activation_function": "swiglu", "rotary_emb_interleaved": False, "prenorm": False, "n_positions": 8192}


def old_gte(config: Fields) -> None:
    """The name of the authors' code."""
    config["architectures"] = [name.replace("Gte", "New") for name in config["architectures"]]
    old_rope(config)


def old_jina(config: Fields) -> None:
    """XLM-R's names, as the authors' code has them."""
    config["rotary_emb_base"] = config.pop("rope_parameters")["rope_theta"]
    config |= {"architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta", "position_embedding_type": "rotary"}


ENCODERS: Mapping[str, Family] = {
    "bert": Family("BertConfig", "BertModel", BERT, no_rope),
    "distilbert": Family(
        "DistilBertConfig",
        "DistilBertModel",
        {
            **{name: REMOVED for name in COMMON if name.startswith(("num_", "hidden", "inter", "rms", "tie"))},
            "dim": 64,
            "hidden_dim": 96,
            "n_layers": 3,
            "n_heads": 4,
            "max_position_embeddings": 300,
        },
        no_rope,
    ),
    "embeddinggemma": Family(
        "Gemma3TextConfig",
        "Gemma3TextModel",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 11,
            "sliding_window": 22,
            "layer_types": [SLIDING, FULL, SLIDING],
            "use_bidirectional_attention": True,
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
                SLIDING: {"rope_type": "default", "rope_theta": 500.0},
            },
        },
        no_rope,
    ),
    "gte": Family(
        "GteConfig",
        "GteModel",
        {**BERT, "max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0}},
        old_gte,
    ),
    "jina": Family(
        "JinaEmbeddingsV3Config",
        "JinaEmbeddingsV3Model",
        {**ROBERTA, "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0}},
        old_jina,
    ),
    "modernbert": Family(
        "ModernBertConfig",
        "ModernBertModel",
        {
            **dict.fromkeys(("rms_norm_eps", "num_key_value_heads", "tie_word_embeddings"), REMOVED),
            "norm_eps": 0.01,
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "local_attention": 22,
            "layer_types": [FULL, SLIDING, FULL],
            "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": 50000.0},
                SLIDING: {"rope_type": "default", "rope_theta": 500.0},
            },
            "cls_token_id": 0,
            "sep_token_id": 2,
        },
        old_modernbert,
    ),
    "mpnet": Family("MPNetConfig", "MPNetModel", {**BERT, "pad_token_id": 1}, no_rope),
    "nomic": Family(
        "NomicBertConfig",
        "NomicBertModel",
        {
            **BERT,
            "max_position_embeddings": 512,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0},
        },
        old_nomic,
    ),
    "roberta_encoder": Family("RobertaConfig", "RobertaModel", ROBERTA, no_rope),
    "xlm_roberta": Family("XLMRobertaConfig", "XLMRobertaModel", {**ROBERTA, "type_vocab_size": 2}, no_rope),
}
