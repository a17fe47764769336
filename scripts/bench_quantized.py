#!/usr/bin/env python
"""Times linear layers with quantised weights beside bfloat16, against the time that reading the weights takes.

Weights are random. Every call of a kernel reads its own copy of them, so that they come from memory; "floor" is the
time in which this machine reads as many bytes, "bf16" that of the same product with weights in bfloat16.

    scripts/bench_quantized.py                              # this machine's capability
    OCTAVO_CPU_CAPABILITY=avx2 scripts/bench_quantized.py Q4_K Q8_0 --rows 1 16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_ops import best_time

import ops
from executor.graphs import Program
from ops.cpu import library, memory
from ops.dispatch import Spec
from ops.reference.gguf_blocks import BLOCK_FORMATS

SHAPES = {"small": (1536, 576), "large": (8192, 2048), "logits": (49152, 2048)}
"""Out and in features."""
GROUPS = {"int8": (8, None), "int4": (4, 128)}
"""Bits, and columns of a group; None: a row."""
FLOATS = {"fp8_e4m3": (8, None), "nf4": (4, 64), "fp4": (4, 64), "mxfp4": (4, 32), "nvfp4": (4, 16)}
"""Likewise."""
STREAM_BYTES = 512 << 20
"""Total size of a weight's copies: caches of 256 MiB hold half of them at most."""
MAX_COPIES = 1024


def packer(name: str, out_features: int, in_features: int, activations: Any) -> Callable[[], ops.Weight]:
    """Makes copies of a random weight with small numbers."""
    options: Any = {"dtype": torch.bfloat16, "activations": activations}
    if name == "bf16":
        plain = torch.randn(out_features, in_features).bfloat16()
        return lambda: ops.pack_linear(plain)
    if name in GROUPS:
        bits, group_size = GROUPS[name]
        codes = torch.randint(0, 1 << bits, (out_features, in_features), dtype=torch.uint8)
        groups = 1 if group_size is None else in_features // group_size
        scales = torch.full((out_features, groups), 1e-3).half()
        return lambda: ops.pack_groups(codes, scales, bits=bits, **options)
    if name in FLOATS:
        return float_packer(name, out_features, in_features, options)
    num_bytes = in_features // BLOCK_FORMATS[name].columns * BLOCK_FORMATS[name].num_bytes
    rows = torch.randint(0, 48, (out_features, num_bytes), dtype=torch.uint8)  # so that scales are small numbers, too
    return lambda: ops.pack_blocks([(rows, name)], **options)


def float_packer(name: str, out_features: int, in_features: int, options: Any) -> Callable[[], ops.Weight]:
    bits, group_size = FLOATS[name]
    codes = torch.randint(0, 1 << bits, (out_features, in_features), dtype=torch.uint8)
    if name == "fp8_e4m3":  # as weights are spread: subnormal numbers are slower, and rare
        codes = (100 * torch.randn(out_features, in_features)).clamp(-448, 448).to(torch.float8_e4m3fn)
    shape = (out_features, 1 if group_size is None else in_features // group_size)
    options |= {"format": name, "group_size": group_size}
    if name == "mxfp4":
        return lambda: ops.pack_floats(codes, torch.full(shape, 120, dtype=torch.uint8), **options)
    if name == "nvfp4":
        scales = torch.ones(shape).to(torch.float8_e4m3fn)
        return lambda: ops.pack_floats(codes, scales, torch.full((out_features,), 1e-3), **options)
    return lambda: ops.pack_floats(codes, torch.full(shape, 1e-3), **options)


def weight_bytes(weight: ops.Weight) -> int:
    tensors = weight.tensors if isinstance(weight, ops.QuantizedWeight) else (weight.data,)
    return sum(tensor.nbytes for tensor in tensors)


class Bench:
    """Times products of one shape."""

    def __init__(self, out_features: int, in_features: int, seconds: float, activations: str) -> None:
        self.out_features = out_features
        self.in_features = in_features
        self.seconds = seconds
        self.activations = activations

    def time(self, weights: list[ops.Weight], rows: int) -> float:
        """Seconds of one product."""
        program = Program("cpu", max_tokens=rows)
        x: Any = program.input("x", Spec("tokens", self.in_features, torch.bfloat16))
        outputs = [ops.linear(x, weight) for weight in weights]
        program.finish(outputs[-1])
        assert program.python_ops == 0
        tensor = torch.randn(rows, self.in_features).bfloat16()
        run: Callable[[], object] = lambda: program.replay({"x": tensor})  # noqa: E731
        return best_time(run, self.seconds) / len(weights)

    def copies(self, name: str) -> list[ops.Weight]:
        """The same weight as often as it takes to fill more than any CPU's cache."""
        make = packer(name, self.out_features, self.in_features, self.activations)
        first = make()
        count = max(1, min(MAX_COPIES, STREAM_BYTES // weight_bytes(first)))
        return [first, *(make() for _ in range(count - 1))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", help="default: Q8_0 Q4_0 Q4_K Q6_K int8 int4")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 512])
    parser.add_argument("--activations", choices=["int8", "int8_per_token", "float"], default="int8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.2, help="seconds per measurement")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    kernels = library.chosen()
    if kernels is None:
        sys.exit("no kernels are available on this machine")
    buffer = memory.map_zeros(STREAM_BYTES).fill_(1)
    rates = [kernels.measure_bandwidth(buffer.data_ptr(), len(buffer), options.threads) for _ in range(8)]
    bandwidth = float(max(rates))
    print(f"{kernels.capability}, {options.threads} threads, activations in {options.activations}: ", end="")
    print(f"reads {bandwidth / 1e9:.1f} GB/s")
    print(f"{'weight':14} {'format':7} {'rows':>5} {'us':>9} {'GB/s':>6} {'GMAC/s':>7} {'x floor':>8} {'x bf16':>7}")
    for shape in options.shapes:
        out_features, in_features = SHAPES[shape]
        bench = Bench(out_features, in_features, options.seconds, options.activations)
        plain: dict[int, float] = {}
        for name in ["bf16", *(options.formats or ["Q8_0", "Q4_0", "Q4_K", "Q6_K", "int8", "int4"])]:
            if name in BLOCK_FORMATS and in_features % BLOCK_FORMATS[name].columns:
                continue
            if name == "int4" and in_features % 128:
                continue
            weights = bench.copies(name)
            num_bytes = weight_bytes(weights[0])
            for rows in options.rows:
                used = weights[: max(1, len(weights) * 16 // rows)] if rows > 16 else weights
                seconds = bench.time(used, rows)
                plain.setdefault(rows, seconds)
                products = rows * out_features * in_features
                print(
                    f"{out_features} x {in_features:<6} {name:7} {rows:5} {seconds * 1e6:9.1f}"
                    f" {num_bytes / seconds / 1e9:6.1f} {products / seconds / 1e9:7.0f}"
                    f" {seconds * bandwidth / num_bytes:8.2f} {plain[rows] / seconds:7.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
