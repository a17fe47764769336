"""Options of ``octavo bench serve``: its own flags, and those of ``vllm bench serve``."""

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
"""The endpoint for each backend name of vLLM's benchmark."""
SAMPLING = ("top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
IDLE = {
    "tokenizer": "the server counts tokens",
    "tokenizer_mode": "the server counts tokens",
    "trust_remote_code": "no remote code is loaded",
    "disable_tqdm": "there is no progress bar",
    "ready_check_timeout_sec": "readiness is checked once",
    "percentile_metrics": "all metrics are reported",
    "metric_percentiles": "50, 90, 95 and 99 are reported",
    "disable_shuffle": "files are read in order",
}
"""Options of vLLM's benchmark that have no effect here, and why."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The load to generate. Lengths are in tokens, times in seconds."""

    base_url: str = "http://127.0.0.1:8000"
    api_key: str | None = None
    model: str = ""
    """Default: the first model that the server lists."""
    endpoint: str = "completions"
    """completions or chat."""
    num_prompts: int = 200
    max_concurrency: int | None = None
    """Maximum number of open requests. None: 32 in a closed loop, no limit in an open loop."""
    request_rate: float = math.inf
    """Arrivals per second; infinite: a closed loop."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of inter-arrival times. 1: a Poisson process; less: more bursty."""
    input_len: int = 128
    output_len: int = 128
    range_ratio: float = 0.0
    """Lengths are drawn uniformly between (1 - r) and (1 + r) times the given ones."""
    prefix_len: int = 0
    """Shared prefix tokens, in addition to ``input_len``."""
    num_prefixes: int = 1
    dataset_name: str = "random"
    dataset_path: str = ""
    """File of the dataset, unless random."""
    dataset_output_len: int | None = None
    """Output length for the dataset. None: from the dataset, or else ``output_len``."""
    token_ids: bool = False
    vocab_size: int = 32000
    ignore_eos: bool = True
    temperature: float = 0.0
    extra_body: dict[str, Any] = field(default_factory=dict)
    warmup: int = 8
    """Warm-up requests before measuring, with separate prompts."""
    seed: int = 0
    timeout: float = 600.0
    insecure: bool = False
    """Do not verify certificates."""
    keep_alive: bool = True
    """Reuse connections. Some servers close them after a stream, without saying so."""
    keep_text: bool = False
    label: str = ""
    goodput: dict[str, float] = field(default_factory=dict)
    """Limits in milliseconds on ``ttft``, ``tpot`` and ``e2el`` for a good request."""

    @property
    def path(self) -> str:
        """Path of the endpoint."""
        return PATHS[self.endpoint]


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where results go."""

    json: str | None = None
    compare: str | None = None
    save_result: bool = False
    save_detailed: bool = False
    result_dir: str = "."
    result_filename: str | None = None
    metadata: tuple[str, ...] = ()


def parse(arguments: Sequence[str]) -> tuple[Options, Output]:
    """Parses the command line. Exits with a one-line message on errors."""
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
        raise ConfigError(f"--extra-body: expected a JSON object: {error}") from None
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
    """The command line. Flags that are not given are absent: ``Options`` has the defaults."""
    parser = Parser("octavo bench serve", "Benchmark a running OpenAI-compatible server under load.")
    parser.argument_default = argparse.SUPPRESS
    defaults = Options()

    add = parser.add_argument_group("Server").add_argument
    add("--base-url", help=f"URL of the server (default: {defaults.base_url}); or --host and --port.")
    add("--host", help="Host of the server.")
    add("--port", type=int, metavar="N", help="Port of the server.")
    add("--insecure", action="store_true", help="Do not verify certificates.")
    add("--keep-alive", action=argparse.BooleanOptionalAction, help="Reuse connections (default: on).")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="API key. Default: OPENAI_API_KEY.")
    add("--model", help="Model. Default: the first that the server lists.")
    add("--served-model-name", help="Model, overriding --model.")
    add("--backend", "--endpoint-type", choices=tuple(BACKENDS), help="openai-chat: same as --endpoint chat.")
    add("--endpoint", metavar="PATH", help="completions or chat, or their paths (default: completions).")

    add = parser.add_argument_group("Requests").add_argument
    add("--num-prompts", type=int, metavar="N", help=f"Requests to measure (default: {defaults.num_prompts}).")
    add("--max-concurrency", type=int, metavar="N", help="Maximum open requests (default in a closed loop: 32).")
    add("--request-rate", type=float, metavar="R", help="Arrivals per second; inf (the default): a closed loop.")
    add("--burstiness", type=float, metavar="X", help="1 (the default): Poisson arrivals; less: more bursty.")
    add("--warmup", "--num-warmups", type=int, metavar="N", help="Warm-up requests before measuring (default: 8).")
    add("--timeout", type=float, metavar="SECONDS", help="Timeout per request (default: 600).")
    add("--seed", type=int, metavar="N", help="Seed of the random requests (default: 0).")

    add = parser.add_argument_group("Prompts").add_argument
    add("--dataset-name", choices=DATASETS, help="random words (the default), or the format of --dataset-path.")
    add("--dataset-path", metavar="FILE", help="ShareGPT's JSON; custom: JSONL with a prompt or messages on each line.")
    add("--sharegpt-output-len", "--custom-output-len", dest="dataset_output_len", type=int, metavar="N",
        help="Output tokens for prompts of a file. Default: from the file.")  # fmt: skip
    add("--prompts", metavar="FILE", help="Same as --dataset-name custom --dataset-path FILE.")
    add("--input-len", "--random-input-len", type=int, metavar="N", help="Approximate prompt tokens (default: 128).")
    add("--output-len", "--random-output-len", type=int, metavar="N", help="Output tokens (default: 128).")
    add("--range-ratio", "--random-range-ratio", type=float, metavar="X", help="Vary lengths by this fraction.")
    add("--prefix-len", "--random-prefix-len", type=int, metavar="N", help="Extra, shared prefix tokens.")
    add("--num-prefixes", type=int, metavar="N", help="Number of distinct shared prefixes (default: 1).")
    add("--token-ids", action="store_true", help="Send random token ids instead of text (completions only).")
    add("--vocab-size", type=int, metavar="N", help=f"Bound of random token ids (default: {defaults.vocab_size}).")

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
    add("--temperature", type=float, metavar="X", help="Sampling temperature (default: 0).")
    for name in SAMPLING:
        kind: type[int] | type[float] = int if name == "top_k" else float
        add(f"--{name.replace('_', '-')}", type=kind, metavar="X", help="Default: the server's.")
    add("--logprobs", type=int, metavar="N", help="Log probabilities to request.")
    add("--extra-body", metavar="JSON", help="Additional fields for every request.")


def _add_figures(parser: Parser) -> None:
    add = parser.add_argument_group("Results").add_argument
    add("--goodput", nargs="+", metavar="NAME:MS", help="Count requests within limits, such as ttft:500 tpot:50.")
    add("--label", help="Name of the run.")
    add("--json", metavar="FILE", help="Write all results to this file.")
    add("--compare", metavar="FILE", help="Compare with an earlier run's --json.")
    add("--save-result", action="store_true", help="Write a result file like vLLM's benchmark.")
    add("--save-detailed", action="store_true", help="Include per-request times in the result file.")
    add("--result-dir", metavar="FOLDER", help="Folder of the result file (default: current).")
    add("--result-filename", metavar="FILE", help="Default: from backend, rate, model and date.")
    add("--metadata", nargs="+", metavar="KEY=VALUE", help="Additional entries in the result file.")
