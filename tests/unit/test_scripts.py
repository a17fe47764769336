"""The load generators and the simulation: what they count is what happened."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from api.bench import serve as bench_serve
from api.bench import sse_client
from engine_core.config import CacheConfig, EngineConfig, ExecutorConfig, SchedulerConfig, SimulatedDevice

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def load(name: str) -> ModuleType:
    """A script as a module; scripts are no package and import each other by name."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


processes = load("processes")
simulate = load("simulate")
bench_overhead = load("bench_overhead")

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


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
def test_chunks_may_be_cut_anywhere(size: int) -> None:
    events = completion_events()
    body = b"".join(events)
    for encoded in (chunked(events), chunked(events, b";name=value"), chunked([body]), chunked(list(pieces(body, 11)))):
        decoder = sse_client.ChunkedDecoder()
        parts = [decoder.feed(piece) for piece in pieces(encoded, size)]
        assert b"".join(part for part, _ in parts) == body
        assert [finished for _, finished in parts].index(True) == len(parts) - 1


def test_trailers_are_skipped() -> None:
    decoder = sse_client.ChunkedDecoder()
    assert decoder.feed(b"3\r\nabc\r\n0\r\nExpires: never\r\n") == (b"abc", False)
    assert decoder.feed(b"\r\n") == (b"", True)


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
    assert "ended before" in stream.error
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


async def test_a_run_over_an_awkward_server() -> None:
    async with toy_server(answer_awkwardly) as (toy, url):
        options = bench_serve.Options(
            base_url=url, num_prompts=12, max_concurrency=3, input_len=20, output_len=8, prefix_len=10, keep_text=True
        )
        result = await bench_serve.run(options)
    summary = result.summary()
    assert not result.errors() and summary["completed"] == 12
    assert {request.text for request in result.requests} == {"".join(TEXTS)}
    assert summary["output_tokens"] == summary["events"] == 12 * len(TEXTS)
    assert summary["prompt_tokens"] == 12 * 5 and summary["cached_tokens"] == 12 * 2
    assert summary["peak_concurrency"] == 3 and toy.num_connections <= bench_serve.Options().warmup + 3
    assert len(result.requests[0].itls) == len(TEXTS) - 1
    sent = [body for _, body in toy.requests if body and body.get("stream")]
    assert len(sent) == 20 and {body["max_tokens"] for body in sent} == {8}
    # The server counts two tokens a word and three beside: the prefix takes those, (10 - 3) / 2 words.
    prompts = [body["prompt"].split() for body in sent]
    assert {len(words) for words in prompts} == {4 + 10}
    assert len({tuple(words[:4]) for words in prompts}) == 1
    assert len({tuple(words) for words in prompts}) == 20
    json.dumps(result.to_dict(), allow_nan=False)
    assert "12 requests" in bench_serve.format_report(result)


async def test_open_loop_sends_by_the_clock() -> None:
    async with toy_server(answer_awkwardly) as (_, url):
        options = bench_serve.Options(
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
        refused = await bench_serve.run(bench_serve.Options(input_len=3, **options))
        broken = await bench_serve.run(bench_serve.Options(input_len=4, **options))
        with pytest.raises(OSError, match="warming up: status 503"):
            await bench_serve.run(bench_serve.Options(input_len=3, **options | {"warmup": 1}))
    assert refused.errors() == {'status 503: {"error": "no place"}': 4}
    assert broken.errors() == {"ConnectionError: the server closed the connection": 4}
    assert refused.summary()["failed"] == broken.summary()["failed"] == 4


# -- figures ---------------------------------------------------------------------------------------------------


def test_distributions_agree_with_numpy() -> None:
    values = np.random.default_rng(0).exponential(1.0, 501).tolist()
    figures = bench_serve.describe(values)
    assert figures["mean"] == pytest.approx(np.mean(values)) and figures["max"] == max(values)
    for name, percent in {"median": 50, "p90": 90, "p95": 95, "p99": 99}.items():
        assert figures[name] == pytest.approx(np.percentile(values, percent))
    assert bench_serve.describe([]) == {}
    assert set(bench_serve.describe([3.0]).values()) == {3.0}


def test_comparison_has_what_both_runs_have() -> None:
    old = {"rate": 100, "ttft_ms": {"p99": 8.0}, "gone": 1, "failed": 0, "name": "a"}
    new = {"rate": 150, "ttft_ms": {"p99": 4.0}, "added": 2, "failed": 0, "name": "b"}
    rows = bench_serve.compare(old, new)
    assert rows == [("rate", 100, 150, 1.5), ("ttft_ms.p99", 8.0, 4.0, 0.5)]
    assert "1.500" in bench_serve.format_comparison(rows, "old", "new")


# -- the simulation --------------------------------------------------------------------------------------------


def simulation(workload: Sequence[Any], *, num_blocks: int = 400, **prompts: Any) -> Any:
    device = SimulatedDevice(
        step_us=1000.0, token_us=10.0, context_us=0.0, max_model_len=256, block_size=16, vocab_size=1000
    )
    config = EngineConfig(
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=128),
        cache=CacheConfig(num_gpu_blocks_override=num_blocks),
        executor=ExecutorConfig(simulated_device=device),
    )
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


class FakeTransport:
    def __init__(self) -> None:
        self.num_requests = 0

    def write(self, data: bytes) -> None:
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
