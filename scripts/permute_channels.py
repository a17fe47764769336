#!/usr/bin/env python
"""Permutes the channels of a Llama-like model at random, without changing what it computes.

    python scripts/permute_channels.py MODEL OUT     # a folder with safetensors, or a GGUF file

Weights that come from a file of 4 bits lie on its grid: a quantiser of the same groups would find it again, and its
loss say nothing. Permuted, each group holds numbers of many groups. Hidden channels are permuted in the embedding, the
norms and all projections, those of an MLP in its gate, up and down projections. OUT is a folder in bfloat16; a GGUF
file is converted by transformers first.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

READS_HIDDEN = re.compile(r"(embed_tokens|lm_head|q_proj|k_proj|v_proj|gate_proj|up_proj)\.weight$")
WRITES_HIDDEN = re.compile(r"(o_proj|down_proj)\.weight$")
NORM = re.compile(r"norm\.weight$")
PER_HEAD = re.compile(r"self_attn\.[qk]_norm\.weight$")
WRITES_INNER = re.compile(r"(gate_proj|up_proj)\.weight$")
READS_INNER = re.compile(r"down_proj\.weight$")


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


def main() -> int:
    parser = argparse.ArgumentParser(description="Permute the channels of a model without changing what it computes.")
    parser.add_argument("model", type=Path, help="folder or GGUF file")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
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
