#!/usr/bin/env python3
"""Times steps of text alone in a model that sees, against the same language model served without images.

    scripts/bench_vision_text.py                       SmolLM2's shape with LLaVA's tower
    scripts/bench_vision_text.py --model 1b --requests 16

Both have random weights. They take turns, step by step; ratios are medians of the ratios of neighbouring steps. Time
outside of compiled kernels is that of Python.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from bench_models import DEMO, SHAPES, config_of
from bench_step import Clock, Steps

from ops.cpu import library

WARM_UP = 10


def main() -> None:
    """Runs the rounds and prints a line for each of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO, choices=[DEMO, *SHAPES], help=f"shape (default: {DEMO})")
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--context", type=int, default=64, help="tokens of each prompt (default: 64)")
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    kernels = library.chosen()
    if kernels is None:
        sys.exit("no kernels are available on this machine")
    clock = Clock.of(kernels, kernels.run)
    text = config_of(arguments.model)
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 1,
        "text_config": text,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    count, context = arguments.requests, arguments.context
    length = context + arguments.rounds + WARM_UP + 8
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        arms = {
            name: Steps(folder, "bfloat16", 512, count, length, "dummy", language_model_only=is_text)
            for name, is_text in (("text alone", True), ("sees", False))
        }
    for name, steps in arms.items():
        assert (steps.worker.runner.images is None) == (name == "text alone")
        steps.fill(count, context)
    times: dict[str, list[float]] = {name: [] for name in arms}
    outside: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(WARM_UP + arguments.rounds):
        for name in arms if turn % 2 else reversed(arms):
            clock.seconds = 0.0
            seconds = arms[name].run(list(range(count)), [1] * count)
            if turn >= WARM_UP:
                times[name].append(seconds)
                outside[name].append(seconds - clock.seconds)
    print(f"{arguments.model}, {count} requests, {arguments.rounds} rounds, {torch.get_num_threads()} threads")
    base = times["text alone"]
    for name, seconds_of in times.items():
        ratios = np.array(seconds_of) / np.array(base)
        low, high = np.quantile(ratios, (0.25, 0.75))
        print(
            f"{name:12} {statistics.median(seconds_of) * 1e3:8.3f} ms a step, {np.median(ratios):.4f}x "
            f"({low:.3f} to {high:.3f}); {statistics.median(outside[name]) * 1e6:.0f} us of Python"
        )


if __name__ == "__main__":
    main()
