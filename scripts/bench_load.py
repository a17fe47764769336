#!/usr/bin/env python
"""Times the loading of weights from a cold disk, against reading the same files, and measures its memory.

    python scripts/bench_load.py --model folder                  # or a GGUF file
    python scripts/bench_load.py --shape 1b                      # writes a checkpoint with random weights first
    python scripts/bench_load.py --shape 1b --load-format dummy  # random weights without a file
    python scripts/bench_load.py --shape 1b --quantization int4  # quantised while it is loaded

Before each reading and each loading, the files are dropped from the page cache. ``read`` is the rate of plain reads,
with one thread or as many as there are cores, whichever is faster; ``loaded`` the rate at which bytes of the files
become packed weights. ``anonymous`` is the most memory that the process had for itself while loading, beyond what it
had before, in multiples of the packed weights; pages of the mapped files belong to the page cache and do not count.

A hypervisor may take back memory that is free for seconds, and giving it again can take longer than reading from the
disk. So that neither reading nor loading measures that, memory for both is written and freed right before.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import msgspec
import torch
from msgspec.structs import replace

from api.model.gguf_file import read_gguf
from executor.config import ModelConfig
from executor.loader import load_model
from executor.parallel import ParallelState
from ops.cpu.memory import map_zeros

BLOCK = 8 << 20
SAMPLE_SECONDS = 0.002
CALIBRATION = 512
"""Tokens on which a model is measured before it becomes int4, about as many as ``octavo serve`` takes."""


@dataclass
class Loaded:
    """One loading, in a process of its own."""

    seconds: float
    weight_bytes: int
    anonymous_bytes: int
    """Peak, beyond what the process had before."""


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("the kernel does not report RssAnon")


class PeakAnonymous(threading.Thread):
    """Samples ``anonymous_bytes`` until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.base = self.peak = anonymous_bytes()
        self._stop_now = threading.Event()

    def run(self) -> None:
        while not self._stop_now.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, anonymous_bytes())

    def stop(self) -> int:
        """Returns the largest growth."""
        self._stop_now.set()
        self.join()
        return max(self.peak, anonymous_bytes()) - self.base


def load(model: str, options: argparse.Namespace) -> Loaded:
    """Loads a model from a cold disk in this process."""
    load_format = options.load_format
    given = {"dtype": options.dtype, "load_format": load_format, "quantization": options.quantization}
    config = msgspec.convert({"model": model, **given}, ModelConfig)
    if model.endswith(".gguf"):
        config = replace(config, gguf=read_gguf(model).header())
    if options.quantization == "int4":
        config = replace(config, calibration=tuple(range(1, CALIBRATION + 1)))
    torch.set_grad_enabled(False)
    warm_up()
    files = files_of(model, load_format)
    claim_memory(2 * bytes_of(files))
    drop_from_cache(files)
    peak = PeakAnonymous()
    peak.start()
    begin = time.perf_counter()
    loaded = load_model(config, ParallelState(), torch.device("cpu"), None, lambda stage, done, total: None)
    seconds = time.perf_counter() - begin
    return Loaded(seconds, loaded.weight_bytes, peak.stop())


def warm_up() -> None:
    """Compiles the kernels and imports the model's modules, which takes no part in loading."""
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
                                    "num_attention_heads": 8, "vocab_size": 64})  # fmt: skip
        config = ModelConfig(model=folder, load_format="dummy")
        load_model(config, ParallelState(), torch.device("cpu"), None, lambda stage, done, total: None)


def write_config(folder: Path, shape: dict[str, int]) -> None:
    from bench_models import LLAMA

    (folder / "config.json").write_text(json.dumps({**LLAMA, "num_key_value_heads": 8, **shape}))


def write_checkpoint(folder: Path, shape: dict[str, int]) -> None:
    """Writes a Llama model with arbitrary weights, one file, in bfloat16."""
    from bench_models import LLAMA
    from safetensors.torch import save_file

    sizes: dict[str, Any] = {**LLAMA, **shape}
    hidden, inner, vocab = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    kv = hidden // sizes["num_attention_heads"] * 8
    block = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def weight(*dims: int) -> torch.Tensor:
        count = torch.Size(dims).numel()
        return block.repeat(-(-count // len(block)))[:count].view(dims)

    tensors = {"model.embed_tokens.weight": weight(vocab, hidden), "model.norm.weight": weight(hidden)}
    for layer in range(sizes["num_hidden_layers"]):
        for name, dims in {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = weight(*dims)
    save_file(tensors, folder / "model.safetensors")


def files_of(model: str, load_format: str) -> list[Path]:
    """The files with a model's weights."""
    path = Path(model)
    if load_format == "dummy":
        return []
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def bytes_of(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def claim_memory(num_bytes: int) -> None:
    """Writes to memory and frees it, so that the system has it at hand."""
    if num_bytes:
        map_zeros(num_bytes)[:: mmap.PAGESIZE] = 1


def drop_from_cache(files: list[Path]) -> None:
    """Makes the next read of the files go to the disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(files: list[Path]) -> float:
    """Seconds for reading the files once from the disk: the shorter of those with one thread and with one per core."""
    return min(_read_seconds(files, 1), _read_seconds(files, len(os.sched_getaffinity(0))))


def _read_seconds(files: list[Path], num_threads: int) -> float:
    claim_memory(bytes_of(files))
    drop_from_cache(files)
    places = [(path, start) for path in files for start in range(0, path.stat().st_size, BLOCK)]
    local = threading.local()

    def read(place: tuple[Path, int]) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(BLOCK)
        descriptor = os.open(place[0], os.O_RDONLY)
        try:
            os.preadv(descriptor, [local.buffer], place[1])
        finally:
            os.close(descriptor)

    begin = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(read, places))
    return time.perf_counter() - begin


def load_apart(model: str, options: argparse.Namespace) -> Loaded:
    """Loads a model in a new process.

    Raises:
        RuntimeError: It failed.
    """
    command = [sys.executable, __file__, "--model", model, "--dtype", options.dtype, "--once"]
    command += ["--load-format", options.load_format]
    if options.quantization:
        command += ["--quantization", options.quantization]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return Loaded(**json.loads(done.stdout))


def measure(model: str, files: list[Path], options: argparse.Namespace) -> None:
    """Prints the figures of all runs, and their medians."""
    total = bytes_of(files)
    rows = []
    for _ in range(options.runs):
        read = read_seconds(files)
        loaded = load_apart(model, options)
        rows.append((read, loaded.seconds, loaded.anonymous_bytes / loaded.weight_bytes))
        print(f"read {read:.2f} s  load {loaded.seconds:.2f} s  anonymous {rows[-1][2]:.3f}x", flush=True)
    read, seconds, memory = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"{'weights':12} {loaded.weight_bytes / 1e9:.3f} GB packed" + (f", {total / 1e9:.3f} GB in files" * bool(files))
    )
    if files:
        print(f"{'read':12} {total / 1e9 / read:.2f} GB/s")
        print(f"{'loaded':12} {total / 1e9 / seconds:.2f} GB/s, {read / seconds:.2f} of the read rate")
    else:
        print(f"{'loaded':12} {seconds:.2f} s")
    print(f"{'anonymous':12} {memory:.3f}x of the packed weights")


def main() -> int:
    from bench_models import SHAPES

    parser = argparse.ArgumentParser(description="Measure loading from a cold disk.")
    add = parser.add_argument
    add("--model", help="folder or GGUF file")
    add("--shape", choices=SHAPES, help="a model with random weights instead")
    add("--load-format", default="auto", help="as in octavo serve")
    add("--dtype", default="auto", help="as in octavo serve")
    add("--quantization", help="as in octavo serve")
    add("--runs", type=int, default=3)
    add("--dir", help="where --shape writes its files (default: the temporary folder)")
    add("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if bool(options.model) == bool(options.shape):
        parser.error("give --model or --shape")
    if options.once:
        print(json.dumps(asdict(load(options.model, options))))
        return 0
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        model = options.model or folder
        if options.shape:
            write_config(Path(folder), SHAPES[options.shape])
            if options.load_format != "dummy":
                write_checkpoint(Path(folder), SHAPES[options.shape])
        try:
            measure(model, files_of(model, options.load_format), options)
        except RuntimeError as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
