"""Other servers: how each of those that we compare with is started at its best settings. See PEERS.md."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_models import BenchModel

VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*=.*", re.DOTALL)
LLAMA_SERVER = (
    "{program} -m {gguf} --host 127.0.0.1 --port {port} -t {threads} -tb {threads} -np {streams} -c {context} "
    "-b 2048 -ub 512 -fa on --cache-ram 0"
)
PEERS = {
    "llama.cpp": LLAMA_SERVER + " --no-webui --no-kv-unified",
    "ik_llama.cpp": LLAMA_SERVER + " -rtr --log-disable",
    "vllm": "VLLM_CPU_KVCACHE_SPACE=4 VLLM_CPU_OMP_THREADS_BIND={cores} VLLM_CPU_NUM_OF_RESERVED_CPU=0 "
    "HF_HUB_OFFLINE=1 PYTHONPATH= {program} -m vllm.entrypoints.openai.api_server --model {folder} --port {port} "
    "--host 127.0.0.1 --dtype bfloat16 --max-model-len {length} --load-format {load_format}",
}
"""Command lines by name, after environment variables. ``{program}`` is the path given on the command line."""


@dataclass(frozen=True)
class Room:
    """What the loads of a run need."""

    streams: int
    """Maximum number of requests at once."""
    length: int
    """Maximum tokens of a request."""


@dataclass
class Engine:
    """A server to compare."""

    name: str
    command: list[str]
    env: dict[str, str]


def parse_engine(text: str, model: BenchModel, room: Room) -> Engine:
    """An engine from the command line.

    Args:
        text: ``KIND=[VARIABLE=value ...] PATH [flags]`` for a server that is known, where ``KIND`` is a key of
            ``PEERS``, by itself or as ``KIND/variant``; or ``NAME=[VARIABLE=value ...] command``. Words may contain the
            placeholders of ``PEERS``.
        model: The model to serve.
        room: What the loads need.

    Raises:
        argparse.ArgumentTypeError: It is neither.
    """
    name, _, rest = text.partition("=")
    env, words = _split(shlex.split(rest))
    if not name or not words:
        raise argparse.ArgumentTypeError(f"--engine {text!r}: expected KIND=PATH or NAME=COMMAND")
    known = PEERS.get(name.partition("/")[0])
    if known is not None:
        usual_env, usual = _split(shlex.split(known))
        env = usual_env | env
        words = [*(words[0] if word == "{program}" else word for word in usual), *words[1:]]
    values = _placeholders(model, room)
    return Engine(name, [_fill(word, values) for word in words], {k: _fill(v, values) for k, v in env.items()})


def _split(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Environment variables at the beginning of a command, and the rest."""
    count = next((i for i, word in enumerate(words) if not VARIABLE.fullmatch(word)), len(words))
    pairs = (word.partition("=") for word in words[:count])
    return {key: value for key, _, value in pairs}, words[count:]


def _placeholders(model: BenchModel, room: Room) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    return {
        "gguf": model.gguf,
        "folder": model.folder,
        "model": model.gguf if model.gguf.exists() else model.folder,
        "load_format": "auto" if model.has_weights else "dummy",
        "threads": len(cores),
        "cores": ",".join(map(str, cores)),
        "streams": room.streams,
        "context": room.streams * room.length,
        "length": room.length,
    }


def _fill(word: str, values: dict[str, Any]) -> str:
    """Replaces all placeholders but ``{port}``, which the server's start replaces."""
    for key, value in values.items():
        word = word.replace("{" + key + "}", str(value))
    return word
