"""GGUF files of models with recurrences, and of others with experts that llama.cpp's converter treats specially.

A file in float32 holds the same model as the folder it is made from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from torch import Tensor

from tests import tiny
from tests.family import FULL, LINEAR
from tests.models.harness import assert_close, load, logits_of, random_tokens

Config = Mapping[str, Any]
Named = Iterator[tuple[str, Tensor]]
Facts = Callable[[gguf.GGUFWriter, Config], None]


# ---------------------------------------------------------------------------------------------------------
# what the converter does


def alone(config: Config, name: str, tensor: Tensor) -> Named:
    """A tensor that stays as it is."""
    yield name, tensor


def of_mamba(config: Config, name: str, tensor: Tensor) -> Named:
    """The decay itself, vectors as matrices, and norms by group."""
    groups: int = config.get("mamba_n_groups") or config.get("n_groups", 1)
    if name.endswith(".A_log"):
        tensor = -tensor.exp()[:, None]
    elif name.endswith(".D"):
        tensor = tensor[:, None]
    elif name.endswith(("mixer.norm.weight", "mamba.norm.weight")):
        tensor = tensor.view(groups, -1)
    yield step_bias(name), squeezed(name, tensor)


def step_bias(name: str) -> str:
    return name.replace(".dt_bias", ".dt_proj.bias")


def squeezed(name: str, tensor: Tensor) -> Tensor:
    return tensor.squeeze(1) if name.endswith("conv1d.weight") else tensor


def of_nemotron(config: Config, name: str, tensor: Tensor) -> Named:
    """The package has no names for experts in these blocks."""
    layer = re.search(r"\.(\d+)\.mixer\.experts\.(up|down)_proj\.", name)
    if layer is None:
        yield from of_mamba(config, name, tensor)
    else:
        yield f"blk.{layer[1]}.ffn_{layer[2]}_exps.weight", tensor


def of_granite(config: Config, name: str, tensor: Tensor) -> Named:
    """Also gates and ups apart, and the rows of q and k in llama.cpp's order."""
    if name.endswith("_linear.weight"):
        name = name.replace("block_sparse_moe.", "mlp.experts.")
        if not config["num_local_experts"]:
            name = name.replace(".shared_mlp.", ".mlp.")
        name = name.replace(".shared_mlp.", ".mlp.shared_mlp.")
        if name.endswith("output_linear.weight"):
            yield name.replace("output_linear", "down_proj"), tensor
            return
        gates, ups = tensor.chunk(2, dim=-2)
        yield name.replace("input_linear", "gate_proj"), gates
        yield name.replace("input_linear", "up_proj"), ups
        return
    for leaf, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if f".{leaf}." in name:
            tensor = torch.from_numpy(tiny.permute(tensor.numpy(), config[heads]))
    yield from of_mamba(config, name, tensor)


def of_falcon(config: Config, name: str, tensor: Tensor) -> Named:
    """All factors become part of the weights."""
    gate, down = config["mlp_multipliers"]
    into, out = config["attention_in_multiplier"], config["attention_out_multiplier"]
    factors = {
        ".down_proj.weight": down,
        ".gate_proj.weight": gate,
        ".k_proj.weight": config["key_multiplier"] * into,
        ".q_proj.weight": into,
        ".v_proj.weight": into,
        ".o_proj.weight": out,
        ".out_proj.weight": config["ssm_out_multiplier"],
        "lm_head.weight": config["lm_head_multiplier"],
        "embed_tokens.weight": config["embedding_multiplier"],
    }
    tensor = tensor * next((factor for end, factor in factors.items() if name.endswith(end)), 1.0)
    if name.endswith(".in_proj.weight"):
        inner, groups = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
        sizes = [inner, inner, groups, groups, config["mamba_n_heads"]]
        of_parts = zip(tensor.split(sizes), config["ssm_multipliers"], strict=True)
        tensor = torch.cat([part * factor for part, factor in of_parts]) * config["ssm_in_multiplier"]
    yield from of_mamba(config, name, tensor)


def of_qwen(config: Config, name: str, tensor: Tensor) -> Named:
    """Norms with their offset, and of Qwen3-Next q, k and v apart from z."""
    if name.endswith("norm.weight") and "linear_attn" not in name:
        tensor = tensor + 1
    elif name.endswith(".A_log"):
        tensor = -tensor.exp()
    if not name.endswith(".in_proj_qkvz.weight"):
        yield step_bias(name), squeezed(name, tensor)
        return
    keys, size = config["linear_num_key_heads"], config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] // keys * config["linear_value_head_dim"]
    by_head = tensor.view(keys, -1, tensor.shape[1]).split([size, size, values, values], dim=1)
    q, k, v, z = (part.reshape(-1, tensor.shape[1]) for part in by_head)
    yield name.replace("qkvz", "qkv"), torch.cat([q, k, v])
    yield name.replace("qkvz", "z"), z


def of_qwen35(config: Config, name: str, tensor: Tensor) -> Named:
    """Also the heads of values in another order: first the first of each key head."""
    keys, size = config["linear_num_key_heads"], config["linear_key_head_dim"]
    own = config["linear_value_head_dim"]

    def turned(part: Tensor, dim: int, width: int) -> Tensor:
        heads = part.unflatten(dim, (keys, -1, width))
        result: Tensor = heads.transpose(dim, dim + 1).flatten(dim, dim + 2)
        return result

    if name.endswith((".in_proj_qkv.weight", ".conv1d.weight")):
        kept = 2 * keys * size
        tensor = torch.cat([tensor[:kept], turned(tensor[kept:], 0, own)])
    elif name.endswith(".in_proj_z.weight"):
        tensor = turned(tensor, 0, own)
    elif name.endswith((".in_proj_a.weight", ".in_proj_b.weight", ".A_log", ".dt_bias")):
        tensor = turned(tensor, 0, 1)
    elif name.endswith(".linear_attn.out_proj.weight"):
        tensor = turned(tensor, 1, own)
    yield from of_qwen(config, name, tensor)


def of_llama4(config: Config, name: str, tensor: Tensor) -> Named:
    """Experts' matrices have a row for each output."""
    if name.endswith(".gate_up_proj"):
        gates, ups = tensor.transpose(1, 2).chunk(2, dim=1)
        yield name.replace("gate_up_proj", "gate_proj.weight"), gates
        yield name.replace("gate_up_proj", "up_proj.weight"), ups
    elif name.endswith(".experts.down_proj"):
        yield f"{name}.weight", tensor.transpose(1, 2)
    else:
        yield name, tensor


def of_gemma4(config: Config, name: str, tensor: Tensor) -> Named:
    """Factors of routers have names that the package does not know."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if name.endswith(".router.scale"):
        yield f"blk.{layer and layer[1]}.ffn_gate_inp.scale", tensor
    elif name.endswith(".per_expert_scale"):
        yield f"blk.{layer and layer[1]}.ffn_down_exps.scale", tensor
    elif name.endswith((".gate_up_proj", ".experts.down_proj", ".layer_scalar")):
        yield f"{name}.weight", tensor
    else:
        yield name, tensor


# ---------------------------------------------------------------------------------------------------------
# fields


def states(writer: gguf.GGUFWriter, *, heads: int, size: int, groups: int, rows: int, length: int) -> None:
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(heads * size)
    writer.add_ssm_group_count(groups)
    writer.add_ssm_state_size(rows)
    writer.add_ssm_conv_kernel(length)


def mamba_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    names = ("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
    values = [config[name] for name in names]
    states(writer, **dict(zip(("heads", "size", "groups", "rows", "length"), values, strict=True)))


def mamba2_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    names = ("num_heads", "head_dim", "n_groups", "state_size", "conv_kernel")
    values = [config[name] for name in names]
    states(writer, **dict(zip(("heads", "size", "groups", "rows", "length"), values, strict=True)))


def granite_factors(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def granite_moe_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    granite_factors(writer, config)
    writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])


def granite_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    mamba_fields(writer, config)
    is_bamba = config["model_type"] == "bamba"
    writer.add_rope_scaling_finetuned(is_bamba)
    if is_bamba:
        writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"] // 2)
        writer.add_attention_scale((config["hidden_size"] // config["num_attention_heads"]) ** -0.5)
        return
    granite_factors(writer, config)
    writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])


def falcon_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    mamba_fields(writer, config)
    writer.add_key_length(config["head_dim"])


def nemotron_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    names = ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel")
    values = [config[name] for name in names]
    states(writer, **dict(zip(("heads", "size", "groups", "rows", "length"), values, strict=True)))
    writer.add_key_length(config["head_dim"])
    if "moe" in config["layers_block_type"]:
        writer.add_expert_shared_feed_forward_length(config["moe_shared_expert_intermediate_size"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        if config["moe_latent_size"]:
            writer.add_moe_latent_size(config["moe_latent_size"])


def qwen_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    states(
        writer,
        heads=config["linear_num_value_heads"],
        size=config["linear_value_head_dim"],
        groups=config["linear_num_key_heads"],
        rows=config["linear_key_head_dim"],
        length=config["linear_conv_kernel_dim"],
    )
    writer.add_key_length(config["head_dim"])
    writer.add_rope_dimension_count(int(config["head_dim"] * config["rope_parameters"]["partial_rotary_factor"]))
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def qwen2_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def llama4_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_key_length(config["head_dim"])
    writer.add_interleave_moe_layer_step(config["interleave_moe_layer_step"])


def gemma4_fields(writer: gguf.GGUFWriter, config: Config) -> None:
    of_global = config["per_layer_config"]["1"]
    heads = [config["num_key_value_heads"], of_global["num_key_value_heads"]]
    is_sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    writer.add_head_count_kv([heads[0] if flag else heads[1] for flag in is_sliding])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(is_sliding)
    writer.add_key_length(of_global["head_dim"])
    writer.add_key_length_swa(config["head_dim"])
    writer.add_shared_kv_layers(config["num_kv_shared_layers"])
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    size, factor = of_global["head_dim"], rope["full_attention"]["partial_rotary_factor"]
    factors = [1.0 if i < size / 2 * factor else 1e30 for i in range(size // 2)]
    writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))


@dataclass(frozen=True)
class Files:
    """How a family is written."""

    arch: str
    convert: Callable[[Config, str, Tensor], Named] = alone
    facts: Facts = lambda writer, config: None
    fields: Mapping[str, Any] | None = None
    """Of the checkpoint: what files do not say is as llama.cpp knows it."""


UNBIASED: dict[str, Any] = {"attention_bias": False, "mlp_bias": False}
FAMILIES: dict[str, tuple[str, Files]] = {
    "bamba": ("bamba", Files("granitehybrid", of_granite, granite_fields, UNBIASED)),
    "falcon_h1": (
        "falcon_h1",
        Files(
            "falcon-h1",
            of_falcon,
            falcon_fields,
            {**UNBIASED, "mamba_norm_before_gate": False, "projectors_bias": False, "mamba_proj_bias": False},
        ),
    ),
    "gemma4": (
        "gemma4",
        Files(
            "gemma4",
            of_gemma4,
            gemma4_fields,
            {
                "enable_moe_block": True,
                "moe_intermediate_size": 40,
                "num_experts": 6,
                "num_kv_shared_layers": 0,
                "top_k_experts": 2,
                "hidden_size_per_layer_input": 0,
                "use_double_wide_mlp": False,
            },
        ),
    ),
    "granite4_h": ("granite4_h", Files("granitehybrid", of_granite, granite_fields, {"attention_bias": False})),
    "granite4_h, dense": (
        "granite4_h",
        Files("granitehybrid", of_granite, granite_fields, {"num_local_experts": 0, "intermediate_size": 56}),
    ),
    "granitemoe": ("granitemoe", Files("granitemoe", of_granite, granite_factors)),
    "granitemoeshared": ("granitemoeshared", Files("granitemoe", of_granite, granite_moe_fields)),
    "llama4": (
        "llama4",
        Files(
            "llama4",
            of_llama4,
            llama4_fields,
            {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1, "no_rope_layer_interval": 4},
        ),
    ),
    "mamba2": ("mamba2", Files("mamba2", of_mamba, mamba2_fields)),
    "nemotron_h": (
        "nemotron_h",
        Files("nemotron_h_moe", of_nemotron, nemotron_fields, {"n_group": 1, "topk_group": 1}),
    ),
    "nemotron_h, latent": (
        "nemotron_h",
        Files("nemotron_h_moe", of_nemotron, nemotron_fields, {"n_group": 1, "topk_group": 1, "moe_latent_size": 32}),
    ),
    "nemotron_h, dense": (
        "nemotron_h",
        Files("nemotron_h", of_nemotron, nemotron_fields, {"layers_block_type": [LINEAR, "mlp", FULL]}),
    ),
    "qwen2_moe": (
        "qwen2_moe",
        Files("qwen2moe", facts=qwen2_fields, fields={"mlp_only_layers": [], "use_sliding_window": False}),
    ),
    "qwen3_5": ("qwen3_5", Files("qwen35", of_qwen35, qwen_fields)),
    "qwen3_5_moe": ("qwen3_5_moe", Files("qwen35moe", of_qwen35, qwen_fields)),
    "qwen3_next": (
        "qwen3_next",
        Files("qwen3next", of_qwen, qwen_fields, {"mlp_only_layers": [], "attention_bias": False}),
    ),
}


def write(name: str, kind: GGMLQuantizationType = GGMLQuantizationType.F32, **fields: Any) -> tuple[Path, Path]:
    """A checkpoint, and the file that the converter makes of it; matrices with whole blocks have the type."""
    family, files = FAMILIES[name]
    folder = tiny.checkpoint(family, **{**(files.fields or {}), **fields})
    config = json.loads((folder / "config.json").read_text())
    config["mlp_multipliers"] = config.get("mlp_multipliers") or [1.0, 1.0]
    num_layers = config.get("num_hidden_layers") or len(config["layers_block_type"])
    path = folder / f"{name}-{kind.name}.gguf"
    writer = gguf.GGUFWriter(path, files.arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(config.get("intermediate_size_mlp") or config.get("intermediate_size") or 0)
    writer.add_head_count(config.get("num_attention_heads", 0))
    if files.arch not in ("gemma4", "mamba2"):
        writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps") or config["layer_norm_epsilon"])
    rope = config.get("rope_parameters") or {}
    if rope:
        writer.add_rope_freq_base(rope.get(FULL, rope)["rope_theta"])
    _add_experts(writer, config)
    files.facts(writer, config)
    tiny._add_tokenizer(writer)
    arch_id = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == files.arch)
    names = gguf.get_tensor_name_map(arch_id, num_layers)
    tensors = merged(load_file(folder / "model.safetensors"))
    for stored, tensor in tensors.items():
        for known, part in files.convert(config, stored, tensor.float()):
            known = known.replace("e_score_correction_bias", "e_score_correction.bias")
            own = names.get_name(known, try_suffixes=(".weight", ".bias")) or known
            assert own.startswith(("blk.", "token_embd", "output")), known
            is_vector = part.dim() < 2 or "ssm_" in own and not own.endswith(("_in.weight", "_out.weight"))
            chosen = GGMLQuantizationType.F32 if is_vector or part.shape[-1] % 32 else kind
            writer.add_tensor(own, gguf.quantize(part.contiguous().numpy(), chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder, path


def merged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with each matrix of a layer's experts as one: [experts, rows, columns]."""
    stacks: dict[str, list[Tensor]] = {}
    for name in sorted(tensors, key=lambda name: [int(each) if each.isdigit() else 0 for each in name.split(".")]):
        stacks.setdefault(re.sub(r"(\.experts\.)\d+\.", r"\1", name), []).append(tensors[name])
    return {name: parts[0] if len(parts) == 1 else torch.stack(parts) for name, parts in stacks.items()}


def _add_experts(writer: gguf.GGUFWriter, config: Config) -> None:
    counts = [config.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    count = next((each for each in counts if each), 0)
    if count and "moe" in config.get("layers_block_type", ["moe"]) and config.get("enable_moe_block", True):
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.get("num_experts_per_tok") or config["top_k_experts"])
        writer.add_expert_feed_forward_length(config.get("moe_intermediate_size") or config["intermediate_size"])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_holds_the_same_model(name: str) -> None:
    folder, path = write(name)
    ours, theirs = load(path), load(folder)
    assert ours.hf_config.architecture == theirs.hf_config.architecture
    token_ids = random_tokens(60)
    assert_close(logits_of(ours, token_ids), logits_of(theirs, token_ids))


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("nemotron_h", ["self_attn.in_proj", "self_attn.out_proj"]),
        ("qwen3_5", ["self_attn.in_proj_qkv", "self_attn.in_proj_z", "mlp.gate_proj"]),
    ],
)
def test_matrices_keep_their_blocks(name: str, modules: list[str]) -> None:
    _, path = write(name, GGMLQuantizationType.Q8_0)
    loaded = load(path)
    assert loaded.hf_config.quantization is not None
    types = loaded.hf_config.quantization["types"]
    assert {f"model.layers.0.{module}" for module in modules} <= types.keys()
    assert logits_of(loaded, random_tokens(20)).isfinite().all()
