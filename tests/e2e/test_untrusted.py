"""Requests that would take a server down with them: they end with 400, streams and processes go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.server import Server

CHAIN = {
    "$ref": "#/$defs/a0",
    "$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(3000)} | {"a3000": {"type": "integer"}},
}
RULES = "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1}' for i in range(6000)) + '\nr6000: "b"'
TERMINALS = "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(40)) + '\nA40: "b"'
GRAMMARS: list[dict[str, Any]] = [
    {"json": CHAIN},
    {"grammar": RULES},
    {"grammar": TERMINALS},
    {"regex": "\\w?" * 30_000 + "!1"},
    {"regex": "\\w?" * 30_000 + "!2"},
    {"regex": "\\w?" * 30_000 + "!3"},
]
TEMPLATES = [
    "{{ 'a'|center(3000000000) }}",
    "{{ '%2900000000d' % 1 }}",
    "{% set l = range(3000)|list %}" + "{% for i in l %}" * 3 + "{% endfor %}" * 3,
]


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    server = Server("--model", str(tiny_model), "--trust-request-chat-template")
    yield server
    assert server.stop() == 0


async def test_hostile_requests_harm_no_other(server: Server) -> None:
    core = server.child("engine_core").pid
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        tokens = 0

        async def stream() -> None:
            nonlocal tokens
            body = {"prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True, "temperature": 0}
            while True:
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    async for line in response.aiter_lines():
                        assert "error" not in line, line
                        tokens += line.startswith("data: {")

        async def generate(structured: dict[str, Any]) -> httpx.Response:
            body = {"prompt": "x", "max_tokens": 60, "structured_outputs": structured}
            return await client.post("/v1/completions", json=body)

        async def render(template: str) -> httpx.Response:
            body = {"messages": [{"role": "user", "content": "hi"}], "chat_template": template}
            return await client.post("/v1/chat/completions", json=body)

        running = asyncio.create_task(stream())
        for _ in range(2):
            work = [*map(generate, GRAMMARS), *map(render, TEMPLATES)]
            usual = {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
            hostile = asyncio.gather(*work)
            before = tokens
            answer = await generate(usual)
            assert answer.status_code == 200 and json.loads(answer.json()["choices"][0]["text"])
            for response, work_index in zip(await hostile, range(len(work)), strict=True):
                is_grammar = work_index < len(GRAMMARS)
                error = response.json()["error"]
                assert response.status_code == 400, error
                assert error["param"] == ("structured_outputs" if is_grammar else "chat_template"), error
            assert tokens > before
            assert not running.done(), running.exception()
        assert (await client.get("/health")).status_code == 200
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    assert server.child("engine_core").pid == core
