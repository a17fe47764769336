"""The application on a real socket, and clients that write bytes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import uvicorn

from api.config import ServerConfig
from api.server.http_protocol import Connections
from api.server.run import open_listener
from tests.fakes import FakeServer

DEADLINE = 60.0
"""Seconds that anything may take that must happen."""


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class StartedServer(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_started = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_started.set()


@asynccontextmanager
async def running(server: FakeServer, connections: Connections | None = None) -> AsyncIterator[int]:
    """The application on a real socket; gives its port."""
    factory = (connections or Connections()).protocol
    config = uvicorn.Config(server.app, loop="none", http=factory, ws="none", log_config=None, port=0)  # type: ignore[arg-type]
    http = StartedServer(config)
    with open_listener(ServerConfig(port=0)) as listener:
        task = asyncio.create_task(http._serve([listener]))
        await http.is_started.wait()
        yield listener.getsockname()[1]
        http.should_exit = True
        await task


async def talk(port: int, *parts: bytes) -> bytes:
    """Sends parts one by one and returns all that comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.005)
        return await asyncio.wait_for(reader.read(), DEADLINE)
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def until(condition: Callable[..., object], interval: float = 0.002) -> None:
    """Waits for something that must happen; an interval of 0 waits no turn of the loop longer."""
    deadline = asyncio.get_running_loop().time() + DEADLINE
    while not condition():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(interval)
