"""Tiny random models on disk, for tests: the same bits in every run, written once per session.

``checkpoint`` writes a folder as transformers does, with a tokenizer and a chat template, so that a whole server can
run on it. ``gguf_file`` writes such a folder as a GGUF file.
"""

from __future__ import annotations

import atexit
import functools
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.encoder_families import ENCODERS
from tests.fallback_families import FALLBACKS
from tests.families import COMMON, END_OF_TEXT, FAMILIES, IM_END, IM_START, VOCAB_SIZE

__all__ = ["COMMON", "END_OF_TEXT", "IM_END", "IM_START", "VOCAB_SIZE"]

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A language model reads tokens and writes the next one.",
    "Numbers such as 1, 23 and 456 are tokens as well.",
    "Die Straße führt über den Fluß, das Café liegt daneben.",
    "user assistant system\n\nHello, how are you today?",
]


@functools.cache
def session_folder() -> Path:
    """A folder that lasts as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def checkpoint(
    kind: str = "llama",
    *,
    tied: bool | None = None,
    dtype: str = "float32",
    shard_size: str | None = None,
    old_rope_spelling: bool = False,
    model: str | None = None,
    **fields: Any,
) -> Path:
    """A folder with a tiny random model and its tokenizer.

    Args:
        kind: A family.
        tied: Whether the output layer is the embedding. None: as the family's row says, else not.
        dtype: Type of the weights in the file.
        shard_size: Size limit of each file, as transformers takes it; None: one file.
        old_rope_spelling: config.json as before transformers 5 (``Family.old_spelling``).
        model: Another class of the family, such as ``BertForSequenceClassification``.
        fields: More fields of the model's configuration.
    """
    options = {"tied": tied, "dtype": dtype, "shard_size": shard_size, "old_rope_spelling": old_rope_spelling}
    options["model"] = model
    return _checkpoint(kind, json.dumps({"options": options, "fields": fields}, sort_keys=True))


@functools.cache
def _checkpoint(kind: str, arguments: str) -> Path:
    import transformers  # takes seconds, and only the first checkpoint needs it

    given = json.loads(arguments)
    options, fields = given["options"], given["fields"]
    folder = session_folder() / f"{kind}-{len(list(session_folder().iterdir()))}"
    family = {**FAMILIES, **FALLBACKS, **ENCODERS}[kind]
    if options["tied"] is not None:
        fields["tie_word_embeddings"] = options["tied"]
    config_class, model_class = (
        getattr(transformers, name) for name in (family.config, options["model"] or family.model)
    )
    config = config_class(**family.arguments(fields))
    model = model_class(config)
    randomize(model)
    sharding = {"max_shard_size": options["shard_size"]} if options["shard_size"] else {}
    model.to(getattr(torch, options["dtype"])).save_pretrained(folder, **sharding)
    if family.hub_form is not None:
        _write_hub_form(folder, family.hub_form)
    if options["old_rope_spelling"]:
        edit_json(folder / "config.json", family.old_spelling)
    write_tokenizer(folder)
    return folder


def saved_by_transformers(folder: Path) -> Path:
    """The files of a checkpoint that transformers can load: the folder itself, or the original of its hub form."""
    original = folder / "transformers"
    return original if original.is_dir() else folder


def _write_hub_form(folder: Path, hub_form: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> None:
    original = folder / "transformers"
    shutil.copytree(folder, original)
    tensors = load_file(original / "model.safetensors")
    edit_json(folder / "config.json", lambda config: save_file(hub_form(config, tensors), folder / "model.safetensors"))


IS_NORM = re.compile(r"([Nn]orm\d?|ln_\w+|_ln)\.weight$")


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Gives every parameter values that matter: biases that are not zero, norms that are not one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            # A norm keeps its start, 1 or 0, where it does nothing.
            parameter.copy_(parameter + 0.2 * noise if IS_NORM.search(name) else 0.15 * noise)
        for name, buffer in sorted(model.state_dict().items()):
            if name not in parameters and buffer.is_floating_point():
                buffer.copy_(1 + 0.2 * torch.randn(buffer.shape, generator=generator))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Changes a JSON file in place."""
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def copy_of(folder: Path, target: Path) -> Path:
    """A copy to damage: checkpoints are shared by all tests of a session."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


# ---------------------------------------------------------------------------------------------------------
# tokenizer


@functools.cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer that can write every text."""
    result = Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 8,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    result.train_from_iterator(SENTENCES * 3, trainer)
    return result


def write_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
        "eos_token": SPECIAL_TOKENS[IM_END],
        "pad_token": SPECIAL_TOKENS[END_OF_TEXT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": COMMON["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


# ---------------------------------------------------------------------------------------------------------
# GGUF


@dataclass(frozen=True)
class GGUFModel:
    path: Path
    weights: dict[str, torch.Tensor]
    """What the file's tensors stand for: float32, under transformers' names and in its order of rows."""


SCALE_FIELDS: Mapping[GGMLQuantizationType, tuple[int, ...]] = {
    GGMLQuantizationType.Q2_K: (80, 82),
    GGMLQuantizationType.Q3_K: (108,),
    GGMLQuantizationType.Q4_K: (0, 2),
    GGMLQuantizationType.Q5_K: (0, 2),
    GGMLQuantizationType.Q6_K: (208,),
    GGMLQuantizationType.IQ4_NL: (0,),
    GGMLQuantizationType.IQ4_XS: (0,),
}
"""Formats that the package can only read, with the places of the float16 scales in a block."""


LAYER_NORM_EPS = ("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
GGUF_NAMES = {
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "ernie4_5_moe": "ernie4_5-moe",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gpt-oss",
    "glm": "chatglm",
    "gpt_neox": "gptneox",
    "lfm2_moe": "lfm2moe",
    "minimax_m2": "minimax-m2",
    "ministral3": "mistral3",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo3": "olmo2",
    "phi": "phi2",
    "qwen3_moe": "qwen3moe",
}
"""``model_type`` -> ``general.architecture``, where they differ."""
PERMUTED = {"arcee", "granite", "internlm2", "llama", "mistral3", "olmo", "smollm3"}
"""Architectures whose rows of q and k the converter reorders."""


def gguf_file(
    folder: Path,
    kind: GGMLQuantizationType,
    rope_factors: list[float] | None = None,
    kinds: Mapping[str, GGMLQuantizationType] | None = None,
    *,
    arch: str | None = None,
    is_fused: bool = False,
) -> GGUFModel:
    """Writes a checkpoint as convert_hf_to_gguf does; vectors stay float32.

    Args:
        folder: What ``checkpoint`` returned.
        kind: Type of the matrices. K-quants get random blocks instead of the folder's weights.
        rope_factors: The tensor ``rope_freqs.weight``, as Llama 3.1 has it.
        kinds: Types of the matrices whose names contain a text, instead of ``kind``.
        arch: The ``general.architecture``. None: that of the checkpoint's family.
        is_fused: Writes q, k and v of a layer as one tensor; only with float32.
    """
    import transformers

    config = json.loads((folder / "config.json").read_text())
    kind_of_model = config["model_type"].removesuffix("_text")
    arch = arch or GGUF_NAMES.get(kind_of_model, kind_of_model)
    mix = "-mix" + "-".join(each.name for each in kinds.values()) if kinds else ""
    path = folder / f"{arch}-{kind.name}{'-rope' if rope_factors else ''}{mix}{'-fused' * is_fused}.gguf"
    writer = gguf.GGUFWriter(path, arch)
    common = transformers.AutoConfig.from_pretrained(folder)  # under the common names
    heads = common.num_attention_heads
    kv_heads = count_kv_heads(config) or heads
    tensors = with_merged_experts(load_file(folder / "model.safetensors"))
    writer.add_name(folder.name)
    sections = (config.get("rope_parameters") or {}).get("mrope_section")
    if sections:
        writer.add_rope_dimension_sections([*sections, 0])
    writer.add_context_length(common.max_position_embeddings)
    writer.add_embedding_length(common.hidden_size)
    writer.add_block_count(common.num_hidden_layers)
    writer.add_feed_forward_length(
        [len(tensors[f"model.layers.{layer}.mlp.up_proj.weight"]) for layer in range(common.num_hidden_layers)]
        if arch == "gemma4"
        else next(len(tensor) for name, tensor in tensors.items() if re.search(r"\.(w1|dense_h_to_4h)\.weight$", name))
        if arch in ("falcon", "lfm2", "lfm2moe")
        else config.get("intermediate_size") or config["n_inner"]
    )
    writer.add_head_count(heads)
    full_head_dim, full_kv_heads = _global_sizes(arch, config, tensors)
    others = {"conv": 0, "full_attention": full_kv_heads or kv_heads}
    of_layers = [others.get(each, kv_heads) for each in config.get("layer_types") or ()]
    writer.add_head_count_kv(of_layers if arch in ("gemma4", "lfm2", "lfm2moe") else kv_heads)
    if arch == "deepseek2":
        tensors = _add_latents(writer, config, tensors, is_split=not is_fused)
    else:
        writer.add_key_length(full_head_dim or config.get("head_dim") or common.hidden_size // heads)
    if "rms_norm_eps" in config or arch in ("lfm2", "lfm2moe"):
        writer.add_layer_norm_rms_eps(config["rms_norm_eps" if "rms_norm_eps" in config else "norm_eps"])
    else:
        writer.add_layer_norm_eps(next((config[name] for name in LAYER_NORM_EPS if name in config), 1e-5))
    rope = config.get("rope_parameters", {})
    if rope:
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if arch in ("gemma2", "gemma3", "gemma4"):
        _add_gemma(writer, arch, config)
    elif arch not in ("gemma", "llama", "qwen2", "qwen3"):
        _add_facts(writer, arch, config)
    if "num_experts_per_tok" in config or "moe_k" in config:
        _add_experts(writer, arch, config)
    _add_tokenizer(writer)
    arch_id = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(arch_id, common.num_hidden_layers)
    weights = {}
    generator = np.random.default_rng(0)
    for name, tensor in (fused(tensors) if is_fused and arch != "deepseek2" else tensors).items():
        offset = 1 if arch in ("gemma", "gemma2", "gemma3", "nemotron") and name.endswith("norm.weight") else 0
        data = _converted(arch, name, tensor.float().numpy() + offset, heads, kv_heads)
        permuted = arch in PERMUTED and (".q_proj." in name or ".k_proj." in name)
        num_heads = heads if ".q_proj." in name else kv_heads
        if permuted:
            data = permute(data, num_heads)
        chosen = next((each for text, each in (kinds or {}).items() if text in name), kind)
        stored = chosen if data.ndim > 1 else GGMLQuantizationType.F32
        raw = random_blocks(data.shape, stored, generator) if stored in SCALE_FIELDS else gguf.quantize(data, stored)
        known = name.replace("e_score_correction_bias", "e_score_correction.bias")
        known = known.replace(".expert_bias", ".expert_bias.bias")
        stored_name = names.get_name(known, try_suffixes=(".weight", ".bias"))
        assert stored_name is not None, name
        stored_name += ".weight" * name.endswith((".layer_scalar", ".sinks"))
        writer.add_tensor(stored_name, raw, raw_dtype=stored)
        meaning = gguf.dequantize(raw, stored).reshape(data.shape)
        if permuted:
            order = permute(np.arange(len(meaning)), num_heads)
            meaning = meaning[np.argsort(order)]
        is_exact = stored == GGMLQuantizationType.F32
        weights[name] = tensor.float() if is_exact else torch.from_numpy(np.array(meaning)) - offset
    if "long_factor" in rope:
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))
    if arch == "gemma4":
        factor = rope["full_attention"]["partial_rotary_factor"]
        rope_factors = [1.0 if i < full_head_dim / 2 * factor else 1e30 for i in range(full_head_dim // 2)]
    if rope_factors:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFModel(path, {name: tensor.float() for name, tensor in tensors.items()} if is_fused else weights)


EXPERT = re.compile(r"\.(?:mlp|block_sparse_moe|feed_forward)\.experts\.(\d+)\.(\w+)\.weight$")
EXPERT_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Mixtral's names."""


def with_merged_experts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with each matrix of a layer's experts as one: [experts, rows, columns]."""
    result: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found = EXPERT.search(name)
        prefix = re.sub(r"\.(block_sparse_moe|feed_forward)$", ".mlp", name[: name.find(".experts.")])
        if found is not None:
            part = EXPERT_PARTS.get(found[2], found[2])
            experts.setdefault(f"{prefix}.experts.{part}.weight", {})[int(found[1])] = tensor
        elif name.endswith((".gate_up_proj", ".gate_up_proj_bias")):  # gpt-oss: rows alternate
            leaf = "bias" if name.endswith("bias") else "weight"
            rows = tensor if leaf == "bias" else tensor.transpose(1, 2)
            result[f"{prefix}.experts.gate_proj.{leaf}"] = rows[:, ::2].contiguous()
            result[f"{prefix}.experts.up_proj.{leaf}"] = rows[:, 1::2].contiguous()
        elif name.endswith(".experts.down_proj"):
            result[f"{name}.weight"] = tensor.transpose(1, 2).contiguous()
        elif name.endswith(".experts.down_proj_bias"):
            result[name.replace("_bias", ".bias")] = tensor
        else:
            result[name] = tensor
    return result | {name: torch.stack([each[i] for i in range(len(each))]) for name, each in experts.items()}


def _add_latents(
    writer: gguf.GGUFWriter, config: Mapping[str, Any], tensors: dict[str, torch.Tensor], *, is_split: bool
) -> dict[str, torch.Tensor]:
    """Fields of latent attention, and the tensors with what follows latents apart, or as in older files."""
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    key, value = config["qk_nope_head_dim"], config["v_head_dim"]
    writer.add_kv_lora_rank(rank)
    if config["q_lora_rank"] is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_key_length(rank + rope if is_split else key + rope)
    writer.add_value_length(rank if is_split else value)
    if not is_split:
        return tensors
    writer.add_key_length_mla(key + rope)
    writer.add_value_length_mla(value)
    result = {}
    for name, tensor in tensors.items():
        if "kv_b_proj" in name:
            keys, values = tensor.unflatten(0, (-1, key + value)).split([key, value], dim=1)
            result[name.replace("kv_b", "k_b")] = keys.transpose(1, 2).contiguous()
            result[name.replace("kv_b", "v_b")] = values.contiguous()
        else:
            result[name] = tensor
    return result


def _add_experts(writer: gguf.GGUFWriter, arch: str, config: Mapping[str, Any]) -> None:
    """Fields of models with experts."""
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    writer.add_expert_count(next(config[name] for name in names if name in config))
    writer.add_expert_used_count(config.get("num_experts_per_tok") or config["moe_k"])
    if arch not in ("llama", "phimoe"):
        writer.add_expert_feed_forward_length(config.get("moe_intermediate_size") or config["intermediate_size"])
    if arch == "deepseek2":
        is_v3 = config["model_type"] == "deepseek_v3"
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if is_v3 else gguf.ExpertGatingFuncType.SOFTMAX)
    if arch in ("deepseek2", "dots1") and config["n_group"] is not None:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
    if arch == "ernie4_5-moe":
        writer.add_interleave_moe_layer_step(config["moe_layer_interval"])
        writer.add_leading_dense_block_count(config["moe_layer_start_index"])
        writer.add_expert_shared_count(config["moe_num_shared_experts"])
    if arch == "lfm2moe":
        writer.add_leading_dense_block_count(config["num_dense_layers"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if arch in ("deepseek2", "dots1", "glm4moe"):
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])


def count_kv_heads(config: Mapping[str, Any]) -> int | None:
    """As config.json has them; None: one for each head."""
    if config["model_type"] == "falcon":
        return config["num_kv_heads"] if config["new_decoder_architecture"] else 1
    return config.get("num_key_value_heads")


def fused(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with q, k and v of a layer as one."""
    result = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            result[name.replace(".q_proj.", ".qkv_proj.")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            result[name] = tensor
    return result


def _converted(arch: str, name: str, data: npt.NDArray[Any], heads: int, kv_heads: int) -> npt.NDArray[Any]:
    """The converter's layout of a tensor: without Conv1D's transposition, and q, k and v one after the other."""
    if arch == "gpt2" and data.ndim == 2 and ".c_" in name:
        return np.ascontiguousarray(data.T)
    if arch == "gptneox" and ".query_key_value." in name:
        by_head = data.reshape(heads, 3, -1, *data.shape[1:])
        return np.ascontiguousarray(by_head.swapaxes(0, 1)).reshape(data.shape)
    if arch == "falcon" and ".query_key_value." in name:
        by_kv_head = data.reshape(kv_heads, heads // kv_heads + 2, -1, *data.shape[1:])
        q, k, v = np.split(by_kv_head, [-2, -1], axis=1)
        return np.concatenate([each.reshape(-1, *data.shape[1:]) for each in (q, k, v)])
    if arch in ("lfm2", "lfm2moe") and name.endswith(".conv.conv.weight"):
        return data.squeeze(1)
    return data


def _add_gemma(writer: gguf.GGUFWriter, arch: str, config: Mapping[str, Any]) -> None:
    writer.add_sliding_window(config["sliding_window"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    scaling = config["rope_parameters"].get("full_attention", {})
    if scaling.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    if arch == "gemma4":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
        writer.add_key_length_swa(config["head_dim"])
        writer.add_shared_kv_layers(config["num_kv_shared_layers"])
        writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
        writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])


def _global_sizes(arch: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Head size and KV heads of Gemma 4's global layers; else 0."""
    if arch != "gemma4":
        return 0, 0
    prefix = f"model.layers.{config['layer_types'].index('full_attention')}.self_attn"
    head_dim = len(tensors[f"{prefix}.q_norm.weight"])
    return head_dim, len(tensors[f"{prefix}.k_proj.weight"]) // head_dim


def split_gguf(folder: Path, count: int) -> list[Path]:
    """Writes a checkpoint in float32 as a GGUF model in several files, as llama.cpp's gguf-split does."""
    path = gguf_file(folder, GGMLQuantizationType.F32).path
    reader = gguf.GGUFReader(path)
    num_tensors = len(reader.tensors)
    paths = []
    for part in range(count):
        paths.append(path.with_name(f"{path.stem}-{part + 1:05}-of-{count:05}.gguf"))
        writer = gguf.GGUFWriter(paths[-1], "llama")
        if part == 0:
            for name, field in reader.fields.items():
                if not name.startswith("GGUF.") and name != "general.architecture":
                    array_type = field.types[-1] if len(field.types) > 1 else None
                    writer.add_key_value(name, field.contents(), field.types[0], array_type)
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", num_tensors)
        for tensor in reader.tensors[part::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def _add_facts(writer: gguf.GGUFWriter, arch: str, config: Mapping[str, Any]) -> None:
    """Fields of other families, as convert_hf_to_gguf writes them."""
    if arch == "gpt2":
        return
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if arch == "gptneox":
        writer.add_parallel_residual(config["use_parallel_residual"])
    if arch in ("cohere2", "command-r"):
        writer.add_logit_scale(config["logit_scale"])
    if arch in ("lfm2", "lfm2moe"):
        writer.add_shortconv_l_cache(config["conv_L_cache"])
    if arch == "olmo":
        writer.add_clamp_kqv(config["clip_qkv"])
    window, types = config.get("sliding_window"), config.get("layer_types")
    if window is not None or arch in ("phi3", "phimoe"):
        writer.add_sliding_window(window or 0)
        if types is not None:
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in types])
    if rope["rope_type"] in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        if "beta_fast" in rope:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if arch == "deepseek2" and "mscale_all_dim" in rope:
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if arch == "mistral3":
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    if "long_factor" in rope:
        scale, length = config["max_position_embeddings"], rope["original_max_position_embeddings"]
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale / length) / math.log(length)))
    if arch == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])


def permute(rows: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """The order of the rows of q and k in llama.cpp (LlamaModel.permute of convert_hf_to_gguf)."""
    halves = rows.reshape(num_heads, 2, len(rows) // num_heads // 2, *rows.shape[1:])
    permuted: npt.NDArray[Any] = halves.swapaxes(1, 2).reshape(rows.shape)
    return permuted


def random_blocks(
    shape: tuple[int, ...], kind: GGMLQuantizationType, generator: np.random.Generator
) -> npt.NDArray[np.uint8]:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // block, block_bytes), dtype=np.uint8)
    for offset in SCALE_FIELDS[kind]:
        scales = generator.uniform(1e-4, 3e-4, blocks.shape[:-1]).astype(np.float16)
        blocks[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    state = json.loads(tokenizer().to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    unused = [f"[UNUSED{index}]" for index in range(len(tokens), VOCAB_SIZE)]
    types = [gguf.TokenType.CONTROL if token in SPECIAL_TOKENS else gguf.TokenType.NORMAL for token in tokens]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + unused)
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * len(unused))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(IM_END)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
