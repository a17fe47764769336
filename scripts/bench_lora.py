#!/usr/bin/env python
"""Times decode steps of requests with LoRA adapters against steps without.

    python scripts/bench_lora.py                        16 requests on the 1b shape in bfloat16
    python scripts/bench_lora.py --model smollm2-folder --load-format auto

Each request has an adapter of its own. Arms take turns, step by step; ratios are medians of the ratios of neighbouring
steps, with their 95 % intervals. ``plain`` is a worker without --enable-lora. ``bytes`` is the ratio that the adapters'
memory alone would give if a step took as long as its weights to read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_step import LoadFormat, Steps, folder_of
from intervals import median_interval

from executor.adapter_files import adapter_hash
from executor.config import LoRAConfig
from executor.layers.linear import LinearLayer
from executor.layers.parameter import stored_module
from executor.messages import AdapterLoaded, LoadAdapter, LoRARequest

TARGETS = {"q, k, v, o": ("q_proj", "k_proj", "v_proj", "o_proj"), "all linear layers": ("_proj",)}


def write_adapter(folder: Path, steps: Steps, targets: tuple[str, ...], rank: int) -> int:
    """Writes a random adapter in PEFT's format. Returns the bytes that it has in bfloat16."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in steps.worker.runner.model.named_modules():
        if not isinstance(layer, LinearLayer):
            continue
        for shard_id, part in layer.shape.outputs.items():
            module = stored_module(name, shard_id)
            if module.endswith(targets):
                prefix = f"base_model.model.{module}"
                a = torch.randn(rank, layer.shape.input.full, generator=generator)
                b = torch.randn(part.full, rank, generator=generator)
                tensors[f"{prefix}.lora_A.weight"] = (0.01 * a).bfloat16()
                tensors[f"{prefix}.lora_B.weight"] = (0.01 * b).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    return sum(tensor.nbytes for tensor in tensors.values())


def load(steps: Steps, numbers: range, folder: Path) -> float:
    """Loads the adapter several times, each into memory of its own. Returns the seconds of one time."""
    begin = time.perf_counter()
    content_hash = adapter_hash(folder)
    for number in numbers:
        steps.worker.handle(LoadAdapter(number, LoRARequest("x", number, str(folder), content_hash)))
        answer = steps.answers[-1]
        assert isinstance(answer, AdapterLoaded) and not answer.error, answer
    return (time.perf_counter() - begin) / len(numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1b", help="a folder, or a shape of bench_models.py (default: 1b)")
    parser.add_argument("--load-format", choices=get_args(LoadFormat), default="dummy")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=32, help="tokens of each prompt (default: 32)")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    count, context, rounds = arguments.requests, arguments.context, arguments.rounds
    length = context + 2 * rounds + 8
    lora = LoRAConfig(enable_lora=True, max_loras=2 * count, max_lora_rank=arguments.rank)
    with folder_of(arguments.model) as model, tempfile.TemporaryDirectory() as scratch:
        plain = Steps(model, "bfloat16", 512, count, length, arguments.load_format)
        steps = Steps(model, "bfloat16", 512, 4 * count, length, arguments.load_format, lora)
        arms = {"plain": (plain, 0), "none": (steps, 0)}
        added = {}
        ids: dict[str, list[int]] = {"none": [0] * count}
        for place, (name, targets) in enumerate(TARGETS.items()):
            folder = Path(scratch) / str(place)
            added[name] = count * write_adapter(folder, steps, targets, arguments.rank)
            numbers = range(1 + place * count, 1 + (place + 1) * count)
            seconds_each = load(steps, numbers, folder)
            print(f"{name}: {added[name] / count / 1e6:.1f} MB, loaded in {seconds_each * 1e3:.0f} ms", flush=True)
            ids[name] = list(numbers)
        one = "one of them, " + next(iter(TARGETS))
        ids[one] = [1] + [0] * (count - 1)
        added[one] = added[next(iter(TARGETS))] // count
        for slot in range(count):
            plain.run([slot], [context], new_reqs=(plain.admit(slot, context),))
        for place, (name, chosen) in enumerate(ids.items()):
            arms[name] = (steps, place * count)
            for index, number in enumerate(chosen):
                slot = place * count + index
                steps.run([slot], [context], new_reqs=(steps.admit(slot, context, number),))
        times: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(rounds + 3):
            for name in arms if turn % 2 else reversed(arms):
                runner, first = arms[name]
                seconds = runner.run(list(range(first, first + count)), [1] * count)
                if turn >= 3:
                    times[name].append(seconds)
        print(f"{count} requests, rank {arguments.rank}, {rounds} rounds, {torch.get_num_threads()} threads")
        for name, seconds_of in times.items():
            base = "plain" if name == "none" else "none"
            ratios = [before / after for before, after in zip(times[base], seconds_of, strict=True)]
            spread = median_interval(ratios)
            bound = steps.weight_bytes / (steps.weight_bytes + added.get(name, 0))
            print(
                f"{name:28} {statistics.median(seconds_of) * 1e3:8.2f} ms  {statistics.median(ratios):.3f}x of {base}"
                f" ({spread[0]:.3f} to {spread[1]:.3f}); bytes {bound:.3f}x"
            )


if __name__ == "__main__":
    main()
