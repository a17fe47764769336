#!/usr/bin/env python3
"""Compares embedding speed with ONNX Runtime and sentence-transformers, on one model and the same texts, in turn.

    scripts/bench_embeddings.py --model all-MiniLM-L6-v2 --texts gsm8k_test.jsonl --peers /path/to/venv/bin/python

The peers run in a virtual environment of their own, with sentence-transformers, onnxruntime and onnx. Each engine gets
all texts at once, sorted by length where it pads; a round runs every engine once. Times include tokenising.
The vectors of the first ``--compared`` texts are compared, too; a difference over 1e-5 is an error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from floors import Machine  # noqa: E402

from ops.cpu import library  # noqa: E402

TOLERANCE = 1e-5
PEER = """
import json, sys, time
from pathlib import Path
import numpy as np
name, model, cache, compared = sys.argv[1:5]
texts = json.load(sys.stdin)
if name == "sentence-transformers":
    from sentence_transformers import SentenceTransformer
    encoder = SentenceTransformer(model, device="cpu")
    embed = lambda: encoder.encode(texts, batch_size=32, show_progress_bar=False)
else:
    import onnxruntime
    from tokenizers import Tokenizer
    path = Path(cache) / "model.onnx"
    if not path.exists():
        import torch
        from transformers import AutoModel
        class Whole(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = AutoModel.from_pretrained(model, attn_implementation="eager")
            def forward(self, input_ids, attention_mask):
                states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
                mask = attention_mask.unsqueeze(-1).to(states.dtype)
                return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        example = (torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64))
        axes = {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask")}
        torch.onnx.export(Whole().eval(), example, str(path), input_names=list(axes), output_names=["vectors"],
                          dynamic_axes=axes, opset_version=17, dynamo=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(256)
    def embed():
        order = np.argsort([-len(text) for text in texts])
        out = np.zeros((len(texts), session.get_outputs()[0].shape[-1] or 0), np.float32)
        for begin in range(0, len(texts), 32):
            places = order[begin:begin + 32]
            batch = tokenizer.encode_batch([texts[place] for place in places])
            ids = np.array([each.ids for each in batch], np.int64)
            mask = np.array([each.attention_mask for each in batch], np.int64)
            out[places] = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        return out
texts, every = texts[:32], texts
embed()
texts = every
begin = time.perf_counter()
vectors = embed()
print(json.dumps([time.perf_counter() - begin, vectors[:int(compared)].tolist()]))
"""


def ours(model: str, texts: list[str], compared: int) -> tuple[float, list[list[float]], int]:
    """Seconds for all texts, the first vectors, and the number of tokens."""
    from api import LLM

    with LLM(model, dtype="float32") as llm:
        llm.embed(texts[:32], use_tqdm=False)
        begin = time.perf_counter()
        outputs = llm.embed(texts, use_tqdm=False)
        seconds = time.perf_counter() - begin
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return seconds, [output.outputs.embedding for output in outputs[:compared]], tokens


def peer(
    python: str, name: str, model: str, texts: list[str], cache: str, compared: int
) -> tuple[float, list[list[float]]]:
    """The same of another engine."""
    command = [python, "-c", PEER, name, model, cache, str(compared)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip()[-2000:]}")
    seconds, vectors = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds, vectors


def operations(config: dict[str, Any], tokens: int) -> float:
    """Multiplications and additions of the products of a BERT model, attention apart."""
    hidden, inner, num_layers = (
        int(config[name]) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    return 2.0 * tokens * num_layers * (4 * hidden * hidden + 2 * hidden * inner)


def main() -> None:
    """Runs the rounds and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a BERT model in sentence-transformers' form")
    parser.add_argument("--texts", required=True, help="JSON lines with a field question, or text")
    parser.add_argument("--count", type=int, default=1000, help="number of texts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default="", help="python of an environment with the peers; empty: none")
    parser.add_argument("--cache", default="/tmp", help="folder for the exported ONNX model")
    parser.add_argument("--compared", type=int, default=200, help="number of texts whose vectors are compared")
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in Path(arguments.texts).read_text().splitlines()]
    texts = [line.get("question") or line["text"] for line in lines][: arguments.count]
    machine = Machine()
    names = ["onnxruntime", "sentence-transformers"] if arguments.peers else []
    times: dict[str, list[float]] = {name: [] for name in ("octavo", *names)}
    shares = []
    config = json.loads((Path(arguments.model) / "config.json").read_text())
    for _ in range(arguments.rounds):
        peak = machine.measure(library.TYPES[torch.float32]).operations_per_s
        seconds, vectors, tokens = ours(arguments.model, texts, arguments.compared)
        times["octavo"].append(seconds)
        shares.append(operations(config, tokens) / seconds / peak)
        for name in names:
            seconds, others = peer(arguments.peers, name, arguments.model, texts, arguments.cache, arguments.compared)
            times[name].append(seconds)
            difference = np.abs(np.subtract(vectors, others)).max()
            print(f"{name}: vectors of {len(others)} texts differ by {difference:.1e}", file=sys.stderr)
            if difference > TOLERANCE:
                raise SystemExit(f"{name}: the vectors are not the same")
    print(f"{len(texts)} texts, {tokens} tokens, {machine.threads} threads of {machine.capability}")
    for name, own in times.items():
        median = statistics.median(own)
        ratio = statistics.median(other / mine for other, mine in zip(own, times["octavo"], strict=True))
        print(f"{name:22} {len(texts) / median:8.0f} texts/s  {tokens / median:8.0f} tokens/s  time x{ratio:.2f}")
    print(f"share of the peak of float32: {statistics.median(shares):.0%}")


if __name__ == "__main__":
    main()
