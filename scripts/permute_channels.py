#!/usr/bin/env python
"""Permutes the channels of a Llama-like model at random, without changing what it computes.

    python scripts/permute_channels.py MODEL OUT            # a folder with safetensors, or a GGUF file
    python scripts/permute_channels.py MODEL.gguf OUT.gguf

Weights that come from a file of 4 bits lie on its grid: a quantiser of the same groups would find it again, and its
loss say nothing. Permuted, each group holds numbers of many groups. Hidden channels are permuted in the embedding, the
norms and all projections, those of an MLP in its gate, up and down projections. OUT is a folder in bfloat16, for which
transformers converts a GGUF file first, or a GGUF file in bfloat16.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file
from torch import Tensor

from api.commands.quantize import copy_fields

READS_HIDDEN = re.compile(r"(embed_tokens|lm_head|q_proj|k_proj|v_proj|gate_proj|up_proj)\.weight$")
WRITES_HIDDEN = re.compile(r"(o_proj|down_proj)\.weight$")
NORM = re.compile(r"norm\.weight$")
PER_HEAD = re.compile(r"self_attn\.[qk]_norm\.weight$")
WRITES_INNER = re.compile(r"(gate_proj|up_proj)\.weight$")
READS_INNER = re.compile(r"down_proj\.weight$")
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Modules of GGUF files; norms of layers keep their names."""


def permuted(tensors: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a model with permuted channels.

    Raises:
        ValueError: A tensor has no known place in the model.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randperm(tensors["model.norm.weight"].shape[0], generator=generator)
    inner: dict[str, Tensor] = {}
    result = {}
    for name, value in sorted(tensors.items()):
        tensor = value
        if WRITES_INNER.search(name) or READS_INNER.search(name):
            mlp, _, _ = name.removesuffix(".weight").rpartition(".")
            size = tensor.shape[1 if READS_INNER.search(name) else 0]
            order = inner.setdefault(mlp, torch.randperm(size, generator=generator))
            tensor = tensor[:, order] if READS_INNER.search(name) else tensor[order]
        if READS_HIDDEN.search(name):
            tensor = tensor[:, hidden]
        elif WRITES_HIDDEN.search(name) or (NORM.search(name) and not PER_HEAD.search(name)):
            tensor = tensor[hidden]
        elif not PER_HEAD.search(name):
            raise ValueError(f"{name} has no known place in the model")
        result[name] = tensor.contiguous()
    return result


def convert(source: Path, target: Path) -> None:
    """Converts a GGUF file to a folder in bfloat16 with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def permute_gguf(source: Path, target: Path, seed: int = 0) -> None:
    """Writes a GGUF file with permuted channels, in bfloat16."""
    reader = GGUFReader(source)
    ours: dict[str, str] = {}
    tensors = {}
    for each in reader.tensors:
        if each.name == "rope_freqs.weight":  # of angles, not of channels
            continue
        *block, module, leaf = each.name.split(".")  # blk.0.attn_q.weight
        layer = f"model.layers.{block[1]}." if block else ""
        ours[each.name] = f"{layer}{GGUF_NAMES.get(module, module)}.{leaf}"
        numbers = torch.from_numpy(gguf.dequantize(each.data, each.tensor_type).copy())
        tensors[ours[each.name]] = numbers if numbers.dim() == 1 else numbers.bfloat16()
    changed = permuted(tensors, seed)
    writer = GGUFWriter(target, reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
    copy_fields(reader, writer)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for each in reader.tensors:
        if each.name not in ours:
            writer.add_tensor(each.name, each.data, raw_dtype=each.tensor_type)
            continue
        tensor = changed[ours[each.name]]
        if tensor.dim() == 1:
            writer.add_tensor(each.name, tensor.numpy())
        else:
            bits = tensor.view(torch.uint8).numpy()
            writer.add_tensor(each.name, bits, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="Permute the channels of a model without changing what it computes.")
    parser.add_argument("model", type=Path, help="folder or GGUF file")
    parser.add_argument("out", type=Path, help="new folder or GGUF file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.suffix == ".gguf":
        permute_gguf(options.model, options.out, options.seed)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    if options.model.is_file():
        convert(options.model, options.out)
    else:
        for file in options.model.iterdir():
            if file.is_file():
                shutil.copy(file, options.out)
    file = options.out / "model.safetensors"
    save_file(permuted(load_file(file), options.seed), file, metadata={"format": "pt"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
