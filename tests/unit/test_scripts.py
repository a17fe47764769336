"""The load generators and the simulation: what they count is what happened."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_overhead
import bench_overload  # noqa: F401  # it can be imported
import numpy as np
import pytest
import simulate
import simulated_replicas

from api.commands.bench import datasets, figures, latency, report, sse_client, throughput
from api.commands.bench import options as bench_options
from api.commands.bench import serve as bench_serve
from api.commands.bench.options import Options
from api.model.tokenizer import Tokenizer
from api.params.sampling import SamplingParams
from engine_core.config import CacheConfig, EngineConfig, ExecutorConfig, SchedulerConfig, SimulatedDevice
from tests.fakes import tiny_tokenizer

TEXTS = ["Grüße", " ", "aus ", "Köln 🚀", "", " data: {", '"\n\n"', "end"]
"""What the tokens of a stream say: characters of several bytes, none, and what looks like framing."""


def event(choice: dict[str, Any] | None, **fields: Any) -> bytes:
    content = {"choices": [] if choice is None else [{"index": 0, "finish_reason": None, **choice}], **fields}
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def completion_events(texts: Sequence[str] = TEXTS) -> list[bytes]:
    events = [event({"text": text}) for text in texts[:-1]]
    events.append(event({"text": texts[-1], "finish_reason": "length"}))
    usage = {"prompt_tokens": 5, "completion_tokens": len(texts), "prompt_tokens_details": {"cached_tokens": 2}}
    return [*events, event(None, usage=usage), b"data: [DONE]\n\n"]


def chunked(parts: Sequence[bytes], extension: bytes = b"") -> bytes:
    return b"".join(b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts) + b"0\r\n\r\n"


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


# -- the HTTP client -------------------------------------------------------------------------------------------


class NoTransport(asyncio.Transport):
    """Of a connection that a test feeds."""

    def __init__(self) -> None:
        super().__init__()
        self.is_aborted = False

    def write(self, data: Any) -> None:
        pass

    def abort(self) -> None:
        self.is_aborted = True


HEAD = b"HTTP/1.1 200 OK\r\nX: 1\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


async def answer_of(parts: Iterable[bytes], *, closes: bool = False) -> tuple[sse_client.Response, bytes, bool]:
    """The answer to a request, what its sink got, and whether the connection is still good."""
    connection, got = sse_client.HttpConnection(), bytearray()
    connection.connection_made(NoTransport())
    task = asyncio.create_task(connection.request(b"", got.extend))
    await asyncio.sleep(0)
    for part in parts:
        assert not task.done()
        connection.data_received(part)
    if closes:
        connection.connection_lost(None)
    return await task, bytes(got), connection.is_open


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
async def test_chunks_may_be_cut_anywhere(size: int) -> None:
    events = completion_events()
    body = b"".join(events)
    for encoded in (chunked(events), chunked(events, b";name=value"), chunked([body]), chunked(list(pieces(body, 11)))):
        response, got, is_open = await answer_of(pieces(CHUNKED + encoded, size))
        assert (response.status, response.headers["x"], response.body, got, is_open) == (200, "1", b"", body, True)


@pytest.mark.parametrize("size", [1, 10_000])
async def test_ways_in_which_an_answer_ends(size: int) -> None:
    trailers = CHUNKED + b"3\r\nabc\r\n0\r\nExpires: never\r\n\r\n"
    fixed = HEAD + b"Content-Length: 3\r\n\r\nabc"
    for data, closes, is_open in (
        (trailers, False, True),
        (fixed, False, True),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + fixed, False, True),
        (HEAD + b"Connection: close\r\nContent-Length: 3\r\n\r\nabc", False, False),
        (HEAD + b"\r\nabc", True, False),  # the end of the connection is that of the body
    ):
        assert (await answer_of(pieces(data, size), closes=closes))[1:] == (b"abc", is_open)
    error = HEAD.replace(b"200 OK", b"404 Not Found") + b"Content-Length: 3\r\n\r\nabc"
    response, got, _ = await answer_of(pieces(error, size))
    assert (response.status, response.body, got) == (404, b"abc", b"")


@pytest.mark.parametrize("data", [b"hello\r\n\r\n", CHUNKED + b"x\r\n", HEAD + b"Content-Length: 3\r\n\r\na"])
async def test_answers_that_are_cut_off_or_unreadable(data: bytes) -> None:
    with pytest.raises(ConnectionError):
        await answer_of([data], closes=True)


@pytest.mark.parametrize("size", [1, 5, 64, 10_000])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_events_may_be_cut_anywhere(size: int, line_end: bytes) -> None:
    stream = sse_client.EventStream(keep_events=True)
    data = b": hello\n\n" + b"event: x\n".join([b"", *completion_events()])
    for piece in pieces(data.replace(b"\n", line_end), size):
        stream.feed(piece)
    stream.finish()
    assert stream.text() == "".join(TEXTS)
    assert len(stream.times) == len(TEXTS) and stream.times == sorted(stream.times)
    assert stream.usage["completion_tokens"] == len(TEXTS)
    assert stream.is_done and not stream.error


def test_events_of_a_chat_without_a_token_do_not_count() -> None:
    stream = sse_client.EventStream()
    for choice in (
        {"delta": {"role": "assistant", "content": ""}},
        {"delta": {"reasoning_content": "so"}},
        {"delta": {"content": ""}},
        {"delta": {"content": "x"}},
        {"delta": {}, "finish_reason": "stop"},
    ):
        stream.feed(event(choice))
    stream.finish()
    assert len(stream.times) == 3 and stream.is_done


def test_errors_and_early_ends_of_a_stream_are_noticed() -> None:
    stream = sse_client.EventStream()
    stream.feed(event({"text": "x"}))
    stream.finish()
    assert "ended early" in stream.error
    stream = sse_client.EventStream()
    stream.feed(event({"text": "x"}) + b'data: {"error": {"message": "broken"}}\n\ndata: [DONE]\n\n')
    stream.finish()
    assert "broken" in stream.error and len(stream.times) == 1


class ToyServer:
    """Speaks just enough HTTP; ``answer`` gets a request's path and body and writes the response."""

    def __init__(self, answer: Callable[[str, Any, asyncio.StreamWriter], Awaitable[None]]) -> None:
        self.num_connections = 0
        self.requests: list[tuple[str, Any]] = []
        self._answer = answer

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                _, _, length = head.partition("content-length:")
                data = await reader.readexactly(int(length.split()[0])) if length else b""
                body = json.loads(data) if data else None
                path = head.split()[1]
                self.requests.append((path, body))
                await self._answer(path, body, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def toy_server(answer: Callable[[str, Any, asyncio.StreamWriter], Awaitable[None]]) -> Any:
    toy = ToyServer(answer)
    server = await asyncio.start_server(toy.handle, "127.0.0.1", 0)
    async with server:
        yield toy, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def write_json(writer: asyncio.StreamWriter, content: Any, status: str = "200 OK") -> None:
    data = json.dumps(content).encode()
    writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)


async def answer_awkwardly(path: str, body: Any, writer: asyncio.StreamWriter) -> None:
    """Streams in parts that respect neither characters nor events nor chunks."""
    if path == "/v1/models":
        write_json(writer, {"data": [{"id": "toy"}]})
        return
    if not body.get("stream"):
        write_json(writer, {"usage": {"prompt_tokens": 3 + 2 * len(body["prompt"].split())}})
        return
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    response = head + chunked(list(pieces(b"".join(completion_events()), 13)))
    for piece in pieces(response, 17):
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0)


@pytest.mark.parametrize("keep_alive", [True, False])
async def test_connections_are_reused_unless_told_otherwise(keep_alive: bool) -> None:
    async with toy_server(answer_awkwardly) as (toy, url):
        options = Options(
            base_url=url, num_prompts=3, max_concurrency=1, warmup=0, token_ids=True, keep_alive=keep_alive
        )
        result = await bench_serve.run(options)
    assert not result.errors()
    assert len(toy.requests) == 4 and toy.num_connections == (1 if keep_alive else 4)


async def test_a_run_over_an_awkward_server() -> None:
    async with toy_server(answer_awkwardly) as (toy, url):
        options = Options(
            base_url=url, num_prompts=12, max_concurrency=3, input_len=20, output_len=8, prefix_len=10, keep_text=True
        )
        result = await bench_serve.run(options)
    summary = result.summary()
    assert not result.errors() and summary["completed"] == 12
    assert {request.text for request in result.requests} == {"".join(TEXTS)}
    assert summary["output_tokens"] == summary["events"] == 12 * len(TEXTS)
    assert summary["prompt_tokens"] == 12 * 5 and summary["cached_tokens"] == 12 * 2
    assert summary["peak_concurrency"] == 3 and toy.num_connections <= Options().warmup + 3
    assert len(result.requests[0].itls) == len(TEXTS) - 1
    sent = [body for _, body in toy.requests if body and body.get("stream")]
    assert len(sent) == 20 and {body["max_tokens"] for body in sent} == {8}
    # The server counts two tokens a word and three beside: the prefix takes those, (10 - 3) / 2 words.
    prompts = [body["prompt"].split() for body in sent]
    assert {len(words) for words in prompts} == {4 + 10}
    assert len({tuple(words[:4]) for words in prompts}) == 1
    assert len({tuple(words) for words in prompts}) == 20
    json.dumps(result.to_dict(), allow_nan=False)
    assert "12 requests" in report.format_report(result)


async def test_open_loop_sends_by_the_clock() -> None:
    async with toy_server(answer_awkwardly) as (_, url):
        options = Options(
            base_url=url, model="toy", token_ids=True, request_rate=200.0, num_prompts=10, warmup=0, output_len=8
        )
        result = await bench_serve.run(options)
    starts = [request.start for request in result.requests]
    assert not result.errors() and starts == sorted(starts)
    assert 0.01 < starts[-1] < 0.2  # ten arrivals with 5 ms between them in the mean


async def test_failures_are_counted_by_their_reason() -> None:
    async def answer(path: str, body: Any, writer: asyncio.StreamWriter) -> None:
        if len(body["prompt"]) == 3:
            write_json(writer, {"error": "no place"}, "503 Service Unavailable")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nda")
            writer.close()

    async with toy_server(answer) as (_, url):
        options = {"base_url": url, "model": "toy", "token_ids": True, "warmup": 0, "num_prompts": 4}
        refused = await bench_serve.run(Options(input_len=3, **options))
        broken = await bench_serve.run(Options(input_len=4, **options))
        with pytest.raises(OSError, match="no warm-up request succeeded: status 503"):
            await bench_serve.run(Options(input_len=3, **options | {"warmup": 1}))
    assert refused.errors() == {'status 503: {"error": "no place"}': 4}
    assert broken.errors() == {"ConnectionError: the server closed the connection": 4}
    assert refused.summary()["failed"] == broken.summary()["failed"] == 4


# -- command lines of vLLM's benchmarks ------------------------------------------------------------------------


def options_of(line: str) -> tuple[Options, bench_options.Output]:
    return bench_options.parse(shlex.split(line))


def test_flags_of_vllm_bench_serve(capsys: pytest.CaptureFixture[str]) -> None:
    options, output = options_of(
        "--backend openai-chat --endpoint /v1/chat/completions --host ::1 --port 81 --model m/odel "
        "--dataset-name random --random_input_len 9 --random-output-len=7 --random-range-ratio 0.5 "
        "--random-prefix-len 3 --num-warmups 0 --request-rate inf --burstiness 0.5 --top-p 0.9 --top-k 5 "
        "--temperature 0.3 --goodput ttft:500 e2el:9e3 --save-result --result-dir out --metadata a=b c=d "
        "--percentile-metrics ttft,tpot --tokenizer t --disable-tqdm"
    )
    assert options.base_url == "http://[::1]:81" and options.endpoint == "chat" and options.model == "m/odel"
    assert (options.input_len, options.output_len, options.range_ratio, options.prefix_len) == (9, 7, 0.5, 3)
    assert options.warmup == 0 and options.burstiness == 0.5 and options.goodput == {"ttft": 500, "e2el": 9000}
    assert options.extra_body == {"top_p": 0.9, "top_k": 5} and options.temperature == 0.3
    assert output == bench_options.Output(save_result=True, result_dir="out", metadata=("a=b", "c=d"))
    notes = capsys.readouterr().err.splitlines()
    assert [note.split()[1] for note in notes] == ["--tokenizer", "--disable-tqdm", "--percentile-metrics"]
    assert options_of("") == (Options(api_key=options_of("")[0].api_key), bench_options.Output())
    assert options_of("--prompts x.jsonl --output-len 5")[0].dataset_output_len == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--dataset-name sharegpt", "--dataset-name sharegpt needs --dataset-path"),
        ("--dataset-name sonnet", "--dataset-name: invalid choice: 'sonnet'"),
        ("--endpoint /v1/nope", "--endpoint /v1/nope: choose from /v1/completions"),
        ("--goodput ttft", "--goodput ttft: expected ttft:MS"),
        ("--token-ids --endpoint chat", "--token-ids needs --endpoint completions"),
        ("--request-rate 0", "--request-rate and --burstiness must be greater than 0"),
        ("--extra-body [", "--extra-body: expected a JSON object"),
        ("--num-promts 3", "unknown option --num-promts; did you mean --num-prompts?"),
    ],
)
def test_mistakes_in_them(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        options_of(line)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


SHAREGPT = [
    {"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c d e f"}]},
    {"conversations": [{"from": "human", "value": "alone"}]},
    {"conversations": [{"from": "human", "value": "g"}, {"from": "gpt", "value": "h i"}, {"from": "human"}]},
]


def test_datasets(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_text(json.dumps(SHAREGPT))
    assert datasets.read_samples("sharegpt", str(file)) == [
        datasets.Sample("a b", answer="c d e f"),
        datasets.Sample("g", answer="h i"),
    ]
    file.write_text('{"prompt": "x", "output_tokens": 3}\n\n{"messages": [{"role": "user", "content": "y"}]}\n')
    first, second = datasets.read_samples("custom", str(file))
    assert first == ("x", 3, "") and second.output_len is None and datasets.plain(second.prompt) == "y"
    for kind, content, message in (
        ("custom", "{}", "line 1: expected one of"),
        ("custom", "nonsense", "line 1: "),
        ("custom", "", "no prompts found"),
        ("sharegpt", "{}", "expected a list of conversations"),
        ("sharegpt", "[]", "no prompts found"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            datasets.read_samples(kind, str(file))


async def test_a_run_of_sharegpt_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps(SHAREGPT))
    async with toy_server(answer_awkwardly) as (toy, url):
        options = Options(
            base_url=url, num_prompts=4, warmup=0, dataset_name="sharegpt", dataset_path=str(file), burstiness=0.5,
            request_rate=500.0, goodput={"ttft": 1e6},
        )  # fmt: skip
        result = await bench_serve.run(options)
    sent = [body for _, body in toy.requests if body and body.get("stream")]
    # The server counts two tokens a word.
    assert [(body["prompt"], body["max_tokens"]) for body in sent] == [("a b", 8), ("g", 4)] * 2
    output = bench_options.Output(save_detailed=True, result_dir=str(tmp_path / "out"), metadata=("tag=x",))
    report.write(result, output)
    (written,) = (tmp_path / "out").iterdir()
    content = json.loads(written.read_text())
    assert content["completed"] == 4 and content["tag"] == "x" and len(content["ttfts"]) == 4
    assert content["request_goodput"] == content["request_throughput"] > 0 and content["p99_tpot_ms"] >= 0
    assert "within ttft 1e+06 ms" in report.format_report(result)


class InstantEngine:
    """Answers at once, with as many tokens as were asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Sequence[Any], Sequence[SamplingParams]]] = []

    def get_tokenizer(self) -> Tokenizer:
        return tiny_tokenizer()

    def generate(self, prompts: Sequence[Any], params: Sequence[SamplingParams], *, use_tqdm: bool = True) -> list[Any]:
        self.calls.append((prompts, params))
        return [
            SimpleNamespace(
                prompt_token_ids=prompt["prompt_token_ids"] if isinstance(prompt, dict) else [0] * 5,
                outputs=[SimpleNamespace(token_ids=[0] * (wanted.max_tokens or 0))] * wanted.n,
            )
            for prompt, wanted in zip(prompts, params, strict=True)
        ]


def test_latency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = InstantEngine()
    settings = latency.Settings(
        input_len=5, output_len=7, batch_size=3, n=2, num_iters=4, num_iters_warmup=1, output_json=str(tmp_path / "x")
    )
    found = latency.run(engine, settings)
    assert json.loads((tmp_path / "x").read_text()) == found and len(found["latencies"]) == 4
    assert len(engine.calls) == 5 and all(len(prompts) == 3 for prompts, _ in engine.calls)
    prompts = {tuple(prompt["prompt_token_ids"]) for prompts, _ in engine.calls for prompt in prompts}
    assert len(prompts) > 1 and {len(prompt) for prompt in prompts} == {5}
    assert {(params.n, params.max_tokens, params.ignore_eos) for _, every in engine.calls for params in every} == {
        (2, 7, True)
    }
    assert "Avg latency: " in capsys.readouterr().out


def test_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = InstantEngine()
    settings = throughput.Settings(num_prompts=6, input_len=5, output_len=7, output_json=str(tmp_path / "x"))
    found = throughput.run(engine, settings)
    assert found["total_num_tokens"] == 6 * 12 and json.loads((tmp_path / "x").read_text()) == found
    assert "Total num output tokens: 42" in capsys.readouterr().out
    file = tmp_path / "data.json"
    file.write_text(json.dumps(SHAREGPT))
    throughput.run(engine, throughput.Settings(dataset_name="sharegpt", dataset_path=str(file), num_prompts=3))
    prompts, params = engine.calls[-1]
    assert prompts == ["a b", "g", "a b"] and all(1 <= (every.max_tokens or 0) <= 8 for every in params)
    with pytest.raises(ValueError, match="needs --dataset-path"):
        throughput.run(engine, throughput.Settings(dataset_name="custom"))


# -- figures ---------------------------------------------------------------------------------------------------


def test_distributions_agree_with_numpy() -> None:
    values = np.random.default_rng(0).exponential(1.0, 501).tolist()
    found = figures.describe(values)
    assert found["mean"] == pytest.approx(np.mean(values)) and found["max"] == max(values)
    for name, percent in {"median": 50, "p90": 90, "p95": 95, "p99": 99}.items():
        assert found[name] == pytest.approx(np.percentile(values, percent))
    assert figures.describe([]) == {}
    assert set(figures.describe([3.0]).values()) == {3.0}


def test_comparison_has_what_both_runs_have() -> None:
    old = {"rate": 100, "ttft_ms": {"p99": 8.0}, "gone": 1, "failed": 0, "name": "a"}
    new = {"rate": 150, "ttft_ms": {"p99": 4.0}, "added": 2, "failed": 0, "name": "b"}
    rows = figures.compare(old, new)
    assert rows == [("rate", 100, 150, 1.5), ("ttft_ms.p99", 8.0, 4.0, 0.5)]
    assert "1.500" in figures.format_comparison(rows, "old", "new")


# -- the simulation --------------------------------------------------------------------------------------------


def simulated_engine(num_blocks: int) -> EngineConfig:
    device = SimulatedDevice(
        step_us=1000.0, token_us=10.0, context_us=0.0, max_model_len=256, block_size=16, vocab_size=1000
    )
    return EngineConfig(
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=128),
        cache=CacheConfig(num_gpu_blocks_override=num_blocks),
        executor=ExecutorConfig(simulated_device=device),
    )


def simulation(workload: Sequence[Any], *, num_blocks: int = 400, **prompts: Any) -> Any:
    config = simulated_engine(num_blocks)
    run = simulate.Simulation(config, workload, simulate.PromptMaker(vocab_size=1000, **prompts))
    run.run()
    return run


def test_a_simulation_accounts_for_every_token() -> None:
    workload = simulate.synthetic(60, 200.0, mean_prompt=60, mean_output=20, seed=1)
    assert workload == simulate.synthetic(60, 200.0, mean_prompt=60, mean_output=20, seed=1)
    run = simulation(workload)
    figures = run.summary()
    assert figures["finished"] == figures["requests"] == 60 and not figures["clipped"]
    assert run.num_output_tokens.tolist() == [request.num_output_tokens for request in workload]
    assert figures["prompt_tokens"] == sum(request.num_prompt_tokens for request in workload)
    # Each prompt token is computed once, and each output token but a request's last.
    assert sum(run.costs.num_tokens) == figures["prompt_tokens"] + figures["output_tokens"] - 60
    computing = sum(1e-3 + 1e-5 * count for count in run.costs.num_tokens)
    assert run.busy == pytest.approx(computing) and run.busy <= figures["virtual_s"] + 1e-9
    assert sum(len(gaps) for gaps in run._gaps) == figures["output_tokens"] - 60
    assert (run.first_token > run.arrival).all() and (run.finished >= run.first_token).all()
    again = simulation(workload).summary()
    assert {**again, "scheduler": None} == {**figures, "scheduler": None}
    assert "60 of 60" in simulate.format_report(figures, 1.0)
    json.dumps(figures, allow_nan=False)


def test_shared_prefixes_hit_the_cache_and_few_blocks_preempt() -> None:
    workload = [simulate.TraceRequest(0.01 * index, 100, 40) for index in range(40)]
    shared = simulation(workload, shared_fraction=1.0, prefix_len=64, num_prefixes=1).summary()
    assert shared["prefix_cache_hit_rate"] == pytest.approx(39 / 40 * 64 / 100)
    assert not simulation(workload).summary()["prefix_cache_hit_rate"]
    crowded = simulation([simulate.TraceRequest(0.0, 100, 40)] * 16, num_blocks=40).summary()
    assert crowded["preemptions"] and crowded["output_tokens"] == 16 * 40


def test_routing_by_prefixes_doubles_hits_and_shortens_waits() -> None:
    """Four engines, and more common prefixes than the cache of one holds."""
    workload = simulate.synthetic(300, 1200.0, mean_prompt=140, mean_output=10, sigma=0.2, seed=1)
    prompts = simulate.PromptMaker(vocab_size=1000, shared_fraction=1.0, prefix_len=128, num_prefixes=48)
    found = simulated_replicas.compare(simulated_engine(200), workload, prompts, 4)
    by_prefix, in_turn, by_load = (found[name] for name in simulated_replicas.ROUTINGS)
    assert by_prefix["prefix_cache_hit_rate"] >= 2 * in_turn["prefix_cache_hit_rate"]
    assert by_prefix["ttft_ms"]["p90"] <= 0.8 * by_load["ttft_ms"]["p90"]
    rows = (by_prefix, in_turn, by_load)
    assert all(sum(row["requests_per_engine"]) == row["requests"] == 300 for row in rows)
    one_cache, no_limit = (found[name]["prefix_cache_hit_rate"] for name in ("one cache", "no limit"))
    assert by_prefix["prefix_cache_hit_rate"] <= one_cache <= no_limit
    shared = [min(128, request.num_prompt_tokens - 1) // 16 * 16 for request in workload]
    most = sum(sorted(shared)[48:]) / sum(request.num_prompt_tokens for request in workload)
    assert 0.9 * most < no_limit < 1.1 * most, "each prefix but its first occurrence"
    assert max(in_turn["requests_per_engine"]) == 75
    table = simulated_replicas.format_comparison(found)
    assert "round_robin" in table and table.splitlines()[-1].split() == ["no", "limit", f"{no_limit:.1%}"]
    apart = simulated_replicas.compare(simulated_engine(200), workload[:40], simulate.PromptMaker(vocab_size=1000), 2)
    assert min(apart["prefix"]["requests_per_engine"]) >= 15  # without common prefixes only load counts


def test_traces_are_read_and_clipped(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.6805900,10,3\n2023-11-16 18:15:51.2224670,1,1\n"
    )
    trace = simulate.read_trace(path, limit=2, speedup=2.0)
    assert trace == [simulate.TraceRequest(0.0, 374, 44), simulate.TraceRequest(2.0, 10, 3)]
    figures = simulation(trace).summary()
    assert figures["clipped"] == 1 and figures["prompt_tokens"] == 255 + 10 and figures["output_tokens"] == 1 + 3


def test_steady_decode_runs_exactly_so_many() -> None:
    figures = simulate.measure_steady(20, 30, block_size=16).summary()
    assert figures["steps"] == 30 and figures["num_running"] == 20
    assert 0 < figures["together_us"]["median"] < 1e5
    assert "20 running" in simulate.format_steady(figures)


# -- the raw client --------------------------------------------------------------------------------------------


class FakeTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.num_requests = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.num_requests += 1

    def abort(self) -> None:
        pass


@pytest.mark.parametrize("size", [14, 15, 33, 10_000])
def test_the_raw_client_counts_events_that_are_cut(size: int) -> None:
    counters = bench_overhead.Counters(1)
    counters.is_measuring = True
    client = bench_overhead.Client(b"request", 1, counters)
    transport = FakeTransport()
    client.connection_made(transport)
    texts = ["a", "b", "ü"]
    for _ in range(3):
        response = b"HTTP/1.1 200 OK\r\n\r\n" + chunked(completion_events(texts))
        for piece in pieces(response, size):
            client.data_received(piece)
    assert transport.num_requests == 4
    assert counters.events == 3 * 4 and counters.ready.is_set()
    assert len(counters.intervals) + len(counters.first_events) == 12
    assert len(counters.first_events) == 3
    assert counters.responses == 3 and counters.tokens == counters.token_events == 9
    assert not counters.mismatches and not counters.errors


def test_the_raw_client_notices_failures() -> None:
    counters = bench_overhead.Counters(1)
    client = bench_overhead.Client(b"request", 1, counters)
    client.connection_made(FakeTransport())
    client.data_received(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
    client.connection_lost(None)
    assert len(counters.errors) == 1 and "503" in counters.errors[0]
