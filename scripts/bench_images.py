#!/usr/bin/env python3
"""Measures the time to the first token of requests with an image, at servers that run already.

    scripts/bench_images.py octavo=http://127.0.0.1:8000 llama.cpp=http://127.0.0.1:8080 --rounds 6

The servers take turns, and every image is new to them.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import statistics
import time
import urllib.request
from typing import Any

import numpy as np
from PIL import Image


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


def main() -> None:
    """Sends the requests and prints a line per server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", metavar="NAME=URL")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--size", type=int, nargs=2, default=[640, 480], metavar=("WIDTH", "HEIGHT"))
    arguments = parser.parse_args()
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
            seconds, tokens[name] = request(url, models[name], image)
            if index:
                times[name].append(seconds)
    for name, own in times.items():
        print(
            f"{name}: {statistics.median(own) * 1e3:.0f} ms to the first token (median of {len(own)}; "
            f"{min(own) * 1e3:.0f} to {max(own) * 1e3:.0f}), {tokens[name]} tokens in the prompt"
        )


if __name__ == "__main__":
    main()
