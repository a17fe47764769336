#!/usr/bin/env python3
"""Embeddings and scores through HTTP: the time of one text, memory over many texts, and a chat stream beside texts.

    scripts/bench_pooling_server.py --model all-MiniLM-L6-v2 --texts gsm8k_test.jsonl            latency and rate
    scripts/bench_pooling_server.py --model ... --texts ... --memory 100000                      memory of each process
    scripts/bench_pooling_server.py --model ... --texts ... --chat SmolLM2-135M-Instruct         a stream beside texts
    scripts/bench_pooling_server.py --model ms-marco-MiniLM-L6-v2 --texts ... --rerank --peer /path/to/venv/bin/python

A stream belongs to a server of its own, as vectors are computed by one model a server: both share the machine. The peer
of ``--rerank`` is the CrossEncoder of sentence-transformers; rounds alternate.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from processes import Server, own_bytes, process_name

DOCUMENTS, DOCUMENT_TOKENS = 100, 200
BATCH = 500
"""Texts of a request."""
PEER = """
import json, sys, time
from sentence_transformers import CrossEncoder
query, documents = json.load(sys.stdin)
model = CrossEncoder(sys.argv[1], device="cpu")
model.predict([(query, documents[0])] * 8)
begin = time.perf_counter()
model.predict([(query, document) for document in documents], batch_size=32, show_progress_bar=False)
print(time.perf_counter() - begin)
"""


class Client:
    """A connection that stays open."""

    def __init__(self, server: Server) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        """The answer's body. Raises RuntimeError if it is an error."""
        self._connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        data = response.read()
        if response.status != 200:
            raise RuntimeError(data.decode(errors="replace")[:500])
        return data

    def seconds(self, path: str, body: dict[str, Any]) -> float:
        begin = time.perf_counter()
        self.post(path, body)
        return time.perf_counter() - begin


def start(model: str, *flags: str) -> Server:
    """A server that is ready."""
    server = Server([sys.executable, "-m", "api", "--model", model, "--host", "127.0.0.1", "--port", "{port}", *flags])
    try:
        server.wait_ready("/readyz")
    except BaseException:
        server.stop()
        raise
    return server


def latency(client: Client, texts: list[str]) -> None:
    """One short text at a time, then all in one request."""
    body = {"input": "The capital of France is Paris."}
    times = sorted(client.seconds("/v1/embeddings", body) for _ in range(220))[:200]
    print(f"one text: median {statistics.median(times) * 1e3:.2f} ms, 90 % within {times[180] * 1e3:.2f} ms")
    for start_of_round in ("first", "second"):
        seconds = client.seconds("/v1/embeddings", {"input": texts, "encoding_format": "base64"})
        print(f"{len(texts)} texts in one request, {start_of_round} time: {len(texts) / seconds:.0f} texts/s")


def memory(server: Server, client: Client, texts: list[str], count: int) -> None:
    """Prints the time and the memory of each process, without files that it maps, twenty times, in MiB."""
    done, shown, begin = 0, 0, time.perf_counter()
    names: dict[int, str] = {}
    while done < count:
        own = [f"{done + i}: {texts[(done + i) % len(texts)][:60]}" for i in range(min(BATCH, count - done))]
        client.post("/v1/embeddings", {"input": own, "encoding_format": "base64"})
        done += len(own)
        if done * 20 // count > shown:
            shown = done * 20 // count
            sizes = {pid: own_bytes(pid) / 2**20 for pid in server.pids()}
            if names != {pid: process_name(pid) for pid in sizes}:
                names = {pid: process_name(pid) for pid in sizes}
                print(f"{'texts':>8} {'seconds':>8} " + " ".join(f"{name:>20}" for name in names.values()))
            columns = " ".join(f"{size:20.1f}" for size in sizes.values())
            print(f"{done:8} {time.perf_counter() - begin:8.1f} {columns}", flush=True)


def stream_rate(server: Server, tokens: int, result: list[float]) -> None:
    """Appends the tokens per second of a chat stream, from its first token on."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    body = {
        "messages": [{"role": "user", "content": "Tell a long story."}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    times = [time.perf_counter() for line in response if line.startswith(b"data: {")]
    result.append((tokens - 1) / (times[-1] - times[0]))  # events hold one or several


def beside(server: Server, client: Client, chat: str, texts: list[str]) -> None:
    """The rate of a stream alone, and while texts are embedded."""
    other = start(chat)
    try:
        rates: list[float] = []
        stream_rate(other, 50, rates)
        stream_rate(other, 150, rates)
        thread = threading.Thread(target=stream_rate, args=(other, 300, rates))
        begin = time.perf_counter()
        thread.start()
        rounds = 0
        while thread.is_alive():
            client.post("/v1/embeddings", {"input": texts, "encoding_format": "base64"})
            rounds += 1
        thread.join()
        rate = rounds * len(texts) / (time.perf_counter() - begin)
    finally:
        other.stop()
    print(f"stream alone {rates[1]:.1f} tokens/s, beside {rate:.0f} texts/s {rates[2]:.1f} ({rates[2] / rates[1]:.0%})")


def rerank(client: Client, texts: list[str], model: str, peer: str, rounds: int) -> None:
    """A query and documents of equal length, ours and the peer's in turn."""
    words = " ".join(texts).split()
    size = DOCUMENT_TOKENS * 3 // 4
    documents = [" ".join(words[i * size : (i + 1) * size]) for i in range(DOCUMENTS)]
    query, ratios = "How much money does she have left?", []
    for _ in range(rounds):
        body = {"query": query, "documents": documents, "return_documents": False}
        own = min(client.seconds("/rerank", body) for _ in range(2))
        line = f"{DOCUMENTS} documents: {own:.2f} s"
        if peer:
            done = subprocess.run(
                [peer, "-c", PEER, model],
                input=json.dumps([query, documents]),
                capture_output=True,
                text=True,
                check=True,
            )
            ratios.append(float(done.stdout.split()[-1]) / own)
            line += f", CrossEncoder x{ratios[-1]:.2f}"
        print(line, flush=True)
    if ratios:
        print(f"median: {statistics.median(ratios):.2f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", required=True, help="JSON lines with a field question, or text")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--count", type=int, default=1000, help="texts in one request")
    parser.add_argument("--memory", type=int, default=0, help="embed this many texts and print memory")
    parser.add_argument("--chat", default="", help="a generative model, whose server runs beside")
    parser.add_argument("--rerank", action="store_true", help="score documents with a cross-encoder")
    parser.add_argument("--peer", default="", help="python of an environment with sentence-transformers")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    lines = [json.loads(line) for line in Path(options.texts).read_text().splitlines()]
    texts = [line.get("question") or line["text"] for line in lines]
    server = start(options.model, "--dtype", options.dtype)
    try:
        client = Client(server)
        if options.rerank:
            rerank(client, texts, options.model, options.peer, options.rounds)
        elif options.memory:
            memory(server, client, texts, options.memory)
        elif options.chat:
            beside(server, client, options.chat, texts[: options.count])
        else:
            latency(client, texts[: options.count])
    finally:
        server.stop()


if __name__ == "__main__":
    main()
