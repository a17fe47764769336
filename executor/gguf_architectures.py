"""What llama.cpp's converter does to each architecture, and how to undo it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf import MODEL_TENSOR, Keys

from executor.base import ModelError
from executor.hf_config import MAX_POSITIONS, Fields

Config = dict[str, Any]
"""Fields of config.json."""


def nothing(fields: Fields, config: Config) -> None:
    """For architectures without fields of their own."""


UNUSED = r"^rope_(freqs|factors_(short|long))\.weight$"  # read with the configuration


@dataclass(frozen=True)
class Architecture:
    """An architecture as llama.cpp writes it."""

    model: str
    """The ``architectures`` of config.json."""
    permuted: Mapping[MODEL_TENSOR, str] = field(default_factory=dict)
    """Tensors whose rows are reordered so that columns rotated together are adjacent, with the field of their head
    count."""
    ungrouped: Collection[MODEL_TENSOR] = ()
    """Tensors with q, k and v one after the other, which the model has by KV head."""
    has_q_k_v_apart: bool = False
    """Whether the model has q, k and v as three tensors. Files may have them as one."""
    by_head: Collection[MODEL_TENSOR] = ()
    """Matrices that files have apart for each head, [heads, rows, columns], and the model in one."""
    transposed: Collection[MODEL_TENSOR] = ()
    """Matrices that the model has transposed."""
    renames: Sequence[tuple[str, str]] = ()
    """Regular expressions from the names of modules that the ``gguf`` package knows to ours."""
    unused: str = UNUSED
    """Regular expression of tensors that need not have a place in the model."""
    has_experts: bool = False
    """Whether models with experts are supported."""
    norm_offset: float = 0.0
    """What the converter added to the weights of norms."""
    configure: Callable[[Fields, Config], None] = nothing
    """Completes the configuration. Takes the header's fields and the configuration."""


def gemma(fields: Fields, config: Config) -> None:
    """Gemma 2 and 3. llama.cpp knows the pattern of the layers, the base of those with windows, and the scale."""
    arch = config["model_type"]
    window = Keys.Attention.SLIDING_WINDOW.format(arch=arch)
    config["sliding_window"] = fields.size(window, most=MAX_POSITIONS)
    for name, key in (
        ("attn_logit_softcapping", Keys.LLM.ATTN_LOGIT_SOFTCAPPING),
        ("final_logit_softcapping", Keys.LLM.FINAL_LOGIT_SOFTCAPPING),
    ):
        stored = key.format(arch=arch)
        config[name] = fields.number(stored) if fields.has(stored) else None
    largest = {"gemma2": 46, "gemma3": 62}[arch]  # layers of the 27B models
    config["query_pre_attn_scalar"] = (
        config["hidden_size"] // config["num_attention_heads"]
        if config["num_hidden_layers"] == largest
        else config["head_dim"]
    )
    if arch == "gemma3":
        local = fields.number(f"{arch}.rope.freq_base_swa", 10000.0)
        config["rope_parameters"] = {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }


def gemma4(fields: Fields, config: Config) -> None:
    """The factors of the frequencies of global layers are a tensor."""
    arch = config["model_type"]
    windows(fields, config)
    is_sliding = [kind == "sliding_attention" for kind in config.get("layer_types", ())]
    if len(set(is_sliding)) != 2:
        fields.bad(Keys.Attention.SLIDING_WINDOW_PATTERN.format(arch=arch), "a list of flags, true and false")
    kv_heads = fields.get(Keys.Attention.HEAD_COUNT_KV.format(arch=arch))
    if isinstance(kv_heads, list):
        config["num_key_value_heads"] = kv_heads[is_sliding.index(True)]
        config["num_global_key_value_heads"] = kv_heads[is_sliding.index(False)]
    inner = fields.get(Keys.LLM.FEED_FORWARD_LENGTH.format(arch=arch))
    if isinstance(inner, list):
        config["intermediate_size"] = inner[0]
        config["use_double_wide_mlp"] = inner[-1] == 2 * inner[0]
    config["global_head_dim"] = config["head_dim"]
    config["head_dim"] = fields.size(Keys.Attention.KEY_LENGTH_SWA.format(arch=arch))
    config["num_kv_shared_layers"] = fields.integer(Keys.Attention.SHARED_KV_LAYERS.format(arch=arch), 0)
    config["hidden_size_per_layer_input"] = fields.integer(Keys.LLM.EMBD_LENGTH_PER_LAYER_INP.format(arch=arch), 0)
    cap = Keys.LLM.FINAL_LOGIT_SOFTCAPPING.format(arch=arch)
    config["final_logit_softcapping"] = fields.number(cap) if fields.has(cap) else None
    local = fields.number(Keys.Rope.FREQ_BASE_SWA.format(arch=arch), 10000.0)
    config["rope_parameters"] = {
        "full_attention": config["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


def windows(fields: Fields, config: Config) -> None:
    """Windows with the layers that have them: a list of flags, or every layer but each n-th."""
    arch = config["model_type"]
    window = Keys.Attention.SLIDING_WINDOW.format(arch=arch)
    config["sliding_window"] = fields.size(window, most=MAX_POSITIONS) if fields.integer(window, 0) else None
    stored = Keys.Attention.SLIDING_WINDOW_PATTERN.format(arch=arch)
    if config["sliding_window"] is None or not fields.has(stored):
        return
    pattern = fields.get(stored)
    if isinstance(pattern, list) and len(pattern) == config["num_hidden_layers"]:
        flags = [bool(flag) for flag in pattern]
    else:
        period = fields.size(stored)
        flags = [(index + 1) % period != 0 for index in range(config["num_hidden_layers"])]
    config["layer_types"] = ["sliding_attention" if flag else "full_attention" for flag in flags]


def olmo2(fields: Fields, config: Config) -> None:
    """OLMo 3 is an OLMo 2 with windows, in whose layers angles are not scaled."""
    windows(fields, config)
    if config["sliding_window"] is not None:
        config["architectures"] = ["Olmo3ForCausalLM"]
        rope = config["rope_parameters"]
        local = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}


def granite(fields: Fields, config: Config) -> None:
    arch = config["model_type"]
    for name, key, default in (
        ("attention_multiplier", Keys.Attention.SCALE, config["head_dim"] ** -0.5),
        ("embedding_multiplier", Keys.LLM.EMBEDDING_SCALE, 1.0),
        ("logits_scaling", Keys.LLM.LOGIT_SCALE, 1.0),
        ("residual_multiplier", Keys.LLM.RESIDUAL_SCALE, 1.0),
    ):
        config[name] = fields.number(key.format(arch=arch), default)
    if not fields.boolean(Keys.Rope.SCALING_FINETUNED.format(arch=arch), True):
        raise ModelError(f"{fields.source}: Granite models without rotary embeddings are not supported yet")


def phi3(fields: Fields, config: Config) -> None:
    windows(fields, config)
    length = config["rope_parameters"].get("original_max_position_embeddings", config["max_position_embeddings"])
    config["original_max_position_embeddings"] = length


def mistral3(fields: Fields, config: Config) -> None:
    """Ministral 3 scales its queries; other Mistral models with this name are Llamas."""
    scale = Keys.Attention.TEMPERATURE_SCALE.format(arch=config["model_type"])
    if fields.has(scale):
        config["rope_parameters"]["llama_4_scaling_beta"] = fields.number(scale)
    else:
        config["architectures"] = ["LlamaForCausalLM"]


def lfm2(fields: Fields, config: Config) -> None:
    """Layers without KV heads are convolutions."""
    arch = config["model_type"]
    heads = fields.get(Keys.Attention.HEAD_COUNT_KV.format(arch=arch))
    by_layer = heads if isinstance(heads, list) else [heads] * config["num_hidden_layers"]
    config["layer_types"] = ["full_attention" if count else "conv" for count in by_layer]
    config["conv_L_cache"] = fields.size(Keys.ShortConv.L_CACHE.format(arch=arch))
    config["block_auto_adjust_ff_dim"] = False  # the file has the size that results


def falcon(fields: Fields, config: Config) -> None:
    """Falcon 7B has one KV head; the newer architecture of the others several."""
    config["bias"] = config["attention_bias"]
    config["new_decoder_architecture"] = config["num_key_value_heads"] > 1


def biases(fields: Fields, config: Config) -> None:
    """Families with names of their own for biases that the file has or not."""
    config["use_bias"] = config["use_qkv_bias"] = config["attention_bias"]


def cohere(fields: Fields, config: Config) -> None:
    arch = config["model_type"]
    config["logit_scale"] = fields.number(Keys.LLM.LOGIT_SCALE.format(arch=arch))
    if arch == "cohere2":
        windows(fields, config)


def gpt_neox(fields: Fields, config: Config) -> None:
    config["use_parallel_residual"] = fields.boolean(Keys.LLM.USE_PARALLEL_RESIDUAL.format(arch=config["model_type"]))


def olmo(fields: Fields, config: Config) -> None:
    limit = Keys.Attention.CLAMP_KQV.format(arch=config["model_type"])
    config["clip_qkv"] = fields.number(limit) if fields.has(limit) else None


def experts(fields: Fields, config: Config) -> None:
    """What all models with experts have, under the names of each family."""
    arch = config["model_type"]
    count = fields.size(Keys.LLM.EXPERT_COUNT.format(arch=arch))
    config |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), count)
    config["num_experts_per_tok"] = fields.size(Keys.LLM.EXPERT_USED_COUNT.format(arch=arch))
    inner = Keys.LLM.EXPERT_FEED_FORWARD_LENGTH.format(arch=arch)
    config["moe_intermediate_size"] = fields.size(inner, config["intermediate_size"])


def llama(fields: Fields, config: Config) -> None:
    """Mixtral is a Llama with experts."""
    if fields.get(Keys.LLM.EXPERT_COUNT.format(arch=config["model_type"])):
        experts(fields, config)
        config["architectures"] = ["MixtralForCausalLM"]


def qwen3_moe(fields: Fields, config: Config) -> None:
    """llama.cpp divides the weights by their sum, as all released models do."""
    experts(fields, config)
    config["norm_topk_prob"] = True


def olmoe(fields: Fields, config: Config) -> None:
    olmo(fields, config)
    experts(fields, config)
    config["intermediate_size"] = config["moe_intermediate_size"]


def gpt_oss(fields: Fields, config: Config) -> None:
    """llama.cpp knows which layers have windows."""
    experts(fields, config)
    config["intermediate_size"] = config["moe_intermediate_size"]
    window = Keys.Attention.SLIDING_WINDOW.format(arch=config["model_type"])
    config["sliding_window"] = fields.size(window, most=MAX_POSITIONS)
    config["rope_parameters"]["truncate"] = False


def shared_experts(fields: Fields, config: Config) -> None:
    """Experts of which all tokens share some, after dense layers."""
    arch = config["model_type"]
    experts(fields, config)
    config["first_k_dense_replace"] = fields.integer(Keys.LLM.LEADING_DENSE_BLOCK_COUNT.format(arch=arch))
    config["n_shared_experts"] = fields.integer(Keys.LLM.EXPERT_SHARED_COUNT.format(arch=arch), 0)
    config["norm_topk_prob"] = fields.boolean(Keys.LLM.EXPERT_WEIGHTS_NORM.format(arch=arch), False)
    config["routed_scaling_factor"] = fields.number(Keys.LLM.EXPERT_WEIGHTS_SCALE.format(arch=arch), 1.0)
    config["num_mtp_layers"] = fields.integer(Keys.LLM.NEXTN_PREDICT_LAYERS.format(arch=arch), 0)
    if config["num_mtp_layers"] >= config["num_hidden_layers"]:
        fields.bad(Keys.LLM.NEXTN_PREDICT_LAYERS.format(arch=arch), "fewer than the layers")
    config["num_hidden_layers"] -= config["num_mtp_layers"]


def deepseek2(fields: Fields, config: Config) -> None:
    """DeepSeek-V2, V3, Kimi K2 and GLM-4.7-Flash: the function of the router's scores tells which. Older files lack it,
    and V3's groups."""
    arch = config["model_type"]
    shared_experts(fields, config)
    rope_dim = fields.size(Keys.Rope.DIMENSION_COUNT.format(arch=arch))
    sizes = {}
    for name, own, older in (
        ("key", Keys.Attention.KEY_LENGTH_MLA, Keys.Attention.KEY_LENGTH),
        ("value", Keys.Attention.VALUE_LENGTH_MLA, Keys.Attention.VALUE_LENGTH),
    ):  # files with matrices apart give the sizes of the absorbed form under the older names
        stored = own if fields.has(own.format(arch=arch)) else older
        sizes[name] = fields.size(stored.format(arch=arch))
    if sizes["key"] <= rope_dim:
        fields.bad(Keys.Rope.DIMENSION_COUNT.format(arch=arch), f"below the size of a key, {sizes['key']}")
    q_rank = Keys.Attention.Q_LORA_RANK.format(arch=arch)
    groups = fields.size(Keys.LLM.EXPERT_GROUP_COUNT.format(arch=arch), 1)
    config |= {
        "head_dim": rope_dim,
        "kv_lora_rank": fields.size(Keys.Attention.KV_LORA_RANK.format(arch=arch)),
        "q_lora_rank": fields.size(q_rank) if fields.has(q_rank) else None,
        "qk_nope_head_dim": sizes["key"] - rope_dim,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": sizes["value"],
        "n_group": groups,
        "topk_group": fields.size(Keys.LLM.EXPERT_GROUP_USED_COUNT.format(arch=arch), groups),
        "topk_method": "greedy" if groups == 1 else "group_limited_greedy",
        "attention_bias": False,
    }
    config["rope_parameters"].pop("partial_rotary_factor", None)
    if config["rope_parameters"].get("mscale_all_dim"):  # the files have a tenth of it
        scale = 10 * config["rope_parameters"]["mscale_all_dim"]
        config["rope_parameters"] |= {"mscale": scale, "mscale_all_dim": scale}
    if fields.integer(Keys.LLM.EXPERT_GATING_FUNC.format(arch=arch), SOFTMAX) == SIGMOID:
        config["architectures"] = ["DeepseekV3ForCausalLM"]
    else:
        config["norm_topk_prob"] = False


SOFTMAX, SIGMOID = 1, 2
"""Functions that turn a router's logits into scores (``ExpertGatingFuncType``)."""

PERMUTED = {MODEL_TENSOR.ATTN_Q: "num_attention_heads", MODEL_TENSOR.ATTN_K: "num_key_value_heads"}
"""What the converter does to Llama and those that it treats as Llama."""

ARCHITECTURES: Mapping[str, Architecture] = {
    "arcee": Architecture("ArceeForCausalLM", PERMUTED),
    "chatglm": Architecture("GlmForCausalLM", has_q_k_v_apart=True),
    "cohere2": Architecture("Cohere2ForCausalLM", configure=cohere),
    "command-r": Architecture("CohereForCausalLM", configure=cohere),
    "deepseek2": Architecture(
        "DeepseekV2ForCausalLM",
        by_head=(MODEL_TENSOR.ATTN_K_B, MODEL_TENSOR.ATTN_V_B),
        has_experts=True,
        configure=deepseek2,
    ),
    "ernie4_5": Architecture("Ernie4_5ForCausalLM", configure=biases),
    "exaone4": Architecture("Exaone4ForCausalLM", configure=windows),
    "falcon": Architecture(
        "FalconForCausalLM",
        ungrouped=(MODEL_TENSOR.ATTN_QKV,),
        renames=((r"^transformer\.h\.(\d+)\.(ln_attn|ln_mlp)$", r"model.layers.\1.\2"),),
        configure=falcon,
    ),
    "gemma": Architecture("GemmaForCausalLM", norm_offset=1.0),
    "gemma2": Architecture("Gemma2ForCausalLM", norm_offset=1.0, configure=gemma),
    "gemma3": Architecture("Gemma3ForCausalLM", norm_offset=1.0, configure=gemma),
    "gemma4": Architecture(
        "Gemma4ForCausalLM",
        unused=rf"{UNUSED}|\.attn_(k|v|k_norm)\.weight$",  # layers that read K and V of others
        configure=gemma4,
    ),
    "glm4": Architecture("Glm4ForCausalLM"),
    "glm4moe": Architecture("Glm4MoeForCausalLM", has_experts=True, configure=shared_experts),
    "gpt-oss": Architecture("GptOssForCausalLM", has_experts=True, configure=gpt_oss),
    "gpt2": Architecture("GPT2LMHeadModel"),
    "gptneox": Architecture("GPTNeoXForCausalLM", ungrouped=(MODEL_TENSOR.ATTN_QKV,), configure=gpt_neox),
    "granite": Architecture("GraniteForCausalLM", PERMUTED, configure=granite),
    "internlm2": Architecture("LlamaForCausalLM", PERMUTED),  # with q, k and v apart
    "lfm2": Architecture(
        "Lfm2ForCausalLM",
        transposed=(MODEL_TENSOR.SHORTCONV_CONV,),
        renames=(
            (r"^model\.embedding_norm$", "model.norm"),
            (r"\.conv\.(in_proj|out_proj|conv)$", r".self_attn.\1"),
        ),
        configure=lfm2,
    ),
    "llama": Architecture("LlamaForCausalLM", PERMUTED, has_experts=True, configure=llama),
    "mistral3": Architecture("Ministral3ForCausalLM", PERMUTED, configure=mistral3),
    "nemotron": Architecture("NemotronForCausalLM"),
    "olmo": Architecture("OlmoForCausalLM", PERMUTED, configure=olmo),
    "olmo2": Architecture("Olmo2ForCausalLM", configure=olmo2),
    "olmoe": Architecture("OlmoeForCausalLM", has_experts=True, configure=olmoe),
    "phi2": Architecture("PhiForCausalLM"),
    "phi3": Architecture("Phi3ForCausalLM", configure=phi3),
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen2vl": Architecture("Qwen2ForCausalLM"),  # text has one position on all three axes, so angles are Qwen2's
    "qwen3": Architecture("Qwen3ForCausalLM"),
    "qwen3moe": Architecture("Qwen3MoeForCausalLM", has_experts=True, configure=qwen3_moe),
    "qwen3vl": Architecture("Qwen3ForCausalLM"),
    "seed_oss": Architecture("SeedOssForCausalLM"),
    "smollm3": Architecture("SmolLM3ForCausalLM", PERMUTED),
    "stablelm": Architecture("StableLmForCausalLM", configure=biases),
    "starcoder2": Architecture("Starcoder2ForCausalLM", configure=biases),
}
"""By ``general.architecture``. Mistral's files also say llama."""
