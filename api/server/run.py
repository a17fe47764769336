"""Runs the server: opens the port, starts the engine, serves HTTP and shuts down."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import faulthandler
import os
import resource
import shlex
import signal
import socket
import ssl
import stat
import sys
import time
from collections.abc import Awaitable, Callable, Generator
from typing import TypeVar

import msgspec
import uvicorn
import uvloop

from api.config import ServerConfig
from api.engine.metrics import EngineMetrics
from api.engine.pool import create_engines
from api.engine.progress import LoadBar
from api.errors import EngineDeadError
from api.flags import ConfigError
from api.generation.adapters import Adapters
from api.generation.host import Host
from api.generation.served_model import ServedModel
from api.generation.serving import Serving
from api.http.tracing import Tracer, create_tracer
from api.http.traffic import Traffic
from api.media.reader import MAX_HELD_BYTES
from api.model.files import ModelFiles
from api.server.app import create_app
from api.server.garbage import Collector, keep_what_lives
from api.server.http_protocol import MAX_CONNECTIONS, Connections, Limits
from api.server.service_manager import notify
from api.server.startup import StartupApp
from api.server.stats_log import StatsLog
from engine_core.launch import get_logger
from engine_core.messages import LoadProgress

logger = get_logger()
T = TypeVar("T")

BACKLOG = 2048
KEEP_ALIVE_TIMEOUT = 65
"""Seconds that an idle connection stays open. Longer than the timeout of proxies, which could otherwise send a request
on a connection that is just being closed."""
MAX_UNSENT_BYTES = 128 << 10
"""Bytes per connection that the kernel buffers in addition to those in flight."""
FILES_APART = 256
"""Maximum number of file descriptors other than connections."""
FLUSH_TIMEOUT = 2.0
"""Seconds for answers that were ended at shutdown to reach their clients."""
_HOST_ADVICE = "use 127.0.0.1 for this machine only, or 0.0.0.0 for all addresses"
SHUTTING_DOWN = "the server is shutting down"


class PortInUseError(Exception):
    """The server cannot listen on its address; the message says why."""


def run_server(
    config: ServerConfig, files: ModelFiles, *, announce: Callable[[str], None] | None = None, progress: bool = True
) -> int:
    """Serves until a signal arrives or the engine dies.

    Args:
        config: The resolved configuration.
        files: The model's files.
        announce: Shows the welcome text once requests are accepted. Default: print it to standard output.
        progress: Show a progress bar while the model loads.

    Returns:
        The exit code: 0, or that of an engine that died permanently after it had started.

    Raises:
        PortInUseError: The server cannot listen on its address. Nothing was started.
        ConfigError: The TLS files cannot be used. Nothing was started.
        EngineDeadError: The engine cannot be started.
        ModelFileError: The tokenizer cannot be read.
    """
    faulthandler.register(signal.SIGUSR1)
    check_tls(config)
    listener = open_listener(config)
    try:
        return uvloop.run(_Run(config, files, listener, announce or _write, progress=progress).serve())
    finally:
        listener.close()
        if config.uds is not None:
            with contextlib.suppress(OSError):
                os.unlink(config.uds)


def _write(text: str) -> None:
    """Writes a line to standard output. If its disk is full, or nobody reads it, the server goes on without it."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is in the buffer must not fail later


def check_tls(config: ServerConfig) -> None:
    """Checks the TLS files before anything expensive starts.

    Raises:
        ConfigError: A file cannot be read, key and certificate do not match, or the ciphers are invalid.
    """
    if config.ssl_keyfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    path = config.ssl_certfile or config.ssl_keyfile
    flag = "--ssl-certfile" if config.ssl_certfile else "--ssl-keyfile"
    try:
        # Without a password callback, OpenSSL would ask for the passphrase at the terminal.
        context.load_cert_chain(path, config.ssl_keyfile, password=lambda: b"")
        if config.ssl_ca_certs is not None:
            flag, path = "--ssl-ca-certs", config.ssl_ca_certs
            context.load_verify_locations(path)
        if config.ssl_ciphers is not None:
            flag, path = "--ssl-ciphers", config.ssl_ciphers
            context.set_ciphers(path)
    except OSError as error:  # includes ssl.SSLError
        hint = (
            ""
            if flag == "--ssl-ciphers"
            else f"; expected PEM files, the key ({config.ssl_keyfile}) without a passphrase"
        )
        raise ConfigError(f"{flag} {path}: {error.strerror or error}{hint}") from error


def open_listener(config: ServerConfig) -> socket.socket:
    """Binds the port, or the Unix socket, before anything expensive starts. Clients cannot connect yet.

    Raises:
        PortInUseError: The address is in use, not available or not permitted.
    """
    if config.uds is not None:
        return _open_unix(config.uds)
    where = f"{config.host or '0.0.0.0'}:{config.port}"
    try:
        found = socket.getaddrinfo(
            config.host or None, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_ADDRCONFIG
        )
    except OSError as error:
        raise PortInUseError(
            f"cannot listen on {where}: cannot resolve --host {config.host} ({error.strerror}); {_HOST_ADVICE}"
        ) from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit this. Otherwise, the kernel would buffer megabytes for a client that does not read.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_UNSENT_BYTES)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise PortInUseError(f"cannot listen on {where}: {error.strerror}; {_advice(error, config)}") from error
    return listener


def _advice(error: OSError, config: ServerConfig) -> str:
    """What to do about an address that cannot be bound."""
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {config.host} is not an address of this machine; {_HOST_ADVICE}"
    if error.errno == errno.EACCES:
        return "ports below 1024 require privileges; choose a higher one with --port"
    return "choose another port with --port, or 0 for any free one"


def _open_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise PortInUseError(f"cannot listen on {path}: the path exists and is not a socket")
            with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
                try:
                    probe.connect(path)
                except ConnectionRefusedError:
                    os.unlink(path)  # left over from a server that has exited
                else:
                    raise PortInUseError(f"cannot listen on {path}: another server is listening there")
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise PortInUseError(f"cannot listen on {path}: {error.strerror}") from error
    except PortInUseError:
        listener.close()
        raise
    return listener


class _HttpServer(uvicorn.Server):
    """uvicorn without its own signal handling."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._is_listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # two servers may bind the same port while neither listens
            raise PortInUseError(f"cannot listen: {error.strerror}") from error
        self._is_listening.set()

    async def start(self, listener: socket.socket) -> asyncio.Task[None]:
        """Starts to serve. Returns the task of the server.

        Raises:
            PortInUseError: Another server is already listening.
        """
        task = asyncio.create_task(self.serve(sockets=[listener]))
        listening = asyncio.create_task(self._is_listening.wait())
        await asyncio.wait((task, listening), return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if task.done():
            task.result()
        return task


class _Run:
    """One run of the server, from start to exit."""

    def __init__(
        self,
        config: ServerConfig,
        files: ModelFiles,
        listener: socket.socket,
        announce: Callable[[str], None],
        *,
        progress: bool,
    ) -> None:
        self._config = config
        self._files = files
        self._listener = listener
        self._announce = announce
        self._bar = LoadBar(enabled=progress)
        self._app = StartupApp(config.root_path)
        self._begin = time.monotonic()
        self._stop = asyncio.Event()
        """Set by the first signal, or when the engine is dead."""
        self._stop_now = asyncio.Event()
        """Set by the second signal."""
        self._exit_code = 0
        self._tracer: Tracer | None = None
        names = config.served_model_name
        self._metrics = EngineMetrics(names[0] if names else files.name, engine=config.first_replica)
        self._client = create_engines(
            config,
            lambda: files.tokenizer,
            self._metrics,
            on_progress=self._on_progress,
            on_fatal=self._on_fatal,
            bounds_queue=True,
            prepares_grammars=config.offers_generation,
        )

    async def serve(self) -> int:
        loop = asyncio.get_running_loop()
        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup
            signals.append(signal.SIGHUP)
        for number in signals:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            server = _HttpServer(_uvicorn_config(self._config, self._app))
            http = await server.start(self._listener)
            try:
                await self._serve(server, http)
            finally:
                server.should_exit = True
                await http
            return self._exit_code
        finally:
            self._bar.close()
            await self._client.close()
            if self._tracer is not None:
                await asyncio.to_thread(self._tracer.close)

    async def _serve(self, server: _HttpServer, http: asyncio.Task[None]) -> None:
        """Starts the engine, then serves until shutdown."""
        ready = await self._unless_stopped(self._client.start())
        self._bar.close()
        if ready is None:
            return
        host = Host(self._config)
        model = ServedModel(host, self._files, self._client, self._metrics, ready)
        if model.images is not None:
            model.images.reader.max_held_bytes = MAX_HELD_BYTES
        adapters = None
        if self._config.engine.executor.lora.enable_lora:
            adapters = Adapters(model)
            await adapters.load_all(self._config.lora_modules)
        traffic = Traffic(self._metrics.registry)
        self._app.app = create_app(Serving(host, [model], adapters), traffic)
        keep_what_lives()
        if self._config.otlp_traces_endpoint is not None:
            self._tracer = create_tracer(self._config.otlp_traces_endpoint, model.name)
            self._metrics.on_trace = self._tracer.record
        helpers = [asyncio.create_task(Collector(lambda: traffic.num_open).run())]
        if not self._config.disable_log_stats:
            helpers += [asyncio.create_task(StatsLog(metrics).run()) for metrics in self._metrics.engines]
        stopper = asyncio.create_task(self._stop_when_asked(server, traffic))
        self._announce(self._ready_text(model))
        notify("READY=1")
        try:
            await http
        finally:
            stopper.cancel()
            for helper in helpers:
                helper.cancel()
            host.close()

    def _on_progress(self, progress: LoadProgress) -> None:
        self._bar.update(progress)
        self._app.update(progress)

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set():
            logger.warning("%s again: exiting now", signal.Signals(number).name)
            self._stop_now.set()
        else:
            logger.info("%s: shutting down; send it again to exit now", signal.Signals(number).name)
            notify("STOPPING=1")
            self._stop.set()

    def _on_fatal(self, error: EngineDeadError) -> None:
        logger.error("the engine is dead: %s", error)
        self._exit_code = error.exit_code
        self._stop.set()

    async def _unless_stopped(self, work: Awaitable[T]) -> T | None:
        """The result of ``work``; None if the server is told to stop first."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            stop.cancel()

    async def _stop_when_asked(self, server: _HttpServer, traffic: Traffic) -> None:
        """Waits for the stop, then drains: rejects new requests, lets open ones finish, and fails those that remain."""
        await self._stop.wait()
        traffic.is_draining = True
        if self._client.dead is None and traffic.num_open:
            timeout = self._config.shutdown_timeout
            logger.info("waiting for %d open requests, up to %g s", traffic.num_open, timeout)
            idle = asyncio.ensure_future(traffic.wait_idle(timeout))
            now = asyncio.ensure_future(self._stop_now.wait())
            await asyncio.wait((idle, now), return_when=asyncio.FIRST_COMPLETED)
            idle.cancel()
            now.cancel()
        if traffic.num_open:
            self._client.fail_all(SHUTTING_DOWN)
            await traffic.wait_idle(FLUSH_TIMEOUT)
        server.should_exit = True
        server.force_exit = traffic.num_open > 0

    def _ready_text(self, model: ServedModel) -> str:
        """The welcome text: where the server listens, and a command to try."""
        seconds = time.monotonic() - self._begin
        config = self._config
        # A certificate rarely names the loopback address, so curl gets -k.
        target, options = _url(config, self._listener), ["-s" if config.ssl_keyfile is None else "-sk"]
        if config.uds is not None:
            options += ["--unix-socket", config.uds]
        headers = ["Content-Type: application/json"]
        if config.api_key:
            headers.append("Authorization: Bearer $OCTAVO_API_KEY")
        body: dict[str, object]
        if not config.offers_generation:
            path, body = "/v1/embeddings", {"input": "Hello"}
        elif model.chat_template is not None:
            path = "/v1/chat/completions"
            body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32}
        else:
            path, body = "/v1/completions", {"prompt": "Hello", "max_tokens": 32}
        body = {"model": model.name, **body}
        command = [
            "curl",
            *map(shlex.quote, [*options, f"{target}{config.root_path}{path}"]),
            *(f'-H "{header}"' for header in headers),
            "-d",
            shlex.quote(msgspec.json.encode(body).decode()),
        ]
        where = f"unix:{config.uds}" if config.uds is not None else f"{target}{config.root_path}/v1"
        return f"Serving {model.name} at {where} (ready in {seconds:.1f} s). Try:\n\n  {' '.join(command)}\n"


def _url(config: ServerConfig, listener: socket.socket) -> str:
    if config.uds is not None:
        return "http://localhost" if config.ssl_keyfile is None else "https://localhost"
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    scheme = "http" if config.ssl_keyfile is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _limits() -> Limits:
    """Limits with as many connections as file descriptors allow; raises the soft limit if needed."""
    wanted = MAX_CONNECTIONS + FILES_APART
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return Limits()
    return Limits(connections=max(min(MAX_CONNECTIONS, soft - FILES_APART), 16))


def _uvicorn_config(config: ServerConfig, app: StartupApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="none",
        http=Connections(_limits()).protocol,  # type: ignore[arg-type]  # a factory does
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="debug" if config.log_level == "debug" else "warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=config.ssl_cert_reqs,
        ssl_ciphers=config.ssl_ciphers or "TLSv1",  # uvicorn's default
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_TIMEOUT,
        timeout_graceful_shutdown=int(FLUSH_TIMEOUT),
    )
