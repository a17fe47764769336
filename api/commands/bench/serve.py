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

import asyncio
import contextlib
import gc
import math
import random
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from api.commands.bench import report as reports
from api.commands.bench.datasets import Sample, plain, random_ids, read_samples, vary
from api.commands.bench.options import Options, parse
from api.commands.bench.result import RequestResult, Result
from api.commands.bench.sse_client import MAX_ERROR_TEXT, EventStream, HttpClient, shorten

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
        is_file = options.dataset_name != "random"
        self._samples = read_samples(options.dataset_name, options.dataset_path) if is_file else []

    def bodies(self, count: int) -> Iterator[dict[str, Any]]:
        """Request bodies."""
        for index in range(count):
            if self._samples:
                sample = self._samples[index % len(self._samples)]
                yield self.body(sample.prompt, self._output_len(sample))
            else:
                yield self.body(self._prompt(), vary(self._random, self._options.output_len, self._options.range_ratio))

    def body(self, prompt: Any, max_tokens: int, *, stream: bool = True) -> dict[str, Any]:
        """A request body: ``prompt`` is text, token ids or chat messages."""
        options = self._options
        body: dict[str, Any] = {"model": self._model, "max_tokens": max_tokens, "temperature": options.temperature}
        if options.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        else:
            body["prompt"] = plain(prompt)
        if options.ignore_eos:
            body["ignore_eos"] = True
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body | options.extra_body

    def _output_len(self, sample: Sample) -> int:
        """Tokens to ask for: the number that is given, else that of the file, else about those of its answer."""
        length = self._options.dataset_output_len or sample.output_len
        if length is None and sample.answer:
            length = round(len(sample.answer.split()) * self._length.per_word)
        return max(1, length or self._options.output_len)

    def _prompt(self) -> Any:
        options = self._options
        prefix = self._random.choice(self._prefixes) if options.num_prefixes > 1 else self._prefixes[0]
        count = vary(self._random, options.input_len, options.range_ratio)
        if options.token_ids:
            return [*prefix, *random_ids(self._random, count, options.vocab_size)]
        is_start = not prefix
        return " ".join([*prefix, *self._words(self._random, self._length.words_for(count, is_start=is_start))])

    def _make_prefix(self, source: random.Random) -> Sequence[Any]:
        count = self._options.prefix_len
        if not count:
            return []
        if self._options.token_ids:
            return random_ids(source, count, self._options.vocab_size)
        return self._words(source, self._length.words_for(count))

    def _words(self, source: random.Random, count: int) -> list[Any]:
        return source.choices(WORDS, k=max(1, count))


async def measure_text_length(client: HttpClient, options: Options, model: str) -> TextLength:
    """Asks the server how many tokens words take."""
    workload = Workload(options, model, TextLength(), options.seed)
    counts: list[int] = []
    for num_words in PROBE_WORDS:
        words = (WORDS * (num_words // len(WORDS) + 1))[:num_words]
        body = workload.body(" ".join(words), 1, stream=False)
        answer = await client.call("POST", options.path, body)
        counts.append((answer.get("usage") or {}).get("prompt_tokens", 0))
    per_word = (counts[1] - counts[0]) / (PROBE_WORDS[1] - PROBE_WORDS[0])
    if per_word <= 0:
        print("the server does not report prompt lengths; counting one token per word", file=sys.stderr)
        return TextLength()
    return TextLength(per_word, max(0.0, counts[0] - per_word * PROBE_WORDS[0]))


# -- the run ---------------------------------------------------------------------------------------------------


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
            shape = self._options.burstiness
            is_poisson = shape == 1
            due += (
                gaps.expovariate(request_rate) if is_poisson else gaps.gammavariate(shape, 1 / (request_rate * shape))
            )
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
    client = HttpClient(
        options.base_url,
        options.api_key,
        options.timeout,
        insecure=options.insecure,
        keep_alive=options.keep_alive,
    )
    try:
        model = options.model or (await client.call("GET", "/v1/models"))["data"][0]["id"]
        # The answers in ShareGPT's file are texts, too.
        needs_length = not options.token_ids and options.dataset_name != "custom"
        length = await measure_text_length(client, options, model) if needs_length else TextLength()
        path = options.path

        def encode(seed: int, count: int) -> list[bytes]:
            workload = Workload(options, model, length, seed)
            return [client.encode("POST", path, body) for body in workload.bodies(count)]

        if options.warmup:
            warmup = Generator(client, options)
            await warmup.run(encode(options.seed + 1_000_003, options.warmup), math.inf)
            if all(result.error for result in warmup.results):
                raise OSError(f"no warm-up request succeeded: {warmup.results[0].error}")
        requests = encode(options.seed, options.num_prompts)
        generator = Generator(client, options)
        cpu = time.process_time()
        duration = await generator.run(requests, options.request_rate)
        cpu = time.process_time() - cpu
    finally:
        client.close()
    return Result(options, model, generator.results, duration, cpu, generator.peak_concurrency)


# -- figures ---------------------------------------------------------------------------------------------------


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on uvloop where that is installed."""
    return asyncio.run(main) if uvloop is None else uvloop.run(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and compares. Returns the exit code."""
    options, output = parse(sys.argv[1:] if argv is None else argv)
    gc.freeze()
    try:
        result = run_loop(run(options))
        print(reports.format_report(result))
        reports.write(result, output)
    except (OSError, ValueError) as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 1
    return 0 if result.summary()["completed"] else 1
