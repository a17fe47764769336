#!/usr/bin/env python
"""Times the CPU kernels against their floors and against torch.

    scripts/bench_ops.py                        all kernels, shapes of SmolLM2-135M
    scripts/bench_ops.py --model 896 linear     some kernels, other shapes
    OCTAVO_CPU_CAPABILITY=avx2 scripts/bench_ops.py

The floor of a kernel is the larger of two times: that of the bytes it must move, at this machine's memory bandwidth,
and that of the operations it must do, at the rate of its inner kernel with all data in the L1 cache. Both rates are
measured first. Kernels run as in a step: one call runs several of the same kind, each on its own weights or caches, so
that these come from memory. Times are the best of many runs, since other programs only make them longer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from executor.graphs import Program
from ops import AttentionMetadata, AttentionShape
from ops.cpu import library, memory
from ops.cpu.instructions import kv_shapes
from ops.dispatch import Spec, StepInput

STREAM_BYTES = 512 << 20
"""Total size of a kernel's copies of weights or caches: some CPUs have caches of 256 MiB."""
MAX_COPIES = 256
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Model:
    """The model dimensions that matter to kernels."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int

    @property
    def attention(self) -> AttentionShape:
        return AttentionShape(self.heads, self.kv_heads, self.head_dim, scale=self.head_dim**-0.5)


MODELS = {
    "576": Model(576, 9, 3, 64, 1536, 49152),
    "896": Model(896, 14, 2, 64, 4864, 151936),
    "4096": Model(4096, 32, 8, 128, 14336, 128256),
}
"""SmolLM2-135M, Qwen2.5-0.5B, Llama-3.1-8B."""


@dataclass
class Case:
    """One row of the table."""

    kernel: str
    shape: str
    num_bytes: int
    operations: int
    """Multiplications and additions, counted separately."""
    run: Callable[[], object]
    calls: int
    """Number of kernels that ``run`` calls."""
    torch_run: Callable[[], object] | None = None
    torch_calls: int = 1


class Bench:
    """Creates the cases of one model and dtype."""

    def __init__(self, model: Model, dtype: torch.dtype, threads: int) -> None:
        self.model = model
        self.dtype = dtype
        self.threads = threads

    def randn(self, *shape: int) -> Tensor:
        return (0.1 * torch.randn(shape)).to(self.dtype)

    def copies(self, num_bytes: int) -> int:
        return max(1, min(MAX_COPIES, STREAM_BYTES // num_bytes))

    def program(self, rows: int, width: int, make: Callable[[Any, int], Any], copies: int) -> Callable[[], object]:
        """A program of ``copies`` kernels that read the same [rows, width]; ``make`` records one of them."""
        program = Program("cpu", max_tokens=rows, max_samples=rows)
        x = program.input("x", Spec("tokens", width, self.dtype))
        outputs = [make(x, i) for i in range(copies)]
        program.finish(outputs[-1])
        assert program.python_ops == 0
        tensor = self.randn(rows, width)
        return lambda: program.replay({"x": tensor})

    # -- kernels -------------------------------------------------------------------------------------------

    def linear(self) -> Iterator[Case]:
        model = self.model
        qkv = (model.heads + 2 * model.kv_heads) * model.head_dim
        layers = {
            "qkv": (qkv, model.hidden),
            "o": (model.hidden, model.heads * model.head_dim),
            "gate_up": (2 * model.inner, model.hidden),
            "down": (model.hidden, model.inner),
            "lm_head": (model.vocab, model.hidden),
        }
        for name, (out_features, in_features) in layers.items():
            num_bytes = out_features * in_features * self.dtype.itemsize
            copies = self.copies(num_bytes)
            weights = [self.randn(out_features, in_features) for _ in range(copies)]
            paired = name == "gate_up"
            packed = [ops.pack_linear(weight, paired) for weight in weights]

            def make(x: Any, i: int, name: str = name, packed: Any = packed) -> Any:
                if name == "lm_head":
                    return ops.logits(x, packed[i])
                out = ops.linear(x, packed[i])
                return ops.act_and_mul(out, "silu") if name == "gate_up" else out

            for rows in (1, 8, 32, 64) if name == "lm_head" else (1, 4, 8, 16, 32, 64, 256, 1024):
                x = self.randn(rows, in_features)

                def in_torch(x: Tensor = x, weights: list[Tensor] = weights, paired: bool = paired) -> None:
                    for weight in weights:
                        out = F.linear(x, weight)
                        if paired:
                            gate, up = out.chunk(2, dim=-1)
                            F.silu(gate) * up

                yield Case(
                    f"linear {name}",
                    f"{rows} x {in_features} -> {out_features}",
                    num_bytes,
                    2 * rows * out_features * in_features,
                    self.program(rows, in_features, make, copies),
                    copies,
                    in_torch,
                    copies,
                )

    def attention(self) -> Iterator[Case]:
        for num_reqs, context, queries in (
            (1, 256, 1),
            (8, 256, 1),
            (32, 256, 1),
            (64, 256, 1),
            (1, 4096, 1),
            (8, 2048, 1),
            (1, 256, 256),
            (1, 1500, 1500),
            (4, 512, 128),
        ):
            yield self._attention_case(num_reqs, context, queries)

    def _attention_case(self, num_reqs: int, context: int, queries: int) -> Case:
        shape = self.model.attention
        blocks = -(-context // BLOCK_SIZE)
        token_elements = 2 * shape.num_kv_heads * shape.head_dim
        num_bytes = num_reqs * context * token_elements * self.dtype.itemsize
        copies = self.copies(num_bytes)
        sizes = kv_shapes(num_reqs * blocks, BLOCK_SIZE, shape, self.dtype)
        caches = []
        for _ in range(copies):
            keys, values = (
                memory.map_zeros(torch.Size(size).numel() * self.dtype.itemsize).view(self.dtype).view(size)
                for size in sizes
            )
            caches.append((keys.fill_(0.1), values.fill_(0.1)))
        table = torch.randperm(num_reqs * blocks).int().view(num_reqs, blocks)
        positions = torch.arange(context - queries, context)
        slots = (table[:, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE).flatten()
        starts = torch.arange(0, (num_reqs + 1) * queries, queries, dtype=torch.int32)
        lens = torch.full((num_reqs,), context, dtype=torch.int32)
        meta = AttentionMetadata(starts, lens, table, slots, BLOCK_SIZE)
        kv_width = shape.num_kv_heads * shape.head_dim
        rows = num_reqs * queries
        program = Program("cpu", max_tokens=rows)
        q = program.input("q", Spec("tokens", shape.q_width, self.dtype))
        k = program.input("k", Spec("tokens", kv_width, self.dtype))
        v = program.input("v", Spec("tokens", kv_width, self.dtype))
        group: Any = StepInput("group")
        outputs: list[Any] = [ops.paged_attention(q, k, v, cache, group, shape, "tiled") for cache in caches]  # type: ignore[arg-type]
        program.finish(outputs[-1])
        inputs = {
            "q": self.randn(rows, shape.q_width),
            "k": self.randn(rows, kv_width),
            "v": self.randn(rows, kv_width),
        }
        inputs["group"] = meta  # type: ignore[assignment]
        pairs = num_reqs * sum(range(context - queries + 1, context + 1))

        queries_t = self.randn(num_reqs, shape.num_heads, queries, shape.head_dim)
        keys_t, values_t = (self.randn(num_reqs, shape.num_kv_heads, context, shape.head_dim) for _ in range(2))
        causal = queries == context

        def in_torch() -> None:
            F.scaled_dot_product_attention(queries_t, keys_t, values_t, is_causal=causal, enable_gqa=True)

        return Case(
            "attention",
            f"{num_reqs} x {queries} of {context}",
            num_bytes,
            4 * pairs * shape.num_heads * shape.head_dim,
            lambda: program.replay(inputs),
            copies,
            in_torch,
        )

    def pointwise(self) -> Iterator[Case]:
        model, size = self.model, self.dtype.itemsize
        norm = self.randn(model.hidden)
        table = ops.pack_linear(self.randn(model.vocab, model.hidden))
        for rows in (1, 32, 1024):
            x, wide = self.randn(rows, model.hidden), self.randn(rows, 2 * model.inner)
            ids = torch.randint(0, model.vocab, (rows,), dtype=torch.int32)
            one = 16
            yield Case(
                "rms_norm",
                f"{rows} x {model.hidden}",
                0,
                0,
                self.program(rows, model.hidden, lambda x, _: ops.rms_norm(x, norm, 1e-5), one),
                one,
                partial(F.rms_norm, x, [model.hidden], norm, 1e-5),
            )
            yield Case(
                "act_and_mul",
                f"{rows} x {2 * model.inner}",
                0,
                0,
                self.program(rows, 2 * model.inner, lambda x, _: ops.act_and_mul(x, "silu"), one),
                one,
                partial(_silu_and_mul, wide),
            )
            yield Case(
                "embedding (packed)",
                f"{rows} x {model.hidden}",
                rows * model.hidden * size,
                0,
                partial(ops.embedding, ids, table),
                1,
            )


def _silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def best_time(run: Callable[[], object], seconds: float) -> float:
    """The shortest time of several calls of ``run``."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        begin = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - begin)
        if now > end:
            return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", choices=["linear", "attention", "pointwise", []], help="default: all")
    parser.add_argument("--model", choices=MODELS, default="576", help="hidden size of the model (default: 576)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.3, help="seconds per measurement")
    parser.add_argument("--no-torch", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    kernels = library.chosen()
    if kernels is None:
        sys.exit("no kernels are available on this machine")
    dtype: torch.dtype = getattr(torch, options.dtype)
    buffer = memory.map_zeros(STREAM_BYTES).fill_(1)

    def bandwidth() -> float:
        rates = [kernels.measure_bandwidth(buffer.data_ptr(), len(buffer), options.threads) for _ in range(8)]
        return float(max(rates))

    peak = 2 * max(kernels.measure_peak(library.TYPES[dtype], options.threads) for _ in range(8))
    print(
        f"{kernels.capability}, {options.dtype}, {options.threads} threads: "
        f"reads {bandwidth() / 1e9:.1f} GB/s, multiplies {peak / 1e9:.0f} Gflop/s"
    )
    print(f"{'kernel':20} {'shape':26} {'us':>9} {'GB/s':>6} {'Gflop/s':>8} {'floor':>9} {'x floor':>8} {'torch':>10}")
    bench = Bench(MODELS[options.model], dtype, options.threads)
    for name in options.kernels or ["linear", "attention", "pointwise"]:
        for case in getattr(bench, name)():
            read = bandwidth()
            seconds = best_time(case.run, options.seconds) / case.calls
            read = max(read, bandwidth())  # other load comes and goes: take the best bandwidth seen
            floor = max(case.num_bytes / read, case.operations / peak)
            line = f"{case.kernel:20} {case.shape:26} {seconds * 1e6:9.1f} {case.num_bytes / seconds / 1e9:6.1f}"
            line += f" {case.operations / seconds / 1e9:8.0f} {floor * 1e6:9.1f}"
            line += f" {seconds / floor:8.2f}" if floor else " " * 9
            if case.torch_run is not None and not options.no_torch:
                line += f" {best_time(case.torch_run, options.seconds) / case.torch_calls * 1e6:10.1f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
