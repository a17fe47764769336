"""What ``octavo bench serve`` is asked to do: its own flags, and those of ``vllm bench serve``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from api.commands.bench.datasets import DATASETS
from api.flags import ConfigError, Parser

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
BACKENDS = {"octavo": "completions", "vllm": "completions", "openai": "completions", "openai-chat": "chat"}
"""Names of vLLM's benchmark for the two protocols."""
SAMPLING = ("top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
IDLE = {
    "tokenizer": "the server counts tokens",
    "tokenizer_mode": "the server counts tokens",
    "trust_remote_code": "no code is loaded",
    "disable_tqdm": "there is no progress bar",
    "ready_check_timeout_sec": "the server is asked once",
    "percentile_metrics": "all are reported",
    "metric_percentiles": "50, 90, 95 and 99 are reported",
    "disable_shuffle": "files are read in their order",
}
"""Options of vLLM's benchmark that change nothing here, and why."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to send. Lengths are in tokens, times in seconds."""

    base_url: str = "http://127.0.0.1:8000"
    api_key: str | None = None
    model: str = ""
    """Default: the first that the server lists."""
    endpoint: str = "completions"
    """completions or chat."""
    num_prompts: int = 200
    max_concurrency: int | None = None
    """Requests that are open at the same time at most. None: 32 in the closed loop, no bound in the open one."""
    request_rate: float = math.inf
    """Arrivals per second; infinite: the closed loop."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of the time between arrivals. 1: a Poisson process; less: more in bursts."""
    input_len: int = 128
    output_len: int = 128
    range_ratio: float = 0.0
    """Lengths are drawn evenly between (1 - r) and (1 + r) times the given ones."""
    prefix_len: int = 0
    """Tokens at the start that prompts share, beside ``input_len``."""
    num_prefixes: int = 1
    dataset_name: str = "random"
    dataset_path: str = ""
    """The file of a dataset that is not random."""
    dataset_output_len: int | None = None
    """Length of answers to it. None: what it says, else ``output_len``."""
    token_ids: bool = False
    vocab_size: int = 32000
    ignore_eos: bool = True
    temperature: float = 0.0
    extra_body: dict[str, Any] = field(default_factory=dict)
    warmup: int = 8
    """Requests before the clock starts, with prompts of their own."""
    seed: int = 0
    timeout: float = 600.0
    insecure: bool = False
    """Trust any certificate."""
    keep_text: bool = False
    label: str = ""
    goodput: dict[str, float] = field(default_factory=dict)
    """Bounds in milliseconds on ``ttft``, ``tpot`` and ``e2el`` that a good request keeps."""

    @property
    def path(self) -> str:
        """The endpoint's."""
        return PATHS[self.endpoint]


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where figures go."""

    json: str | None = None
    compare: str | None = None
    save_result: bool = False
    save_detailed: bool = False
    result_dir: str = "."
    result_filename: str | None = None
    metadata: tuple[str, ...] = ()


def parse(arguments: Sequence[str]) -> tuple[Options, Output]:
    """Reads the command line. Ends the process with one line about what is wrong."""
    parser = create_parser()
    given = parser.parse(arguments)
    try:
        return _resolve(given)
    except ConfigError as error:
        parser.error(str(error))


def _resolve(given: dict[str, Any]) -> tuple[Options, Output]:
    for name, why in IDLE.items():
        if given.pop(name, None) not in (None, False):
            print(f"octavo: --{name.replace('_', '-')} has no effect: {why}", file=sys.stderr)
    body = {name: value for name in SAMPLING if (value := given.pop(name, None)) is not None}
    if (logprobs := given.pop("logprobs", None)) is not None:
        body["logprobs"] = logprobs
    try:
        given["extra_body"] = {**body, **json.loads(given.get("extra_body", "{}"))}
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--extra-body: a JSON object is expected: {error}") from None
    host, port = given.pop("host", None), given.pop("port", None)
    if "base_url" not in given and (host or port):
        name = host or "127.0.0.1"
        given["base_url"] = f"http://{f'[{name}]' if ':' in name else name}:{port or 8000}"
    backend = given.pop("backend", None)
    endpoint = given.get("endpoint", BACKENDS.get(backend or "", "completions"))
    given["endpoint"] = next((name for name, path in PATHS.items() if endpoint in (name, path)), "")
    if not given["endpoint"]:
        raise ConfigError(f"--endpoint {endpoint}: choose from {', '.join(PATHS.values())}")
    if served := given.pop("served_model_name", None):
        given["model"] = served
    if path := given.pop("prompts", None):
        given |= {"dataset_name": "custom", "dataset_path": path, "dataset_output_len": given.get("output_len")}
    if given.get("dataset_name", "random") != "random" and not given.get("dataset_path"):
        raise ConfigError(f"--dataset-name {given['dataset_name']} needs --dataset-path")
    given["goodput"] = dict(_bound(word) for word in given.get("goodput", ()))
    given["metadata"] = tuple(given.get("metadata", ()))
    options = Options(**{name: value for name, value in given.items() if name in Options.__dataclass_fields__})
    if options.token_ids and options.endpoint == "chat":
        raise ConfigError("--token-ids needs --endpoint completions")
    if options.burstiness <= 0 or options.request_rate <= 0:
        raise ConfigError("--request-rate and --burstiness must be greater than 0")
    return options, Output(**{name: given[name] for name in Output.__dataclass_fields__ if name in given})


def _bound(word: str) -> tuple[str, float]:
    name, _, value = word.partition(":")
    try:
        if name in ("ttft", "tpot", "e2el"):
            return name, float(value)
    except ValueError:
        pass
    raise ConfigError(f"--goodput {word}: expected ttft:MS, tpot:MS or e2el:MS")


def create_parser() -> Parser:
    """The command line. A flag that is not given leaves nothing behind: ``Options`` has the defaults."""
    parser = Parser("octavo bench serve", "Measure a running server that speaks OpenAI's protocol under load.")
    parser.argument_default = argparse.SUPPRESS
    defaults = Options()

    add = parser.add_argument_group("Server").add_argument
    add("--base-url", help=f"Server (default: {defaults.base_url}); or --host and --port.")
    add("--host", help="Its host.")
    add("--port", type=int, metavar="N", help="Its port.")
    add("--insecure", action="store_true", help="Trust any certificate.")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="Default: OPENAI_API_KEY.")
    add("--model", help="Default: the first that the server lists.")
    add("--served-model-name", help="The same, and goes before --model.")
    add("--backend", "--endpoint-type", choices=tuple(BACKENDS), help="openai-chat: the same as --endpoint chat.")
    add("--endpoint", metavar="PATH", help="completions or chat, or their paths (default: completions).")

    add = parser.add_argument_group("Requests").add_argument
    add("--num-prompts", type=int, metavar="N", help=f"Requests to measure (default: {defaults.num_prompts}).")
    add("--max-concurrency", type=int, metavar="N", help="Open requests at most (closed loop: 32 if not given).")
    add("--request-rate", type=float, metavar="R", help="Arrivals per second; inf (the default): a closed loop.")
    add("--burstiness", type=float, metavar="X", help="1 (the default): Poisson arrivals; less: more in bursts.")
    add("--warmup", "--num-warmups", type=int, metavar="N", help="Requests before the clock starts (default: 8).")
    add("--timeout", type=float, metavar="SECONDS", help="For each request (default: 600).")
    add("--seed", type=int, metavar="N", help="The same seed makes the same requests (default: 0).")

    add = parser.add_argument_group("Prompts").add_argument
    add("--dataset-name", choices=DATASETS, help="random words (the default), or a file of that kind.")
    add("--dataset-path", metavar="FILE", help="ShareGPT's JSON; custom: JSONL with a prompt or messages on each line.")
    add("--sharegpt-output-len", "--custom-output-len", dest="dataset_output_len", type=int, metavar="N",
        help="Output tokens for prompts of a file. Default: what it says.")  # fmt: skip
    add("--prompts", metavar="FILE", help="The same as --dataset-name custom --dataset-path FILE.")
    add("--input-len", "--random-input-len", type=int, metavar="N", help="Prompt tokens, about (default: 128).")
    add("--output-len", "--random-output-len", type=int, metavar="N", help="Output tokens, exactly (default: 128).")
    add("--range-ratio", "--random-range-ratio", type=float, metavar="X", help="Vary lengths evenly by this share.")
    add("--prefix-len", "--random-prefix-len", type=int, metavar="N", help="Tokens shared, beside --input-len.")
    add("--num-prefixes", type=int, metavar="N", help="Different shared prefixes (default: 1).")
    add("--token-ids", action="store_true", help="Send random token ids instead of text (completions only).")
    add("--vocab-size", type=int, metavar="N", help=f"Bound of the random token ids (default: {defaults.vocab_size}).")

    _add_sampling(parser)
    _add_figures(parser)
    for name in IDLE:
        flag = f"--{name.replace('_', '-')}"
        if name in ("trust_remote_code", "disable_tqdm", "disable_shuffle"):
            parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
        else:
            parser.add_argument(flag, help=argparse.SUPPRESS)
    return parser


def _add_sampling(parser: Parser) -> None:
    add = parser.add_argument_group("Sampling").add_argument
    add("--ignore-eos", action=argparse.BooleanOptionalAction, help="Fixed output length (default: on).")
    add("--temperature", type=float, metavar="X", help="Default: 0.")
    for name in SAMPLING:
        kind: type[int] | type[float] = int if name == "top_k" else float
        add(f"--{name.replace('_', '-')}", type=kind, metavar="X", help="Default: the server's.")
    add("--logprobs", type=int, metavar="N", help="Log probabilities to ask for.")
    add("--extra-body", metavar="JSON", help="More fields of every request.")


def _add_figures(parser: Parser) -> None:
    add = parser.add_argument_group("Figures").add_argument
    add("--goodput", nargs="+", metavar="NAME:MS", help="Count requests within bounds, such as ttft:500 tpot:50.")
    add("--label", help="Name of the run.")
    add("--json", metavar="FILE", help="Write all figures there.")
    add("--compare", metavar="FILE", help="Print ratios to an earlier run's --json.")
    add("--save-result", action="store_true", help="Write a JSON file under the names of vLLM's benchmark.")
    add("--save-detailed", action="store_true", help="With the times of every request in it.")
    add("--result-dir", metavar="FOLDER", help="Where to (default: here).")
    add("--result-filename", metavar="FILE", help="Default: backend, rate, model and date.")
    add("--metadata", nargs="+", metavar="KEY=VALUE", help="More entries of that file.")
