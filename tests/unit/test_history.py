"""One history over every route: what the template sees does not depend on the protocol that it came by."""

from __future__ import annotations

import io
import itertools
import json
from typing import Any

import pytest

from api.commands.run_batch import answer_lines
from api.config import ServerConfig
from tests.fakes import MODEL, FakeServer, says
from tests.null.test_history import DEEPSEEK
from tests.routes import CHATS, Reply, ask
from tests.scripted import ScriptedModel
from tests.unit.conftest import Api

DUMP = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}"
NAMES_DEVELOPER = DUMP + "{% if messages[0].role == 'developer' %}{% endif %}"
LOOPS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}[{{ p.text }}]{% endfor %}"
    "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
ROUTES = (*CHATS, "tokenize", "batch")
SPELLING = '{"city":"Köln",  "days": 2}'


async def rendered(route: str, template: str, **fields: Any) -> str:
    """The prompt.

    Args:
        route: One of ``ROUTES``.
        template: Of the model.
        fields: The body, in the words of the route's protocol.
    """
    server = FakeServer(ServerConfig(max_stored_responses=0), script=says("x"), chat_template=template)
    api = Api(server)
    if route == "tokenize":
        ids = (await api.ok("/tokenize", {**fields, "add_generation_prompt": False}))["tokens"]
    elif route == "batch":
        line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": fields}
        output = io.BytesIO()
        await answer_lines(server.app, io.BytesIO(json.dumps(line).encode() + b"\n"), output, 1, 1 << 20)
        assert json.loads(output.getvalue())["response"]["status_code"] == 200, output.getvalue()
    elif route == "messages":
        await api.ok("/v1/messages", {"model": MODEL, "max_tokens": 1, **fields})
    else:
        await api.ok({"chat": "/v1/chat/completions", "responses": "/v1/responses"}[route], fields)
    if route != "tokenize":
        (request,) = server.engine.submitted
        ids = memoryview(request.prompt_token_ids).cast("i").tolist()
    return server.model.tokenizer.decode(ids, False)


def called(route: str, result: Any, **more: Any) -> dict[str, Any]:
    """A question, a call of the function ``f`` with ``SPELLING``, and its result: a text, or texts of parts."""
    user = {"role": "user", "content": "q"}
    texts = None if isinstance(result, str) else result
    if route == "messages":
        content = result if texts is None else [{"type": "text", "text": text} for text in texts]
        use = {"type": "tool_use", "id": "1", "name": "f", "input": json.loads(SPELLING)}
        block = {"type": "tool_result", "tool_use_id": "1", "content": content, **more}
        return {"messages": [user, {"role": "assistant", "content": [use]}, {"role": "user", "content": [block]}]}
    if route == "responses":
        output = result if texts is None else [{"type": "input_text", "text": text} for text in texts]
        return {
            "input": [
                user,
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": SPELLING},
                {"type": "function_call_output", "call_id": "1", "output": output},
            ]
        }
    content = result if texts is None else [{"type": "text", "text": text} for text in texts]
    function = {"name": "f", "arguments": SPELLING}
    return {
        "messages": [
            user,
            {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": "1", "content": content, **more},
        ]
    }


@pytest.mark.parametrize("route", ROUTES)
async def test_a_call_and_its_result(route: str) -> None:
    text = SPELLING if route != "messages" else json.dumps(json.loads(SPELLING), ensure_ascii=False)
    prompt = await rendered(route, DEEPSEEK, **called(route, ["a", "b"]))
    assert prompt == f"<user>q<call>function<sep>f\n```json\n{text}\n```<end><out>a\nb<end>"
    prompt = await rendered(route, LOOPS, **called(route, ["a", "b"]))
    value = json.dumps(json.loads(SPELLING), ensure_ascii=False)
    assert prompt == f"<user>[q]<assistant>[]{value}<tool>[a][b]"
    assert (await rendered(route, LOOPS, **called(route, "a\nb"))).endswith("<tool>[a\nb]")


@pytest.mark.parametrize("route", ["chat", "messages", "tokenize", "batch"])
async def test_a_call_that_failed(route: str) -> None:
    failed = called(route, ["a", "b"], is_error=True)
    assert (await rendered(route, DEEPSEEK, **failed)).endswith("<out>Error: a\nb<end>")
    assert (await rendered(route, LOOPS, **failed)).endswith("<tool>[Error: a][b]")
    reads = "{% for m in messages %}{{ m.role }}{% if m.is_error %}!{% endif %}{{ m.content }};{% endfor %}"
    assert (await rendered(route, reads, **failed)).endswith("tool!a\nb;")
    good = called(route, "a", is_error=False)
    assert (await rendered(route, DEEPSEEK, **good)).endswith("<out>a<end>")


@pytest.mark.parametrize("route", ["chat", "tokenize", "batch"])
async def test_an_empty_list_of_calls_is_none(route: str) -> None:
    silent = {"role": "assistant", "content": "a", "tool_calls": []}
    prompt = await rendered(route, DEEPSEEK, messages=[silent, {"role": "user", "content": "q"}])
    assert prompt == "<assistant>a<user>q"


def instructed(route: str, *roles: str) -> dict[str, Any]:
    """A conversation of messages that say who says them; the first system text is where the protocol has a field."""
    said = [{"role": role, "content": role[:1].upper() + str(i)} for i, role in enumerate(roles)]
    field = {"responses": "instructions", "messages": "system"}.get(route)
    fields: dict[str, Any] = {}
    if field is not None and roles[0] == "system":
        fields[field] = said.pop(0)["content"]
    return {**fields, "input" if route == "responses" else "messages": said}


ROLES: list[tuple[list[str], list[str], list[str]]] = [
    (["developer", "user"], ["system:D0", "user:U1"], ["developer:D0", "user:U1"]),
    (["system", "developer", "user"], ["system:S0\n\nD1", "user:U2"], ["system:S0", "developer:D1", "user:U2"]),
    (["system", "system", "user"], ["system:S0\n\nS1", "user:U2"], ["system:S0\n\nS1", "user:U2"]),
    (
        ["system", "user", "developer", "user"],
        ["system:S0", "user:U1", "system:D2", "user:U3"],
        ["system:S0", "user:U1", "developer:D2", "user:U3"],
    ),
]
"""Roles, and what reaches a template that does not know developers, and one that does."""


@pytest.mark.parametrize(
    ("route", "roles", "unknown", "known"),
    # Anthropic's protocol has no developers.
    [(route, *case) for route in ROUTES for case in ROLES if route != "messages" or "developer" not in case[0]],
)
async def test_roles(route: str, roles: list[str], unknown: list[str], known: list[str]) -> None:
    for template, expected in ((DUMP, unknown), (NAMES_DEVELOPER, known)):
        prompt = await rendered(route, template, **instructed(route, *roles))
        messages = [json.loads(line) for line in prompt.splitlines()]
        assert [f"{message['role']}:{message['content']}" for message in messages] == expected


@pytest.mark.parametrize(
    "config", [ServerConfig(), ServerConfig(enable_auto_tool_choice=True, tool_call_parser="hermes")]
)
@pytest.mark.parametrize("route", CHATS)
async def test_no_tools_are_plain_text(route: str, config: ServerConfig) -> None:
    model = ScriptedModel()
    pieces = ("<tool_call>", '{"name": "f", "arguments": {}}', "</tool_call>")
    marker = model.says("calls", *pieces)
    api = Api(model.fake(config))
    for choice, stream, has_list in itertools.product((None, "auto", "none"), (False, True), (False, True)):
        fields: dict[str, Any] = {"tools": []} if has_list else {}
        if choice is not None:
            fields["tool_choice"] = {"type": choice} if route == "messages" else choice
        assert await ask(api, route, marker, stream=stream, **fields) == Reply("".join(pieces), finish="stop")


@pytest.mark.parametrize("tools", [None, []])
async def test_a_call_that_is_demanded_needs_tools(tools: Any) -> None:
    api = Api(FakeServer())
    user = [{"role": "user", "content": "q"}]
    choices: tuple[Any, ...] = ("required", {"type": "function", "function": {"name": "f"}})
    for choice in choices:
        error = await api.error("/v1/chat/completions", {"messages": user, "tools": tools, "tool_choice": choice})
        assert error["param"] == "tool_choice"
    for choice in ("required", {"type": "function", "name": "f"}):
        error = await api.error("/v1/responses", {"input": "q", "tools": tools, "tool_choice": choice})
        assert error["param"] == "tool_choice"
    for kind in ({"type": "any"}, {"type": "tool", "name": "f"}):
        body = {"model": MODEL, "max_tokens": 1, "messages": user, "tools": tools, "tool_choice": kind}
        assert (await api.post("/v1/messages", body)).status_code == 400
    assert not api.server.engine.submitted
    assert (await api.ok("/tokenize", {"messages": user, "tools": []}))["count"] > 0
