#!/usr/bin/env python3
"""Checks LoRA adapters: those that PEFT writes, and loading them under traffic.

    python scripts/check_adapters.py traffic            load and unload 200 times while requests run
    python scripts/check_adapters.py peft               adapters of PEFT, against its own merged weights
    python scripts/check_adapters.py peft --cases dora stacks
    python scripts/check_adapters.py families           all matrices of each family, against merged weights

``traffic``: a tiny server with room for three adapters gets requests without adapter and with two, while others come
and go. Each answer must be the one that its adapter gives alone, and the memory of no process may grow by an adapter
once the first loads are over.

``peft``: PEFT is installed into --folder, which is kept, for the torch and transformers of this interpreter. It adapts
tiny random models in each of its ways, saves the adapter, and merges it in float32. Octavo's logits with the file must
be those of the merged model.

``families``: a tiny random model of each family, with an adapter of everything that is a matrix but for the matrices
between latents and heads and norms of heads.

Exit status: 0 if all is as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import ROOT, Server, descendants, resident_bytes, signals_as_exceptions

sys.path.insert(0, str(ROOT))

import httpx
import torch

REQUIREMENTS = ("peft==0.21.2", "accelerate==1.15.0")
TOLERANCE = 1e-5
"""Of logits, as a share of the largest."""
RANK = 256
"""Of the adapters that come and go: large, so that one left behind is seen in a process's memory."""
ADMIN = {"Authorization": "Bearer root"}
PERMANENT = ("a", "b")
PASSING = ("c", "d", "e", "f")


# -- loading under traffic -----------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """Requests to a server, and what is wrong with their answers."""

    url: str
    expected: dict[str, list[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    num_answers: int = 0
    is_over: bool = False

    def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, headers=ADMIN, timeout=120)

    def ask(self, name: str, adapter: str = "") -> None:
        """Sends a request and compares its answer with the first one of that adapter."""
        prompt = [(7 * i * i) % 250 + 3 for i in range(40)]
        body = {"model": name, "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        response = self.post("/v1/completions", {**body, "return_token_ids": True})
        if response.status_code != 200:
            self.problems.append(f"{name}: {response.status_code}: {response.text[:200]}")
            return
        tokens = response.json()["choices"][0]["token_ids"]
        self.num_answers += 1
        if self.expected.setdefault(adapter or name, tokens) != tokens:
            self.problems.append(f"{adapter or name}: other tokens than before")

    def change(self, action: str, **fields: Any) -> None:
        response = self.post(f"/v1/{action}_lora_adapter", fields)
        if response.status_code != 200:
            self.problems.append(f"{action} {fields}: {response.status_code}: {response.text[:200]}")

    def run(self, name: str) -> None:
        """Asks until it is over."""
        while not self.is_over:
            self.ask(name)


def memory_of(server: Server) -> dict[str, int]:
    """Bytes of each process by its title."""
    result = {}
    for pid, _ in sorted(descendants(server.pid)):
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
        result[title[:40]] = resident_bytes(pid)
    return {"api": resident_bytes(server.pid), **result}


def load_and_unload(traffic: Traffic, number: int, previous: str) -> str:
    """One adapter comes, is used and goes; every fourth is replaced by another first. Returns which it was."""
    adapter = PASSING[number % len(PASSING)]
    traffic.change("load", lora_name="guest", lora_path=adapter, load_inplace=previous != "")
    traffic.ask("guest", adapter)
    if number % 4 == 3:
        return adapter
    traffic.change("unload", lora_name="guest")
    return ""


def check_traffic(num_loads: int) -> int:
    """Runs it and prints what came of it. Returns the exit status."""
    from tests import tiny
    from tests.lora import write_adapter

    base = tiny.checkpoint("llama")
    with tempfile.TemporaryDirectory() as scratch:
        size = 0
        for seed, name in enumerate((*PERMANENT, *PASSING), 1):
            path = write_adapter(base, seed=seed, scale=0.05, rank=RANK, alpha=RANK)
            shutil.copytree(path, Path(scratch) / name)
            size = (path / "adapter_model.safetensors").stat().st_size
        flags = ["--max-loras", "2", "--max-cpu-loras", "3", "--max-lora-rank", str(RANK), "--admin-api-key", "root"]
        modules = [f"{name}={scratch}/{name}" for name in PERMANENT]
        command = [sys.executable, "-m", "api", "--model", str(base), "--served-model-name", "base", "--port", "{port}"]
        command += ["--enable-lora", *flags, "--allowed-lora-path", scratch, "--lora-modules", *modules]
        server = Server([*command, "--kv-cache-memory", "64MiB"])
        try:
            server.wait_ready()
            traffic = Traffic(server.url)
            names = ("base", *PERMANENT)
            for name in names:
                traffic.ask(name)
            before: dict[str, int] = {}
            previous = ""
            with ThreadPoolExecutor(2 * len(names)) as pool:
                asked = [pool.submit(traffic.run, name) for name in names * 2]
                begin = time.monotonic()
                for number in range(num_loads):
                    previous = load_and_unload(traffic, number, previous)
                    if number == num_loads // 4:
                        before = memory_of(server)
                seconds = time.monotonic() - begin
                after = memory_of(server)
                traffic.is_over = True
            for each in asked:
                each.result()
        finally:
            server.stop()
    problems = traffic.problems
    print(f"{num_loads} loads in {seconds:.0f} s beside {traffic.num_answers} answers; {len(problems)} problems")
    grown = {title: after[title] - each for title, each in before.items() if title in after}
    for title, growth in grown.items():
        print(f"{title:40} {before[title] / 2**20:8.1f} MiB, {growth / 2**10:+8.0f} KiB in the last three quarters")
    print(f"an adapter has {size / 2**20:.1f} MiB")
    for problem in problems[:10]:
        print(problem)
    return 1 if problems or max(grown.values()) > size else 0


# -- adapters of PEFT ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An adapter of a tiny model."""

    model: str
    """As in ``tests/families.py``."""
    config: Mapping[str, Any]
    """Fields of ``LoraConfig``."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of the model's configuration."""


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["gate_up_proj", "down_proj"]
CASES: dict[str, Case] = {
    "linear": Case("llama", {"target_modules": "all-linear"}),
    "ranks": Case(
        "llama",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 3, "down_proj": 7},
            "alpha_pattern": {"v_proj": 3, "up_proj": 21},
        },
    ),
    "layers": Case("llama", {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "dora": Case("llama", {"target_modules": "all-linear", "use_dora": True}),
    "embedding": Case("llama", {"target_modules": ["embed_tokens", "q_proj"]}, {"tie_word_embeddings": False}),
    "bias": Case("qwen2", {"target_modules": ATTENTION, "bias": "lora_only"}),
    "all_biases": Case("qwen2", {"target_modules": ["down_proj"], "bias": "all"}),
    "lora_bias": Case("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "saved": Case(
        "llama",
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens"]},
        {"tie_word_embeddings": False},
    ),
    "tokens": Case("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 9]}),
    "conv1d": Case("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "fused": Case("phi3", {"target_modules": "all-linear"}),
    "grouped": Case("gpt_neox", {"target_modules": "all-linear"}),
    "stacks": Case("qwen3_moe", {"target_modules": ATTENTION, "target_parameters": EXPERTS}),
    "one_stack": Case("mixtral", {"target_modules": [], "target_parameters": ["down_proj"]}),
    "converted": Case("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "converted_all": Case("qwen2_moe", {"target_modules": "all-linear"}),
    "alternating": Case("gpt_oss", {"target_modules": ATTENTION, "target_parameters": EXPERTS}),
    "transposed": Case("llama4", {"target_modules": ATTENTION, "target_parameters": EXPERTS}),
    "router": Case("olmoe", {"target_modules": ["v_proj"], "target_parameters": ["gate.weight"]}),
    "latent": Case("deepseek_v3", {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]}),
    "states": Case("mamba2", {"target_modules": ["in_proj"]}),
}


def install(folder: Path) -> None:
    """Installs PEFT, if it is not there, and makes it importable."""
    done = folder / "installed"
    if not done.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, *REQUIREMENTS], check=True)
        done.touch()
    sys.path.append(str(folder))


def peft_writes(case: Case, base: Path, folder: Path, token_ids: list[int]) -> torch.Tensor:
    """Has PEFT adapt a model and save the adapter. Returns the logits of the merged model."""
    import peft  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(**{"r": 5, "lora_alpha": 10, "task_type": "CAUSAL_LM", **case.config})
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:  # B begins with zeros
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(folder)
        merged = adapted.merge_and_unload()
        logits: torch.Tensor = merged.eval()(torch.tensor([token_ids])).logits[0]
    return logits


def compare(case: Case, folder: Path) -> str:
    """The largest difference, for a line of the report; raises what went wrong."""
    from executor.adapter_files import adapter_hash
    from executor.adapters import LoadedAdapters
    from executor.config import LoRAConfig
    from executor.messages import LoRARequest
    from tests import tiny
    from tests.models.harness import Chunk, Runner, load, random_tokens

    base, token_ids = tiny.checkpoint(case.model, **case.fields), random_tokens(40)
    expected = peft_writes(case, base, folder, token_ids)
    loaded = load(base, max_adapters=1)
    adapters = LoadedAdapters(loaded, LoRAConfig(enable_lora=True, max_loras=1, max_lora_rank=16))
    plain, adapted = Runner(loaded), Runner(loaded)
    adapters.load(1, LoRARequest("x", 1, str(folder), adapter_hash(folder)))
    found = adapted.step([Chunk(0, token_ids, 1)])
    scale = expected.abs().max()
    difference = float((found - expected).abs().max() / scale)
    moved = float((plain.step([Chunk(0, token_ids)]) - expected).abs().max() / scale)
    if difference > TOLERANCE or moved < 100 * TOLERANCE:
        raise ValueError(f"logits differ by {difference:.2g}, and from those without adapter by {moved:.2g}")
    return f"{difference:.1e} (without the adapter {moved:.2g})"


def check_peft(folder: Path, names: list[str]) -> int:
    """Runs cases and prints a line for each. Returns the exit status."""
    from executor.base import ModelError

    folder.mkdir(parents=True, exist_ok=True)
    install(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(min(4, torch.get_num_threads()))
    failed = 0
    for name in names or list(CASES):
        with tempfile.TemporaryDirectory() as scratch:
            try:
                line = compare(CASES[name], Path(scratch))
            except (ModelError, ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:
                line, failed = f"FAILED: {type(error).__name__}: {str(error)[:300]}", failed + 1
            kinds = json.dumps({key: value for key, value in CASES[name].config.items() if key != "target_modules"})
        print(f"{name:14} {CASES[name].model:12} {line}   {kinds}", flush=True)
    return 1 if failed else 0


# -- all families --------------------------------------------------------------------------------------------------

LEFT_OUT = re.compile(r"embed|wte|wpe|norm|kv_b_proj|conv1d")
"""Tables, which adapters change in another way, and what can have none."""


def difference_of(family: str) -> float:
    """How far logits are from those with merged weights, as a share of the largest."""
    from safetensors.torch import load_file

    from executor.adapter_files import adapter_hash
    from executor.adapters import LoadedAdapters
    from executor.config import LoRAConfig
    from executor.messages import LoRARequest
    from tests import tiny
    from tests.lora import merge, write_adapter
    from tests.models.harness import Chunk, Runner, load, random_tokens

    base, token_ids = tiny.checkpoint(family), random_tokens(30)
    weights = load_file(base / "model.safetensors")
    modules = [name.removesuffix(".weight") for name, weight in weights.items() if weight.dim() == 2]
    leaves = {name.rpartition(".")[2] for name in modules if not LEFT_OUT.search(name)}
    folder = write_adapter(base, targets="|".join(f"{leaf}$" for leaf in sorted(leaves)), transposed=family == "gpt2")
    loaded = load(base, max_adapters=1)
    adapters = LoadedAdapters(loaded, LoRAConfig(enable_lora=True, max_loras=1, max_lora_rank=8))
    adapters.load(1, LoRARequest("x", 1, str(folder), adapter_hash(folder)))
    found = Runner(loaded, captured=True).step([Chunk(0, token_ids, 1)])
    expected = Runner(load(merge(base, folder))).step([Chunk(0, token_ids)])
    return float((found - expected).abs().max() / expected.abs().max())


def check_families() -> int:
    """Prints a line for each family. Returns the exit status."""
    from executor.base import ModelError
    from tests.families import FAMILIES

    failed = 0
    for name in FAMILIES:
        try:
            difference = difference_of(name)
            line, is_good = f"{difference:.1e}", difference <= TOLERANCE
        except ModelError as error:
            line, is_good = str(error), False
        failed += not is_good
        print(f"{name:20} {'' if is_good else 'FAILED: '}{line}", flush=True)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("traffic", "peft", "families"))
    parser.add_argument("--loads", type=int, default=200, help="traffic: how many adapters come")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[], help="peft: default: all")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(os.environ.get("TMPDIR", "/var/tmp")) / "octavo-peft",
        help="peft: where it is installed",
    )
    options = parser.parse_args()
    checks: dict[str, Callable[[], int]] = {
        "traffic": lambda: check_traffic(options.loads),
        "peft": lambda: check_peft(options.folder, options.cases),
        "families": check_families,
    }
    with signals_as_exceptions():
        return checks[options.what]()


if __name__ == "__main__":
    sys.exit(main())
