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
    has_merged_qkv: bool = False
    """Whether the model has a tensor of this name. Others have q, k and v, which files may hold in one."""
    by_head: Collection[MODEL_TENSOR] = ()
    """Matrices that files have apart for each head, [heads, rows, columns], and the model in one."""
    transposed: Collection[MODEL_TENSOR] = ()
    """Matrices that the model has transposed."""
    renames: Sequence[tuple[str, str]] = ()
    """Regular expressions from the names of modules that the ``gguf`` package knows to ours."""
    unused: str = UNUSED
    """Regular expression of tensors that need not have a place in the model."""
    others: Sequence[tuple[str, str]] = ()
    """Regular expressions from our names of tensors that the ``gguf`` package does not know to those in the file."""
    has_experts: bool = False
    """Whether models with experts are supported."""
    has_attention: bool = True
    """False: the file has no sizes of heads, nor of MLPs."""
    also: Collection[str] = ()
    """Other ``architectures`` whose files have the same name."""
    norm_offset: float = 0.0
    """What the converter added to the weights of norms."""
    configure: Callable[[Fields, Config], None] = nothing
    """Completes the configuration. Takes the header's fields and the configuration, which has the shapes of the file's
    tensors as ``tensors`` meanwhile."""

    def is_of(self, model: str) -> bool:
        """Whether files of a model of config.json have this architecture's name."""
        return model == self.model or model in self.also


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
    if fields.get(Keys.LLM.EXPERT_COUNT.format(arch=arch)):
        experts(fields, config)
        config |= {"enable_moe_block": True, "top_k_experts": config["num_experts_per_tok"]}
    local = fields.number(Keys.Rope.FREQ_BASE_SWA.format(arch=arch), 10000.0)
    config["rope_parameters"] = {
        "full_attention": config["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


def axes(fields: Fields, config: Config) -> None:
    """Qwen2-VL, Qwen3-VL and Qwen3.5: the angles that each axis of a position turns. Text's are equal on all axes."""
    arch = config["model_type"]
    name = Keys.Rope.DIMENSION_SECTIONS.format(arch=arch)
    if fields.has(name):
        config["rope_parameters"] |= {
            "mrope_section": [int(number) for number in fields.numbers(name)[:3]],
            "mrope_interleaved": arch != "qwen2vl",
        }


def qwen3_vl_moe(fields: Fields, config: Config) -> None:
    axes(fields, config)
    qwen3_moe(fields, config)


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


def granite_factors(fields: Fields, config: Config) -> None:
    arch = config["model_type"]
    for name, key, default in (
        ("attention_multiplier", Keys.Attention.SCALE, config["head_dim"] ** -0.5),
        ("embedding_multiplier", Keys.LLM.EMBEDDING_SCALE, 1.0),
        ("logits_scaling", Keys.LLM.LOGIT_SCALE, 1.0),
        ("residual_multiplier", Keys.LLM.RESIDUAL_SCALE, 1.0),
    ):
        config[name] = fields.number(key.format(arch=arch), default)


def granite(fields: Fields, config: Config) -> None:
    granite_factors(fields, config)
    if not is_rotated(fields, config):
        raise ModelError(f"{fields.source}: Granite models without rotary embeddings are not supported yet")


def is_rotated(fields: Fields, config: Config) -> bool:
    """Whether attention of Granite has rotary embeddings."""
    return fields.boolean(Keys.Rope.SCALING_FINETUNED.format(arch=config["model_type"]), True)


def phi3(fields: Fields, config: Config) -> None:
    windows(fields, config)
    length = config["rope_parameters"].get("original_max_position_embeddings", config["max_position_embeddings"])
    config["original_max_position_embeddings"] = length


PHIMOE_MSCALE = 1.243163121016122
"""What the angles of Phi-3.5-MoE are multiplied with."""


def phimoe(fields: Fields, config: Config) -> None:
    """The converter computes the factor of the angles as for Phi-3."""
    phi3(fields, config)
    if (config["original_max_position_embeddings"], config["max_position_embeddings"]) == (4096, 131072):
        config["rope_parameters"]["attention_factor"] = PHIMOE_MSCALE
    experts(fields, config)
    config |= {"lm_head_bias": "output.bias" in config["tensors"]}


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


def lfm2_moe(fields: Fields, config: Config) -> None:
    """llama.cpp divides the weights by their sum and has no factor, as with the released model."""
    lfm2(fields, config)
    experts(fields, config)
    config |= {
        "norm_topk_prob": True,
        "num_dense_layers": min(layers_with(config, "ffn_gate_inp.weight"), default=0),
        "routed_scaling_factor": 1.0,
        "use_expert_bias": bool(layers_with(config, "exp_probs_b.bias")),
    }


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


def granite_moe(fields: Fields, config: Config) -> None:
    granite(fields, config)
    experts(fields, config)
    config["intermediate_size"] = config["moe_intermediate_size"]
    if layers_with(config, "ffn_up_shexp.weight"):
        config |= {"architectures": ["GraniteMoeSharedForCausalLM"], "has_split_gate_up": True}
        config["shared_intermediate_size"] = shared_size(fields, config)


def shared_size(fields: Fields, config: Config) -> int:
    """Intermediate size of the expert that all tokens share."""
    name = Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH.format(arch=config["model_type"])
    found = [
        config["tensors"][f"blk.{layer}.ffn_up_shexp.weight"] for layer in layers_with(config, "ffn_up_shexp.weight")
    ]
    return fields.size(name, found[0][0] if found and found[0] else None)


def qwen2_moe(fields: Fields, config: Config) -> None:
    """llama.cpp does not divide weights by their sum, as with the released models."""
    experts(fields, config)
    config |= {"shared_expert_intermediate_size": shared_size(fields, config), "norm_topk_prob": False}


def llama4(fields: Fields, config: Config) -> None:
    """llama.cpp knows the chunks, the layers that are not rotated, and which model has no norms of q and k."""
    arch = config["model_type"]
    config["intermediate_size_mlp"] = config["intermediate_size"]
    experts(fields, config)
    config["intermediate_size"] = config["moe_intermediate_size"]
    config["interleave_moe_layer_step"] = fields.size(Keys.LLM.INTERLEAVE_MOE_LAYER_STEP.format(arch=arch))
    config["use_qk_norm"] = config["num_experts"] != MAVERICK_EXPERTS
    if fields.get(Keys.Attention.SLIDING_WINDOW.format(arch=arch)) == 0:
        config |= {"attention_chunk_size": None, "no_rope_layers": [1] * config["num_hidden_layers"]}
        config["attn_temperature_tuning"] = False


MAVERICK_EXPERTS = 128
"""Of the model without norms of q and k."""


def layers_with(config: Config, name: str) -> list[int]:
    """The layers that have a tensor of this name."""
    return [layer for layer in range(config["num_hidden_layers"]) if f"blk.{layer}.{name}" in config["tensors"]]


def without_predictors(fields: Fields, config: Config) -> None:
    """Leaves out the last layers, if they predict further tokens."""
    stored = Keys.LLM.NEXTN_PREDICT_LAYERS.format(arch=config["model_type"])
    config["num_mtp_layers"] = fields.integer(stored, 0)
    if config["num_mtp_layers"] >= config["num_hidden_layers"]:
        fields.bad(stored, "fewer than the layers")
    config["num_hidden_layers"] -= config["num_mtp_layers"]


def state_sizes(fields: Fields, config: Config) -> tuple[int, int, int, int, int]:
    """Of a recurrence: heads, size of each, groups of heads, rows of a state, and length of the convolution."""
    arch = config["model_type"]
    heads, inner, groups, rows, length = (
        fields.size(key.format(arch=arch))
        for key in (
            Keys.SSM.TIME_STEP_RANK,
            Keys.SSM.INNER_SIZE,
            Keys.SSM.GROUP_COUNT,
            Keys.SSM.STATE_SIZE,
            Keys.SSM.CONV_KERNEL,
        )
    )
    if inner % heads:
        fields.bad(Keys.SSM.INNER_SIZE.format(arch=arch), f"a multiple of the heads, {heads}")
    return heads, inner // heads, groups, rows, length


NO_LENGTH = 1 << 20
"""The context length of files whose model has none."""


def mamba2(fields: Fields, config: Config) -> None:
    heads, size, groups, rows, length = state_sizes(fields, config)
    has_bias = bool(layers_with(config, "ssm_in.bias"))
    config |= {"num_heads": heads, "head_dim": size, "n_groups": groups, "state_size": rows, "conv_kernel": length}
    config |= {"expand": heads * size // config["hidden_size"], "use_bias": has_bias}
    config["use_conv_bias"] = bool(layers_with(config, "ssm_conv1d.bias"))
    if config["max_position_embeddings"] == NO_LENGTH:
        del config["max_position_embeddings"]


def mamba_fields(fields: Fields, config: Config) -> None:
    """The recurrence, under the names of Bamba, Falcon-H1 and Granite 4."""
    heads, size, groups, rows, length = state_sizes(fields, config)
    config |= {
        "mamba_n_heads": heads,
        "mamba_d_head": size,
        "mamba_n_groups": groups,
        "mamba_d_state": rows,
        "mamba_d_conv": length,
        "mamba_d_ssm": heads * size,
        "mamba_expand": max(heads * size // config["hidden_size"], 1),
        "mamba_conv_bias": bool(layers_with(config, "ssm_conv1d.bias")),
        "mamba_proj_bias": bool(layers_with(config, "ssm_in.bias")),
    }


def granite_hybrid(fields: Fields, config: Config) -> None:
    """Granite 4, or Bamba, whose attention is rotated."""
    granite_factors(fields, config)
    mamba_fields(fields, config)
    attends = layers_with(config, "attn_output.weight")  # q may be a part of another tensor
    if is_rotated(fields, config):
        config |= {"architectures": ["BambaForCausalLM"], "attn_layer_indices": attends}
        return
    types = ["attention" if layer in attends else "mamba" for layer in range(config["num_hidden_layers"])]
    config |= {"layer_types": types, "num_local_experts": 0, "has_split_gate_up": True}
    ups = layers_with(config, "ffn_up.weight")
    shape = config["tensors"][f"blk.{ups[0]}.ffn_up.weight"] if ups else ()
    config["shared_intermediate_size"] = shape[0] if shape else config["intermediate_size"]
    if fields.get(Keys.LLM.EXPERT_COUNT.format(arch=config["model_type"])):
        experts(fields, config)
        config["intermediate_size"] = config["moe_intermediate_size"]
        config["shared_intermediate_size"] = shared_size(fields, config)
    if config["max_position_embeddings"] == NO_LENGTH:
        config["max_position_embeddings"] = 1 << 17  # as of the released models


def falcon_h1(fields: Fields, config: Config) -> None:
    """All factors are in the weights."""
    mamba_fields(fields, config)
    config["mamba_rms_norm"] = bool(layers_with(config, "ssm_norm.weight"))
    config["mamba_norm_before_gate"] = False
    config["projectors_bias"] = bool(layers_with(config, "ssm_out.bias"))


def nemotron_h(fields: Fields, config: Config) -> None:
    """What a layer is follows from its tensors."""
    arch = config["model_type"]
    heads, size, groups, rows, length = state_sizes(fields, config)
    config |= {"mamba_num_heads": heads, "mamba_head_dim": size, "n_groups": groups, "ssm_state_size": rows}
    config |= {"conv_kernel": length, "use_bias": bool(layers_with(config, "ssm_in.bias"))}
    config["use_conv_bias"] = bool(layers_with(config, "ssm_conv1d.bias"))
    without_predictors(fields, config)
    kinds = {"ssm_in": "linear_attention", "attn_output": "full_attention", "ffn_gate_inp": "moe", "ffn_up": "mlp"}
    types: dict[int, str] = {}
    for name, kind in kinds.items():
        for layer in layers_with(config, f"{name}.weight"):
            types.setdefault(layer, kind)
    if len(types) != config["num_hidden_layers"]:
        raise ModelError(f"{fields.source}: a layer has neither a recurrence nor attention nor an MLP")
    config["layers_block_type"] = [types[layer] for layer in range(config["num_hidden_layers"])]
    config["rope_parameters"].pop("partial_rotary_factor", None)
    if "moe" not in types.values():
        return
    experts(fields, config)
    latent = Keys.LLM.MOE_LATENT_SIZE.format(arch=arch)
    config |= {
        "moe_shared_expert_intermediate_size": shared_size(fields, config),
        "moe_latent_size": fields.size(latent) if fields.has(latent) else None,
        "norm_topk_prob": fields.boolean(Keys.LLM.EXPERT_WEIGHTS_NORM.format(arch=arch), True),
        "routed_scaling_factor": fields.number(Keys.LLM.EXPERT_WEIGHTS_SCALE.format(arch=arch), 1.0),
    }


def qwen3_next(fields: Fields, config: Config) -> None:
    """Qwen3-Next and Qwen3.5. The state's rows are those of a key; its heads those of values, by group."""
    heads, size, keys, rows, length = state_sizes(fields, config)
    without_predictors(fields, config)
    states = layers_with(config, "ssm_a")
    types = [
        "linear_attention" if layer in states else "full_attention" for layer in range(config["num_hidden_layers"])
    ]
    config |= {
        "layer_types": types,
        "linear_num_value_heads": heads,
        "linear_value_head_dim": size,
        "linear_num_key_heads": keys,
        "linear_key_head_dim": rows,
        "linear_conv_kernel_dim": length,
        "has_split_qkv": bool(layers_with(config, "ssm_ba.weight") and layers_with(config, "attn_gate.weight")),
    }
    if fields.get(Keys.LLM.EXPERT_COUNT.format(arch=config["model_type"])):
        experts(fields, config)
        config |= {"shared_expert_intermediate_size": shared_size(fields, config), "norm_topk_prob": True}


def qwen35(fields: Fields, config: Config) -> None:
    """llama.cpp has the heads of values in another order: first the first of each key head."""
    qwen3_next(fields, config)
    axes(fields, config)
    config["has_tiled_heads"] = True


def shared_experts(fields: Fields, config: Config) -> None:
    """Experts of which all tokens share some, after dense layers."""
    arch = config["model_type"]
    experts(fields, config)
    config["first_k_dense_replace"] = min(layers_with(config, "ffn_gate_inp.weight"), default=0)
    config["n_shared_experts"] = fields.integer(Keys.LLM.EXPERT_SHARED_COUNT.format(arch=arch), 0)
    config["norm_topk_prob"] = fields.boolean(Keys.LLM.EXPERT_WEIGHTS_NORM.format(arch=arch), False)
    config["routed_scaling_factor"] = fields.number(Keys.LLM.EXPERT_WEIGHTS_SCALE.format(arch=arch), 1.0)
    without_predictors(fields, config)


def expert_groups(fields: Fields, config: Config) -> int:
    """Adds the groups of experts, of which there is one if the file says nothing, and returns their number."""
    arch = config["model_type"]
    groups = fields.size(Keys.LLM.EXPERT_GROUP_COUNT.format(arch=arch), 1)
    used = fields.size(Keys.LLM.EXPERT_GROUP_USED_COUNT.format(arch=arch), groups)
    config |= {"n_group": groups, "topk_group": used}
    return groups


def dots1(fields: Fields, config: Config) -> None:
    """llama.cpp has no windows, as the released models have none."""
    shared_experts(fields, config)
    expert_groups(fields, config)


def ernie_moe(fields: Fields, config: Config) -> None:
    """Which layers have experts is clear from their tensors, but for the layers between."""
    biases(fields, config)
    experts(fields, config)
    arch, sparse = config["model_type"], layers_with(config, "ffn_gate_inp.weight")
    config |= {
        "moe_layer_start_index": min(sparse, default=0),
        "moe_layer_end_index": max(sparse, default=-1),
        "moe_layer_interval": fields.size(Keys.LLM.INTERLEAVE_MOE_LAYER_STEP.format(arch=arch), 1),
        "moe_num_shared_experts": fields.integer(Keys.LLM.EXPERT_SHARED_COUNT.format(arch=arch), 0),
    }
    for name, own in (("moe_num_experts", "num_experts"), ("moe_k", "num_experts_per_tok")):
        config[name] = config[own]


def minimax_m2(fields: Fields, config: Config) -> None:
    """All MLPs have experts."""
    experts(fields, config)
    config["intermediate_size"] = config["moe_intermediate_size"]


def deepseek2(fields: Fields, config: Config) -> None:
    """DeepSeek-V2, V3, Kimi K2 and GLM-4.7-Flash: the router tells which. Older files lack the function of its scores,
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
    groups = expert_groups(fields, config)
    config |= {
        "head_dim": rope_dim,
        "kv_lora_rank": fields.size(Keys.Attention.KV_LORA_RANK.format(arch=arch)),
        "q_lora_rank": fields.size(q_rank) if fields.has(q_rank) else None,
        "qk_nope_head_dim": sizes["key"] - rope_dim,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": sizes["value"],
        "topk_method": "greedy" if groups == 1 else "group_limited_greedy",
        "attention_bias": False,
    }
    config["rope_parameters"].pop("partial_rotary_factor", None)
    if config["rope_parameters"].get("mscale_all_dim"):  # the files have a tenth of it
        scale = 10 * config["rope_parameters"]["mscale_all_dim"]
        config["rope_parameters"] |= {"mscale": scale, "mscale_all_dim": scale}
    is_corrected = layers_with(config, "exp_probs_b.bias")
    if is_corrected or fields.integer(Keys.LLM.EXPERT_GATING_FUNC.format(arch=arch), SOFTMAX) == SIGMOID:
        config["architectures"] = ["DeepseekV3ForCausalLM"]
    else:
        config["norm_topk_prob"] = False


SOFTMAX, SIGMOID = 1, 2
"""Functions that turn a router's logits into scores (``ExpertGatingFuncType``)."""

PERMUTED = {MODEL_TENSOR.ATTN_Q: "num_attention_heads", MODEL_TENSOR.ATTN_K: "num_key_value_heads"}
"""What the converter does to Llama and those that it treats as Llama."""

STATES: Mapping[str, Any] = {"transposed": (MODEL_TENSOR.SSM_CONV1D,)}
"""What all models with recurrences have."""
LINEAR: Mapping[str, Any] = {**STATES, "renames": ((r"\.linear_attn\.", ".self_attn."),), "has_merged_qkv": True}
"""Gated DeltaNets, whose own q, k and v are one tensor."""
SHORT_CONVOLUTIONS: Mapping[str, Any] = {
    "transposed": (MODEL_TENSOR.SHORTCONV_CONV,),
    "renames": (
        (r"^model\.embedding_norm$", "model.norm"),
        (r"\.conv\.(in_proj|out_proj|conv)$", r".self_attn.\1"),
    ),
}
"""LFM2's."""
MIXER = ((r"^backbone\.layers\.(\d+)\.mixer\.", r"model.layers.\1.self_attn."),)

ARCHITECTURES: Mapping[str, Architecture] = {
    "arcee": Architecture("ArceeForCausalLM", PERMUTED),
    "chatglm": Architecture("GlmForCausalLM"),
    "cohere2": Architecture("Cohere2ForCausalLM", configure=cohere),
    "command-r": Architecture("CohereForCausalLM", renames=((r"\.([qk]_norm)$", r".\1.heads"),), configure=cohere),
    "deepseek2": Architecture(
        "DeepseekV2ForCausalLM",
        also=("DeepseekV3ForCausalLM",),
        by_head=(MODEL_TENSOR.ATTN_K_B, MODEL_TENSOR.ATTN_V_B),
        has_experts=True,
        configure=deepseek2,
    ),
    "dots1": Architecture("Dots1ForCausalLM", has_experts=True, configure=dots1),
    "ernie4_5": Architecture("Ernie4_5ForCausalLM", configure=biases),
    "ernie4_5-moe": Architecture("Ernie4_5_MoeForCausalLM", has_experts=True, configure=ernie_moe),
    "exaone4": Architecture("Exaone4ForCausalLM", configure=windows),
    "falcon": Architecture(
        "FalconForCausalLM",
        has_merged_qkv=True,
        ungrouped=(MODEL_TENSOR.ATTN_QKV,),
        renames=((r"^transformer\.h\.(\d+)\.(ln_attn|ln_mlp)$", r"model.layers.\1.\2"),),
        configure=falcon,
    ),
    "falcon-h1": Architecture(
        "FalconH1ForCausalLM",
        renames=(
            (r"\.self_attn\.", ".self_attn.attention."),
            (r"\.(\d+)\.mamba\.", r".\1.self_attn.mamba."),
        ),
        configure=falcon_h1,
        **STATES,
    ),
    "gemma": Architecture("GemmaForCausalLM", norm_offset=1.0),
    "gemma2": Architecture("Gemma2ForCausalLM", norm_offset=1.0, configure=gemma),
    "gemma3": Architecture("Gemma3ForCausalLM", norm_offset=1.0, configure=gemma),
    "gemma4": Architecture(
        "Gemma4ForCausalLM",
        renames=((r"\.router\.proj$", ".moe.gate"),),
        others=(
            (r"^model\.layers\.(\d+)\.moe\.gate\.norm\.weight$", r"blk.\1.ffn_gate_inp.scale"),
            (r"^model\.layers\.(\d+)\.moe\.gate\.per_expert_scale$", r"blk.\1.ffn_down_exps.scale"),
        ),
        has_experts=True,
        unused=rf"{UNUSED}|\.attn_(k|v|k_norm)\.weight$",  # layers that read K and V of others
        configure=gemma4,
    ),
    "glm4": Architecture("Glm4ForCausalLM"),
    "glm4moe": Architecture("Glm4MoeForCausalLM", has_experts=True, configure=shared_experts),
    "gpt-oss": Architecture("GptOssForCausalLM", has_experts=True, configure=gpt_oss),
    "gpt2": Architecture("GPT2LMHeadModel", has_merged_qkv=True),
    "gptneox": Architecture(
        "GPTNeoXForCausalLM", has_merged_qkv=True, ungrouped=(MODEL_TENSOR.ATTN_QKV,), configure=gpt_neox
    ),
    "granite": Architecture("GraniteForCausalLM", PERMUTED, configure=granite),
    "granitehybrid": Architecture(
        "GraniteMoeHybridForCausalLM",
        PERMUTED,
        also=("BambaForCausalLM",),
        renames=((r"\.(\d+)\.mamba\.", r".\1.self_attn."),),
        has_experts=True,
        configure=granite_hybrid,
        **STATES,
    ),
    "granitemoe": Architecture(
        "GraniteMoeForCausalLM",
        PERMUTED,
        also=("GraniteMoeSharedForCausalLM",),
        has_experts=True,
        configure=granite_moe,
    ),
    "internlm2": Architecture("LlamaForCausalLM", PERMUTED),  # with q, k and v apart
    "lfm2": Architecture("Lfm2ForCausalLM", configure=lfm2, **SHORT_CONVOLUTIONS),
    "lfm2moe": Architecture("Lfm2MoeForCausalLM", has_experts=True, configure=lfm2_moe, **SHORT_CONVOLUTIONS),
    "llama": Architecture(
        "LlamaForCausalLM",
        PERMUTED,
        also=("MistralForCausalLM", "MixtralForCausalLM"),
        has_experts=True,
        configure=llama,
    ),
    "llama4": Architecture("Llama4ForCausalLM", has_experts=True, configure=llama4),
    "mamba2": Architecture("Mamba2ForCausalLM", renames=MIXER, has_attention=False, configure=mamba2, **STATES),
    "minimax-m2": Architecture("MiniMaxM2ForCausalLM", has_experts=True, configure=minimax_m2),
    "mistral3": Architecture("Ministral3ForCausalLM", PERMUTED, also=("LlamaForCausalLM",), configure=mistral3),
    "nemotron": Architecture("NemotronForCausalLM"),
    "nemotron_h": Architecture("NemotronHForCausalLM", renames=MIXER, configure=nemotron_h, **STATES),
    "nemotron_h_moe": Architecture(
        "NemotronHForCausalLM", renames=MIXER, has_experts=True, configure=nemotron_h, **STATES
    ),
    "olmo": Architecture("OlmoForCausalLM", PERMUTED, configure=olmo),
    "olmo2": Architecture("Olmo2ForCausalLM", also=("Olmo3ForCausalLM",), configure=olmo2),
    "olmoe": Architecture("OlmoeForCausalLM", has_experts=True, configure=olmoe),
    "phi2": Architecture("PhiForCausalLM"),
    "phi3": Architecture("Phi3ForCausalLM", has_merged_qkv=True, configure=phi3),
    "phimoe": Architecture("PhimoeForCausalLM", has_experts=True, configure=phimoe),
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen2moe": Architecture("Qwen2MoeForCausalLM", has_experts=True, configure=qwen2_moe),
    "qwen2vl": Architecture("Qwen2ForCausalLM", configure=axes),
    "qwen3": Architecture("Qwen3ForCausalLM"),
    "qwen35": Architecture("Qwen3_5ForCausalLM", norm_offset=1.0, configure=qwen35, **LINEAR),
    "qwen35moe": Architecture("Qwen3_5MoeForCausalLM", norm_offset=1.0, has_experts=True, configure=qwen35, **LINEAR),
    "qwen3moe": Architecture("Qwen3MoeForCausalLM", has_experts=True, configure=qwen3_moe),
    "qwen3next": Architecture(
        "Qwen3NextForCausalLM", norm_offset=1.0, has_experts=True, configure=qwen3_next, **LINEAR
    ),
    "qwen3vl": Architecture("Qwen3ForCausalLM", configure=axes),
    "qwen3vlmoe": Architecture("Qwen3MoeForCausalLM", has_experts=True, configure=qwen3_vl_moe),
    "seed_oss": Architecture("SeedOssForCausalLM"),
    "smollm3": Architecture("SmolLM3ForCausalLM", PERMUTED),
    "stablelm": Architecture("StableLmForCausalLM", configure=biases),
    "starcoder2": Architecture("Starcoder2ForCausalLM", configure=biases),
}
"""By ``general.architecture``. Mistral's files also say llama."""
