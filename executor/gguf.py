"""GGUF checkpoints: maps llama.cpp's names to Hugging Face's and dequantises its types.

The header arrives parsed. Names and quantised formats come from the ``gguf`` package: a tensor is dequantised to
float32, exactly as the format defines, then converted to the model's dtype.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, MODEL_TENSOR, GGMLQuantizationType, Keys
from gguf.quants import dequantize
from gguf.tensor_mapping import get_tensor_name_map
from msgspec.structs import replace
from torch import Tensor

from executor import gguf_experts
from executor.base import ModelError
from executor.checkpoint import FLOATS, MappedFile, StoredTensor
from executor.config import GGUFHeader, GGUFTensor
from executor.gguf_architectures import ARCHITECTURES, Config
from executor.hf_config import MAX_LAYERS, MAX_POSITIONS, Fields
from executor.supported import check_gguf_architecture
from executor.weights_mapper import WeightsMapper

PLAIN_TYPES = {
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.F32: torch.float32,
}

ROPE_FACTORS = "rope_freqs.weight"
LONGROPE_FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
"""By their names in config.json."""

YARN_FIELDS = {
    "attention_factor": Keys.Rope.SCALING_YARN_ATTN_FACTOR,
    "beta_fast": Keys.Rope.SCALING_YARN_BETA_FAST,
    "beta_slow": Keys.Rope.SCALING_YARN_BETA_SLOW,
    "mscale_all_dim": Keys.Rope.SCALING_YARN_LOG_MUL,
}

LAYER_NORM_EPS = ("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
"""The names that families have for what layer norms add to the variance."""

CHUNK_BYTES = 256 << 10
"""Quantised bytes dequantised at a time: the float32 result should fit a core's cache."""

SUFFIXES = (".weight", ".bias")
CORRECTION = re.compile(r"\.e_score_correction_bias$")
"""Biases of routers, which the ``gguf`` package knows as a module."""
STEP_BIAS = re.compile(r"\.dt_bias$")
"""Those of the steps of recurrences, likewise."""
FLAT = (MODEL_TENSOR.FFN_EXP_PROBS_B, MODEL_TENSOR.SSM_A, MODEL_TENSOR.SSM_D, MODEL_TENSOR.SSM_NORM)
"""Vectors that files may have as matrices."""


# ---------------------------------------------------------------------------------------------------------
# configuration


def hf_config_from_gguf(header: GGUFHeader, source: str = "the GGUF header") -> dict[str, Any]:
    """The equivalent of config.json for the model in a GGUF file.

    Args:
        header: The file's header.
        source: How error messages refer to the header.

    Raises:
        ModelError: A field is missing or invalid, or the architecture is not supported.
    """
    fields = Fields(header.metadata, source)
    arch = _architecture(fields)
    _check_experts(header, arch, source)

    def key(template: str) -> str:
        return template.format(arch=arch)

    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    if "token_embd.weight" not in shapes:
        raise ModelError(f"{source}: tensor 'token_embd.weight' is missing")
    num_layers = fields.size(key(Keys.LLM.BLOCK_COUNT), most=MAX_LAYERS)
    has_attention = ARCHITECTURES[arch].has_attention
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[arch].model],
        "model_type": arch,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": fields.size(key(Keys.LLM.EMBEDDING_LENGTH)),
        "intermediate_size": _inner_size(fields, arch, num_layers) if has_attention else 1,
        "num_hidden_layers": num_layers,
        "num_attention_heads": fields.size(key(Keys.Attention.HEAD_COUNT)) if has_attention else 1,
        "max_position_embeddings": fields.size(key(Keys.LLM.CONTEXT_LENGTH), most=MAX_POSITIONS),
        "rope_parameters": _rope_parameters(fields, arch),
        **_facts_of_tensors(shapes, num_layers),
    }
    if fields.has(key(Keys.Attention.LAYERNORM_EPS)):
        config |= dict.fromkeys(LAYER_NORM_EPS, fields.number(key(Keys.Attention.LAYERNORM_EPS)))
    else:
        config["rms_norm_eps"] = fields.number(key(Keys.Attention.LAYERNORM_RMS_EPS))
    config["num_key_value_heads"] = size_of_layers(
        fields, key(Keys.Attention.HEAD_COUNT_KV), num_layers, config["num_attention_heads"]
    )
    config["head_dim"] = fields.size(
        key(Keys.Attention.KEY_LENGTH), config["hidden_size"] // config["num_attention_heads"]
    )
    rotary_dim = fields.size(key(Keys.Rope.DIMENSION_COUNT), config["head_dim"])
    if rotary_dim != config["head_dim"]:  # rounded up, so that the product with head_dim is not below rotary_dim
        config["rope_parameters"]["partial_rotary_factor"] = math.nextafter(rotary_dim / config["head_dim"], math.inf)
    ARCHITECTURES[arch].configure(fields, config)
    del config["tensors"]
    return config


def size_of_layers(fields: Fields, name: str, num_layers: int, default: int | None = None) -> int:
    """A field with one size, or one for each layer, of which the largest is returned."""
    if not isinstance(fields.get(name), list):
        return fields.size(name, default)
    sizes = fields.numbers(name)
    if len(sizes) != num_layers:
        fields.bad(name, "one number, or one for each layer")
    return int(max(sizes))


def _facts_of_tensors(shapes: Mapping[str, tuple[int, ...]], num_layers: int) -> Config:
    """Fields that follow from which tensors there are; ``tensors``: their shapes, for ``Architecture.configure``."""

    def has(name: str) -> bool:
        return any(f"blk.{layer}.{name}" in shapes for layer in range(num_layers))

    return {
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": has("attn_q.bias") or has("attn_qkv.bias"),
        "attention_out_bias": "blk.0.attn_output.bias" in shapes,
        "mlp_bias": has("ffn_down.bias"),
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in shapes,
        "num_ln_in_parallel_attn": 1 + ("blk.0.attn_norm_2.weight" in shapes),
        "attention_k_eq_v": any(
            f"blk.{layer}.attn_k.weight" in shapes and f"blk.{layer}.attn_v.weight" not in shapes
            for layer in range(num_layers)
        ),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in shapes,
        "has_split_kv_b": "blk.0.attn_k_b.weight" in shapes,
        "tensors": shapes,
    }


def _inner_size(fields: Fields, arch: str, num_layers: int) -> int:
    """Of MLPs, or of experts if there are no others."""
    name, own = (key.format(arch=arch) for key in (Keys.LLM.FEED_FORWARD_LENGTH, Keys.LLM.EXPERT_FEED_FORWARD_LENGTH))
    return size_of_layers(fields, name if fields.get(name) or not fields.has(own) else own, num_layers)


def _architecture(fields: Fields) -> str:
    arch = fields.string(Keys.General.ARCHITECTURE)
    try:
        check_gguf_architecture(arch)
    except ModelError as error:
        raise ModelError(f"{fields.source}: {error}") from error
    return arch


def _check_experts(header: GGUFHeader, arch: str, source: str) -> None:
    if header.metadata.get(Keys.LLM.EXPERT_COUNT.format(arch=arch)) and not ARCHITECTURES[arch].has_experts:
        raise ModelError(
            f"{source}: {arch} models with experts are not supported yet in GGUF files; choose a dense one, or one in "
            "safetensors format"
        )


def _rope_parameters(fields: Fields, arch: str) -> dict[str, Any]:
    def key(template: str) -> str:
        return template.format(arch=arch)

    kind = fields.string(key(Keys.Rope.SCALING_TYPE), "none")
    rope: dict[str, Any] = {
        "rope_type": "default" if kind in ("none", "longrope") else kind,  # LongRoPE's factors are tensors
        "rope_theta": fields.number(key(Keys.Rope.FREQ_BASE), 10000.0),
    }
    if rope["rope_type"] != "default":
        rope["factor"] = fields.number(key(Keys.Rope.SCALING_FACTOR))
        if rope["factor"] <= 0:
            fields.bad(key(Keys.Rope.SCALING_FACTOR), "greater than 0")
    if fields.has(key(Keys.Rope.SCALING_ORIG_CTX_LEN)):
        rope["original_max_position_embeddings"] = fields.size(key(Keys.Rope.SCALING_ORIG_CTX_LEN), most=MAX_POSITIONS)
    if fields.has(key(Keys.Rope.SCALING_ATTN_FACTOR)):  # llama.cpp multiplies it by YaRN's own factor
        own = 1.0 + 0.1 * math.log(rope["factor"]) if kind == "yarn" else 1.0
        rope["attention_factor"] = fields.number(key(Keys.Rope.SCALING_ATTN_FACTOR)) * own
    for name, stored in YARN_FIELDS.items():
        if fields.has(key(stored)):
            rope[name] = fields.number(key(stored))
    if rope.get("mscale_all_dim"):
        rope["mscale"] = 1.0
    return rope


# ---------------------------------------------------------------------------------------------------------
# weights


class GGUFCheckpoint:
    """A GGUF model in one or more files."""

    def __init__(self, path: Path, header: GGUFHeader) -> None:
        """Opens the files.

        Args:
            path: The file, or the first of several.
            header: Its header, with the tensors of all files.
        """
        self.path = path
        self.header = header
        self.paths = [path.parent / name for name in header.files] or [path]
        self.mapped = [MappedFile(each) for each in self.paths]
        self.entries = {tensor.name: tensor for tensor in header.tensors}
        for tensor in header.tensors:
            self._check(tensor)
        self.config = hf_config_from_gguf(header, str(path))
        """The model's configuration under the names of config.json."""
        arch = self.config["model_type"]
        if not ARCHITECTURES[arch].has_merged_qkv:
            self.entries = self._divided(self._apart)
        self.entries = self._divided(gguf_experts.apart)
        arch_id = next(key for key, value in MODEL_ARCH_NAMES.items() if value == arch)
        self.names = get_tensor_name_map(arch_id, self.config["num_hidden_layers"])
        self.architecture = ARCHITECTURES[arch]
        self.known_names = {self._renamed(known): known for known in self.names.mapping}
        """Names of modules that the ``gguf`` package knows, by ours."""
        types = self._quantized_types()
        if types:
            self.config["quantization_config"] = {"quant_method": "gguf", "types": types}
        rope = self.config["rope_parameters"]
        rope = rope.get("full_attention", rope)
        if ROPE_FACTORS in self.entries:  # Llama 3's frequency factors, as a tensor
            rope |= {"rope_type": "frequency_factors", "factors": self._numbers(ROPE_FACTORS)}
        if all(name in self.entries for name in LONGROPE_FACTORS.values()):
            rope |= {"rope_type": "longrope"}
            rope |= {field: self._numbers(name) for field, name in LONGROPE_FACTORS.items()}

    def tensors(self, wanted: Collection[str], mapper: WeightsMapper) -> list[StoredTensor]:
        hf_names = {self._gguf_name(name): name for name in wanted}
        return [
            StoredTensor(
                name=hf_names.get(entry.name, entry.name),
                origin=self._origin(entry.name),
                num_bytes=entry.num_bytes,
                read=partial(self._read, entry, hf_names.get(entry.name)),
                prefetch=partial(self.mapped[entry.file].prefetch, entry.offset, entry.num_bytes),
            )
            for entry in self.entries.values()
            if entry.name in hf_names or not self._is_unused(entry.name)
        ]

    def _is_unused(self, gguf_name: str) -> bool:
        """Whether the model needs no such tensor: further tokens are predicted by layers after the others."""
        layer = gguf_experts.layer_of(gguf_name)
        if self.config.get("num_mtp_layers") and layer is not None and layer >= self.config["num_hidden_layers"]:
            return True
        return re.search(self.architecture.unused, gguf_name) is not None

    def _quantized_types(self) -> dict[str, str]:
        """Types of quantised matrices, by all names that their modules have in any family."""
        types = {}
        for module, known in self.known_names.items():
            _, gguf_name = self.names.mapping[known]
            entry = self.entries.get(f"{gguf_name}.weight")
            if entry is not None and len(entry.shape) == 2:
                kind = _type_of(entry, self._origin(entry.name))
                if kind not in PLAIN_TYPES:
                    types[module] = kind.name
        for module, entry in gguf_experts.matrices(self.entries.values()):
            kind = _type_of(entry, self._origin(entry.name))
            if kind not in PLAIN_TYPES:
                types[module] = kind.name
        return types

    def _numbers(self, name: str) -> list[float]:
        numbers: list[float] = self._read(self.entries[name], None, torch.float32).tolist()
        return numbers

    def origin(self, name: str) -> str:
        return self._origin(self._gguf_name(name))

    def _origin(self, gguf_name: str) -> str:
        entry = self.entries.get(gguf_name)
        return f"{self.path if entry is None else self.paths[entry.file]}: tensor {gguf_name!r}"

    def _gguf_name(self, name: str) -> str:
        of_expert = gguf_experts.gguf_name(name)
        if of_expert is not None:
            return of_expert
        for pattern, stored in self.architecture.others:
            if re.search(pattern, name):
                return re.sub(pattern, stored, name)
        found = self.names.get_name(self._known_name(name), try_suffixes=SUFFIXES) or name
        # A parameter of the layer itself: its name has no last component.
        return f"{found}.weight" if found not in self.entries and f"{found}.weight" in self.entries else found

    def _known_name(self, name: str) -> str:
        if name in self.known_names:
            return self.known_names[name]  # a parameter of the layer itself
        name = STEP_BIAS.sub(".dt_proj.bias", CORRECTION.sub(".e_score_correction.bias", name))
        module, dot, leaf = name.rpartition(".")
        return f"{self.known_names.get(module, module)}{dot}{leaf}"

    def _renamed(self, known: str) -> str:
        for pattern, replacement in self.architecture.renames:
            known = re.sub(pattern, replacement, known)
        return known

    def _check(self, tensor: GGUFTensor) -> None:
        """Checks that the tensor has a known type and lies within the file."""
        origin = self._origin(tensor.name)
        check_size(tensor, origin)
        missing = tensor.offset + tensor.num_bytes - len(self.mapped[tensor.file])
        if missing > 0:
            raise ModelError(f"{origin}: truncated: the file ends {missing} bytes before the tensor does")

    def _divided(self, apart: Callable[[GGUFTensor], Iterable[GGUFTensor]]) -> dict[str, GGUFTensor]:
        """The parts of all tensors, by name.

        Raises:
            ModelError: Two tensors have the same part.
        """
        found: dict[str, GGUFTensor] = {}
        sources: dict[str, str] = {}
        for tensor in self.entries.values():
            for part in apart(tensor):
                if part.name in found:
                    raise ModelError(
                        f"{self._origin(tensor.name)} and tensor {sources[part.name]!r} are the same weights "
                        f"({part.name}); convert the model again, with one of them"
                    )
                found[part.name], sources[part.name] = part, tensor.name
        return found

    def _apart(self, tensor: GGUFTensor) -> list[GGUFTensor]:
        """The tensor itself, or q, k and v if it holds them one after the other."""
        heads, kv_heads, size = (self.config[f] for f in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        rows = tensor.shape[0] if tensor.shape else 0
        if ".attn_qkv." not in tensor.name or rows != (heads + 2 * kv_heads) * size:
            return [tensor]
        parts, offset = [], tensor.offset
        for part, count in (("q", heads * size), ("k", kv_heads * size), ("v", kv_heads * size)):
            name, num_bytes = tensor.name.replace("attn_qkv", f"attn_{part}"), tensor.num_bytes // rows * count
            shape = (count, *tensor.shape[1:])
            parts.append(replace(tensor, name=name, shape=shape, offset=offset, num_bytes=num_bytes))
            offset += num_bytes
        return parts

    def _read(self, tensor: GGUFTensor, hf_name: str | None, dtype: torch.dtype) -> Tensor:
        kind = _type_of(tensor, self._origin(tensor.name))
        if dtype not in (*FLOATS, torch.uint8):
            raise ValueError(f"has type {kind.name}; the model needs {dtype}")
        raw = np.frombuffer(self.mapped[tensor.file].data, np.uint8, tensor.num_bytes, tensor.offset)
        role = self.names.get_type(self._known_name(hf_name), try_suffixes=SUFFIXES) if hf_name else None
        if role is not None and role in self.architecture.permuted:
            num_heads = self.config[self.architecture.permuted[role]]
            raw = unpermute(raw.reshape(tensor.shape[0], -1), num_heads).reshape(-1)
        if role in self.architecture.ungrouped:
            heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
            raw = group(raw.reshape(tensor.shape[0], -1), heads, kv_heads).reshape(-1)
        shape = (-1, tensor.shape[-1]) if role in self.architecture.by_head else tensor.shape
        shape = (-1,) if role in FLAT else (1, -1) if role == MODEL_TENSOR.FFN_GATE_INP_SHEXP else shape
        if dtype == torch.uint8:
            return torch.from_numpy(raw).view(tensor.shape[0], -1)
        if kind in PLAIN_TYPES:
            plain = torch.from_numpy(raw).view(PLAIN_TYPES[kind]).view(shape)
            is_norm = hf_name is not None and hf_name.endswith("norm.weight")
            if role in self.architecture.transposed:
                return plain.T if plain.dim() == 2 else plain
            if role == MODEL_TENSOR.SSM_A:
                return (-plain.float()).log()
            is_norm = is_norm and role != MODEL_TENSOR.SSM_NORM  # it has no offset
            return plain.float() - self.architecture.norm_offset if is_norm else plain
        try:
            return dequantize_to(raw, kind, dtype).view(shape)
        except NotImplementedError as error:
            raise ValueError(f"has type {kind.name}, which is not supported") from error


def check_size(tensor: GGUFTensor, origin: str) -> None:
    """Rejects an entry of the tensor table whose size does not match its shape and type.

    The api has checked the file in the same way, with its own table; see ``tests/models/test_gguf.py``.

    Args:
        tensor: The entry.
        origin: How error messages refer to the entry.

    Raises:
        ModelError: The type is unknown, rows are not whole blocks, or the number of bytes is wrong.
    """
    kind = _type_of(tensor, origin)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    count = math.prod(tensor.shape)
    if math.prod(tensor.shape[-1:]) % block or tensor.num_bytes != count // block * block_bytes:
        raise ModelError(f"{origin}: corrupt header: {tensor.num_bytes} bytes for {kind.name} {list(tensor.shape)}")


def _type_of(tensor: GGUFTensor, origin: str) -> GGMLQuantizationType:
    try:
        return GGMLQuantizationType(tensor.ggml_type)
    except ValueError as error:
        raise ModelError(f"{origin} has an unknown type ({tensor.ggml_type})") from error


def unpermute(rows: npt.NDArray[np.uint8], num_heads: int) -> npt.NDArray[np.uint8]:
    """Undoes llama.cpp's order of the rows of q and k.

    Args:
        rows: [num_heads * head_dim, bytes of a row]. Rows move as a whole, so their quantisation does not matter.
        num_heads: Rows are reordered within each head.
    """
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[1])  # [num_heads, head_dim / 2, 2, bytes]
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def group(rows: npt.NDArray[np.uint8], num_heads: int, num_kv_heads: int) -> npt.NDArray[np.uint8]:
    """Rows of q, k and v, one after the other, by KV head: first those of its queries, then of its key and value."""
    heads = rows.reshape(num_heads + 2 * num_kv_heads, -1, rows.shape[1])
    parts = np.split(heads, [num_heads, num_heads + num_kv_heads])
    by_kv_head = [part.reshape(num_kv_heads, -1, rows.shape[1]) for part in parts]
    return np.concatenate(by_kv_head, axis=1).reshape(rows.shape)


def dequantize_to(raw: npt.NDArray[np.uint8], kind: GGMLQuantizationType, dtype: torch.dtype) -> Tensor:
    """Dequantises blocks to a flat tensor: exact in float32, then rounded to ``dtype``.

    Works in chunks, with many rows joined: the package takes 16 rows at a time and would be several times slower.
    """
    block, block_bytes = GGML_QUANT_SIZES[kind]
    step = max(1, CHUNK_BYTES // block_bytes)
    out = torch.empty(len(raw) // block_bytes * block, dtype=dtype)
    for first in range(0, len(raw) // block_bytes, step):
        chunk = raw[first * block_bytes : (first + step) * block_bytes]
        numbers = torch.from_numpy(dequantize(chunk.reshape(1, -1), kind).reshape(-1))
        out[first * block : first * block + len(numbers)] = numbers
    return out
