"""Measures the time from a server's start to its first token over HTTP, and its memory at that point.

    python scripts/bench_startup.py --model folder                       # kernels cached
    python scripts/bench_startup.py --model folder --empty-cache         # kernels compiled anew each time
    python scripts/bench_startup.py --command 'python -m other.server --model folder --port {port}'

Memory is the proportional set size (PSS) of the whole process tree after the first answer: pages that processes share
count once. It includes weights and KV cache as far as they were touched; ``--weights`` prints the size of the given
files for comparison.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from processes import Server, signals_as_exceptions


def first_token(server: Server) -> float:
    """Seconds from the start of a server, now ready, to the first event of a streamed completion."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    try:
        connection.request("GET", "/v1/models")
        model = json.load(connection.getresponse())["data"][0]["id"]
        body = {"model": model, "prompt": "Hello", "max_tokens": 2, "stream": True, "temperature": 0}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"the server answered {response.status}: {response.read(500)!r}")
        while not response.readline().startswith(b"data: "):
            pass
        return time.monotonic() - server.started
    finally:
        connection.close()


def measure(command: list[str], runs: int, *, empty_cache: bool) -> dict[str, list[float]]:
    """Starts the server several times.

    Raises:
        RuntimeError: It did not start or did not answer.
    """
    figures: dict[str, list[float]] = {"ready_s": [], "first_token_s": [], "memory_mib": []}
    for _ in range(runs):
        cache = tempfile.mkdtemp(prefix="octavo-cache-") if empty_cache else None
        server = Server(command, env={"OCTAVO_CACHE_DIR": cache} if cache else None)
        try:
            server.wait_ready(interval=0.02)
            figures["ready_s"].append(time.monotonic() - server.started)
            figures["first_token_s"].append(first_token(server))
            figures["memory_mib"].append(server.memory_bytes() / 2**20)
        finally:
            server.stop()
            if cache:
                shutil.rmtree(cache, ignore_errors=True)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the start of a server.")
    add = parser.add_argument
    add("--model", default="", help="model of Octavo (default: the demo model)")
    add("--command", help="command line of another server; {port} is replaced by its port")
    add("--runs", type=int, default=5, help="measured starts, after one that is not counted")
    add("--empty-cache", action="store_true", help="give every start an empty kernel cache")
    add("--weights", type=Path, nargs="*", default=[], help="files whose total size is printed for comparison")
    add("--json", type=Path, metavar="FILE", help="write all figures to this file")
    add("server_flags", nargs="*", metavar="-- FLAGS", help="additional flags for Octavo")
    arguments = parser.parse_args()
    if arguments.command:
        command = shlex.split(arguments.command)
    else:
        command = [sys.executable, "-m", "api", "serve", "--port", "{port}", *arguments.server_flags]
        if arguments.model:
            command += ["--model", arguments.model]
    with signals_as_exceptions():
        try:
            if not arguments.empty_cache:
                measure(command, 1, empty_cache=False)
            figures = measure(command, arguments.runs, empty_cache=arguments.empty_cache)
        except (RuntimeError, OSError) as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
    for name, values in figures.items():
        print(f"{name:16} min {min(values):.2f}  median {statistics.median(values):.2f}  max {max(values):.2f}")
    if arguments.weights:
        print(f"{'weights_mib':16} {sum(file.stat().st_size for file in arguments.weights) / 2**20:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
