#!/usr/bin/env python
"""Writes a GGUF model with experts in quantised blocks, for comparisons of engines.

    python scripts/bench_experts.py experts.gguf
    python scripts/bench_step.py --model experts.gguf --decode 1 8
    python scripts/bench_compare.py --model a3b-Q4_K --engine llama.cpp=llama.cpp/build/bin/llama-server

It has the shape of Qwen3-30B-A3B with fewer layers and the demo model's vocabulary. Its blocks are random: which
experts a token gets does not matter to the speed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
from bench_models import LLAMA, add_tokenizer, demo_path
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from api.model.gguf_file import read_gguf
from executor.quantization.gguf import SCALES

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 2048, 32, 4, 128
EXPERTS, TOP_K, INNER = 128, 8, 768
NAME = "a3b"
"""What ``bench_compare.py`` calls the model."""
LAYERS = 8
"""Of the 48 that the model has."""
PATTERN_BLOCKS = 4096
"""Random blocks that are repeated."""


def shapes_of(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor."""
    yield "token_embd.weight", (int(str(LLAMA["vocab_size"])), HIDDEN)
    yield "output_norm.weight", (HIDDEN,)
    for layer in range(layers):
        for name, shape in {
            "attn_norm": (HIDDEN,),
            "attn_q": (HEADS * HEAD_DIM, HIDDEN),
            "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_q_norm": (HEAD_DIM,),
            "attn_k_norm": (HEAD_DIM,),
            "attn_output": (HIDDEN, HEADS * HEAD_DIM),
            "ffn_norm": (HIDDEN,),
            "ffn_gate_inp": (EXPERTS, HIDDEN),
            "ffn_gate_exps": (EXPERTS, INNER, HIDDEN),
            "ffn_up_exps": (EXPERTS, INNER, HIDDEN),
            "ffn_down_exps": (EXPERTS, HIDDEN, INNER),
        }.items():
            yield f"blk.{layer}.{name}.weight", shape


def random_blocks(shape: tuple[int, ...], kind: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    """Blocks whose numbers are small."""
    columns, size = GGML_QUANT_SIZES[kind]
    pattern = np.random.default_rng(0).integers(0, 256, (PATTERN_BLOCKS, size), np.uint8)
    for offset, most in SCALES[kind.name].items():
        pattern[:, offset : offset + 2] = np.array([0.05 / most], np.float16).view(np.uint8)
    return np.resize(pattern.reshape(-1), int(np.prod(shape)) // columns * size)


def numbers(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Norms are 1; routers are random."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return np.random.default_rng(len(name)).normal(0, 0.02, shape).astype(np.float32)


def write(path: Path, layers: int, kind: GGMLQuantizationType) -> None:
    """Writes the GGUF file."""
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(3 * HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(TOP_K)
    writer.add_expert_feed_forward_length(INNER)
    add_tokenizer(writer, read_gguf(demo_path()).metadata)
    kinds = {}
    for name, shape in shapes_of(layers):
        is_plain = len(shape) == 1 or "ffn_gate_inp" in name
        own = kinds[name] = GGMLQuantizationType.F32 if is_plain else kind
        columns, size = GGML_QUANT_SIZES[own]
        num_bytes = int(np.prod(shape)) // columns * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes_of(layers):
        is_plain = kinds[name] == GGMLQuantizationType.F32
        writer.write_tensor_data(numbers(name, shape) if is_plain else random_blocks(shape, kind))
    writer.close()


def make(folder: Path, kind: str) -> Path:
    """Writes the model into a folder, unless it is there already."""
    path = folder / f"{NAME}-{kind}.gguf"
    if not path.exists():
        print(f"writing {path}", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        write(unfinished, LAYERS, GGMLQuantizationType[kind])
        unfinished.rename(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("path", type=Path, help="the file to write")
    add("--type", default="Q4_K", choices=SCALES, help="type of the blocks (default: Q4_K)")
    add("--layers", type=int, default=LAYERS, help=f"of the 48 that the model has (default: {LAYERS})")
    options = parser.parse_args()
    write(options.path, options.layers, GGMLQuantizationType[options.type])


if __name__ == "__main__":
    main()
