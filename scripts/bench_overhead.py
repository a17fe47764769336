"""Measures the overhead of the stack without a model: the real server on a simulated device.

    python scripts/bench_overhead.py                    # 256 clients, as fast as the stack can
    python scripts/bench_overhead.py --rate 20000       # a device with this many tokens per second
    python scripts/bench_overhead.py --clients 512 --rate 28000 --bar 25000 --json overhead.json
    python scripts/bench_overhead.py -- --model folder --max-num-seqs 512

Without ``--rate`` the device is so fast (``--step-us``) that it is never the bottleneck: clients get tokens as fast as
the stack can deliver them, and events that are ready together share a write. With ``--rate``, steps take as long as on
a device with that total throughput, each event is sent alone, and the intervals between the events of a client show
how evenly the stack delivers tokens.

The load runs in a separate process on the same cores as the server; it searches raw bytes for event markers and parses
nothing else. One response is parsed in full first. For each later one, the usage at its end is compared with the number
of events: one token, one event. Linux only (CPU times come from /proc). All processes started here are stopped by their
process ids.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import re
import subprocess
import sys
import time
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from processes import (
    Server,
    descendants,
    end_process,
    processor_seconds,
    resident_bytes,
    signals_as_exceptions,
    start_process,
)
from simulate import format_steady, measure_steady

from api.commands.bench.figures import compare, describe, format_comparison, format_distributions
from api.commands.bench.serve import WORDS, run_loop
from api.commands.bench.sse_client import EventStream, HttpClient

EVENT = b"data: {"
"""Start of every event except the last."""
END = b"\r\n0\r\n\r\n"
"""The last chunk of a response."""
USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
RECENT = 800
"""Bytes at the end of a response that contain its usage report."""
START_TIMEOUT = 120.0
"""Seconds until every client has had an event."""
BAR = 15000.0
"""Tokens per second expected of the whole stack."""
PLANNING_BAR_MS = 1.5
PLANNING_RUNNING = 1000


@dataclass(frozen=True, kw_only=True)
class Load:
    """Parameters of the load process."""

    port: int
    clients: int
    warmup: float
    """Seconds between the last client's first event and the start of the clock."""
    duration: float
    """Seconds to measure."""
    bodies: list[str]
    """One request per client, which it repeats."""
    path: str
    extra_events: int
    """Events of a response that carry no token."""
    pids: dict[str, int]
    """Processes whose CPU time is measured, by name."""


# -- the load process ------------------------------------------------------------------------------------------


class Counters:
    """Counters shared by all clients of the load process."""

    def __init__(self, num_clients: int) -> None:
        self.ready = asyncio.Event()
        """Set when every client has had an event, or one has failed."""
        self.num_waiting = num_clients
        """Number of clients without an event yet."""
        self.is_measuring = False
        self.events = 0
        self.segments = 0
        """Number of reads that contained events."""
        self.intervals = array("d")
        """Seconds between two events of one client."""
        self.first_events = array("d")
        """Seconds from sending a request to its first event."""
        self.responses = 0
        self.tokens = 0
        """Tokens of complete responses, by their usage reports."""
        self.token_events = 0
        """The events of the same responses that carry tokens."""
        self.mismatches = 0
        """Number of responses whose events and tokens differ in number."""
        self.errors: list[str] = []

    def start(self) -> None:
        self.num_waiting -= 1
        if not self.num_waiting:
            self.ready.set()

    def fail(self, message: str) -> None:
        self.errors.append(message)
        self.ready.set()


class Client(asyncio.Protocol):
    """Sends one request after another over one connection and counts events without parsing them."""

    def __init__(self, request: bytes, extra_events: int, counters: Counters) -> None:
        self._request = request
        self._extra_events = extra_events
        self._counters = counters
        self._transport: asyncio.Transport | None = None
        self._tail = b""
        """End of the received data, shorter than an event marker."""
        self._recent = b""
        """End of the received data, long enough for the usage report."""
        self._events = 0
        self._sent_at = 0.0
        self._last = 0.0
        self._is_closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop has its own class
        self._send()

    def _send(self) -> None:
        assert self._transport is not None
        self._tail = self._recent = b""
        self._events = 0
        self._sent_at = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        joined = self._tail + data
        if not self._recent and not joined.startswith(b"HTTP/1.1 200 "):
            self._fail(joined[-200:].decode("utf-8", "replace"))
            return
        count = joined.count(EVENT)
        if count:
            counters = self._counters
            if not self._last:
                counters.start()
            if counters.is_measuring:
                counters.events += count
                counters.segments += 1
                if self._events:
                    counters.intervals.append(now - self._last)
                else:
                    counters.first_events.append(now - self._sent_at)
                if count > 1:
                    counters.intervals.extend([0.0] * (count - 1))
            self._events += count
            self._last = now
        self._recent = (self._recent + data)[-RECENT:]
        if joined.endswith(END):
            self._end()
        else:
            self._tail = joined[1 - len(EVENT) :]

    def _end(self) -> None:
        counters = self._counters
        counters.responses += 1
        usage = USAGE.search(self._recent)
        if usage is None:
            counters.mismatches += 1
        else:
            tokens, token_events = int(usage[1]), self._events - self._extra_events
            counters.tokens += tokens
            counters.token_events += token_events
            counters.mismatches += tokens != token_events
        self._send()

    def _fail(self, message: str) -> None:
        self._counters.fail(message)
        self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._is_closing:
            self._counters.fail(f"connection lost: {exc}")

    def close(self) -> None:
        self._is_closing = True
        if self._transport is not None:
            self._transport.abort()


async def generate(load: Load) -> dict[str, Any]:
    """Runs the load and returns figures: times in seconds, distributions in milliseconds."""
    loop = asyncio.get_running_loop()
    counters = Counters(len(load.bodies))
    clients: list[Client] = []
    connecting = time.perf_counter()
    for body in load.bodies:
        head = (
            f"POST {load.path} HTTP/1.1\r\nHost: 127.0.0.1:{load.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        client = Client((head + body).encode(), load.extra_events, counters)
        await loop.create_connection(lambda client=client: client, "127.0.0.1", load.port)  # type: ignore[misc]
        clients.append(client)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(counters.ready.wait(), START_TIMEOUT)
    all_started = time.perf_counter() - connecting
    await asyncio.sleep(load.warmup)
    gc.collect()
    gc.freeze()
    before = processor_seconds(load.pids)
    begin = time.perf_counter()
    counters.is_measuring = True
    await asyncio.sleep(load.duration)
    counters.is_measuring = False
    seconds = time.perf_counter() - begin
    after = processor_seconds(load.pids)
    memory = {name: resident_bytes(pid) for name, pid in load.pids.items()}
    for client in clients:
        client.close()
    tokens_per_event = counters.tokens / counters.token_events if counters.token_events else 1.0
    # On average, every response has as many events without a token as the first one.
    share = counters.token_events / max(1, counters.token_events + counters.responses * load.extra_events)
    tokens_per_s = counters.events * share * tokens_per_event / seconds
    cpu = {name: (after[name] - before[name]) / seconds for name in load.pids}
    return {
        "tokens_per_s": tokens_per_s,
        "events_per_s": counters.events / seconds,
        "events_per_segment": counters.events / max(1, counters.segments),
        "tokens_per_event": tokens_per_event,
        "responses": counters.responses,
        "mismatched_responses": counters.mismatches,
        "failed": len(counters.errors),
        "duration_s": seconds,
        "all_started_s": all_started,
        "cpu_share": cpu,
        "cpu_us_per_token": {name: value * 1e6 / max(tokens_per_s, 1) for name, value in cpu.items()},
        "resident_mib": {name: value / 2**20 for name, value in memory.items()},
        "event_interval_ms": describe([interval * 1e3 for interval in counters.intervals]),
        "first_event_ms": describe([seconds * 1e3 for seconds in counters.first_events]),
        "errors": counters.errors[:3],
    }


def named_pids(pid: int) -> dict[str, int]:
    """The processes of a server with a simulated device, by name: its only child is the engine core."""
    pids = {"api": pid}
    pids.update(("engine_core", child) for child, _ in descendants(pid))
    return pids


# -- the measurement -------------------------------------------------------------------------------------------


def request_bodies(arguments: argparse.Namespace) -> list[str]:
    """A request for each client. Output lengths differ, so that they do not all end in the same step."""
    source = random.Random(arguments.seed)
    bodies: list[str] = []
    for index in range(arguments.clients):
        max_tokens = source.randint(max(2, arguments.output_len // 2), arguments.output_len * 3 // 2)
        body: dict[str, Any] = {"max_tokens": max_tokens, "ignore_eos": True, "seed": index}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if arguments.endpoint == "chat":
            text = " ".join(source.choices(WORDS, k=arguments.input_len))
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = [source.randrange(256, arguments.vocab_size) for _ in range(arguments.input_len)]
        bodies.append(json.dumps(body))
    return bodies


async def check_events(port: int, path: str, body: str) -> int:
    """Reads one response in full.

    Returns:
        The number of its events that carry no token.

    Raises:
        RuntimeError: It does not have one event per token.
    """
    client = HttpClient(f"http://127.0.0.1:{port}", timeout=60)
    stream = EventStream(keep_events=True)
    try:
        response = await client.send(client.encode("POST", path, json.loads(body)), stream.feed)
    finally:
        client.close()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {response.body[:200].decode('utf-8', 'replace')}")
    stream.finish()
    tokens = int(stream.usage["completion_tokens"])
    # The last token's event also carries the finish reason, and has no text if the token is half a character.
    if stream.error or len(stream.times) not in (tokens, tokens - 1):
        raise RuntimeError(f"got {tokens} tokens in {len(stream.times)} events {stream.error}")
    return len(stream.events) - tokens


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts a server and the load, and stops both.

    Raises:
        RuntimeError: One of them failed.
    """
    step_us = arguments.clients / arguments.rate * 1e6 if arguments.rate else arguments.step_us
    # Room for all: half as much again for the longest outputs, and for what a chat template adds.
    num_blocks = arguments.clients * ((arguments.input_len + 2 * arguments.output_len + 64) // 32 + 1)
    device = {"step_us": step_us, "token_us": 0, "context_us": 0, "vocab_size": arguments.vocab_size}
    device["num_blocks"] = max(num_blocks, 1024)
    path = "/v1/chat/completions" if arguments.endpoint == "chat" else "/v1/completions"
    bodies = request_bodies(arguments)
    flags = {
        "--distributed-executor-backend": "simulated",
        "--simulated-device": json.dumps(device),
        "--max-num-seqs": arguments.clients,
        "--max-num-batched-tokens": max(8192, 8 * arguments.clients),
        "--log-level": "warning",
    }
    command = [sys.executable, "-m", "api", "serve", "--port", "{port}"]
    server = Server([*command, *(str(part) for flag in flags.items() for part in flag), *arguments.server_flags])
    try:
        server.wait_ready()
        extra_events = run_loop(check_events(server.port, path, bodies[0]))
        load = Load(
            port=server.port,
            clients=arguments.clients,
            warmup=arguments.warmup,
            duration=arguments.duration,
            bodies=bodies,
            path=path,
            extra_events=extra_events,
            pids=named_pids(server.pid),
        )
        figures = run_load(load)
        if figures["failed"]:
            print(f"server log:\n{server.log()}", file=sys.stderr)
        return {"clients": arguments.clients, "step_us": step_us, "extra_events": extra_events, **figures}
    finally:
        server.stop()


def run_load(load: Load) -> dict[str, Any]:
    """Runs ``generate`` in a separate process.

    Raises:
        RuntimeError: It failed.
    """
    process = start_process(
        [sys.executable, str(Path(__file__).resolve()), "--load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        output, _ = process.communicate(
            json.dumps(asdict(load)).encode(), load.warmup + load.duration + 2 * START_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError("the load process did not exit") from None
    finally:
        end_process(process)
    if process.returncode:
        raise RuntimeError(f"the load process ended with exit code {process.returncode}")
    figures: dict[str, Any] = json.loads(output)
    return figures


def load_main() -> int:
    """The load process: reads a ``Load`` from standard input, writes the figures to standard output."""
    spec = json.load(sys.stdin)
    load = Load(**{**spec, "pids": {**spec["pids"], "load": os.getpid()}})
    print(json.dumps(run_loop(generate(load))))
    return 0


def format_report(figures: dict[str, Any]) -> str:
    """The figures of ``measure`` as text."""
    shares = "   ".join(
        f"{name} {share:.0%} of a core ({figures['cpu_us_per_token'][name]:.1f} us per token, "
        f"{figures['resident_mib'][name]:.0f} MiB)"
        for name, share in figures["cpu_share"].items()
    )
    lines = [
        f"{figures['clients']} clients, a step every {figures['step_us']:.0f} us: "
        f"{figures['tokens_per_s']:.0f} tokens/s over {figures['duration_s']:.1f} s; "
        f"every client had an event after {figures['all_started_s']:.2f} s",
        f"{figures['tokens_per_event']:.4f} tokens per event ({figures['mismatched_responses']} of "
        f"{figures['responses']} responses differ), {figures['events_per_segment']:.2f} events per segment",
        f"cpu: {shares}",
        format_distributions(
            {"event interval (ms)": figures["event_interval_ms"], "first event (ms)": figures["first_event_ms"]}
        ),
    ]
    lines += [f"failed: {figures['failed']} clients, such as: {error}" for error in figures["errors"]]
    return "\n".join(lines)


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure the stack's own cost with a simulated device.")
    add = parser.add_argument
    add("--clients", type=int, default=256, metavar="N", help="number of concurrent streams")
    add("--duration", type=float, default=10.0, metavar="SECONDS", help="measured time")
    add("--warmup", type=float, default=2.0, metavar="SECONDS", help="warm-up time after every client has had an event")
    add("--step-us", type=float, default=1000.0, metavar="X", help="time per step of the device in microseconds")
    add("--rate", type=float, metavar="R", help="tokens per second of the device, instead of --step-us")
    add("--endpoint", choices=("completions", "chat"), default="completions")
    add("--input-len", type=int, default=32, metavar="N", help="prompt tokens")
    add("--output-len", type=int, default=256, metavar="N", help="mean tokens per response, varied by half")
    add(
        "--vocab-size",
        type=int,
        default=49152,
        metavar="N",
        help="vocabulary size of the tokenizer (default: the demo model's)",
    )
    add("--seed", type=int, default=0)
    add("--bar", type=float, metavar="R", help=f"tokens per second to reach (default: {BAR:.0f}, or 90 %% of --rate)")
    add("--strict", action="store_true", help="exit with 1 when a bar is missed")
    add("--label", default="", help="label of the run")
    add("--json", type=Path, metavar="FILE", help="write all figures to this file")
    add("--compare", type=Path, metavar="OLD.json", help="print ratios against an earlier run")
    add("server_flags", nargs="*", metavar="-- FLAGS", help="server flags")
    return parser


def main() -> int:
    if sys.argv[1:] == ["--load"]:
        return load_main()
    arguments = create_parser().parse_args()
    with signals_as_exceptions():
        steady = measure_steady(PLANNING_RUNNING, 500).summary()
        print(format_steady(steady))
        try:
            figures = measure(arguments)
        except (RuntimeError, OSError) as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
    print(format_report(figures))
    planning_ms = steady["together_us"]["median"] / 1e3
    bar = arguments.bar or (0.9 * arguments.rate if arguments.rate else BAR)
    verdicts = {
        f"{figures['tokens_per_s']:.0f} tokens/s, bar {bar:.0f}": figures["tokens_per_s"] >= bar,
        f"planning {planning_ms:.2f} ms, bar {PLANNING_BAR_MS}": planning_ms <= PLANNING_BAR_MS,
        "one token per event, no failures": not figures["mismatched_responses"] and not figures["failed"],
    }
    for name, is_met in verdicts.items():
        print(f"{'met   ' if is_met else 'MISSED'} {name}")
    summary = {**figures, "planning": steady}
    if arguments.compare:
        old = json.loads(arguments.compare.read_text())
        rows = compare(old["summary"], summary)
        print(format_comparison(rows, old["label"] or "old", arguments.label or "new"))
    if arguments.json:
        report = {"label": arguments.label, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "summary": summary}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(verdicts.values()) or not arguments.strict else 1


if __name__ == "__main__":
    sys.exit(main())
