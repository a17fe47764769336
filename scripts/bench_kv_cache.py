#!/usr/bin/env python
"""Measures what a KV cache that outlives workers and servers costs and saves.

    python scripts/bench_kv_cache.py restart --model folder    first token from --kv-cache-dir, after a restart
    python scripts/bench_kv_cache.py memory --model folder     decode with the cache in a file in memory, or not
    python scripts/bench_kv_cache.py memory --model 1b --load-format dummy
    python scripts/bench_kv_cache.py kill --model folder       tokens computed again after kill -9 of the worker

``restart`` asks a server prompts of random tokens, restarts it, drops the files' pages from the page cache, and asks
the same again; answers must be equal. ``memory`` takes turns, step by step, between two workers in one process.
``kill`` counts the tokens of finished steps while requests run, with and without a death in the middle of prompts and
of decoding: steps that were in flight count once, so all others must make the same number.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench_models import demo_path
from bench_step import Steps, folder_of
from check_faults import find
from intervals import median_interval
from processes import Server, signals_as_exceptions

SETTLED = 1.0
"""Seconds without a new file after which all are taken to be written."""


def ask(server: Server, model: str, prompt: list[int], max_tokens: int = 8) -> tuple[float, str]:
    """Seconds to the first token of a prompt, and the whole answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
    body |= {"stream": True, "temperature": 0}
    begin = time.monotonic()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"the server answered {response.status}: {response.read(500)!r}")
    seconds, text = 0.0, ""
    for line in response:
        if line.startswith(b"data: {"):
            seconds = seconds or time.monotonic() - begin
            text += json.loads(line[6:])["choices"][0]["text"]
    connection.close()
    return seconds, text


def wait_until_written(folder: Path) -> int:
    """Waits until no file is added any more. Returns their bytes."""
    size, since = -1, time.monotonic()
    while time.monotonic() - since < SETTLED:
        now = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if now != size:
            size, since = now, time.monotonic()
        time.sleep(0.1)
    return size


def drop_pages(folder: Path) -> None:
    """Drops files from the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure_restart(model: str, num_prompts: int, num_tokens: int, flags: list[str]) -> None:
    """Prints the time to the first token before and after a restart."""
    source = random.Random(1)
    prompts = [[source.randrange(1000, 30000) for _ in range(num_tokens)] for _ in range(num_prompts)]
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
        os.chmod(folder, 0o700)
        command = [sys.executable, "-m", "api", "--model", model, "--port", "{port}", "--kv-cache-dir", folder]
        seconds: list[list[float]] = []
        texts: list[list[str]] = []
        for life in range(2):
            if life:
                print(f"{wait_until_written(Path(folder)) / 2**20:.0f} MiB in files")
            server = Server([*command, "--served-model-name", "m", *flags])
            try:
                server.wait_ready()
                ask(server, "m", [1000] * 50)  # too short to be stored
                drop_pages(Path(folder))
                answers = [ask(server, "m", prompt) for prompt in prompts]
                if not life:
                    wait_until_written(Path(folder))
            finally:
                server.stop()
            seconds.append([each for each, _ in answers])
            texts.append([text for _, text in answers])
    if texts[0] != texts[1]:
        raise SystemExit("answers differ")
    before, after = (statistics.median(each) for each in seconds)
    ratios = sorted(cold / warm for cold, warm in zip(*seconds, strict=True))
    print(
        f"first token of {num_tokens} tokens: computed {before * 1e3:.0f} ms, from files {after * 1e3:.0f} ms; "
        f"{statistics.median(ratios):.1f}x ({ratios[0]:.1f} to {ratios[-1]:.1f})"
    )


def num_computed(server: Server) -> int:
    """Tokens of all finished steps."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return sum(int(float(each)) for each in re.findall(r"^vllm:iteration_tokens_total_sum\S* (\S+)$", text, re.M))


def run_and_kill(server: Server, prompts: list[list[int]], max_tokens: int, kill_after: float | None) -> int:
    """Runs prompts at the same time. Returns the tokens of finished steps meanwhile.

    Args:
        server: The server.
        prompts: Prompts that are not cached.
        max_tokens: Tokens of each answer.
        kill_after: Computed tokens per token of the prompts after which the worker is killed; None: it is not.
    """
    begin = num_computed(server)
    with ThreadPoolExecutor(len(prompts)) as pool:
        asked = [pool.submit(ask, server, "m", prompt, max_tokens) for prompt in prompts]
        if kill_after is not None:
            while num_computed(server) - begin < kill_after * sum(map(len, prompts)):
                time.sleep(0.01)
            (worker,) = find([server], "worker")
            os.kill(worker[0], signal.SIGKILL)
        for each in asked:
            each.result()
    return num_computed(server) - begin


def measure_kill(model: str, num_prompts: int, num_tokens: int, flags: list[str]) -> None:
    """Prints how many tokens are computed again after a worker's death."""
    source, max_tokens = random.Random(1), 60
    command = [sys.executable, "-m", "api", "--model", model, "--port", "{port}", "--served-model-name", "m", *flags]
    server = Server(command)
    try:
        server.wait_ready()
        counts = []
        for kill_after in (None, 0.3, 0.7, 1.01, 1.02):
            prompts = [[source.randrange(100, 200) for _ in range(num_tokens)] for _ in range(num_prompts)]
            counts.append(run_and_kill(server, prompts, max_tokens, kill_after))
            if kill_after is not None:
                again = counts[-1] - counts[0]
                print(f"killed after {kill_after:.0%} of the prompts: {again} of {counts[0]} tokens again", flush=True)
    finally:
        server.stop()


def measure_memory(model: str, load_format: str, requests: int, context: int, pairs: int) -> None:
    """Prints the ratio of decode steps per second, file in memory to anonymous memory."""
    descriptor = os.memfd_create("kv")
    with folder_of(model) as path:
        kinds = [
            Steps(path, "auto", 512, requests, context + pairs + 64, load_format, descriptors=descriptors)  # type: ignore[arg-type]
            for descriptors in ({}, {"kv": descriptor})
        ]
    for steps in kinds:
        steps.fill(requests, context)
    slots, counts = list(range(requests)), [1] * requests
    for _ in range(3):
        for steps in kinds:
            steps.run(slots, counts)
    ratios, times = [], []
    for pair in range(pairs):
        order = kinds if pair % 2 else kinds[::-1]
        taken = {id(steps): steps.run(slots, counts) for steps in order}
        times.append([taken[id(steps)] for steps in kinds])
        ratios.append(times[-1][0] / times[-1][1])
    low, high = median_interval(ratios)
    anonymous, file = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    print(
        f"decode of {requests} at {context} tokens: anonymous {anonymous:.2f} ms, file in memory {file:.2f} ms; speed "
        f"{statistics.median(ratios):.3f}x (95 % interval of the median: {low:.3f} to {high:.3f}, {pairs} pairs)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("restart", "memory", "kill"))
    parser.add_argument(
        "--model", default=str(demo_path()), help="folder, GGUF file, or for memory a shape of bench_models.py"
    )
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--tokens", type=int, default=4000, help="restart, kill: length of a prompt")
    parser.add_argument("--prompts", type=int, default=5, help="restart, kill: number of prompts")
    parser.add_argument("--requests", type=int, default=64, help="memory: rows of a step")
    parser.add_argument("--context", type=int, default=320, help="memory: tokens of each request")
    parser.add_argument("--pairs", type=int, default=100, help="memory: pairs of steps")
    options, flags = parser.parse_known_args()
    with signals_as_exceptions():
        if options.what == "restart":
            measure_restart(options.model, options.prompts, options.tokens, flags)
        elif options.what == "kill":
            measure_kill(options.model, options.prompts, options.tokens, flags)
        else:
            measure_memory(options.model, options.load_format, options.requests, options.context, options.pairs)


if __name__ == "__main__":
    main()
