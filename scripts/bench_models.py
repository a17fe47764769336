#!/usr/bin/env python
"""Writes models that every engine can read: for each a GGUF file, and a folder with the same model in bfloat16.

    python scripts/bench_models.py smollm2 1b 1b-Q4_0 --out models

``smollm2`` is the demo model, dequantised. ``1b`` and ``3b`` are Llama shapes with random weights and the demo model's
tokenizer; their folders hold no weights, so an engine that reads folders needs random weights of its own
(``--load-format dummy`` in Octavo and vLLM). The speed of a dense model does not depend on the values.

The GGUF file is in bfloat16, or in a type that follows the name: one that the ``gguf`` package writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize

from api.config import DEMO_MODULE
from api.model.gguf_file import GGUFFile, read_gguf
from api.model.gguf_tokenizer import convert_gguf_tokenizer

DEMO = "smollm2"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}
SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
}
"""Llama models without weights; all have 8 KV heads."""
TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Of quantised files."""
_DEMO_SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
}
TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Weights of a layer in GGUF files and in folders."""
SMALLEST_EXPONENT = 0x79 << 7
"""Bits of 2^-6 in bfloat16. Random weights have magnitudes from 2^-6 to 2^-5, about those of trained models."""

Bits = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class BenchModel:
    """A model on disk, for engines that read files and for those that read folders."""

    gguf: Path
    folder: Path

    @property
    def has_weights(self) -> bool:
        """Whether the folder holds weights."""
        return (self.folder / "model.safetensors").exists()


def config_of(name: str) -> dict[str, Any]:
    """The model's config.json."""
    return LLAMA | (_DEMO_SHAPE if name == DEMO else SHAPES[name] | {"num_key_value_heads": 8})


def shapes_of(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name in GGUF files and shape of each tensor."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "token_embd.weight", (config["vocab_size"], hidden)
    yield "output_norm.weight", (hidden,)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "attn_norm": (hidden,),
            "attn_q": (hidden, hidden),
            "attn_k": (kv, hidden),
            "attn_v": (kv, hidden),
            "attn_output": (hidden, hidden),
            "ffn_norm": (hidden,),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }.items():
            yield f"blk.{layer}.{name}.weight", shape


def make_model(name: str, out: Path) -> BenchModel:
    """Writes a model unless it is there already.

    Args:
        name: ``smollm2``, or a key of ``SHAPES``; for a quantised GGUF file with its type, as in ``1b-Q8_0``.
        out: Folder for the models.
    """
    name, _, type_name = name.partition("-")
    if name not in (DEMO, *SHAPES) or type_name not in ("", *TYPES):
        raise SystemExit(f"expected one of {', '.join((DEMO, *SHAPES))}, by itself or with -{', -'.join(TYPES)}")
    kind = GGMLQuantizationType[type_name or "BF16"]
    model = BenchModel(out / f"{name}-{type_name or 'bf16'}.gguf", out / name)
    if model.gguf.exists() and (model.folder / "config.json").exists():
        return model
    print(f"writing {model.gguf} and {model.folder}", file=sys.stderr)
    model.folder.mkdir(parents=True, exist_ok=True)
    config = config_of(name)
    demo = read_gguf(demo_path())
    weights = _demo_weights(demo) if name == DEMO else None
    unfinished = model.gguf.with_suffix(".part")
    _write_gguf(unfinished, config, kind, demo, weights)
    unfinished.rename(model.gguf)
    _write_tokenizer(model.folder, config, demo)
    if weights is not None and not model.has_weights:
        _write_safetensors(model.folder / "model.safetensors", config, weights)
    (model.folder / "config.json").write_text(json.dumps(config, indent=1))
    return model


def write_demo(path: Path, renamed: Mapping[int, str]) -> None:
    """Writes the demo model in bfloat16, as a GGUF file in which some tokens have other texts."""
    demo = read_gguf(demo_path())
    tokens = list(demo.metadata["tokenizer.ggml.tokens"])
    for token, text in renamed.items():
        tokens[token] = text
    demo.metadata["tokenizer.ggml.tokens"] = tokens
    _write_gguf(path, config_of(DEMO), GGMLQuantizationType.BF16, demo, _demo_weights(demo))


def demo_path() -> Path:
    from importlib.util import find_spec

    spec = find_spec(DEMO_MODULE)
    if spec is None or spec.origin is None:
        raise SystemExit("the demo model is missing; scripts/serve installs it")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _demo_weights(demo: GGUFFile) -> dict[str, Bits]:
    """The demo model's weights as the bits of bfloat16 numbers, by their names in GGUF files."""
    data = np.memmap(demo.path, np.uint8, "r")
    weights = {}
    for tensor in demo.tensors:
        kind = GGMLQuantizationType(tensor.ggml_type)
        raw = data[tensor.offset : tensor.offset + tensor.num_bytes].reshape(*tensor.shape[:-1], -1)
        values = dequantize(raw, kind).reshape(tensor.shape).astype(np.float32)
        weights[tensor.name] = quantize(values, GGMLQuantizationType.BF16).view(np.uint16).reshape(tensor.shape)
    return weights


def _random_bits(shape: tuple[int, ...], random: np.random.Generator) -> Bits:
    """Random bfloat16 numbers: sign and mantissa are random."""
    bits = np.frombuffer(random.bytes(2 * int(np.prod(shape))), np.uint16).reshape(shape)
    random_bits: Bits = (bits & np.uint16(0x807F)) | np.uint16(SMALLEST_EXPONENT)
    return random_bits


def _floats(bits: Bits) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _write_gguf(
    path: Path, config: dict[str, Any], kind: GGMLQuantizationType, demo: GGUFFile, weights: dict[str, Bits] | None
) -> None:
    """Writes the GGUF file, with matrices of some type; without weights, they are random and norms are ones."""
    writer = GGUFWriter(path, "llama")
    heads = config["num_attention_heads"]
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind.name}"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    add_tokenizer(writer, demo.metadata)
    shapes = dict(shapes_of(config))
    for name, shape in shapes.items():  # the format stores vectors in float32
        own_kind = GGMLQuantizationType.F32 if len(shape) == 1 else kind
        columns, size = GGML_QUANT_SIZES[own_kind]
        num_bytes = int(np.prod(shape)) // columns * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, raw_dtype=own_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        if weights is not None:
            values = weights[name]
        else:
            values = np.full(shape, 0x3F80, np.uint16) if len(shape) == 1 else _random_bits(shape, random)
        if len(shape) == 1:
            writer.write_tensor_data(_floats(values))
        else:
            plain = kind == GGMLQuantizationType.BF16
            writer.write_tensor_data(values if plain else quantize(_floats(values), kind))
    writer.close()


def add_tokenizer(writer: GGUFWriter, metadata: dict[str, Any]) -> None:
    prefix = "tokenizer.ggml."
    writer.add_tokenizer_model(metadata[f"{prefix}model"])
    writer.add_tokenizer_pre(metadata[f"{prefix}pre"])
    writer.add_token_list(metadata[f"{prefix}tokens"])
    writer.add_token_types(metadata[f"{prefix}token_type"])
    writer.add_token_merges(metadata[f"{prefix}merges"])
    writer.add_bos_token_id(metadata[f"{prefix}bos_token_id"])
    writer.add_eos_token_id(metadata[f"{prefix}eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(metadata["tokenizer.chat_template"])


def _write_tokenizer(folder: Path, config: dict[str, Any], demo: GGUFFile) -> None:
    found = convert_gguf_tokenizer(demo)
    found.backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": demo.metadata["tokenizer.chat_template"],
        "model_max_length": config["max_position_embeddings"],
        **found.special_tokens_map,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _write_safetensors(path: Path, config: dict[str, Any], weights: dict[str, Bits]) -> None:
    """Writes weights under the names of folders, with the rows of Q and K in the order of folders."""
    import torch
    from safetensors.torch import save_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for name, bits in weights.items():
        part, _, kind = name.removesuffix(".weight").removeprefix("blk.").partition(".")
        if kind in heads:  # llama.cpp makes columns that are rotated together adjacent
            bits = bits.reshape(heads[kind], -1, 2, bits.shape[1]).swapaxes(1, 2).reshape(bits.shape)
        target = {"token_embd": "embed_tokens", "output_norm": "norm"}.get(part) or f"layers.{part}.{TENSORS[kind]}"
        tensors[f"model.{target}.weight"] = torch.from_numpy(np.ascontiguousarray(bits)).view(torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Write models for benchmarks.")
    parser.add_argument("names", nargs="+", help=f"{', '.join((DEMO, *SHAPES))}, or with a type: 1b-Q8_0")
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder for the models (default: models)")
    options = parser.parse_args()
    for name in options.names:
        print(make_model(name, options.out).gguf)


if __name__ == "__main__":
    main()
