#!/usr/bin/env python3
"""Measures vision towers with random weights: time per image, and the share of the machine's peak.

    scripts/bench_vision.py --tower clip-l-336 --rounds 5

The products of patches, layers and projector count as operations; attention does not, so its time lowers the share.
The share by processor time holds on a machine with other work too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from floors import Machine  # noqa: E402

from executor.config import DeviceConfig, ModelConfig  # noqa: E402
from executor.device.base import create_device  # noqa: E402
from executor.image_inputs import ImageInputs  # noqa: E402
from executor.layers.linear import LinearLayer  # noqa: E402
from executor.loader import load_model  # noqa: E402
from executor.messages import MultiModalFeature, to_tensor  # noqa: E402
from executor.parallel import ParallelState  # noqa: E402
from ops.cpu import library  # noqa: E402

TEXT: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 4096,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
}
TOWERS: dict[str, dict[str, Any]] = {
    "clip-l-336": {"architectures": ["LlavaForConditionalGeneration"], "text_config": TEXT, "image_token_index": 1},
    "siglip-b-512": {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "text_config": {**TEXT, "hidden_size": 576, "num_attention_heads": 9},
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "image_size": 512,
            "patch_size": 16,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
        "scale_factor": 4,
        "image_token_id": 1,
    },
}


def operations(tower: torch.nn.Module, num_patches: int) -> float:
    """Multiplications and additions of a tower's products for one tile."""
    total = 0
    for name, module in tower.named_modules():
        if isinstance(module, LinearLayer):
            rows = 1 if name.startswith(("connector", "projection")) else num_patches
            total += 2 * rows * module.shape.input.full * sum(module.output_sizes)
    return total


def main() -> None:
    """Runs the rounds and prints a line per tower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", choices=TOWERS, default="clip-l-336")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    device = create_device("cpu")
    device.initialize(DeviceConfig(), 0)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(TOWERS[arguments.tower]))
        config = ModelConfig(model=folder, load_format="dummy", dtype=arguments.dtype)
        loaded = load_model(config, ParallelState(), device.torch_device, None, lambda *_: None)
    assert loaded.tower is not None
    images = ImageInputs(loaded.tower, loaded.hf_config.hidden_size, loaded.dtype, device, 512)
    encoder: Any = loaded.tower.get_submodule("encoder")
    side = encoder.side
    columns = 3 * encoder.patch_size**2
    patches = np.random.default_rng(0).integers(0, 256, (side**2, columns), dtype=np.uint8)
    levels = np.linspace(-1, 1, 256, dtype=np.float32)[None].repeat(3, axis=0)
    data: dict[str, Any] = {"patches": patches, "levels": levels, "grid": np.array([[side, side]], np.int32)}
    count = loaded.tower.max_image_tokens if arguments.tower == "clip-l-336" else (side // 4) ** 2
    feature = MultiModalFeature("", 0, count, count, data=tuple((name, to_tensor(each)) for name, each in data.items()))
    machine = Machine()
    peak = machine.measure(library.TYPES[loaded.dtype]).operations_per_s
    images.encode(feature)
    times, processor_times = [], []
    for _ in range(arguments.rounds):
        begin, processor_begin = time.perf_counter(), time.process_time()
        images.encode(feature)
        times.append(time.perf_counter() - begin)
        processor_times.append(time.process_time() - processor_begin)
    done, seconds = operations(loaded.tower, side**2), statistics.median(times)
    processor_seconds = statistics.median(processor_times) / machine.threads
    shares = [f"{done / each / peak:.0%}" for each in (seconds, min(times), processor_seconds)]
    print(
        f"{arguments.tower} {arguments.dtype}, {machine.threads} threads of {machine.capability}: "
        f"{seconds * 1e3:.0f} ms for {side**2} patches; of the peak of {arguments.dtype} products "
        f"({peak / 1e9:.0f} GFLOP/s) {shares[0]}, at best {shares[1]}, by processor time {shares[2]}"
    )


if __name__ == "__main__":
    main()
