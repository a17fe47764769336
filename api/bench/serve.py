"""Measures a server that speaks OpenAI's protocol, this one or another: closed loop or Poisson arrivals.

    octavo bench serve --base-url http://127.0.0.1:8000 --max-concurrency 64 --num-prompts 500
    octavo bench serve --request-rate 8 --endpoint chat --prompts gsm8k_test.jsonl --json new.json
    octavo bench serve --prefix-len 512 --num-prefixes 4 --compare old.json --label "prefix cache"

What is measured: TTFT (time to first token), ITL (inter-token latency: the time between two events that carry
tokens), TPOT (time per output token after the first) and E2E (until the last byte). In the open loop a request's clock
starts when it is due, sent or not, so that neither a slow generator nor a bound on concurrency hides waiting.

Tokens are counted by the server's own usage report at the end of each stream, or by events where there is none.
Prompts are text of short common words; how many tokens a word takes is asked of the server first, by two small
requests, so no tokenizer is needed here. ``--token-ids`` sends random ids instead.

The HTTP client (``sse_client.py``) is written for this purpose: an event costs it a few microseconds, so one core takes
tens of thousands of events a second; with uvloop, if it is there, it costs less.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from api.bench.sse_client import MAX_ERROR_TEXT, EventStream, HttpClient, shorten

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment]

T = TypeVar("T")

_COMMON_WORDS = (
    "the of and to in is was he for it with as his on be at by had not are but from or have an they which one you "
    "were her all she there would their we him been has when who will more no if out so said what up its about into "
    "than them can only other new some could time these two may then do first any my now such like our over man me "
    "even most made after also did many before must through back years where much your way well down should because "
    "each just those people how too little state good very make world still own see men work long get here between "
    "both life being under never day same another know while last might us great old year off come since against go "
    "came right used take three"
)
WORDS = _COMMON_WORDS.split()
"""Words that most vocabularies hold as one token each."""

PROBE_WORDS = (12, 84)
"""Lengths of the two requests from which the tokens per word are taken."""

# -- prompts ---------------------------------------------------------------------------------------------------


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
    input_len: int = 128
    output_len: int = 128
    range_ratio: float = 0.0
    """Lengths are drawn evenly between (1 - r) and (1 + r) times the given ones."""
    prefix_len: int = 0
    """Tokens at the start that prompts share, beside ``input_len``."""
    num_prefixes: int = 1
    prompts: str = ""
    """A JSONL file with a ``question``, ``prompt``, ``text`` or ``messages`` on each line."""
    token_ids: bool = False
    vocab_size: int = 32000
    ignore_eos: bool = True
    temperature: float = 0.0
    extra_body: dict[str, Any] = field(default_factory=dict)
    warmup: int = 8
    """Requests before the clock starts, with prompts of their own."""
    seed: int = 0
    timeout: float = 600.0
    keep_text: bool = False
    label: str = ""


@dataclass(frozen=True)
class TextLength:
    """How many tokens a text of words takes: ``offset + words * per_word``."""

    per_word: float = 1.0
    offset: float = 0.0

    def words_for(self, num_tokens: float, *, is_start: bool = True) -> int:
        return max(0, round((num_tokens - (self.offset if is_start else 0)) / self.per_word))


class Workload:
    """Makes the requests of a run: the same ones for the same seed."""

    def __init__(self, options: Options, model: str, length: TextLength, seed: int) -> None:
        self._options = options
        self._model = model
        self._length = length
        self._random = random.Random(seed)
        prefixes = random.Random(options.seed)  # those of the measured run, also while warming up
        self._prefixes = [self._make_prefix(prefixes) for _ in range(max(1, options.num_prefixes))]
        self._lines = [json.loads(line) for line in _lines(options.prompts)] if options.prompts else []

    def bodies(self, count: int) -> Iterator[dict[str, Any]]:
        """Request bodies."""
        for index in range(count):
            yield self.body(self._prompt(index), self._vary(self._options.output_len))

    def body(self, prompt: Any, max_tokens: int, *, stream: bool = True) -> dict[str, Any]:
        """A request body: ``prompt`` is text, token ids or chat messages."""
        options = self._options
        body: dict[str, Any] = {"model": self._model, "max_tokens": max_tokens, "temperature": options.temperature}
        if options.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        else:
            body["prompt"] = prompt
        if options.ignore_eos:
            body["ignore_eos"] = True
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body | options.extra_body

    def _vary(self, length: int) -> int:
        ratio = self._options.range_ratio
        return max(1, round(length * self._random.uniform(1 - ratio, 1 + ratio))) if ratio else length

    def _prompt(self, index: int) -> Any:
        options = self._options
        if self._lines:
            return prompt_of(self._lines[index % len(self._lines)])
        prefix = self._random.choice(self._prefixes) if options.num_prefixes > 1 else self._prefixes[0]
        count = self._vary(options.input_len)
        if options.token_ids:
            return prefix + self._ids(self._random, count)
        is_start = not prefix
        return " ".join(prefix + self._words(self._random, self._length.words_for(count, is_start=is_start)))

    def _make_prefix(self, source: random.Random) -> list[Any]:
        count = self._options.prefix_len
        if not count:
            return []
        if self._options.token_ids:
            return self._ids(source, count)
        return self._words(source, self._length.words_for(count))

    def _ids(self, source: random.Random, count: int) -> list[Any]:
        low = min(256, self._options.vocab_size - 1)  # the lowest are special tokens in many vocabularies
        return [source.randrange(low, self._options.vocab_size) for _ in range(count)]

    def _words(self, source: random.Random, count: int) -> list[Any]:
        return source.choices(WORDS, k=max(1, count))


def _lines(path: str) -> list[str]:
    return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def prompt_of(line: dict[str, Any]) -> Any:
    """The prompt on a line of a JSONL file.

    Raises:
        ValueError: None of the known keys is there.
    """
    for key in ("question", "prompt", "text", "messages"):
        if key in line:
            return line[key]
    raise ValueError(f"a line has none of question, prompt, text, messages: {str(line)[:80]}")


async def measure_text_length(client: HttpClient, options: Options, model: str) -> TextLength:
    """Asks the server how many tokens words take."""
    workload = Workload(options, model, TextLength(), options.seed)
    counts: list[int] = []
    for num_words in PROBE_WORDS:
        words = (WORDS * (num_words // len(WORDS) + 1))[:num_words]
        body = workload.body(" ".join(words), 1, stream=False)
        answer = await client.call("POST", _path(options), body)
        counts.append((answer.get("usage") or {}).get("prompt_tokens", 0))
    per_word = (counts[1] - counts[0]) / (PROBE_WORDS[1] - PROBE_WORDS[0])
    if per_word <= 0:
        print("the server does not say how long prompts are; counting a token per word", file=sys.stderr)
        return TextLength()
    return TextLength(per_word, max(0.0, counts[0] - per_word * PROBE_WORDS[0]))


def _path(options: Options) -> str:
    return "/v1/chat/completions" if options.endpoint == "chat" else "/v1/completions"


# -- the run ---------------------------------------------------------------------------------------------------


@dataclass
class RequestResult:
    """One request. Times in seconds, ``start`` from the start of the run."""

    start: float
    e2e: float = 0.0
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_events: int = 0
    error: str = ""
    text: str = ""

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first."""
        if self.num_output_tokens < 2 or self.num_events < 2:
            return None
        return sum(self.itls) / (self.num_output_tokens - 1)


@dataclass
class Result:
    """A run: its requests in the order in which they were sent, and what it took."""

    options: Options
    model: str
    requests: list[RequestResult]
    duration: float
    """Seconds from the first request to the end of the last."""
    cpu_seconds: float
    """Processor time of this process meanwhile."""
    peak_concurrency: int

    def summary(self) -> dict[str, Any]:
        """All figures: counts, rates per second, and distributions in milliseconds."""
        good = [request for request in self.requests if not request.error]
        num_prompt_tokens = sum(request.num_prompt_tokens for request in good)
        num_output_tokens = sum(request.num_output_tokens for request in good)
        num_events = sum(request.num_events for request in good)
        tpots = [tpot for request in good if (tpot := request.tpot) is not None]
        seconds = max(self.duration, 1e-9)
        return {
            "completed": len(good),
            "failed": len(self.requests) - len(good),
            "duration_s": self.duration,
            "peak_concurrency": self.peak_concurrency,
            "requests_per_s": len(good) / seconds,
            "output_tokens_per_s": num_output_tokens / seconds,
            "total_tokens_per_s": (num_prompt_tokens + num_output_tokens) / seconds,
            "prompt_tokens": num_prompt_tokens,
            "cached_tokens": sum(request.num_cached_tokens for request in good),
            "output_tokens": num_output_tokens,
            "events": num_events,
            "tokens_per_event": num_output_tokens / num_events if num_events else 0.0,
            "mean_prompt_tokens": num_prompt_tokens / len(good) if good else 0.0,
            "ttft_ms": describe([request.ttft * 1e3 for request in good if request.num_events]),
            "itl_ms": describe([itl * 1e3 for request in good for itl in request.itls]),
            "tpot_ms": describe([tpot * 1e3 for tpot in tpots]),
            "e2e_ms": describe([request.e2e * 1e3 for request in good]),
            "generator_cpu_share": self.cpu_seconds / seconds,
            "generator_us_per_event": self.cpu_seconds * 1e6 / num_events if num_events else 0.0,
        }

    def errors(self) -> dict[str, int]:
        """Failures and how often each happened."""
        return dict(Counter(request.error for request in self.requests if request.error).most_common())

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file; the API key is left out."""
        options = {key: value for key, value in asdict(self.options).items() if key != "api_key"}
        if math.isinf(self.options.request_rate):
            options["request_rate"] = None
        return {
            "label": self.options.label,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "model": self.model,
            "options": options,
            "summary": self.summary(),
            "errors": self.errors(),
        }


class Generator:
    """Sends requests and notes what comes back."""

    def __init__(self, client: HttpClient, options: Options) -> None:
        self._client = client
        self._options = options
        self._origin = time.perf_counter()
        self._num_open = 0
        self.peak_concurrency = 0
        self.results: list[RequestResult] = []

    async def run(self, requests: Sequence[bytes], request_rate: float) -> float:
        """Sends encoded requests, in a closed loop if the rate is infinite. Returns the seconds it took."""
        self._origin = time.perf_counter()
        if math.isinf(request_rate):
            pending = iter(requests)
            workers = min(self._options.max_concurrency or 32, len(requests))
            await asyncio.gather(*(self._work(pending) for _ in range(workers)))
        else:
            await self._send_by_clock(requests, request_rate)
        return time.perf_counter() - self._origin

    async def _work(self, pending: Iterator[bytes]) -> None:
        for data in pending:
            await self._send(data, time.perf_counter())

    async def _send_by_clock(self, requests: Sequence[bytes], request_rate: float) -> None:
        gaps = random.Random(self._options.seed)
        bound = self._options.max_concurrency
        places = asyncio.Semaphore(bound) if bound else contextlib.nullcontext()

        async def send(data: bytes, due: float) -> None:
            async with places:
                await self._send(data, due)

        due = self._origin
        tasks = []
        for data in requests:
            due += gaps.expovariate(request_rate)
            delay = due - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            tasks.append(asyncio.create_task(send(data, due)))
        await asyncio.gather(*tasks)

    async def _send(self, data: bytes, begin: float) -> None:
        result = RequestResult(start=begin - self._origin)
        self.results.append(result)
        stream = EventStream(keep_events=self._options.keep_text)
        self._num_open += 1
        self.peak_concurrency = max(self.peak_concurrency, self._num_open)
        try:
            response = await self._client.send(data, stream.feed)
            result.e2e = time.perf_counter() - begin
            if response.status == 200:
                stream.finish()
                result.error = stream.error
            else:
                result.error = f"status {response.status}: {shorten(response.body)}"
        except (OSError, ValueError) as error:
            result.error = f"{type(error).__name__}: {error}"[:MAX_ERROR_TEXT]
        finally:
            self._num_open -= 1
        times = stream.times
        if times:
            result.ttft = times[0] - begin
            result.itls = [after - before for before, after in zip(times, times[1:], strict=False)]
        usage = stream.usage
        result.num_events = len(times)
        result.num_output_tokens = usage.get("completion_tokens") or len(times)
        result.num_prompt_tokens = usage.get("prompt_tokens") or 0
        result.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if self._options.keep_text:
            result.text = stream.text()


async def run(options: Options) -> Result:
    """Warms the server up, then measures.

    Raises:
        OSError: The server cannot be reached or refused a request before the clock started.
    """
    client = HttpClient(options.base_url, options.api_key, options.timeout)
    try:
        model = options.model or (await client.call("GET", "/v1/models"))["data"][0]["id"]
        needs_length = not options.token_ids and not options.prompts
        length = await measure_text_length(client, options, model) if needs_length else TextLength()
        path = _path(options)

        def encode(seed: int, count: int) -> list[bytes]:
            workload = Workload(options, model, length, seed)
            return [client.encode("POST", path, body) for body in workload.bodies(count)]

        if options.warmup:
            warmup = Generator(client, options)
            await warmup.run(encode(options.seed + 1_000_003, options.warmup), math.inf)
            if all(result.error for result in warmup.results):
                raise OSError(f"no request succeeded while warming up: {warmup.results[0].error}")
        requests = encode(options.seed, options.num_prompts)
        generator = Generator(client, options)
        cpu = time.process_time()
        duration = await generator.run(requests, options.request_rate)
        cpu = time.process_time() - cpu
    finally:
        client.close()
    return Result(options, model, generator.results, duration, cpu, generator.peak_concurrency)


# -- figures ---------------------------------------------------------------------------------------------------


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value below which that share of sorted values lies, interpolated between neighbours."""
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def describe(values: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles and maximum; empty for no values."""
    if not values:
        return {}
    ordered = sorted(values)
    figures = {"mean": math.fsum(ordered) / len(ordered), "median": percentile(ordered, 50)}
    figures |= {f"p{percent}": percentile(ordered, percent) for percent in (90, 95, 99)}
    return figures | {"max": ordered[-1]}


def flatten(figures: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested figures as one table: ``{"ttft_ms": {"p99": 3}}`` becomes ``{"ttft_ms.p99": 3}``."""
    flat: dict[str, float] = {}
    for key, value in figures.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix + key] = value
    return flat


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """Figures that both runs have and that are not 0 in both: name, old, new, new divided by old (NaN if that is 0)."""
    before, after = flatten(old), flatten(new)
    return [
        (key, before[key], after[key], after[key] / before[key] if before[key] else math.nan)
        for key in after
        if key in before and (before[key] or after[key])
    ]


def format_comparison(rows: Sequence[tuple[str, float, float, float]], old_name: str, new_name: str) -> str:
    """The table that ``compare`` makes, as text."""
    lines = [f"{'':28} {old_name[:14]:>14} {new_name[:14]:>14}    ratio"]
    lines += [f"{key:28} {before:14.6g} {after:14.6g} {ratio:8.3f}" for key, before, after, ratio in rows]
    return "\n".join(lines)


def format_distributions(named: dict[str, dict[str, float]]) -> str:
    """Distributions as a table, one a line."""
    columns = ("mean", "median", "p90", "p95", "p99", "max")
    lines = [f"{'':22}" + "".join(f"{column:>10}" for column in columns)]
    for name, figures in named.items():
        cells = "".join(f"{figures[column]:10.3f}" if figures else f"{'-':>10}" for column in columns)
        lines.append(f"{name:22}{cells}")
    return "\n".join(lines)


def format_report(result: Result) -> str:
    """What a person wants to know of a run."""
    figures = result.summary()
    lines = [
        f"{result.options.label or result.model}: {figures['completed']} requests in {figures['duration_s']:.2f} s, "
        f"{figures['failed']} failed, at most {figures['peak_concurrency']} at once",
        f"requests/s {figures['requests_per_s']:.2f}   output tokens/s {figures['output_tokens_per_s']:.1f}   "
        f"total tokens/s {figures['total_tokens_per_s']:.1f}",
        f"prompt tokens {figures['prompt_tokens']} (mean {figures['mean_prompt_tokens']:.1f}, "
        f"{figures['cached_tokens']} cached)   output tokens {figures['output_tokens']} in {figures['events']} events "
        f"({figures['tokens_per_event']:.3f} per event)",
        format_distributions(
            {
                "TTFT (ms)": figures["ttft_ms"],
                "ITL (ms)": figures["itl_ms"],
                "TPOT (ms)": figures["tpot_ms"],
                "E2E (ms)": figures["e2e_ms"],
            }
        ),
        f"generator: {figures['generator_cpu_share']:.0%} of a core, "
        f"{figures['generator_us_per_event']:.1f} us per event",
    ]
    if figures["generator_cpu_share"] > 0.8:
        lines.append("the generator itself was busy most of the time: the server may be faster than this shows")
    lines += [f"failed {count} times: {error}" for error, count in result.errors().items()]
    return "\n".join(lines)


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on uvloop where that is installed."""
    return asyncio.run(main) if uvloop is None else uvloop.run(main)


def parse_options(arguments: argparse.Namespace) -> Options:
    """Command line to options."""
    values = {key: value for key, value in vars(arguments).items() if key in Options.__dataclass_fields__}
    values["extra_body"] = json.loads(arguments.extra_body)
    return Options(**values)


def create_parser() -> argparse.ArgumentParser:
    """The command line; each flag is a field of ``Options``."""
    parser = argparse.ArgumentParser(
        prog="octavo bench serve", description="Measure a running server that speaks OpenAI's protocol under load."
    )
    defaults = Options()
    add = parser.add_argument
    add("--base-url", default=defaults.base_url, help="server, such as http://127.0.0.1:8000")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: OPENAI_API_KEY")
    add("--model", default="", help="default: the first that the server lists")
    add("--endpoint", choices=("completions", "chat"), default=defaults.endpoint)
    add("--num-prompts", type=int, default=defaults.num_prompts, metavar="N", help="requests to measure")
    add("--max-concurrency", type=int, metavar="N", help="open requests at most (closed loop: 32 if not given)")
    add("--request-rate", type=float, default=math.inf, metavar="R", help="Poisson arrivals per second (open loop)")
    add("--input-len", type=int, default=defaults.input_len, metavar="N", help="prompt tokens, about")
    add("--output-len", type=int, default=defaults.output_len, metavar="N", help="output tokens, exactly")
    add("--range-ratio", type=float, default=0.0, metavar="R", help="vary lengths evenly by this share")
    add("--prefix-len", type=int, default=0, metavar="N", help="tokens that prompts share, beside --input-len")
    add("--num-prefixes", type=int, default=1, metavar="N", help="different shared prefixes")
    add("--prompts", default="", metavar="FILE", help="JSONL with question, prompt, text or messages on each line")
    add("--token-ids", action="store_true", help="send random token ids instead of text (completions only)")
    add("--vocab-size", type=int, default=defaults.vocab_size, metavar="N", help="bound of the random token ids")
    add("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="fixed output length (an extension)")
    add("--temperature", type=float, default=defaults.temperature)
    add("--extra-body", default="{}", metavar="JSON", help="more fields of every request")
    add("--warmup", type=int, default=defaults.warmup, metavar="N", help="requests before the clock starts")
    add("--seed", type=int, default=0)
    add("--timeout", type=float, default=defaults.timeout, metavar="SECONDS", help="for each request")
    add("--label", default="", help="name of the run")
    add("--json", metavar="FILE", help="write all figures there")
    add("--compare", metavar="OLD.json", help="print ratios to an earlier run")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and compares. Returns the exit code."""
    parser = create_parser()
    arguments = parser.parse_args(argv)
    if arguments.token_ids and arguments.endpoint == "chat":
        parser.error("--token-ids needs --endpoint completions")
    options = parse_options(arguments)
    gc.freeze()
    try:
        result = run_loop(run(options))
    except OSError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    print(format_report(result))
    report = result.to_dict()
    if arguments.compare:
        old = json.loads(Path(arguments.compare).read_text())
        rows = compare(old["summary"], report["summary"])
        print(format_comparison(rows, old.get("label") or "old", options.label or "new"))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0 if report["summary"]["completed"] else 1
