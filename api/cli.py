"""The command line: ``octavo [serve] [MODEL] [flags]`` and the other ``COMMANDS``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from api.version import VERSION

if TYPE_CHECKING:  # each command imports what it needs: most need no engine
    from api.config import ServerConfig
    from api.flags import Parser
    from api.model.files import ModelFiles

EXIT_USAGE = 2

BENCHES = """\
usage: octavo bench serve [flags]                measure a running server under load
       octavo bench latency [MODEL] [flags]      measure the latency of one batch, without a server
       octavo bench throughput [MODEL] [flags]   measure the throughput of many requests, without a server
       octavo bench BENCHMARK --help             all flags of a benchmark"""


@dataclass(frozen=True)
class Command:
    """A subcommand of ``octavo``."""

    usage: str
    summary: str
    run: Callable[[Sequence[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads; the flush at exit must not fail
        return 1


def _run(arguments: list[str]) -> int:
    word = arguments[0] if arguments else ""
    if word in ("-h", "--help", "help"):
        print(overview())
        return 0
    if word in ("-V", "--version", "version"):
        print(VERSION)
        return 0
    if word in COMMANDS:
        return COMMANDS[word].run(arguments[1:])
    if word and not word.startswith("-") and not _may_be_model(word):
        from api.flags import did_you_mean

        return _fail(
            f"unknown command {word!r}{did_you_mean(word, COMMANDS)} (octavo --help lists them; a model is a folder, a "
            "GGUF file or a hub id such as organisation/name)",
            EXIT_USAGE,
        )
    return serve(arguments)


def overview() -> str:
    """All commands, one per line."""
    lines = [f"  octavo {command.usage:32} {command.summary}" for command in COMMANDS.values()]
    return "\n".join(
        [
            "Octavo serves large language models. Without a command it serves MODEL, or a small demo model.",
            "",
            *lines,
            "",
            "octavo COMMAND --help shows a command's flags, octavo --version the version.",
        ]
    )


def _may_be_model(word: str) -> bool:
    return "/" in word or word.endswith(".gguf") or os.path.exists(word)


def chat(arguments: Sequence[str]) -> int:
    """``octavo chat``."""
    from api.commands import talk

    return talk.main("chat", arguments)


def complete(arguments: Sequence[str]) -> int:
    """``octavo complete``."""
    from api.commands import talk

    return talk.main("complete", arguments)


def bench(arguments: Sequence[str]) -> int:
    """``octavo bench``."""
    word = arguments[0] if arguments else ""
    if word == "serve":
        from api.commands.bench import serve as load

        return load.main(arguments[1:])
    if word in ("latency", "throughput"):
        return _offline_bench(word, arguments[1:])
    if word in ("-h", "--help"):
        print(BENCHES)
        return 0
    _fail(f"unknown benchmark {word!r}" if word else "missing benchmark name", EXIT_USAGE)
    print(BENCHES, file=sys.stderr)
    return EXIT_USAGE


def _offline_bench(name: str, arguments: Sequence[str]) -> int:
    from api.commands.bench import latency, throughput
    from api.flags import ConfigError
    from api.llm import LLM

    module = latency if name == "latency" else throughput
    given = _offline_parser(name).parse(arguments)
    settings = {field: given.pop(field) for field in module.Settings.__dataclass_fields__ if field in given}

    def run() -> int:
        # One batch's cache must not speed up the next.
        values = {"enable_prefix_caching": False, **option_values(given, os.environ)}
        try:
            with LLM(**values) as llm:
                module.run(llm, module.Settings(**settings))
        except ValueError as error:  # requests that do not fit the model
            raise ConfigError(str(error)) from error
        return 0

    return _reported(run)


def _offline_parser(name: str) -> Parser:
    from api.commands.bench import latency, throughput

    module = latency if name == "latency" else throughput
    parser = model_parser(f"octavo bench {name}", module.DESCRIPTION)
    module.add_arguments(parser)
    return parser


def eval_parser() -> Parser:
    """The flags of ``octavo eval-quant``."""
    from api.commands import eval_quant

    parser = model_parser("octavo eval-quant", eval_quant.DESCRIPTION, usage="[MODEL] TEXTFILE [flags]")
    eval_quant.add_arguments(parser)
    return parser


def evaluate(arguments: Sequence[str]) -> int:
    """``octavo eval-quant``."""
    from api.commands import eval_quant
    from api.llm import LLM

    given = eval_parser().parse(arguments, intermixed=True)
    settings = {name: given.pop(name) for name in eval_quant.Settings.__dataclass_fields__ if name in given}

    def run() -> int:
        base = option_values(given, os.environ)
        return eval_quant.run(lambda values: LLM(**values), base, eval_quant.Settings(**settings))

    return _reported(run)


def imatrix(arguments: Sequence[str]) -> int:
    """``octavo imatrix``."""
    from api.commands import imatrix as command

    return _reported(lambda: command.main(arguments))


def quantize(arguments: Sequence[str]) -> int:
    """``octavo quantize``."""
    from api.commands import quantize as command

    def compare(model: str, other: str, text: str) -> int:
        return evaluate([model, text, "--formats", f"bf16,{other}"])

    return _reported(lambda: command.main(arguments, compare))


def cache(arguments: Sequence[str]) -> int:
    """``octavo cache``."""
    from api.commands import cache as command

    return _reported(lambda: command.main(arguments))


def collect_env(arguments: Sequence[str]) -> int:
    """``octavo collect-env``."""
    from api.commands import collect_env as environment

    return environment.main(arguments)


def cluster_key(arguments: Sequence[str]) -> int:
    """``octavo cluster-key``."""
    from api.commands import cluster_key as command

    return _reported(lambda: command.main(arguments))


def plan_parser() -> Parser:
    """The flags of ``octavo plan``."""
    from api.commands import plan

    parser = model_parser("octavo plan", plan.DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    return parser


def plan(arguments: Sequence[str]) -> int:
    """``octavo plan``."""
    from api.commands import plan as command
    from api.model.files import find_model, with_model

    given = plan_parser().parse(arguments)
    as_json = given.pop("json")
    if given.get("nnodes"):  # a plan needs no other machine
        given = {"cluster_key": "-", "master_addr": "127.0.0.1", **given}

    def run() -> int:
        config, _ = resolve(given, os.environ)
        files = find_model(config)
        return command.run(with_model(config, files), files.name, as_json=as_json)

    return _reported(run)


def completion(arguments: Sequence[str]) -> int:
    """``octavo completion``."""
    from api.commands import cache as cache_command
    from api.commands import cluster_key as key_command
    from api.commands import completion, talk
    from api.commands import imatrix as imatrix_command
    from api.commands import quantize as quantize_command
    from api.commands.bench.options import create_parser

    parsers = {
        "serve": serve_parser(),
        "chat": talk.short_parser("chat"),
        "complete": talk.short_parser("complete"),
        "run-batch": batch_parser(),
        "bench serve": create_parser(),
        "bench latency": _offline_parser("latency"),
        "bench throughput": _offline_parser("throughput"),
        "plan": plan_parser(),
        "eval-quant": eval_parser(),
        "imatrix": imatrix_command.create_parser(),
        "quantize": quantize_command.create_parser(),
        "cache": cache_command.create_parser(),
        "cluster-key": key_command.create_parser(),
    }
    return completion.main(arguments, parsers, {name: command.summary for name, command in COMMANDS.items()})


def batch_parser() -> Parser:
    """The flags of ``octavo run-batch``."""
    from api.commands import run_batch

    parser = model_parser(
        "octavo run-batch", "Answer the requests of a JSONL file in OpenAI's batch format, without a server."
    )
    run_batch.add_arguments(parser)
    return parser


def batch(arguments: Sequence[str]) -> int:
    """``octavo run-batch``."""
    from api.commands import run_batch

    parser = batch_parser()
    given = parser.parse(arguments)
    source, target, concurrency = (given.pop(name) for name in ("input_file", "output_file", "max_concurrency"))

    def run(config: ServerConfig, files: ModelFiles) -> int:
        try:
            return run_batch.run_batch(config, files, source, target, concurrency)
        except run_batch.BatchError as error:
            return _fail(str(error), 1)
        except KeyboardInterrupt:
            return _fail("interrupted; finished answers are in the output file", 130)

    return _with_model(parser, given, "octavo batch", run)


def serve_parser() -> Parser:
    """The flags of ``octavo serve``."""
    return model_parser("octavo serve", "Serve a model over the OpenAI API.")


def model_parser(prog: str, description: str, usage: str = "[MODEL] [flags]") -> Parser:
    """A command that loads a model: every option is a flag."""
    from api.config import GROUPS, ServerConfig
    from api.flags import Parser, add_arguments, options
    from api.vllm_options import add_foreign_arguments

    parser = Parser(prog, description, usage)
    parser.add_argument(
        "model_tag", nargs="?", metavar="MODEL", help="Hub id, folder or GGUF file; the same as --model."
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of these options by their long names; flags take precedence."
    )
    add_arguments(parser, ServerConfig, GROUPS)
    add_foreign_arguments(parser, [name for option in options(ServerConfig) for name in option.names])
    return parser


def serve(arguments: Sequence[str]) -> int:
    """``octavo serve``."""
    parser = serve_parser()
    return _with_model(parser, parser.parse(arguments), "octavo api", _run_server)


def _run_server(config: ServerConfig, files: ModelFiles) -> int:
    from api.server.run import PortInUseError, run_server

    try:
        return run_server(config, files)
    except PortInUseError as error:
        return _fail(str(error), 1)


def _run_agent(config: ServerConfig) -> int:
    """Runs the workers of a machine that serves no API itself."""
    import setproctitle

    from api.engine.socket_dir import SocketDir
    from engine_core.launch import ModelError, run_agent
    from engine_core.messages import EXIT_MODEL

    executor = config.engine.executor
    setproctitle.setproctitle(f"octavo machine {executor.parallel.node_rank}")
    folder = SocketDir()
    try:
        return run_agent(executor, folder.path, config.log_level)
    except ModelError as error:
        return _fail(str(error), EXIT_MODEL)
    finally:
        folder.close()


def _run_replicas(config: ServerConfig) -> int:
    """Runs engines of a server on another machine."""
    import setproctitle

    from api.engine.socket_dir import SocketDir
    from engine_core.launch import ModelError
    from engine_core.messages import EXIT_MODEL
    from engine_core.replica_duties import run_replicas

    first, count = config.data_parallel_start_rank or 0, config.num_local_replicas
    setproctitle.setproctitle(f"octavo engines {first}-{first + count - 1}")
    folder = SocketDir()
    try:
        return run_replicas(
            config.replica_engine, first, count, config.data_parallel_size, folder.path, config.log_level
        )
    except ModelError as error:
        return _fail(str(error), EXIT_MODEL)
    finally:
        folder.close()


def _with_model(
    parser: Parser, given: Mapping[str, Any], title: str, run: Callable[[ServerConfig, ModelFiles], int]
) -> int:
    """Resolves the configuration, finds the model and runs; failures print one line and give an exit code."""
    import setproctitle

    from api.config import unused_variables
    from api.flags import ConfigError
    from engine_core.launch import discard_prepared, get_logger, prepare_engine_core, setup_logging

    try:
        config, notes = resolve(given, os.environ)
    except ConfigError as error:
        return _fail(str(error), EXIT_USAGE)
    setproctitle.setproctitle(title)
    setup_logging("api", config.log_level, config.log_format)
    if notes:
        get_logger().warning("options that have no effect: %s", "; ".join(notes))
    if unused := unused_variables(os.environ):
        get_logger().debug("vLLM environment variables that have no effect: %s", ", ".join(unused))
    if config.engine.executor.parallel.node_rank or config.headless:
        return run_machine(config)
    if config.num_local_replicas == 1:  # replicas start on cores of their own
        prepare_engine_core(config.engine)

    def find_and_run() -> int:
        # These, and the model's files, take about as long as the imports of a worker, which run in the meantime.
        from api.model.files import find_model, with_model
        from api.params.defaults import check_defaults
        from api.ray_machines import with_machines

        files = find_model(config)
        check_defaults(files)
        with with_machines(config) as placed:
            return run(with_model(placed, files), files)

    try:
        return _reported(find_and_run)
    finally:
        discard_prepared()


def run_machine(config: ServerConfig) -> int:
    """Runs the workers or the engines of a machine that serves no API. Returns the exit code."""
    from engine_core.launch import discard_prepared, prepare_agent, setup_logging

    has_workers = config.engine.executor.parallel.nnodes > 1
    number = config.engine.executor.parallel.node_rank if has_workers else config.data_parallel_start_rank
    setup_logging(f"machine {number}" if has_workers else f"engines {number}", config.log_level, config.log_format)
    if has_workers:
        prepare_agent()

    def find_and_run() -> int:
        from api.model.files import find_model, with_model

        found = with_model(config, find_model(config))
        return _run_agent(found) if has_workers else _run_replicas(found)

    try:
        return _reported(find_and_run)
    finally:
        discard_prepared()


def _reported(run: Callable[[], int]) -> int:
    """Runs a command. What its user can mend ends it with one line and an exit code."""
    from api.errors import EngineDeadError, ModelFileError
    from api.flags import ConfigError
    from engine_core.messages import EXIT_MODEL

    try:
        return run()
    except ModelFileError as error:
        return _fail(str(error), EXIT_MODEL)
    except EngineDeadError as error:
        return _fail(str(error), error.exit_code)
    except ConfigError as error:
        return _fail(str(error), EXIT_USAGE)
    except KeyboardInterrupt:  # a server that runs handles signals itself
        return _fail("interrupted", 130)


def _fail(message: str, code: int) -> int:
    from engine_core.launch import printable

    with contextlib.suppress(OSError):  # the disk of a log may be full; the exit code counts
        print(f"octavo: {printable(message)}", file=sys.stderr)
    return code


def resolve(given: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[ServerConfig, list[str]]:
    """The configuration from flags, a YAML file and the environment, in this order of precedence.

    Args:
        given: The given flags by option name; ``model_tag`` and ``config`` are not options.
        environment: ``os.environ``.

    Returns:
        The configuration, and a note for each option that has no effect.

    Raises:
        ConfigError: A value is invalid, or two values conflict.
    """
    from api.config import make_config

    return make_config(option_values(given, environment))


def option_values(given: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Option values by name, from the same sources as ``resolve``.

    Raises:
        ConfigError: An environment variable, the file or the model argument is invalid.
    """
    from api.config import CONFIG_VARIABLE, from_environment
    from api.flags import ConfigError
    from api.machines import place_from

    flags = dict(given)
    tag = flags.pop("model_tag", None)
    if tag is not None and flags.setdefault("model", tag) != tag:
        raise ConfigError(f"two different models given: {tag} and --model {flags['model']}")
    file = flags.pop("config", None) or environment.get(CONFIG_VARIABLE)
    from_file = read_config_file(Path(file)) if file else {}
    values = {**from_environment(environment), **from_file, **flags}
    return {**place_from(environment, values), **values} if values.get("cluster_key") else values


def read_config_file(path: Path) -> dict[str, Any]:
    """Options from a YAML file; keys are the long flags without the leading dashes.

    Raises:
        ConfigError: The file cannot be read or is not a mapping.
    """
    import yaml

    from api.flags import ConfigError

    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected a mapping of options, got {type(content).__name__}")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


COMMANDS = {
    "serve": Command("[serve] [MODEL] [flags]", "serve a model over the OpenAI API", serve),
    "chat": Command("chat [MODEL] [TEXT]", "chat with a model, on a running or a new server", chat),
    "complete": Command("complete [MODEL] [TEXT]", "complete text with a model", complete),
    "run-batch": Command("run-batch -i IN -o OUT [MODEL]", "process an OpenAI batch file, without a server", batch),
    "bench": Command("bench BENCHMARK [flags]", "benchmark a server or a model (serve, latency, throughput)", bench),
    "plan": Command("plan [MODEL] [flags]", "say what a model takes on this machine, and how fast it is", plan),
    "eval-quant": Command("eval-quant [MODEL] TEXTFILE", "compare formats of a model: loss, memory, speed", evaluate),
    "imatrix": Command("imatrix [MODEL] TEXTFILE", "measure a model on a text, for --quantization int4", imatrix),
    "quantize": Command("quantize [MODEL] -o PATH", "write a quantised model", quantize),
    "cache": Command("cache [show|clear] DIR", "show or clear what --kv-cache-dir holds", cache),
    "cluster-key": Command("cluster-key FILE", "make the key that several machines need", cluster_key),
    "completion": Command("completion SHELL", "print a completion script for bash, zsh or fish", completion),
    "collect-env": Command("collect-env", "print environment information for bug reports", collect_env),
}
"""Subcommands by name."""
