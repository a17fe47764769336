"""Measures a server under ten times the load that it can serve, on a simulated device.

    python scripts/bench_overload.py                                  # a minute of warm-up, three of overload
    python scripts/bench_overload.py --warmup 20 --duration 30        # a shorter run
    python scripts/bench_overload.py --by user --json overload.json   # users without keys, instead of keys
    python scripts/bench_overload.py -- --max-num-queued-reqs 100     # additional server flags

Requests arrive first at the rate that the device can serve, then at ten times that rate; one tenant sends ten times as
many as each of fifteen others. Requests arrive whether or not earlier ones were answered, and rejected ones are not
retried. The script measures the memory of the server's processes after the warm-up and at the end, the time to reject a
request, the tokens served compared with those without overload, and how equally the tenants were served (Jain's index).

The load runs in a separate process on the same cores; it reads status lines and counts event markers. Linux only
(memory comes from /proc). All processes started here are stopped by their process ids.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import random
import subprocess
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_overhead import END, EVENT, named_pids
from processes import Server, end_process, processor_seconds, resident_bytes, signals_as_exceptions, start_process

from api.commands.bench.figures import describe, format_distributions
from api.commands.bench.serve import WORDS, run_loop

MAX_GROWTH_MIB = 64.0
MAX_REFUSAL_MS = 50.0
MIN_GOODPUT = 0.9
MIN_JAIN = 0.95
FACTOR = 10
"""Requests of the heavy tenant per request of a light one."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Parameters of the load process."""

    port: int
    path: str
    rate: float
    """Requests per second that the device can serve."""
    overload: float
    warmup: float
    duration: float
    baseline: float
    """Seconds at the rate of the device before the overload; the first third is not counted."""
    tenants: int
    by: str
    """key or user."""
    input_len: int
    output_len: int
    seed: int
    pids: dict[str, int]
    """Processes whose memory is measured, by name."""


class Window:
    """Counters of one measurement window."""

    def __init__(self, num_tenants: int) -> None:
        self.begin = time.perf_counter()
        self.seconds = 0.0
        self.tokens = [0] * num_tenants
        self.sent = 0
        self.statuses: Counter[int] = Counter()
        self.refusals = array("d")
        """Seconds from sending a request to the end of its rejection."""
        self.first_events = array("d")
        self.retry_after = array("d")
        self.late = 0.0
        """Largest delay of the load process in seconds."""
        self.lost = 0
        """Number of lost connections."""

    def close(self) -> Window:
        self.seconds = time.perf_counter() - self.begin
        return self

    @property
    def tokens_per_s(self) -> float:
        return sum(self.tokens) / self.seconds


class Client(asyncio.Protocol):
    """A connection that carries one request at a time, for any tenant."""

    def __init__(self, load: _Run) -> None:
        self._run = load
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._tenant = 0
        self._status = 0
        self._sent_at = 0.0
        self._is_open = False
        self._has_events = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, tenant: int, request: bytes) -> None:
        assert self._transport is not None
        self._tenant, self._status, self._buffer = tenant, 0, b""
        self._is_open, self._has_events = True, False
        self._sent_at = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._status:
            head, separator, _ = self._buffer.partition(b"\r\n\r\n")
            if not separator:
                return
            self._status = int(head[9:12])
            self._run.window.statuses[self._status] += 1
        if self._status == 200:
            self._count()
        elif self._is_whole():
            self._end_of_refusal()

    def _count(self) -> None:
        window = self._run.window
        count = self._buffer.count(EVENT)
        if count and not self._has_events:
            self._has_events = True
            window.first_events.append(time.perf_counter() - self._sent_at)
        window.tokens[self._tenant] += count
        if self._buffer.endswith(END):
            self._done()
        else:
            self._buffer = self._buffer[1 - len(EVENT) :]

    def _is_whole(self) -> bool:
        head, _, body = self._buffer.partition(b"\r\n\r\n")
        return len(body) >= int(_header(head, b"content-length") or 0)

    def _end_of_refusal(self) -> None:
        window = self._run.window
        window.refusals.append(time.perf_counter() - self._sent_at)
        window.retry_after.append(float(_header(self._buffer, b"retry-after") or 0))
        self._done()

    def _done(self) -> None:
        self._is_open = False
        self._run.idle.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        with contextlib.suppress(ValueError):
            self._run.idle.remove(self)
        if self._is_open and not self._run.is_closing:
            self._run.window.lost += 1

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _header(head: bytes, name: bytes) -> bytes | None:
    for line in head.split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.lower() == name:
            return value.strip()
    return None


class _Run:
    """The load process."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.idle: deque[Client] = deque()
        self.is_closing = False
        self.clients: list[Client] = []
        self.window = Window(load.tenants)
        self._source = random.Random(load.seed)
        self._tasks: set[asyncio.Task[None]] = set()

    def request(self, tenant: int) -> bytes:
        load, source = self.load, self._source
        body: dict[str, Any] = {"max_tokens": load.output_len, "ignore_eos": True, "stream": True, "stream_interval": 1}
        body["prompt"] = " ".join(source.choices(WORDS, k=load.input_len))
        body["seed"] = source.randrange(1 << 30)
        if load.by == "user":
            body["user"] = f"user-{tenant}"
        data = json.dumps(body)
        key = f"Authorization: Bearer key-{tenant}\r\n" if load.by == "key" else ""
        head = f"POST {load.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{key}"
        return f"{head}Content-Length: {len(data)}\r\n\r\n{data}".encode()

    async def send(self, tenant: int) -> None:
        if self.idle:
            client = self.idle.pop()
        else:
            loop = asyncio.get_running_loop()
            client = Client(self)
            try:
                await loop.create_connection(lambda: client, "127.0.0.1", self.load.port)
            except OSError:
                self.window.lost += 1
                return
            self.clients.append(client)
        client.send(tenant, self.request(tenant))

    async def drive(self, rate: float, seconds: float, choose: Callable[[], int]) -> None:
        """Sends requests at random times, at this average rate per second."""
        now = time.perf_counter()
        end = now + seconds
        due = now
        while due < end:
            delay = due - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
                self.window.late = max(self.window.late, time.perf_counter() - due)
            task = asyncio.create_task(self.send(choose()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            self.window.sent += 1
            due += self._source.expovariate(rate)

    async def measure(self, rate: float, seconds: float, choose: Callable[[], int]) -> Window:
        self.window = window = Window(self.load.tenants)
        await self.drive(rate, seconds, choose)
        self.window = Window(self.load.tenants)
        return window.close()

    def memory(self) -> dict[str, float]:
        return {name: resident_bytes(pid) / 2**20 for name, pid in self.load.pids.items()}

    async def run(self) -> dict[str, Any]:
        """Runs the load and returns figures: memory in MiB, times in milliseconds."""
        load, source = self.load, self._source
        await self.drive(load.rate, load.baseline / 3, lambda: source.randrange(load.tenants))
        before = await self.measure(load.rate, load.baseline * 2 / 3, lambda: source.randrange(load.tenants))
        weights = [FACTOR] + [1] * (load.tenants - 1)
        tenants = range(load.tenants)
        await self.drive(load.rate * load.overload, load.warmup, lambda: source.choices(tenants, weights)[0])
        memory = self.memory()
        cpu = processor_seconds(load.pids)
        gc.collect()
        gc.freeze()
        peak = dict(memory)
        watcher = asyncio.create_task(self._watch(peak))
        window = await self.measure(
            load.rate * load.overload, load.duration, lambda: source.choices(tenants, weights)[0]
        )
        watcher.cancel()
        shares = {name: (after - cpu[name]) / window.seconds for name, after in processor_seconds(load.pids).items()}
        end = self.memory()
        self.is_closing = True
        for client in self.clients:
            client.close()
        return {
            "baseline_tokens_per_s": before.tokens_per_s,
            "tokens_per_s": window.tokens_per_s,
            "goodput": window.tokens_per_s / before.tokens_per_s,
            "jain": sum(window.tokens) ** 2 / (load.tenants * sum(count * count for count in window.tokens)),
            "tokens": window.tokens,
            "sent": window.sent,
            "statuses": dict(window.statuses),
            "lost": window.lost,
            "late_ms": window.late * 1e3,
            "refusal_ms": describe([seconds * 1e3 for seconds in window.refusals]),
            "first_event_ms": describe([seconds * 1e3 for seconds in window.first_events]),
            "retry_after_s": describe(list(window.retry_after)),
            "memory_mib": memory,
            "memory_at_end_mib": end,
            "memory_peak_mib": peak,
            "cpu_share": shares,
            "connections": len(self.clients),
        }

    async def _watch(self, peak: dict[str, float]) -> None:
        while True:
            await asyncio.sleep(1)
            for name, size in self.memory().items():
                peak[name] = max(peak[name], size)


def load_main() -> int:
    """The load process: reads a ``Load`` from standard input, writes the figures to standard output."""
    load = Load(**json.load(sys.stdin))

    async def run() -> dict[str, Any]:
        return await _Run(load).run()

    print(json.dumps(run_loop(run())))
    return 0


# -- the measurement -------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts a server and the load, and stops both.

    Raises:
        RuntimeError: One of them failed.
    """
    rate = arguments.slots / (arguments.output_len * arguments.step_us * 1e-6)
    num_blocks = arguments.slots * ((2 * arguments.input_len + arguments.output_len) // 32 + 4)
    device = {"step_us": arguments.step_us, "token_us": 0, "context_us": 0, "vocab_size": arguments.vocab_size}
    device["num_blocks"] = max(num_blocks, 1024)
    flags = {
        "--distributed-executor-backend": "simulated",
        "--simulated-device": json.dumps(device),
        "--max-num-seqs": arguments.slots,
        "--max-num-batched-tokens": 8192,
        "--log-level": "warning",
    }
    command = [sys.executable, "-m", "api", "serve", "--port", "{port}"]
    command += [str(part) for flag in flags.items() for part in flag]
    if arguments.by == "key":
        command += ["--api-key", *(f"key-{number}" for number in range(arguments.tenants))]
    server = Server([*command, *arguments.server_flags])
    try:
        server.wait_ready()
        load = Load(
            port=server.port,
            path="/v1/completions",
            rate=rate,
            overload=arguments.overload,
            warmup=arguments.warmup,
            duration=arguments.duration,
            baseline=arguments.baseline,
            tenants=arguments.tenants,
            by=arguments.by,
            input_len=arguments.input_len,
            output_len=arguments.output_len,
            seed=arguments.seed,
            pids=named_pids(server.pid),
        )
        figures = run_load(load)
        if figures["lost"] or set(figures["statuses"]) - {"200", "429"}:
            print(f"server log:\n{server.log()}", file=sys.stderr)
        return {"rate": rate, **figures}
    finally:
        server.stop()


def run_load(load: Load) -> dict[str, Any]:
    """Runs the load in a separate process.

    Raises:
        RuntimeError: It failed.
    """
    process = start_process(
        [sys.executable, str(Path(__file__).resolve()), "--load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        seconds = load.baseline + load.warmup + load.duration + 60
        output, _ = process.communicate(json.dumps(asdict(load)).encode(), seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError("the load process did not exit") from None
    finally:
        end_process(process)
    if process.returncode:
        raise RuntimeError(f"the load process ended with exit code {process.returncode}")
    figures: dict[str, Any] = json.loads(output)
    return figures


def format_report(figures: dict[str, Any]) -> str:
    """The figures of ``measure`` as text."""
    tokens = figures["tokens"]
    statuses = ", ".join(f"{count} x {status}" for status, count in sorted(figures["statuses"].items()))
    lines = [
        f"the device can serve {figures['rate']:.1f} requests/s; {figures['sent']} sent: {statuses}, {figures['lost']} "
        f"lost, over {figures['connections']} connections; sent up to {figures['late_ms']:.0f} ms late",
        f"{figures['tokens_per_s']:.0f} tokens/s, {figures['baseline_tokens_per_s']:.0f} without overload",
        f"tokens served: heavy tenant {tokens[0]}, others {min(tokens[1:])} to {max(tokens[1:])} each",
    ]
    for name in figures["memory_mib"]:
        before, after = figures["memory_mib"][name], figures["memory_at_end_mib"][name]
        peak, cpu = figures["memory_peak_mib"][name], figures["cpu_share"][name]
        lines.append(
            f"{name}: {before:.1f} MiB after the warm-up, {after:.1f} at the end, peak {peak:.1f}; {cpu:.0%} cpu"
        )
    names = {"refusal_ms": "rejection (ms)", "first_event_ms": "first event (ms)", "retry_after_s": "Retry-After (s)"}
    lines.append(format_distributions({text: figures[name] for name, text in names.items() if figures[name]}))
    return "\n".join(lines)


def verdicts(figures: dict[str, Any]) -> dict[str, bool]:
    """Each bar, and whether it is met."""
    growth = max(figures["memory_at_end_mib"][name] - size for name, size in figures["memory_mib"].items())
    refusal = figures["refusal_ms"]["p99"] if figures["refusal_ms"] else 0.0
    return {
        f"memory grew by {growth:.1f} MiB, bar {MAX_GROWTH_MIB:.0f}": growth <= MAX_GROWTH_MIB,
        f"p99 rejection time {refusal:.1f} ms, bar {MAX_REFUSAL_MS:.0f}": refusal <= MAX_REFUSAL_MS,
        f"goodput {figures['goodput']:.1%}, bar {MIN_GOODPUT:.0%}": figures["goodput"] >= MIN_GOODPUT,
        f"Jain's index {figures['jain']:.4f}, bar {MIN_JAIN}": figures["jain"] >= MIN_JAIN,
        "only 200 and 429, no connection lost": not figures["lost"] and not set(figures["statuses"]) - {"200", "429"},
    }


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure a server under overload, with a simulated device.")
    add = parser.add_argument
    add("--overload", type=float, default=10.0, metavar="X", help="load as a multiple of what the device can serve")
    add("--duration", type=float, default=180.0, metavar="SECONDS", help="measured time")
    add("--warmup", type=float, default=60.0, metavar="SECONDS", help="overload before the measurement")
    add("--baseline", type=float, default=30.0, metavar="SECONDS", help="time without overload before the warm-up")
    add("--slots", type=int, default=64, metavar="N", help="maximum number of running requests")
    add("--step-us", type=float, default=25000.0, metavar="X", help="time per step of the device in microseconds")
    add("--input-len", type=int, default=32, metavar="N", help="words per prompt")
    add("--output-len", type=int, default=64, metavar="N", help="tokens per output")
    add(
        "--tenants",
        type=int,
        default=16,
        metavar="N",
        help=f"tenants; the first sends {FACTOR} times as much as others",
    )
    add("--by", choices=("key", "user"), default="key", help="how tenants are identified")
    add(
        "--vocab-size",
        type=int,
        default=49152,
        metavar="N",
        help="vocabulary size of the tokenizer (default: the demo model's)",
    )
    add("--seed", type=int, default=0)
    add("--strict", action="store_true", help="exit with 1 when a bar is missed")
    add("--json", type=Path, metavar="FILE", help="write all figures to this file")
    add("server_flags", nargs="*", metavar="-- FLAGS", help="server flags")
    return parser


def main() -> int:
    if sys.argv[1:] == ["--load"]:
        return load_main()
    arguments = create_parser().parse_args()
    with signals_as_exceptions():
        try:
            figures = measure(arguments)
        except (RuntimeError, OSError) as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
    print(format_report(figures))
    results = verdicts(figures)
    for name, is_met in results.items():
        print(f"{'met   ' if is_met else 'MISSED'} {name}")
    if arguments.json:
        report = {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "summary": figures}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(results.values()) or not arguments.strict else 1


if __name__ == "__main__":
    sys.exit(main())
