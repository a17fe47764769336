"""``octavo bench latency``: how long one batch of requests takes."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from api.commands.bench.figures import percentile
from api.commands.bench.offline import Engine, random_prompt, sampling, write_json

DESCRIPTION = "Measure the latency of one batch without a server, with new random prompts each time."
PERCENTILES = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure. Lengths are in tokens."""

    input_len: int = 32
    output_len: int = 128
    batch_size: int = 8
    n: int = 1
    """Completions of each prompt."""
    num_iters_warmup: int = 2
    num_iters: int = 10
    disable_detokenize: bool = False
    output_json: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field of ``Settings``."""
    defaults = Settings()
    add = parser.add_argument_group("Benchmark").add_argument
    add("--input-len", type=int, metavar="N", default=defaults.input_len, help="Tokens per prompt (default: 32).")
    add("--output-len", type=int, metavar="N", default=defaults.output_len, help="Tokens per answer (default: 128).")
    add("--batch-size", type=int, metavar="N", default=defaults.batch_size, help="Prompts per batch (default: 8).")
    add("--n", type=int, metavar="N", default=defaults.n, help="Completions per prompt (default: 1).")
    add(
        "--num-iters-warmup",
        type=int,
        metavar="N",
        default=defaults.num_iters_warmup,
        help="Warm-up batches (default: 2).",
    )
    add("--num-iters", type=int, metavar="N", default=defaults.num_iters, help="Measured batches (default: 10).")
    add("--disable-detokenize", action="store_true", help="Skip detokenisation.")
    add("--output-json", metavar="FILE", help="Write the results to this file.")


def run(engine: Engine, settings: Settings) -> dict[str, Any]:
    """Measures, prints and returns the results: seconds per batch."""
    source = random.Random(0)
    params = sampling(settings.output_len, settings.n, detokenize=not settings.disable_detokenize)

    def one() -> float:
        prompts = [
            random_prompt(source, engine.get_tokenizer(), settings.input_len) for _ in range(settings.batch_size)
        ]
        begin = time.perf_counter()
        engine.generate(prompts, [params] * len(prompts), use_tqdm=False)
        return time.perf_counter() - begin

    for _ in tqdm(range(settings.num_iters_warmup), desc="Warming up"):
        one()
    latencies = [one() for _ in tqdm(range(max(1, settings.num_iters)), desc="Measuring")]
    ordered = sorted(latencies)
    report = {
        "avg_latency": statistics.fmean(latencies),
        "latencies": latencies,
        "percentiles": {str(percent): percentile(ordered, percent) for percent in PERCENTILES},
    }
    print(f"Avg latency: {report['avg_latency']:.4f} seconds")
    for percent in PERCENTILES:
        print(f"{percent}% percentile latency: {percentile(ordered, percent):.4f} seconds")
    write_json(settings.output_json, report)
    return report
