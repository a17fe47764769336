"""``octavo run-batch``: answers the requests of an OpenAI batch file without a server.

Each line of the input is ``{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}``, each
line of the output what OpenAI's batch API writes. The requests go through the application that serves, so every
endpoint that takes JSON can be in a batch.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import secrets
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from typing import IO, Any

import msgspec
import uvloop
from starlette.applications import Starlette
from starlette.types import Message
from tqdm import tqdm

from api.config import ServerConfig
from api.engine.client import EngineClient
from api.engine.metrics import EngineMetrics
from api.engine.progress import LoadBar
from api.generation.host import Host
from api.generation.served_model import ServedModel
from api.generation.serving import Serving
from api.http.traffic import Traffic
from api.model.files import ModelFiles
from api.server.app import create_app

DEFAULT_CONCURRENCY = 512
MAX_WAITING_BYTES = 64 << 20
"""Of answers that wait in memory for those before them."""
TRANSFER_TIMEOUT = 600
"""Seconds that a download or an upload may stand still."""


class BatchError(Exception):
    """A batch file cannot be read or written; the message is for a person."""


class BatchLine(msgspec.Struct):
    """A line of the input."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


class BatchResponse(msgspec.Struct):
    status_code: int
    request_id: str
    body: Any


class BatchFailure(msgspec.Struct):
    code: str
    message: str


class BatchResult(msgspec.Struct):
    """A line of the output. A request that was refused has its answer in ``response``, and says so in ``error``."""

    id: str
    custom_id: str | None
    response: BatchResponse | None
    error: BatchFailure | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``run-batch`` beside those of the engine."""
    add = parser.add_argument
    add("-i", "--input-file", required=True, metavar="FILE", help="JSONL of requests: a file, - or an http(s) URL.")
    add(
        "-o",
        "--output-file",
        required=True,
        metavar="FILE",
        help="Where answers go, in the order in which they are ready: a file, - or an http(s) URL for PUT.",
    )
    add(
        "--max-concurrency",
        type=int,
        default=DEFAULT_CONCURRENCY,
        metavar="N",
        help=f"Requests that are worked on at the same time (default: {DEFAULT_CONCURRENCY}).",
    )


def run_batch(config: ServerConfig, files: ModelFiles, source: str, target: str, max_concurrency: int) -> int:
    """Answers a batch.

    Args:
        config: Resolved, with the model's files in it.
        files: The model's.
        source: Path, ``-`` or URL of the requests.
        target: Path, ``-`` or URL of the answers.
        max_concurrency: Requests that are open at the same time.

    Returns:
        The exit code: 0 also if requests were refused, as their lines say.

    Raises:
        BatchError: A file cannot be read or written.
        EngineDeadError: The engine cannot be started.
    """
    # Nobody but this process can reach the application.
    config = msgspec.structs.replace(config, api_key=[])
    with _opened(source, target) as (lines, output):
        counts = uvloop.run(_serve_batch(config, files, lines, output, max(1, max_concurrency)))
    print(f"octavo: {counts.done} requests, {counts.failed} of them failed", file=sys.stderr)
    return 0


@contextlib.contextmanager
def _opened(source: str, target: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The files of requests and answers; what has a URL is a temporary file here."""
    with contextlib.ExitStack() as stack:
        try:
            lines = stack.enter_context(_open_source(source))
            output = stack.enter_context(_open_target(target))
        except (OSError, ValueError) as error:
            raise BatchError(f"{error}") from error
        yield lines, output
        try:
            output.flush()
            if _is_url(target):
                _upload(output, target)
        except (OSError, ValueError) as error:
            raise BatchError(f"{target}: {error}") from error


def _open_source(source: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    if source == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    if not _is_url(source):
        return open(source, "rb")
    with contextlib.ExitStack() as stack:
        answer = stack.enter_context(urllib.request.urlopen(source, timeout=TRANSFER_TIMEOUT))
        file = stack.enter_context(tempfile.TemporaryFile())
        shutil.copyfileobj(answer, file)
        file.seek(0)
        answer.close()
        stack.pop_all()
    return file


def _open_target(target: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    if target == "-":
        return contextlib.nullcontext(sys.stdout.buffer)
    return tempfile.TemporaryFile() if _is_url(target) else open(target, "wb")


def _upload(file: IO[bytes], target: str) -> None:
    length = file.tell()
    file.seek(0)
    headers = {"Content-Type": "application/x-ndjson", "Content-Length": str(length)}
    request = urllib.request.Request(target, file, headers, method="PUT")
    with urllib.request.urlopen(request, timeout=TRANSFER_TIMEOUT):
        pass


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


class Counts(msgspec.Struct):
    """What became of the requests."""

    done: int = 0
    failed: int = 0


async def _serve_batch(
    config: ServerConfig, files: ModelFiles, lines: IO[bytes], output: IO[bytes], max_concurrency: int
) -> Counts:
    metrics = EngineMetrics(files.name)
    bar = LoadBar()
    client = EngineClient(config.engine, files.tokenizer, metrics, on_progress=bar.update, log_level=config.log_level)
    try:
        try:
            ready = await client.start()
        finally:
            bar.close()
        host = Host(config)
        model = ServedModel(host, files, client, metrics, ready)
        try:
            app = create_app(Serving(host, [model]), Traffic(metrics.registry))
            counts = await answer_lines(app, lines, output, max_concurrency, config.max_body_size)
        finally:
            host.close()
        if client.dead is not None:
            raise client.dead
        return counts
    finally:
        await client.close()


async def answer_lines(
    app: Starlette, lines: IO[bytes], output: IO[bytes], max_concurrency: int, max_line: int
) -> Counts:
    """Answers each line of a batch, and writes the answers down in the order of the lines, as soon as that is possible.

    An answer that is early waits for those before it, in a temporary file if they are many.

    Args:
        app: The application.
        lines: JSONL; empty lines are left out.
        output: Takes a line for each of them.
        max_concurrency: Requests that are open at the same time.
        max_line: Bytes that a line may have.
    """
    counts = Counts()
    encoder = msgspec.json.Encoder()
    numbered = enumerate((number, line) for number, line in enumerate(lines, 1) if line.strip())
    seen: set[str] = set()

    async def work() -> None:
        for place, (number, line) in numbered:
            result = await _answer(app, number, line, seen, max_line)
            in_order.put(place, encoder.encode(result) + b"\n")
            counts.done += 1
            counts.failed += result.error is not None
            progress.update()

    with tqdm(desc="Requests", unit="req", delay=1) as progress, InOrder(output) as in_order:
        workers = [asyncio.create_task(work()) for _ in range(max_concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
    return counts


class InOrder:
    """Writes lines in the order of their places. Those that are early wait, and are written at the end in any case."""

    def __init__(self, output: IO[bytes], memory: int = MAX_WAITING_BYTES) -> None:
        """Prepares. ``memory`` is how many bytes of lines may wait in memory; others wait in a temporary file."""
        self._output = output
        self._memory = memory
        self._next = 0
        """The place that is written next."""
        self._waiting: dict[int, bytes | tuple[int, int]] = {}
        """By place: lines, or offset and length in the file."""
        self._num_bytes = 0
        """Of lines that wait in memory."""
        self._end = 0
        """Of the file."""
        self._file = tempfile.SpooledTemporaryFile[bytes](1)

    def put(self, place: int, line: bytes) -> None:
        """Takes the line of a place; each comes once."""
        if place != self._next:
            self._keep(place, line)
            return
        self._output.write(line)
        self._next += 1
        while self._next in self._waiting:
            self._write(self._next)
            self._next += 1
        self._output.flush()  # what was paid for must not be lost with the process

    def _keep(self, place: int, line: bytes) -> None:
        if self._num_bytes + len(line) <= self._memory:
            self._waiting[place] = line
            self._num_bytes += len(line)
            return
        self._waiting[place] = (self._end, len(line))
        self._file.seek(self._end)
        self._end += self._file.write(line)

    def _write(self, place: int) -> None:
        line = self._waiting.pop(place)
        if isinstance(line, bytes):
            self._num_bytes -= len(line)
        else:
            self._file.seek(line[0])
            line = self._file.read(line[1])
        self._output.write(line)

    def __enter__(self) -> InOrder:
        return self

    def __exit__(self, *_: object) -> None:
        """Also after a failure: lines whose predecessors never came are written all the same."""
        with self._file:
            for place in sorted(self._waiting):
                self._write(place)
            self._output.flush()


async def _answer(app: Starlette, number: int, line: bytes, seen: set[str], max_line: int) -> BatchResult:
    """The output line of an input line, whatever that is."""
    result = BatchResult(f"batch-{secrets.token_hex(12)}", None, None, None)
    try:
        if len(line) > max_line:
            raise ValueError(f"it is longer than {max_line} bytes (--max-body-size)")
        entry = msgspec.json.decode(line, type=BatchLine)
        result.custom_id = entry.custom_id
        if entry.custom_id in seen:
            raise ValueError("its custom_id was used by an earlier line")
        seen.add(entry.custom_id)
        if entry.method != "POST":
            raise ValueError(f"its method must be POST, got {entry.method}")
        if entry.body.get("stream"):
            raise ValueError("an answer in a batch cannot be streamed")
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        result.error = BatchFailure("invalid_line", f"line {number}: {error}".replace("`", ""))
        return result
    status, body = await _call(app, entry, result.id)
    try:
        content = msgspec.json.decode(body)
    except msgspec.DecodeError:
        content = body.decode("utf-8", "replace")
    result.response = BatchResponse(status, result.id, content)
    if status != 200:
        problem = content.get("error") if isinstance(content, dict) else None
        problem = problem if isinstance(problem, dict) else {}
        result.error = BatchFailure(str(problem.get("type", status)), str(problem.get("message", f"status {status}")))
    return result


async def _call(app: Starlette, entry: BatchLine, request_id: str) -> tuple[int, bytes]:
    """Sends a request through the application. Returns status and body of the answer."""
    data = msgspec.json.encode(entry.body)
    path = entry.url.partition("?")[0]
    status = 500
    parts: list[bytes] = []
    pending = [{"type": "http.request", "body": data, "more_body": False}]
    never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    async def receive() -> Message:
        return pending.pop() if pending else await never

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "replace"),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(data)).encode()),
            (b"x-request-id", request_id.encode()),
        ],
        "client": None,
        "server": None,
    }
    try:
        await app(scope, receive, send)
    finally:
        never.cancel()
    return status, b"".join(parts)
