"""``octavo imatrix``: how important each column of a model's weights is, for ``--quantization int4``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api.commands.eval_quant import read_texts, windows
from api.config import make_config
from api.flags import ConfigError, Parser
from api.model.files import find_model
from engine_core.launch import child_command, child_environment

DESCRIPTION = "Measure on a text how important each column of a model's weights is, for --quantization int4."


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure. Lengths are in tokens."""

    text_file: str
    output: str
    max_tokens: int = 8192
    """Of the text; 0: all."""
    window: int = 512
    """Longest piece of a text that the model sees at once."""
    dtype: str = "float32"
    """Of the model while it is measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field of ``Settings``."""
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="Hub id, folder or GGUF file.")
    parser.add_argument(
        "text_file",
        metavar="TEXTFILE",
        help="Text, or JSONL with a text, or a question and an answer, in each line.",
    )
    add = parser.add_argument
    add("-o", "--output", metavar="FILE", default="imatrix.safetensors", help="File to write (default: %(default)s).")
    add("--max-tokens", type=int, metavar="N", default=Settings.max_tokens,
        help="Tokens of the text to use, 0 for all (default: 8192).")  # fmt: skip
    add("--window", type=int, metavar="N", default=Settings.window,
        help="Longest piece of a text that the model sees at once (default: 512).")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), default=Settings.dtype,
        help="Of the model while it is measured (default: float32); bfloat16 takes half the memory.")  # fmt: skip


def create_parser() -> Parser:
    parser = Parser("octavo imatrix", DESCRIPTION, usage="[MODEL] TEXTFILE [flags]")
    add_arguments(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Measures and writes the file.

    Raises:
        ConfigError: A setting is invalid, or the model cannot be measured.
        ModelFileError: The model's files are missing or damaged.
    """
    given: Mapping[str, Any] = create_parser().parse(arguments, intermixed=True)
    settings = Settings(**{name: given[name] for name in Settings.__dataclass_fields__})
    config, _ = make_config({"model": given["model_tag"] or ""})
    texts = read_texts(settings.text_file)
    files = find_model(config)
    pieces = windows(texts, files.tokenizer, settings.max_tokens, settings.window)
    target = Path(settings.output).absolute()
    done = subprocess.run(
        child_command("executor.imatrix", str(Path(files.path).absolute()), str(target), settings.dtype),
        env=child_environment(),
        input=json.dumps(pieces),
        stderr=None,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ConfigError(f"{files.name} could not be measured; see above")
    print(f"{target}: use it with --quantization int4 --imatrix {settings.output}", file=sys.stderr)
    return 0
