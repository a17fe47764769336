#!/usr/bin/env python
"""Writes the tables of docs/quantization.md and README.md: loss, speed and memory of a model in many formats.

    python scripts/eval_formats.py gsm8k_test.jsonl --model SmolLM2=smollm2.gguf --model "Gemma 3"=gemma-Q4_K_M.gguf \\
        --embeddings all-MiniLM-L6-v2 --llama-quantize llama.cpp/build/bin/llama-quantize --speeds --write

Of each model, given as a GGUF file, the channels are permuted first (``permute_channels.py``): weights that come from 4
bits lie on their grid, which a quantiser would find again. All formats are made of that model. ``octavo eval-quant``
compares them with it, some at a time, each time beside the model itself; what is done is kept in --folder, and not done
again. ``--llama-quantize`` names llama.cpp's tool, which writes types that ``octavo quantize`` does not (Q4_K_M).
Losses do not depend on what else the machine does, speeds do: ``--speeds`` measures them when the losses are known, one
format right after the other, in some rounds, and takes the median of each.

*Nearest, all in 4 bits* is rounding to the nearest with tables and logits in 4 bits as well (GGUF's Q4_1): what
``--quantization int4`` is measured against.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from processes import ROOT

sys.path.insert(0, str(ROOT))

import numpy as np
from permute_channels import permute_gguf

from api.commands.eval_quant import read_texts
from api.commands.quantize import write_gguf

AT_LOAD = ("int8@float", "int8@int8", "fp8", "int4@float", "int4@int8")
FILES = ("Q8_0", "Q4_1", "Q4_0")
OTHER_FILES = ("Q6_K", "Q4_K_M")
"""Those that need llama.cpp's tool."""
REFERENCE = "bf16"
INT4 = ("int4@float", "int4@int8")
NEAREST = "nearest"
CACHES = ("bf16+int8", "bf16+fp8", "bf16+int4")
COLUMNS = ("MB", "NLL", "KL", "tokens/s")
"""The last with ``--speeds``."""
AT_ONCE = 5
"""Formats beside the reference in one run."""
SPEED_TOKENS = 128
"""Of the text, where only speeds are wanted."""
SPEED_ROUNDS = 3
TARGET = ROOT / "docs" / "quantization.md"
README = ROOT / "README.md"
README_ROWS = ("int8@int8", "Q8_0", "int4@int8", "Q4_K_M")
"""Beside the reference."""
START = "<!-- scripts/eval_formats.py writes this table -->\n"
END = "<!-- end of the table -->\n"
TEXTS = 200
"""Texts of which embeddings are compared."""


def octavo(*arguments: str) -> None:
    """Runs a command, which prints its own errors."""
    subprocess.run([sys.executable, "-m", "api", *arguments], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)


class Model:
    """A permuted model and its files."""

    def __init__(self, source: Path, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder / source.stem
        self.folder.mkdir(parents=True, exist_ok=True)
        self.options = options
        self.file = self.folder / "BF16.gguf"
        if not self.file.exists():
            unfinished = self.file.with_suffix(".part")
            permute_gguf(source, unfinished)
            unfinished.rename(self.file)

    def format_of(self, row: str) -> str:
        """A row of the table as a format of ``octavo eval-quant``; its file is written."""
        if row not in (*FILES, *OTHER_FILES, NEAREST):
            return row
        target = self.folder / f"{row}.gguf"
        if target.exists():
            pass
        elif row in OTHER_FILES:
            subprocess.run([self.options.llama_quantize, self.file, target, row], check=True, stdout=subprocess.DEVNULL)
        elif row == NEAREST:
            write_gguf(self.file, target, "Q4_1", tables="Q4_1")
        else:
            write_gguf(self.file, target, row)
        return str(target)

    def results(self, rows: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The results of ``octavo eval-quant`` by row, bf16 first; a row that cannot run has none."""
        found = self._measured(rows, self.options.max_tokens)
        rounds = SPEED_ROUNDS if self.options.speeds else 0
        speeds = [self._measured(rows, SPEED_TOKENS, len(rows), f"speed{number}") for number in range(rounds)]
        for row in found if speeds else ():
            found[row]["tokens_per_second"] = statistics.median(each[row]["tokens_per_second"] for each in speeds)
        return found

    def _measured(
        self, rows: Sequence[str], max_tokens: int, at_once: int = AT_ONCE, title: str = ""
    ) -> dict[str, dict[str, Any]]:
        """Results by row. ``title``: of those that are kept, in place of the rows."""
        found: dict[str, dict[str, Any]] = {}
        for first in range(0, len(rows), at_once):
            some = rows[first : first + at_once]
            formats = [self.format_of(row) for row in ("bf16", *some)]
            kept = self.folder / f"{max_tokens}_{title or '_'.join(some).replace('/', '-')}.json"
            if not kept.exists():
                arguments = ["--max-tokens", str(max_tokens), "--formats", ",".join(formats)]
                octavo("eval-quant", str(self.file), self.options.text, *arguments, "--json", str(kept))
            results = {each["name"]: each for each in json.loads(kept.read_text())["results"]}
            for row, name in zip(("bf16", *some), formats, strict=True):
                if name in results:
                    found.setdefault(row, results[name])
        return found


def cells(result: dict[str, Any] | None, row: str, columns: Sequence[str]) -> str:
    """What the table says of a format."""
    if result is None:
        return "refused" + " | " * (len(columns) - 1)
    found = {
        "MB": f"{result['weight_bytes'] / 1e6:.0f}",
        "NLL": "" if row == REFERENCE else f"{result['change']:+.2%}",
        "KL": "" if row == REFERENCE else f"{result['kl']:.4f}",
        "tokens/s": f"{result['tokens_per_second']:.0f}",
    }
    return " | ".join(found[column] for column in columns)


def table(
    names: Sequence[str], results: Sequence[dict[str, dict[str, Any]]], rows: Sequence[str], columns: Sequence[str]
) -> list[str]:
    """The lines of a table in Markdown, and what follows from it."""
    count = len(columns)
    lines = [
        "| | " + " | ".join(name + " | " * (count - 1) for name in names) + "|",
        "|---" * (1 + count * len(names)) + "|",
        "| | " + " | ".join(" | ".join(columns) for _ in names) + " |",
    ]
    for row in (REFERENCE, *rows):
        lines += [f"| `{row}` | " + " | ".join(cells(each.get(row), row, columns) for each in results) + " |"]
    for name, each in zip(names, results, strict=True):
        if NEAREST in rows and NEAREST in each:
            shares = [f"`{row}` {each[row]['kl'] / each[NEAREST]['kl']:.0%}" for row in INT4 if row in each]
            lines += ["", f"{name}, share of the divergence of `{NEAREST}` that is left: {', '.join(shares)}."]
    return [" ".join(line.split()) for line in lines]


def embeddings(model: str, texts: Sequence[str]) -> str:
    """How far quantised weights turn the vectors of an embedding model."""
    from api import LLM, PoolingParams

    def vectors(**values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
        with LLM(model=model, runner="pooling", **values) as llm:
            found = llm.embed(list(texts), use_tqdm=False, pooling_params=PoolingParams(truncate_prompt_tokens=-1))
        result = np.array([each.outputs.embedding for each in found])
        result /= np.linalg.norm(result, axis=1, keepdims=True)
        return result

    exact = vectors(dtype="float32")
    found = []
    for name in ("int8", "fp8", "int4"):
        cosines = (exact * vectors(quantization=name)).sum(axis=1)
        found.append(f"`{name}` {cosines.mean():.4f} ({cosines.min():.4f})")
    return f"{Path(model).name}, mean (least) cosine between vectors and those of float32: {', '.join(found)}."


def with_table(page: str, lines: Sequence[str]) -> str:
    """The page with other lines between the marks."""
    before, _, rest = page.partition(START)
    return before + START + "".join(f"{line}\n" for line in lines) + END + rest.partition(END)[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("text", help="as of octavo eval-quant")
    add("--model", action="append", default=[], metavar="NAME=FILE.gguf")
    add("--embeddings", metavar="FOLDER", help="an embedding model")
    add("--llama-quantize", metavar="FILE", help="adds " + ", ".join(OTHER_FILES))
    add("--rows", nargs="+", help="formats instead of all of the table's")
    add("--max-tokens", type=int, default=8192)
    add("--folder", type=Path, default=Path(tempfile.gettempdir()) / "octavo-formats")
    add("--speeds", action="store_true", help="measure speeds, on a machine that does nothing else")
    add("--write", action="store_true", help=f"into {TARGET.relative_to(ROOT)} and {README.name}")
    options = parser.parse_args()
    rows = options.rows or [*AT_LOAD, *FILES, *(OTHER_FILES if options.llama_quantize else ()), NEAREST, *CACHES]
    pairs = [each.partition("=") for each in options.model]
    results = [Model(Path(file), options.folder.absolute(), options).results(rows) for _, _, file in pairs]
    columns = COLUMNS if options.speeds else COLUMNS[:-1]
    lines = table([name for name, _, _ in pairs], results, rows, columns) if results else []
    if options.embeddings:
        kept = options.folder / f"{Path(options.embeddings).name}.txt"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(embeddings(options.embeddings, read_texts(options.text)[:TEXTS]))
        lines += ["", kept.read_text()]
    print("\n".join(lines))
    if options.write:
        TARGET.write_text(with_table(TARGET.read_text(), lines))
        short = [row for row in README_ROWS if row in rows]
        lines = table([name for name, _, _ in pairs], results, short, [each for each in columns if each != "KL"])
        README.write_text(with_table(README.read_text(), lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
