"""``octavo eval-quant``: how well and how fast a model runs in several formats, one engine after another."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, Protocol

from tqdm import tqdm

from api.commands.bench.offline import write_json
from api.errors import EngineDeadError, ModelFileError
from api.flags import ConfigError
from api.model.tokenizer import Tokenizer
from api.params.sampling import SamplingParams
from engine_core.config import KV_CACHE_DTYPES

DESCRIPTION = (
    "Compare formats of a model: the likelihood of a text file, the memory of the weights and the speed of one stream."
)
DTYPES = {
    **dict.fromkeys(("bf16", "bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "float16", "half"), "float16"),
    **dict.fromkeys(("fp32", "float32", "float"), "float32"),
}
"""Formats of weights that are not quantised."""
AUTO = "auto"
"""The format of the model's files."""
USES_IMATRIX = ("int4",)
TOP = 64
"""Tokens at each position of which the probabilities are compared."""
WINDOWS_AT_ONCE = 16
RUNS = 3
"""Streams that are timed."""
PROMPT_LEN, OUTPUT_LEN = 64, 128


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to compare. Lengths are in tokens."""

    text_file: str
    formats: str = "bf16,int8,int4"
    max_tokens: int = 8192
    """Of the text; 0: all."""
    window: int = 1024
    """Longest piece of a text that the model sees at once."""
    json: str | None = None
    plot: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field of ``Settings``."""
    parser.add_argument(
        "text_file",
        metavar="TEXTFILE",
        help="Text, or JSONL with a text, or a question and an answer, in each line.",
    )
    add = parser.add_argument_group("Evaluation").add_argument
    add("--formats", metavar="LIST", default=Settings.formats,
        help="Comma-separated: bf16, fp16, fp32, a value of --quantization, auto (as in the model's files) or another "
        "model. int8@float sets --quantized-activations, too, and bf16+int8 --kv-cache-dtype. The first is what the "
        "others are compared with (default: bf16,int8,int4).")  # fmt: skip
    add("--max-tokens", type=int, metavar="N", default=Settings.max_tokens,
        help="Tokens of the text to use, 0 for all (default: 8192).")  # fmt: skip
    add("--window", type=int, metavar="N", default=Settings.window,
        help="Longest piece of a text that the model sees at once (default: 1024).")  # fmt: skip
    add("--json", metavar="FILE", help="Write the results to this file.")
    add("--plot", metavar="FILE.png", help="Plot the results (needs matplotlib).")


class Engine(Protocol):
    """The part of ``LLM`` that is needed."""

    @property
    def weight_bytes(self) -> int: ...

    def get_tokenizer(self) -> Tokenizer: ...

    def generate(
        self, prompts: Sequence[Any], sampling_params: SamplingParams, *, use_tqdm: bool = True
    ) -> Sequence[Any]: ...


MakeEngine = Callable[[Mapping[str, Any]], AbstractContextManager[Engine]]
"""Starts an engine with these options."""

Position = Mapping[int, float]
"""Log probabilities of a position's own token and of the most likely ones, by token id."""


@dataclass(frozen=True)
class Result:
    """The figures of a format."""

    name: str
    weight_bytes: int
    tokens_per_second: float
    """Of one stream, after its prompt."""
    num_tokens: int
    """Tokens whose likelihood was measured."""
    nll: float
    """Mean negative log-likelihood of a token, in nats."""
    perplexity: float
    change: float
    """Of ``nll`` against the first format, as a share of it."""
    change_error: float
    """Standard error of ``change``."""
    kl: float
    """Kullback-Leibler divergence from the first format, in nats per token: of the probabilities of the tokens that
    both hold among the ``TOP`` most likely, and of the rest together. Never above that of all tokens."""
    same_top: float
    """Share of positions with the same most likely token as in the first format."""


def row_options(row: str) -> dict[str, Any]:
    """The options of a format of ``--formats``.

    Raises:
        ConfigError: The name is empty.
    """
    options: dict[str, Any] = {}
    whole, _, cache = row.rpartition("+")
    if cache in KV_CACHE_DTYPES and whole:
        row, options["kv_cache_dtype"] = whole, cache
    name, _, activations = row.partition("@")
    if activations:
        options["quantized_activations"] = activations
    if not name:
        raise ConfigError("--formats: a name is empty")
    if name in DTYPES:
        return {"dtype": DTYPES[name], "quantization": "none", **options}
    if "/" in name or name.endswith(".gguf") or Path(name).exists():
        return {"model": name, **options}
    return options if name == AUTO else {"quantization": name, **options}


def engine_options(base: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a format's engine: without drafts unless they are asked for, as speeds are those of the format."""
    values = {**base, "max_logprobs": TOP, "enable_prefix_caching": False, **row}
    values["speculative_config"] = base.get("speculative_config") or {"method": "none"}
    if values.get("quantization") not in USES_IMATRIX:
        values.pop("imatrix", None)
    return values


def read_texts(file: str) -> list[str]:
    """The texts of a file: all of it, or one for each line of JSONL.

    Raises:
        ConfigError: The file cannot be read, or has no text.
    """
    try:
        content = Path(file).read_text(encoding="utf-8")
        texts = list(_lines(content)) if file.endswith(".jsonl") else [content]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from None
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ConfigError(f"{file}: there is no text")
    return texts


def _lines(content: str) -> Iterator[str]:
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        fields = json.loads(line)
        for names in (("text",), ("question", "answer"), ("prompt", "completion")):
            if isinstance(fields, dict) and all(isinstance(fields.get(name), str) for name in names):
                yield "\n".join(fields[name] for name in names)
                break
        else:
            raise ValueError(f"line {number}: expected text, or question and answer, or prompt and completion")


def windows(texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int, window: int) -> list[list[int]]:
    """Token ids of pieces of the texts, each with the tokens that the tokenizer puts before a text."""
    num_before, _ = tokenizer.added_around(True)
    before = tokenizer.encode(texts[0])[:num_before]
    room = max(1, window - len(before))
    left = max_tokens or sys.maxsize
    pieces = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)[:left]
        left -= len(ids)
        pieces += [[*before, *ids[first : first + room]] for first in range(0, len(ids), room)]
    return [piece for piece in pieces if len(piece) > 1]


def positions(engine: Engine, pieces: Sequence[Sequence[int]], name: str) -> Iterator[tuple[int, Position]]:
    """Each token after the first of each piece, with the log probabilities at its position."""
    params = SamplingParams(prompt_logprobs=TOP, max_tokens=1, temperature=0.0, detokenize=False)
    with tqdm(total=sum(map(len, pieces)), desc=name, unit=" tokens", leave=False) as bar:
        for first in range(0, len(pieces), WINDOWS_AT_ONCE):
            batch = [{"prompt_token_ids": list(piece)} for piece in pieces[first : first + WINDOWS_AT_ONCE]]
            for output in engine.generate(batch, params, use_tqdm=False):
                entries = output.prompt_logprobs or [None]
                for token, entry in zip(output.prompt_token_ids[1:], entries[1:], strict=True):
                    yield token, {other: value.logprob for other, value in entry.items()}
                bar.update(len(output.prompt_token_ids))


def divergence(reference: Position, other: Position) -> float:
    """See ``Result.kl``."""
    total, rest, other_rest = 0.0, 1.0, 1.0
    for token in reference.keys() & other.keys():
        share = math.exp(reference[token])
        total += share * (reference[token] - other[token])
        rest, other_rest = rest - share, other_rest - math.exp(other[token])
    rest, other_rest = max(rest, 1e-9), max(other_rest, 1e-9)
    return max(0.0, total + rest * math.log(rest / other_rest))


def decode_speed(engine: Engine, prompt: Sequence[int]) -> float:
    """Tokens a second of one stream, after its prompt."""
    params = SamplingParams(max_tokens=OUTPUT_LEN, temperature=0.0, ignore_eos=True, detokenize=False)
    speeds = []
    for _ in range(RUNS):
        (output,) = engine.generate([{"prompt_token_ids": list(prompt)}], params, use_tqdm=False)
        seconds = output.metrics.last_token_ts - output.metrics.first_token_ts
        speeds.append((output.metrics.num_generation_tokens - 1) / max(seconds, 1e-9))
    return float(median(speeds))


class Comparison:
    """Measures formats; the first is the reference of the others."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.texts = read_texts(settings.text_file)
        self.results: list[Result] = []
        self._pieces: list[list[int]] = []
        self._vocab_size = 0
        self._reference: list[tuple[int, Position]] = []

    def measure(self, name: str, engine: Engine) -> Result:
        """The figures of the format that an engine runs.

        Raises:
            ConfigError: It has another vocabulary than the first.
        """
        tokenizer = engine.get_tokenizer()
        if not self._reference:
            self._pieces = windows(self.texts, tokenizer, self.settings.max_tokens, self.settings.window)
            if not self._pieces:
                raise ConfigError(f"{self.settings.text_file}: at least two tokens are needed to measure a likelihood")
            self._vocab_size = tokenizer.vocab_size
        elif tokenizer.vocab_size != self._vocab_size:
            raise ConfigError(
                f"--formats: {name} has {tokenizer.vocab_size} tokens, and the first format {self._vocab_size}; "
                "compare formats of one model"
            )
        speed = decode_speed(engine, self._pieces[0][:PROMPT_LEN])
        found = positions(engine, self._pieces, name)
        if not self._reference:
            self._reference = list(found)
            found = iter(self._reference)
        differences, divergences, same, losses = [], [], 0, []
        for (_, expected), (token, position) in zip(self._reference, found, strict=True):
            losses.append(-position[token])
            differences.append(expected[token] - position[token])
            divergences.append(divergence(expected, position))
            same += max(expected, key=expected.__getitem__) == max(position, key=position.__getitem__)
        count, nll = len(losses), fmean(losses)
        base = nll - fmean(differences)
        error = stdev(differences) / math.sqrt(count) if count > 1 else 0.0
        result = Result(
            name, engine.weight_bytes, speed, count, nll, math.exp(nll), (nll - base) / base, error / base,
            fmean(divergences), same / count,
        )  # fmt: skip
        self.results.append(result)
        return result


HEADER = (
    f"{'format':24} {'weights':>10} {'tokens/s':>9} {'perplexity':>10} {'nll':>8} {'change':>16} {'KL':>8} {'top':>7}"
)


def line(result: Result) -> str:
    """A row of the table."""
    name = result.name if len(result.name) <= 24 else f"...{result.name[-21:]}"
    change = f"{result.change:+.2%} ± {result.change_error:.2%}"
    return (
        f"{name:24} {result.weight_bytes / 1e6:7.1f} MB {result.tokens_per_second:9.1f} {result.perplexity:10.4f} "
        f"{result.nll:8.4f} {change:>16} {result.kl:8.4f} {result.same_top:7.2%}"
    )


def run(make_engine: MakeEngine, base: Mapping[str, Any], settings: Settings) -> int:
    """Measures, prints and writes the results. A format that cannot run is reported, and the others go on.

    Args:
        make_engine: Starts an engine.
        base: Options of all engines.
        settings: What to compare.

    Returns:
        The exit code.

    Raises:
        ConfigError: A setting is invalid.
    """
    if settings.plot and find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib")
    rows = {name: row_options(name) for name in settings.formats.split(",")}
    comparison = Comparison(settings)
    failed = False
    print(HEADER, flush=True)
    for name, options in rows.items():
        try:
            with make_engine(engine_options(base, options)) as engine:
                print(line(comparison.measure(name, engine)), flush=True)
        except (ConfigError, EngineDeadError, ModelFileError, ValueError) as error:
            print(f"octavo: {name}: {error}", file=sys.stderr)
            failed = True
            if not comparison.results:
                break  # nothing to compare the others with
    if comparison.results:
        report(comparison.results, settings)
    return 1 if failed else 0


def report(results: Sequence[Result], settings: Settings) -> None:
    """Says what the columns mean, and writes the files."""
    first = results[0]
    print(
        f"{first.num_tokens} tokens of {settings.text_file}. nll: nats per token. Against {first.name}: change of nll, "
        "KL (nats per token), share of equal most likely tokens (top). tokens/s: of one stream."
    )
    write_json(settings.json, {"text_file": settings.text_file, "results": [asdict(result) for result in results]})
    if settings.plot:
        plot(results, Path(settings.plot))


def plot(results: Sequence[Result], file: Path) -> None:
    """Loss against memory and against speed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True)
    sides = {
        "weights in MB": [result.weight_bytes / 1e6 for result in results],
        "tokens/s of one stream": [result.tokens_per_second for result in results],
    }
    for axes, (label, values) in zip(panels, sides.items(), strict=True):
        axes.scatter(values, [result.nll for result in results])
        for result, value in zip(results, values, strict=True):
            axes.annotate(
                Path(result.name).name, (value, result.nll), textcoords="offset points", xytext=(5, 5), fontsize=8
            )
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.margins(x=0.2, y=0.1)
    panels[0].set_ylabel("negative log-likelihood, nats per token")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
