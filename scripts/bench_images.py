#!/usr/bin/env python3
"""Measures the time to the first token of requests with an image, at servers that run already.

    scripts/bench_images.py --write /tmp/smolvlm      text.gguf and mmproj.gguf: SmolVLM-256M's shape, random tower
    octavo serve /tmp/smolvlm/text.gguf --mmproj /tmp/smolvlm/mmproj.gguf --port 8000
    llama-server -m /tmp/smolvlm/text.gguf --mmproj /tmp/smolvlm/mmproj.gguf --port 8080 --image-max-tokens 4096
    scripts/bench_images.py octavo=http://127.0.0.1:8000 llama.cpp=http://127.0.0.1:8080 --rounds 6

The servers take turns, and every image is new to them. With --beside, somebody else reads an answer meanwhile, whose
longest wait for a token is reported.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import itertools
import json
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
from bench_models import write_demo
from gguf import GGMLQuantizationType, GGUFWriter, VisionProjectorType
from gguf.quants import quantize
from PIL import Image

TOKENS = {3: "<image>", 4: "<fake_token_around_image>", 5: "<global-img>"}
"""What tokens that no text has become."""
WIDTH, INNER, LAYERS, SIDE, PATCH, SCALE, TEXT_WIDTH = 768, 3072, 12, 512, 16, 4, 576
"""The shape of SmolVLM-256M's tower."""


def tower_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of the tower."""
    yield "v.patch_embd.weight", (WIDTH, 3, PATCH, PATCH)
    yield "v.patch_embd.bias", (WIDTH,)
    yield "v.position_embd.weight", ((SIDE // PATCH) ** 2, WIDTH)
    for layer in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", WIDTH, WIDTH),
            ("attn_v", WIDTH, WIDTH),
            ("attn_out", WIDTH, WIDTH),
            ("ffn_up", INNER, WIDTH),
            ("ffn_down", WIDTH, INNER),
        ):
            yield f"v.blk.{layer}.{name}.weight", (rows, columns)
            yield f"v.blk.{layer}.{name}.bias", (rows,)
        for name in ("ln1", "ln2"):
            yield f"v.blk.{layer}.{name}.weight", (WIDTH,)
            yield f"v.blk.{layer}.{name}.bias", (WIDTH,)
    yield "v.post_ln.weight", (WIDTH,)
    yield "v.post_ln.bias", (WIDTH,)
    yield "mm.model.fc.weight", (TEXT_WIDTH, WIDTH * SCALE**2)


def write_tower(path: Path, kind: GGMLQuantizationType) -> None:
    """Writes a tower with random matrices of some type as an mmproj file."""
    writer = GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_clip_projector_type(VisionProjectorType.IDEFICS3)
    writer.add_vision_embedding_length(WIDTH)
    writer.add_vision_feed_forward_length(INNER)
    writer.add_vision_block_count(LAYERS)
    writer.add_vision_head_count(WIDTH // 64)
    writer.add_vision_image_size(SIDE)
    writer.add_vision_preproc_image_size(4 * SIDE)
    writer.add_vision_patch_size(PATCH)
    writer.add_vision_projection_dim(TEXT_WIDTH)
    writer.add_vision_projector_scale_factor(SCALE)
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_use_gelu(True)
    writer.add_vision_image_mean([0.5, 0.5, 0.5])
    writer.add_vision_image_std([0.5, 0.5, 0.5])
    random = np.random.default_rng(0)
    for name, shape in tower_shapes():
        values: npt.NDArray[np.float32] = random.standard_normal(shape, np.float32) * np.float32(0.02)
        if "ln" in name:
            values = np.full(shape, float(name.endswith("weight")), np.float32)
        is_plain = len(shape) != 2 or "position" in name
        writer.add_tensor(name, values if is_plain else quantize(values, kind), raw_dtype=None if is_plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def image_url(seed: int, width: int, height: int) -> str:
    """A JPEG of noise."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def request(url: str, model: str, image: str) -> tuple[float, int]:
    """Seconds until the reply of one token, and tokens of the prompt."""
    content: list[dict[str, Any]] = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": image}},
    ]
    messages = [{"role": "user", "content": content}]
    body = json.dumps({"model": model, "messages": messages, "max_tokens": 1, "temperature": 0}).encode()
    target = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    begin = time.perf_counter()
    with urllib.request.urlopen(target, timeout=600) as response:
        reply = json.load(response)
    return time.perf_counter() - begin, reply["usage"]["prompt_tokens"]


class Reader:
    """Reads an answer in a thread."""

    def __init__(self, url: str, model: str) -> None:
        """Returns once tokens arrive."""
        prompt = {"model": model, "prompt": "Once upon a time", "max_tokens": 4000}
        body = json.dumps({**prompt, "temperature": 0, "ignore_eos": True, "stream": True}).encode()
        target = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        self._response = urllib.request.urlopen(target, timeout=600)
        self._times: list[float] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        while len(self._times) < 20 and self._thread.is_alive():
            time.sleep(0.01)

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it is closed
            for line in self._response:
                if line.startswith(b"data: "):
                    self._times.append(time.perf_counter())

    def close(self) -> list[float]:
        """Ends the answer. Returns the seconds between its tokens."""
        self._response.close()
        return [later - earlier for earlier, later in itertools.pairwise(self._times)]


def main() -> None:
    """Sends the requests and prints a line per server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="*", metavar="NAME=URL")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write a model instead")
    parser.add_argument("--type", default="BF16", choices=["BF16", "F16", "Q8_0"], help="of the tower (default: BF16)")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--beside", action="store_true", help="while an answer to somebody else is read")
    parser.add_argument("--size", type=int, nargs=2, default=[640, 480], metavar=("WIDTH", "HEIGHT"))
    arguments = parser.parse_args()
    if arguments.write is not None:
        arguments.write.mkdir(parents=True, exist_ok=True)
        write_demo(arguments.write / "text.gguf", TOKENS)
        write_tower(arguments.write / "mmproj.gguf", GGMLQuantizationType[arguments.type])
        return
    servers = dict(each.split("=", 1) for each in arguments.servers)
    models = {}
    for name, url in servers.items():
        with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as response:
            models[name] = json.load(response)["data"][0]["id"]
    times: dict[str, list[float]] = {name: [] for name in servers}
    tokens = {}
    for index in range(arguments.rounds + 1):
        image = image_url(index, *arguments.size)
        for name, url in servers.items():
            reader = Reader(url, models[name]) if arguments.beside else None
            seconds, tokens[name] = request(url, models[name], image)
            wait = "" if reader is None else f", {max(reader.close(), default=0.0):.2f} s for a token of another answer"
            print(f"{name}: {seconds:.2f} s{wait}{'' if index else ', not counted'}", file=sys.stderr, flush=True)
            if index:
                times[name].append(seconds)
    for name, own in times.items():
        print(
            f"{name}: {statistics.median(own) * 1e3:.0f} ms to the first token (median of {len(own)}; "
            f"{min(own) * 1e3:.0f} to {max(own) * 1e3:.0f}), {tokens[name]} tokens in the prompt"
        )


if __name__ == "__main__":
    main()
