"""``octavo run-batch``: answers the requests of an OpenAI batch file without a server.

Each input line is ``{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}``; output lines
are as in OpenAI's batch API. Requests go through the server's application, so every endpoint that takes JSON works in
a batch.
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
from api.engine.metrics import EngineMetrics
from api.engine.pool import create_engines
from api.engine.progress import LoadBar
from api.generation.host import Host
from api.generation.served_model import ServedModel
from api.generation.serving import Serving
from api.http.traffic import Traffic
from api.model.files import ModelFiles
from api.server.app import create_app

DEFAULT_CONCURRENCY = 512
MAX_WAITING_BYTES = 64 << 20
"""Bytes of finished answers that may wait in memory for earlier ones."""
TRANSFER_TIMEOUT = 600
"""Seconds that a download or upload may stall."""


class BatchError(Exception):
    """A batch file cannot be read or written; the message is for the user."""


class BatchLine(msgspec.Struct):
    """An input line."""

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
    """An output line. A rejected request has the response in ``response`` as well as an ``error``."""

    id: str
    custom_id: str | None
    response: BatchResponse | None
    error: BatchFailure | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``run-batch``, in addition to the engine's."""
    add = parser.add_argument
    add("-i", "--input-file", required=True, metavar="FILE", help="Input in JSONL: a file, - or an http(s) URL.")
    add(
        "-o",
        "--output-file",
        required=True,
        metavar="FILE",
        help="Output, in request order: a file, - or an http(s) URL for PUT.",
    )
    add(
        "--max-concurrency",
        type=int,
        default=DEFAULT_CONCURRENCY,
        metavar="N",
        help=f"Maximum number of concurrent requests (default: {DEFAULT_CONCURRENCY}).",
    )


def run_batch(config: ServerConfig, files: ModelFiles, source: str, target: str, max_concurrency: int) -> int:
    """Answers a batch.

    Args:
        config: Resolved, including the model's files.
        files: The model's files.
        source: Path, ``-`` or URL of the input.
        target: Path, ``-`` or URL of the output.
        max_concurrency: Maximum number of concurrent requests.

    Returns:
        The exit code: 0 even if requests were rejected; their output lines say so.

    Raises:
        BatchError: A file cannot be read or written.
        EngineDeadError: The engine cannot be started.
    """
    # Only this process can reach the application.
    config = msgspec.structs.replace(config, api_key=[])
    with _opened(source, target) as (lines, output):
        counts = uvloop.run(_serve_batch(config, files, lines, output, max(1, max_concurrency)))
    print(f"octavo: {counts.done} requests, {counts.failed} failed", file=sys.stderr)
    return 0


@contextlib.contextmanager
def _opened(source: str, target: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The input and output files; URLs are mapped to temporary files."""
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
    metrics = EngineMetrics(files.name, engine=config.first_replica)
    bar = LoadBar()
    client = create_engines(config, lambda: files.tokenizer, metrics, on_progress=bar.update)
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
    """Answers each line of a batch, and writes the answers in input order as soon as possible.

    Early answers wait for those before them, in a temporary file if there are many.

    Args:
        app: The application.
        lines: JSONL; empty lines are skipped.
        output: Receives a line for each input line.
        max_concurrency: Maximum number of concurrent requests.
        max_line: Maximum length of a line in bytes.
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
    """Writes lines in order of their places. Early lines wait; on exit, all remaining ones are written."""

    def __init__(self, output: IO[bytes], memory: int = MAX_WAITING_BYTES) -> None:
        """``memory`` is the number of bytes of lines that may wait in memory; more wait in a temporary file."""
        self._output = output
        self._memory = memory
        self._next = 0
        """The place to write next."""
        self._waiting: dict[int, bytes | tuple[int, int]] = {}
        """By place: the line, or its offset and length in the file."""
        self._num_bytes = 0
        """Bytes of lines waiting in memory."""
        self._end = 0
        """End of the file."""
        self._file = tempfile.SpooledTemporaryFile[bytes](1)

    def put(self, place: int, line: bytes) -> None:
        """Adds the line of a place; each place comes once."""
        if place != self._next:
            self._keep(place, line)
            return
        self._output.write(line)
        self._next += 1
        while self._next in self._waiting:
            self._write(self._next)
            self._next += 1
        self._output.flush()  # finished work must not be lost if the process dies

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
        """Writes all remaining lines, even after a failure."""
        with self._file:
            for place in sorted(self._waiting):
                self._write(place)
            self._output.flush()


async def _answer(app: Starlette, number: int, line: bytes, seen: set[str], max_line: int) -> BatchResult:
    """The output line for an input line, valid or not."""
    result = BatchResult(f"batch-{secrets.token_hex(12)}", None, None, None)
    try:
        if len(line) > max_line:
            raise ValueError(f"longer than {max_line} bytes (--max-body-size)")
        entry = msgspec.json.decode(line, type=BatchLine)
        result.custom_id = entry.custom_id
        if entry.custom_id in seen:
            raise ValueError("custom_id must be unique, but an earlier line has the same")
        seen.add(entry.custom_id)
        if entry.method != "POST":
            raise ValueError(f"method must be POST, got {entry.method}")
        if entry.body.get("stream"):
            raise ValueError("stream is not supported in a batch")
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
    """Sends a request through the application. Returns the response's status and body."""
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
