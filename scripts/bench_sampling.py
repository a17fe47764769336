"""Times sampling in microseconds per row, compared with the usual torch implementation.

    python scripts/bench_sampling.py --vocab-size 49152 151936 --rows 1 32

Prints the best of many runs, to reduce the influence of other load.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ops
from executor.messages import ResolvedParams
from executor.request_states import RequestStates
from executor.sampling.sampler import Sampler, SampleRows
from ops.cpu import library
from ops.cpu.op_set import CpuOps

PROMPT_TOKENS = 1000
CASES = {
    "greedy": ResolvedParams(temperature=0.0),
    "temperature": ResolvedParams(temperature=0.8),
    "top-p": ResolvedParams(temperature=0.8, top_p=0.95),
    "top-k": ResolvedParams(temperature=0.8, top_k=50),
    "top-k, top-p": ResolvedParams(temperature=0.8, top_k=50, top_p=0.95),
    "min-p": ResolvedParams(temperature=0.8, min_p=0.05),
    "penalties, top-p": ResolvedParams(temperature=0.8, top_p=0.95, repetition_penalty=1.1, presence_penalty=0.5),
    "top-p, 5 logprobs": ResolvedParams(temperature=0.8, top_p=0.95, logprobs=5),
}


def make_logits(kind: str, rows: int, vocab_size: int) -> torch.Tensor:
    """Peaked: 40 tokens stand out from N(0, 1.5), as if the model were confident. Flat: N(0, 2)."""
    generator = torch.Generator().manual_seed(0)
    if kind == "flat":
        return 2 * torch.randn(rows, vocab_size, generator=generator)
    logits = 1.5 * torch.randn(rows, vocab_size, generator=generator)
    for row in logits:
        row[torch.randperm(vocab_size, generator=generator)[:40]] = 14 + 2 * torch.randn(40, generator=generator)
    return logits


def sample_with_sort(logits: torch.Tensor, params: ResolvedParams) -> torch.Tensor:
    """Top-k and top-p over sorted logits, one multinomial draw."""
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    ordered, ids = (logits / params.temperature).sort(dim=-1, descending=True)
    if params.top_k:
        ordered[:, params.top_k :] = float("-inf")
    probs = ordered.softmax(dim=-1)
    if params.top_p < 1:
        probs[probs.cumsum(dim=-1) - probs > params.top_p] = 0
    return ids.gather(1, torch.multinomial(probs, 1))


def microseconds(run: Callable[[], object], seconds: float) -> float:
    """The best of the runs that fit into the given time, at least three."""
    best, end, count = float("inf"), time.perf_counter() + seconds, 0
    while count < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
        count += 1
    return best * 1e6


def step(rows: int, vocab_size: int, params: ResolvedParams, logits: torch.Tensor) -> Callable[[], object]:
    """A step of requests with identical parameters."""
    sampler = Sampler(rows)
    states = RequestStates(rows, 2 * PROMPT_TOKENS, [])
    states.token_ids[:] = np.random.default_rng(0).integers(0, vocab_size, states.token_ids.shape)
    states.num_prompt[:] = PROMPT_TOKENS
    for slot in range(rows):
        sampler.add(slot, params)
    slots = np.arange(rows, dtype=np.int32)
    step_rows = SampleRows(slots, np.full(rows, PROMPT_TOKENS + 100), slots)
    return lambda: sampler.sample(logits, step_rows, states)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[49152, 151936])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--seconds", type=float, default=0.3, help="seconds per measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--capability", help="amx, avx512bf16, avx512vnni, avx512, avxvnni, avx2 or portable; default: the best"
    )
    parser.add_argument("--no-torch", action="store_true", help="skip the slow comparison")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.capability is not None:
        ops.use("cpu", CpuOps(library.load(options.capability)))
    chosen = ops.op_set("cpu")
    capability = chosen.library.capability if isinstance(chosen, CpuOps) else chosen.name
    print(f"capability {capability}, {options.threads} threads, microseconds per row")
    overhead = microseconds(step(64, 16, CASES["temperature"], torch.zeros(64, 16)), options.seconds)
    print(f"a step of 64 rows with a vocabulary of 16: {overhead:.1f} us in total")
    print(f"{'vocabulary':>10} {'rows':>5} {'logits':8} {'case':20} {'octavo':>9} {'torch':>9}")
    for vocab_size in options.vocab_size:
        for rows in options.rows:
            for kind in ("peaked", "flat"):
                logits = make_logits(kind, rows, vocab_size)
                for name, params in CASES.items():
                    # Penalties change the logits in place; later runs see different numbers, but the same work.
                    ours = microseconds(step(rows, vocab_size, params, logits.clone()), options.seconds) / rows
                    line = f"{vocab_size:10} {rows:5} {kind:8} {name:20} {ours:9.1f}"
                    if not options.no_torch and name in ("greedy", "temperature", "top-p", "top-k", "top-k, top-p"):
                        theirs = microseconds(lambda: sample_with_sort(logits, params), options.seconds) / rows  # noqa: B023
                        line += f" {theirs:9.1f}"
                    print(line, flush=True)


if __name__ == "__main__":
    main()
