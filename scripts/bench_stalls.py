"""Measures how long a single hostile request stalls all others, and how much memory it leaves behind.

    python scripts/bench_stalls.py                        # every row
    python scripts/bench_stalls.py --rows stop,messages   # rows whose names have these prefixes
    python scripts/bench_stalls.py --json stalls.json -- --max-num-seqs 512

The real server runs with a simulated device. While each request is sent and answered, a separate process reads one
stream and polls /health; the longest silence of either is the row's result. Part of it is due to the machine, so the
first and the last row send no request. Memory is that of the api process: its maximum growth during the request, and
the growth that remains a second later. Linux only (memory comes from /proc).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from processes import Server, end_process, signals_as_exceptions, start_process

TARGET_MS = 50.0
TARGET_MIB = 200.0
SETTLE = 1.0
"""Seconds to wait after a row before measuring memory."""
TIMEOUT = 120.0
STREAM = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4000, "ignore_eos": True, "stream": True}
MESSAGE = {"role": "user", "content": "x"}
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


# -- the requests ----------------------------------------------------------------------------------------------


def encode(**fields: Any) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


def integers(count: int) -> bytes:
    return b"[" + b",".join([b"7"] * count) + b"]"


def chat(**fields: Any) -> bytes:
    return encode(**{"messages": [MESSAGE], "max_tokens": 4, **fields})


def complete(prompt: Any = "x", **fields: Any) -> bytes:
    return encode(prompt=prompt, max_tokens=4, **fields)


def tools(count: int) -> list[Any]:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string", "enum": ["a", "b"]} for i in range(8)}}
    return [{"type": "function", "function": {"name": f"tool_{i}", "parameters": schema}} for i in range(count)]


def schema(count: int) -> dict[str, Any]:
    """A JSON schema of about 25 bytes times ``count``."""
    return {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(count)}}


def call(arguments: str) -> list[Any]:
    function = {"name": "f", "arguments": arguments}
    return [MESSAGE, {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}]


def blocks(count: int) -> bytes:
    content = [{"type": "text", "text": "x"}] * count
    return encode(model="m", max_tokens=4, messages=[{"role": "user", "content": content}])


def items(count: int) -> list[Any]:
    return [{"type": "function_call", "call_id": str(i), "name": "f", "arguments": "{}"} for i in range(count)]


def sequence(*pairs: tuple[str, bytes]) -> bytes:
    """A JSON object whose values are given as encoded JSON."""
    return b"{" + b",".join(b'"%b":%b' % (name.encode(), value) for name, value in pairs) + b"}"


BIAS = {str(token): 1 for token in range(1000)}
WORDS = "all human beings are born free and equal, "
EXPONENTS = b"[" + b",".join([b"1.2345678901234567e-300"] * 1_000_000) + b"]"

ROWS: list[tuple[str, str, Callable[[], bytes]]] = [
    ("n with logit_bias", COMPLETIONS, lambda: complete(n=16384, logit_bias=BIAS)),
    ("n with long prompt", COMPLETIONS, lambda: complete([7] * 4000, n=16384)),
    ("n with bad_words", COMPLETIONS, lambda: complete(n=2000, bad_words=[f"word {i}" for i in range(128)])),
    ("n whole answer", COMPLETIONS, lambda: encode(prompt="x", n=2048, max_tokens=64, ignore_eos=True)),
    ("n chat streamed", CHAT, lambda: chat(n=4096, stream=True)),
    ("bad_words of 30 MB", COMPLETIONS, lambda: complete(bad_words=["x" * 240_000] * 128)),
    ("stop of 1 MB", COMPLETIONS, lambda: complete(stop="x" * 1_000_000)),
    ("stop within bounds", COMPLETIONS, lambda: complete(stop=[f"{i:064d}" for i in range(64)])),
    ("stop_regex", COMPLETIONS, lambda: complete(stop_regex=["(a|b|c){1,200}"] * 16)),
    ("echo of 15M ids", COMPLETIONS, lambda: sequence(("prompt", integers(15_000_000)), ("echo", b"true"))),
    ("echo of 500k ids", COMPLETIONS, lambda: sequence(("prompt", integers(500_000)), ("echo", b"true"))),
    (
        "truncated ids",
        COMPLETIONS,
        lambda: sequence(("prompt", integers(500_000)), ("truncate_prompt_tokens", b"9"), ("echo", b"true")),
    ),
    ("detokenize 10M ids", "/detokenize", lambda: sequence(("tokens", integers(10_000_000)))),
    ("detokenize 500k ids", "/detokenize", lambda: sequence(("tokens", integers(500_000)))),
    ("tokenize 32 MB", "/tokenize", lambda: encode(prompt=WORDS * 780_000)),
    ("tokenize 4 MB", "/tokenize", lambda: encode(prompt=WORDS * 99_000)),
    ("tokenize one word", "/tokenize", lambda: encode(prompt="x" * 4_000_000)),
    ("tokenize strings", "/tokenize", lambda: encode(prompt=WORDS * 50_000, return_token_strs=True)),
    ("messages 300k", CHAT, lambda: chat(messages=[MESSAGE] * 300_000)),
    ("messages 16k", CHAT, lambda: chat(messages=[MESSAGE] * 16_000)),
    ("responses items 300k", RESPONSES, lambda: encode(input=[MESSAGE] * 300_000)),
    ("responses items 16k", RESPONSES, lambda: encode(input=[MESSAGE] * 16_000)),
    ("responses calls 16k", RESPONSES, lambda: encode(input=items(16_000))),
    ("anthropic blocks 300k", "/v1/messages", lambda: blocks(300_000)),
    ("anthropic blocks 30k", "/v1/messages", lambda: blocks(30_000)),
    ("anthropic count", "/v1/messages/count_tokens", lambda: blocks(30_000)),
    ("parts 30k", CHAT, lambda: chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}] * 30_000}])),
    ("template kwargs 20 MB", CHAT, lambda: chat(chat_template_kwargs={str(i): [i] for i in range(1_200_000)})),
    ("template kwargs 1 MB", CHAT, lambda: chat(chat_template_kwargs={str(i): i for i in range(100_000)})),
    ("template kwargs text", CHAT, lambda: chat(chat_template_kwargs={"a": "x" * 30_000_000})),
    ("call arguments 20 MB", CHAT, lambda: chat(messages=call(json.dumps({"a": [1] * 7_000_000})))),
    ("call arguments 1 MB", CHAT, lambda: chat(messages=call(json.dumps({"a": list(range(150_000))})))),
    (
        "truncate with offsets",
        COMPLETIONS,
        lambda: complete(WORDS * 95_000, truncate_prompt_tokens=8, return_token_offsets=True),
    ),
    ("logit_bias of 2M keys", COMPLETIONS, lambda: complete(logit_bias=dict.fromkeys(map(str, range(2_000_000)), 1))),
    ("logit_bias of 30k keys", COMPLETIONS, lambda: complete(logit_bias=dict.fromkeys(map(str, range(30_000)), 1))),
    ("tools 1000", CHAT, lambda: chat(tools=tools(1000), tool_choice="none")),
    ("tools 1000 forced", CHAT, lambda: chat(tools=tools(1000), tool_choice="required")),
    ("tools 20k", CHAT, lambda: chat(tools=tools(20_000), tool_choice="none")),
    ("schema of 250 KB", CHAT, lambda: chat(response_format=_format(schema(8_000)))),
    ("schema of 20 MB", CHAT, lambda: chat(response_format=_format(schema(700_000)))),
    ("schema as text", COMPLETIONS, lambda: complete(guided_json=json.dumps(schema(900_000)))),
    ("choices", COMPLETIONS, lambda: complete(guided_choice=[f"c{number}" for number in range(4000)])),
    ("deep JSON", CHAT, lambda: sequence(("messages", b"[" * 16_000_000))),
    ("deep objects", CHAT, lambda: sequence(("chat_template_kwargs", b'{"a":' * 5_000_000))),
    ("long text", COMPLETIONS, lambda: complete("x" * 32_000_000)),
    ("long text, three bytes", COMPLETIONS, lambda: ('{"prompt":"' + "€" * 10_500_000 + '"}').encode()),
    ("escapes", COMPLETIONS, lambda: complete("\n" * 15_500_000)),
    ("white space", COMPLETIONS, lambda: b'{"prompt":' + b" " * 32_000_000 + b'"x"}'),
    ("hard floats", CHAT, lambda: sequence(("messages", json.dumps([MESSAGE]).encode()), ("unknown", EXPONENTS))),
    ("long integers", CHAT, lambda: sequence(("documents", b"[" + b",".join([b"1" * 4000] * 8000) + b"]"))),
    ("unknown fields", COMPLETIONS, lambda: sequence(("prompt", b'"x"'), ("unknown", integers(15_000_000)))),
    ("prompts 1024", COMPLETIONS, lambda: complete([WORDS * 20] * 1024)),
    ("prompts 1024 of ids", COMPLETIONS, lambda: complete([[7] * 500] * 1024)),
    ("embeddings", "/v1/embeddings", lambda: encode(input=[WORDS * 20] * 2048)),
    ("embeddings of ids", "/v1/embeddings", lambda: encode(input=[[7] * 240] * 2048)),
    ("score", "/score", lambda: encode(queries="x", documents=[WORDS * 10] * 2048)),
    ("score long documents", "/score", lambda: encode(queries="x", documents=[WORDS * 380] * 2000)),
    ("rerank", "/rerank", lambda: encode(query="x", documents=[WORDS] * 2048)),
]


def _format(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}


# -- the prober: a separate process ----------------------------------------------------------------------------


class Silence:
    """Tracks the longest time without a sign of life."""

    def __init__(self) -> None:
        self._last = 0.0
        self.longest = 0.0

    def sign(self) -> None:
        """Records a sign of life."""
        now = time.perf_counter()
        if self._last:
            self.longest = max(self.longest, now - self._last)
        self._last = now

    def take(self) -> float:
        """The longest silence since the last call, including one still in progress."""
        longest = max(self.longest, time.perf_counter() - self._last)
        self.longest = 0.0
        return longest


async def read_stream(port: int, silence: Silence) -> None:
    """Reads one stream after another; the time between streams does not count."""
    body = json.dumps(STREAM)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{head}\r\nConnection: close\r\n\r\n{body}".encode())
        while await reader.read(1 << 16):
            silence.sign()
        writer.close()


async def ask_health(port: int, silence: Silence) -> None:
    """Polls, sending the next request as soon as the last is answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while True:
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":0")
        await reader.readexactly(int(length.partition(b":")[2]))
        silence.sign()
        await asyncio.sleep(0.002)


async def probe(port: int) -> None:
    """Answers each line on standard input with the longest silences since the last one, in milliseconds."""
    stream, health = Silence(), Silence()
    tasks = [asyncio.create_task(read_stream(port, stream)), asyncio.create_task(ask_health(port, health))]
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        for task in tasks:
            if task.done():
                task.result()
        print(json.dumps({"stream": stream.take() * 1e3, "health": health.take() * 1e3}), flush=True)
    for task in tasks:
        task.cancel()


class Prober:
    """The process that measures silences."""

    def __init__(self, port: int) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--probe", str(port)]
        self._process = start_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def take(self) -> dict[str, float]:
        """Longest silences since the last call, in milliseconds."""
        inlet, outlet = self._process.stdin, self._process.stdout
        assert inlet is not None and outlet is not None
        _write(inlet, b"\n")
        silences: dict[str, float] = json.loads(outlet.readline())
        return silences

    def stop(self) -> None:
        end_process(self._process)


def _write(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(data)
    pipe.flush()


# -- the measurement -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """The effects of one request."""

    name: str
    megabytes: float
    status: int
    """HTTP status; 0: the connection was closed."""
    seconds: float
    stream_ms: float
    """Longest silence of the stream."""
    health_ms: float
    peak_mib: float
    """Peak growth of the api's memory."""
    kept_mib: float
    """Lasting growth of the api's memory."""
    answer: str

    @property
    def silence_ms(self) -> float:
        return max(self.stream_ms, self.health_ms)

    def __str__(self) -> str:
        bad = "  <--" if self.silence_ms > TARGET_MS or self.kept_mib > TARGET_MIB else ""
        return (
            f"{self.name:24} {self.megabytes:6.1f} {self.status:5d} {self.seconds:7.2f} {self.stream_ms:8.1f} "
            f"{self.health_ms:8.1f} {self.peak_mib:8.1f} {self.kept_mib:8.1f}  {self.answer[:60]}{bad}"
        )


def memory_mib(pid: int, field: str) -> float:
    """VmRSS or VmHWM of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return 0.0


def reset_peak(pid: int) -> None:
    """Makes VmHWM the peak from now on."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def send(port: int, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of the response; status 0 if the server closed the connection."""
    connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may be rejected before all of it is sent
            connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, EOFError) as error:
        return 0, str(error).encode()
    finally:
        connection.close()


def measure_row(server: Server, prober: Prober, name: str, path: str, body: bytes) -> Result:
    """Sends one request and measures its effects; with an empty path, measures without a request."""
    before = memory_mib(server.pid, "VmRSS")
    reset_peak(server.pid)
    prober.take()
    begin = time.perf_counter()
    status, answer = send(server.port, path, body) if path else (0, b"")
    seconds = time.perf_counter() - begin
    time.sleep(SETTLE)
    silences = prober.take()
    message = answer.partition(b'"message":"')[2] or answer
    return Result(
        name=name,
        megabytes=len(body) / 1e6,
        status=status,
        seconds=seconds,
        stream_ms=silences["stream"],
        health_ms=silences["health"],
        peak_mib=memory_mib(server.pid, "VmHWM") - before,
        kept_mib=memory_mib(server.pid, "VmRSS") - before,
        answer=message[:200].decode("utf-8", "replace").replace("\n", " "),
    )


def measure(arguments: argparse.Namespace) -> list[Result]:
    """Starts a server, runs all rows, and stops it."""
    device = {"step_us": arguments.step_us, "token_us": 0, "context_us": 0, "num_blocks": 65536}
    flags = {
        "--distributed-executor-backend": "simulated",
        "--simulated-device": json.dumps(device),
        "--max-num-seqs": 256,
        "--max-num-batched-tokens": 8192,
        "--served-model-name": "m",
        "--log-level": "warning",
    }
    command = [sys.executable, "-m", "api", "serve", "--port", "{port}"]
    server = Server([*command, *(str(part) for flag in flags.items() for part in flag), *arguments.server_flags])
    results = []
    wanted = tuple(arguments.rows.split(","))
    rows = [row for row in ROWS if row[0].startswith(wanted)]
    print(f"{'row':24} {'MB':>6} {'':5} {'s':>7} {'stream':>8} {'/health':>8} {'peak MiB':>8} {'kept MiB':>8}")
    try:
        server.wait_ready()
        prober = Prober(server.port)
        try:
            time.sleep(1)
            send(server.port, CHAT, chat())
            for name, path, make in [("idle", "", bytes), *rows, ("idle", "", bytes)]:
                results.append(measure_row(server, prober, name, path, make()))
                print(results[-1], flush=True)
        finally:
            prober.stop()
        return results
    except BaseException:
        print(f"server log:\n{server.log()}", file=sys.stderr)
        raise
    finally:
        server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="Only rows whose names have these prefixes, separated by commas.")
    parser.add_argument(
        "--step-us", type=float, default=5000.0, help="Time per step of the simulated device in microseconds."
    )
    parser.add_argument("--json", type=Path, help="Write results to this file.")
    parser.add_argument("--probe", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("server_flags", nargs="*", metavar="-- FLAG", help="Additional server flags.")
    arguments = parser.parse_args()
    if arguments.probe is not None:
        asyncio.run(probe(arguments.probe))
        return 0
    with signals_as_exceptions():
        results = measure(arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    worst = max((result for result in results if result.megabytes), key=lambda result: result.silence_ms, default=None)
    idle = max(result.silence_ms for result in results if not result.megabytes)
    if worst is None:
        return 0
    print(f"longest silence: {worst.silence_ms:.1f} ms ({worst.name}); idle: {idle:.1f} ms; target: {TARGET_MS:.0f} ms")
    return int(worst.silence_ms > max(TARGET_MS, 2 * idle))


if __name__ == "__main__":
    sys.exit(main())
