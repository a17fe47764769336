"""Measures the extra cost per token of constrained requests over free ones, over HTTP, in one run of one server.

    python scripts/bench_structured.py                                  # the demo model
    python scripts/bench_structured.py --streams 16 --rounds 5 -- --model folder --dtype bfloat16
    python scripts/bench_structured.py --against http://127.0.0.1:8000

Rounds of free, constrained and mixed streams alternate. All streams of a round start together; the time per token is
measured while all of them run: from the moment the last stream gets its first token to the moment the first stream gets
its last. Flags after ``--`` are passed to the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from processes import Server, signals_as_exceptions

from api.commands.bench.sse_client import EventStream, HttpClient


def record(**text: int) -> dict[str, object]:
    """The schema of an object; ``text`` are constraints on its strings."""
    string = {"type": "string", **text}
    properties = {
        "id": {"type": "integer"},
        "name": string,
        "tags": {"type": "array", "items": string, "maxItems": 4},
        "kind": {"enum": ["red", "green", "blue"]},
        "score": {"type": "number"},
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


GRAMMARS: dict[str, dict[str, Any]] = {
    "json": {"json": {"type": "array", "items": record(), "minItems": 12}, "disable_any_whitespace": True},
    "json, maxLength": {
        "json": {"type": "array", "items": record(maxLength=24), "minItems": 12},
        "disable_any_whitespace": True,
    },
    "regex": {"regex": "([A-Z][a-z]{2,9} ){300}"},
}
"""Constraints whose outputs are about as long as a round, or longer."""


async def measure(client: HttpClient, model: str, grammars: list[dict[str, Any] | None], max_tokens: int) -> float:
    """Milliseconds per token while all streams of a round run.

    Raises:
        RuntimeError: The server rejected a request, or a stream was too short.
    """
    sinks = [EventStream() for _ in grammars]
    sends = []
    for number, (sink, grammar) in enumerate(zip(sinks, grammars, strict=True)):
        body: dict[str, Any] = {
            "model": model,
            "prompt": f"Records number {number} of many, as one JSON array of objects: ",
            "max_tokens": max_tokens,
            "temperature": 1,
            "seed": number,
            "stream": True,
        }
        body |= {"ignore_eos": True} if grammar is None else {"structured_outputs": grammar}
        sends.append(client.send(client.encode("POST", "/v1/completions", body), sink.feed))
    for response in await asyncio.gather(*sends):
        if response.status != 200:
            raise RuntimeError(f"the server answered {response.status}: {response.body[:500]!r}")
    begin, end = max(sink.times[0] for sink in sinks), min(sink.times[-1] for sink in sinks)
    counts = [sum(begin < moment <= end for moment in sink.times) for sink in sinks]
    if min(counts) < max_tokens // 2:
        raise RuntimeError(f"streams ended after {min(len(sink.times) for sink in sinks)} of {max_tokens} tokens")
    return (end - begin) * 1e3 / statistics.mean(counts)


async def run(url: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    client = HttpClient(url, timeout=300)
    figures: dict[str, list[float]] = {}
    try:
        model = (await client.call("GET", "/v1/models"))["data"][0]["id"]
        free: list[dict[str, Any] | None] = [None] * arguments.streams
        mixtures = {"free": free}
        for name, grammar in GRAMMARS.items():
            mixtures[name] = [grammar] * arguments.streams
        mixtures["half json"] = [GRAMMARS["json"] if i % 2 else None for i in range(arguments.streams)]
        for round_number in range(arguments.rounds + 1):
            for name, mixture in mixtures.items():
                value = await measure(client, model, mixture, arguments.tokens)
                if round_number:  # the first warms up
                    figures.setdefault(name, []).append(value)
    finally:
        client.close()
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=400, help="tokens per stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", help="URL of a running server")
    parser.add_argument("flags", nargs="*", help="server flags, after --")
    arguments = parser.parse_args()
    with signals_as_exceptions():
        if arguments.against:
            figures = asyncio.run(run(arguments.against, arguments))
        else:
            server = Server([sys.executable, "-m", "api", "--port", "{port}", *arguments.flags])
            try:
                server.wait_ready()
                figures = asyncio.run(run(server.url, arguments))
            finally:
                server.stop()
    free = statistics.median(figures["free"])
    for name, values in figures.items():
        middle = statistics.median(values)
        more = 100 * (middle / free - 1)
        print(f"{name:16} {middle:8.3f} ms per token  {more:+6.1f} %  ({min(values):.3f} to {max(values):.3f})")
    print(json.dumps({"streams": arguments.streams, "tokens": arguments.tokens, "ms_per_token": figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
