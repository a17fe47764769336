"""The command line: ``octavo [serve] [MODEL] [flags]`` and the commands of ``OVERVIEW``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import setproctitle
import yaml

from api import client_cli
from api.config import ENVIRONMENT, ServerConfig, check_config
from api.errors import EngineDeadError, ModelFileError
from api.flags import ConfigError, add_arguments, build
from api.model_files import ModelFiles, find_model, with_model
from api.server import PortInUseError, run_server
from api.version import VERSION
from engine_core.launch import setup_logging

EXIT_USAGE = 2
EXIT_MODEL = 78
"""The model or its configuration is at fault (EX_CONFIG): starting again does not help."""

OVERVIEW = """\
usage: octavo [serve] [MODEL] [flags]     serve a model (the default)
       octavo chat [flags]                talk to a running server
       octavo complete [flags]            let a running server complete texts
       octavo run-batch -i IN -o OUT      answer the requests of an OpenAI batch file, without a server
       octavo bench serve [flags]         measure a running server under load
       octavo collect-env                 print what a bug report needs to say of this machine
       octavo COMMAND --help              all flags of a command
       octavo --version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else ""
    if command in ("-h", "--help"):
        print(OVERVIEW + "\n" + serve_parser().format_help())
        return 0
    if command == "--version":
        print(VERSION)
        return 0
    if command in client_cli.COMMANDS:
        return client_cli.main(command, arguments[1:])
    if command == "bench":
        return bench(arguments[1:])
    if command == "collect-env":
        from api import collect_env

        return collect_env.main(arguments[1:])
    if command == "run-batch":
        return batch(arguments[1:])
    return serve(arguments[1:] if command == "serve" else arguments)


def bench(arguments: Sequence[str]) -> int:
    """``octavo bench``."""
    if arguments and arguments[0] == "serve":
        from api.bench import serve as load

        return load.main(arguments[1:])
    print("usage: octavo bench serve [flags]     measure a running server under load; --help shows the flags")
    return 0 if arguments and arguments[0] in ("-h", "--help") else EXIT_USAGE


def batch(arguments: Sequence[str]) -> int:
    """``octavo run-batch``."""
    from api import run_batch

    parser = model_parser(
        "octavo run-batch", "Answer the requests of a JSONL file in OpenAI's batch format, without a server."
    )
    run_batch.add_arguments(parser)
    given = vars(parser.parse_args(arguments))
    source, target, concurrency = (given.pop(name) for name in ("input_file", "output_file", "max_concurrency"))

    def run(config: ServerConfig, files: ModelFiles) -> int:
        try:
            return run_batch.run_batch(config, files, source, target, concurrency)
        except run_batch.BatchError as error:
            return _fail(str(error), 1)
        except KeyboardInterrupt:
            return _fail("interrupted; what was answered is in the output", 130)

    return _with_model(parser, given, "octavo batch", run)


def serve_parser() -> argparse.ArgumentParser:
    """The flags of ``octavo serve``."""
    return model_parser("octavo serve", "Serve a model over the OpenAI API.")


def model_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A command that loads a model: every option is a flag."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
    )
    parser.add_argument(
        "model_tag", nargs="?", metavar="MODEL", help="Hub id, folder or GGUF file; the same as --model."
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with any of these options by their long names; flags win."
    )
    add_arguments(parser, ServerConfig)
    return parser


def serve(arguments: Sequence[str]) -> int:
    """``octavo serve``."""
    parser = serve_parser()
    return _with_model(parser, vars(parser.parse_args(arguments)), "octavo api", run_server)


def _with_model(
    parser: argparse.ArgumentParser,
    given: Mapping[str, Any],
    title: str,
    run: Callable[[ServerConfig, ModelFiles], int],
) -> int:
    """Resolves the configuration, finds the model and runs; every failure is one line and an exit code."""
    try:
        config = resolve(given, os.environ)
    except ConfigError as error:
        parser.print_usage(sys.stderr)
        return _fail(str(error), EXIT_USAGE)
    setproctitle.setproctitle(title)
    setup_logging("api", config.log_level)
    try:
        files = find_model(config)
        return run(with_model(config, files), files)
    except ModelFileError as error:
        return _fail(str(error), EXIT_MODEL)
    except EngineDeadError as error:
        return _fail(str(error), error.exit_code)
    except PortInUseError as error:
        return _fail(str(error), 1)


def _fail(message: str, code: int) -> int:
    print(f"octavo: {message}", file=sys.stderr)
    return code


def resolve(given: Mapping[str, Any], environment: Mapping[str, str]) -> ServerConfig:
    """One configuration from flags, a YAML file and the environment, in this order of precedence.

    Args:
        given: The flags that were given, by option name; ``model_tag`` and ``config`` are not options.
        environment: ``os.environ``.

    Raises:
        ConfigError: A value is bad, or two contradict each other.
    """
    flags = dict(given)
    tag = flags.pop("model_tag", None)
    if tag is not None and flags.setdefault("model", tag) != tag:
        raise ConfigError(f"two models are named: {tag} and --model {flags['model']}")
    from_environment = {
        name: value
        for name, variables in ENVIRONMENT.items()
        if (value := next((environment[variable] for variable in variables if environment.get(variable)), None))
    }
    if "api_key" in from_environment:
        from_environment["api_key"] = [from_environment["api_key"]]  # type: ignore[assignment]
    if "log_level" in from_environment:
        from_environment["log_level"] = from_environment["log_level"].lower()
    file = flags.pop("config", None) or from_environment.pop("config", None)
    from_file = {} if file is None else read_config_file(Path(file))
    config: ServerConfig = build(ServerConfig, {**from_environment, **from_file, **flags})
    check_config(config)
    return config


def read_config_file(path: Path) -> dict[str, Any]:
    """Options of a YAML file; keys are the long flags without their dashes.

    Raises:
        ConfigError: It cannot be read or is not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: a mapping of options is expected, got {type(content).__name__}")
    return {str(key).replace("-", "_"): value for key, value in content.items()}
