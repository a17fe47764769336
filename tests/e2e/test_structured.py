"""Structured outputs of the demo model: each kind, in mixed batches, over HTTP, and while processes die."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from api import LLM, SamplingParams
from api.params.structured import StructuredOutputsParams
from tests.e2e.server import PATIENCE, Server, stream_text

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["nice", "clever", "tall"]}, "maxItems": 4},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
MAP = {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "number"}}}
LARK = 'start: "move " DIRECTION (" then " DIRECTION)*\nDIRECTION: "north" | "south"'
GBNF = 'root ::= "yes" | "no" " " [a-z]+'

PROMPTS = [
    "Describe a person as JSON: ",
    "The answer is ",
    "In the beginning was the ",
    "Some measurements as JSON: ",
]
KINDS: list[dict[str, Any] | None] = [
    {"json": PERSON},
    {"json": MAP, "disable_any_whitespace": True},
    {"json_object": True},
    None,
    {"regex": r"[A-Z][a-z]+ \d{3}(-\d+)?"},
    {"choice": ["red", "dark red", "grün"]},
    {"grammar": LARK},
    {"grammar": GBNF},
]


def check(kind: dict[str, Any] | None, text: str, finish_reason: str | None) -> None:
    if kind is None:
        return
    if "json" in kind or "json_object" in kind:
        jsonschema.Draft202012Validator(kind.get("json", {"type": "object"})).validate(json.loads(text))
        return
    if finish_reason != "stop":
        return
    if "regex" in kind:
        assert re.fullmatch(kind["regex"], text)
    elif "choice" in kind:
        assert text in kind["choice"]
    elif kind["grammar"] == LARK:
        assert re.fullmatch("move (north|south)( then (north|south))*", text)
    else:
        assert re.fullmatch("yes|no [a-z]+", text)


def requests(max_tokens: int = 40) -> list[tuple[str, SamplingParams]]:
    """Every kind with every prompt, greedy and sampled."""
    found = []
    for number, prompt in enumerate(PROMPTS):
        for place, kind in enumerate(KINDS):
            structured = None if kind is None else StructuredOutputsParams(**kind)
            params = SamplingParams(
                temperature=(number + place) % 2, seed=number, max_tokens=max_tokens, structured_outputs=structured
            )
            found.append((prompt, params))
    return found


Output = tuple[str, list[int], str | None]


def generate(llm: LLM, wanted: list[tuple[str, SamplingParams]]) -> list[Output]:
    prompts, params = [prompt for prompt, _ in wanted], [params for _, params in wanted]
    results = llm.generate(prompts, params, use_tqdm=False)
    return [(r.outputs[0].text, r.outputs[0].token_ids, r.outputs[0].finish_reason) for r in results]


@pytest.mark.timeout(600)
def test_every_kind_in_mixed_batches_is_as_it_is_alone(demo_model: Path) -> None:
    wanted = requests()
    with LLM(str(demo_model), max_model_len=1024) as llm:
        batch = generate(llm, wanted)
        for (_, params), (text, _, reason) in zip(wanted, batch, strict=True):
            structured = params.structured_outputs
            kind = None
            if structured is not None:
                kind = {
                    name: value
                    for name in ("json", "json_object", "regex", "choice", "grammar")
                    if (value := getattr(structured, name)) is not None
                }
            check(kind, text, reason)
        alone = [generate(llm, [request])[0] for request in wanted[: len(KINDS)]]
    assert alone == batch[: len(KINDS)]
    setups: list[dict[str, Any]] = [{"max_in_flight_steps": 1}, {"num_gpu_blocks_override": 12, "max_num_seqs": 8}]
    for options in setups:
        with LLM(str(demo_model), max_model_len=256, check_every_step=True, **options) as llm:
            assert generate(llm, wanted) == batch


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[Server]:
    with Server("--model", str(demo_model), "--max-model-len", "1024", "--max-worker-restarts", "20") as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"regex": "["}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs"),
        ({"guided_grammar": "%%%"}, "guided_grammar"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json"),
        ({"guided_json": {"type": "nonsense"}}, "guided_json"),
        ({"guided_json": {"$ref": "http://example.com/schema"}}, "guided_json"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {"type": "null"}}}}},
            "response_format",
        ),
        ({"guided_json": {}, "guided_whitespace_pattern": "["}, "guided_json"),
        ({"guided_json": PERSON, "max_tokens": 5}, "max_tokens"),
    ],
)
def test_what_cannot_be_compiled_or_completed_is_a_400(
    server: Server, fields: dict[str, Any], param: str, stream: bool
) -> None:
    response = server.post("/v1/completions", {"prompt": "x", "max_tokens": 64, "stream": stream, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and error["message"].startswith(param), error


def test_over_http(server: Server) -> None:
    messages = [{"role": "user", "content": "Who are you?"}]
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    for max_tokens in (20, 26, 40, 200):
        body = {"messages": messages, "response_format": schema, "max_tokens": max_tokens, "temperature": 1, "n": 4}
        answer = server.post("/v1/chat/completions", {**body, "seed": max_tokens}).json()
        for choice in answer["choices"]:
            check({"json": PERSON}, choice["message"]["content"], choice["finish_reason"])
    with httpx.stream(
        "POST",
        f"{server.url}/v1/chat/completions",
        json={"messages": messages, "structured_outputs": {"choice": ["left", "right"]}, "stream": True},
        timeout=PATIENCE,
    ) as response:
        chunks = [json.loads(data)["choices"][0] for data in stream_text(response.iter_lines()) if data != "[DONE]"]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) in ("left", "right")
    assert chunks[-1]["finish_reason"] == "stop"


async def stream_tokens(server: Server, body: dict[str, Any], kill: str = "", after: int = 0) -> tuple[list[int], str]:
    """The tokens of a stream and why it ended; a process is killed after some of them."""
    tokens: list[int] = []
    reason = ""
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=120) as client,
        client.stream("POST", "/v1/completions", json={**body, "stream": True, "return_token_ids": True}) as response,
    ):
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            choice = event["choices"][0]
            tokens += choice["token_ids"]
            reason = choice["finish_reason"] or reason
            if kill and len(tokens) >= after:
                server.kill(kill)
                kill = ""
    assert not kill, "the stream was too short for this test"
    return tokens, reason


@pytest.mark.timeout(300)
@pytest.mark.parametrize("title", ["octavo worker 0", "octavo engine_core"])
def test_a_constrained_stream_survives_a_death(server: Server, title: str) -> None:
    people = {"type": "array", "items": PERSON, "minItems": 3}
    body = {"prompt": PROMPTS[0], "guided_json": people, "max_tokens": 120, "temperature": 1, "seed": 5}
    undisturbed = asyncio.run(stream_tokens(server, body))
    assert len(undisturbed[0]) > 65
    for after in (1, 60):
        assert asyncio.run(stream_tokens(server, body, title, after)) == undisturbed
