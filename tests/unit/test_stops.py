"""What ends an output, and what of it is text, over every route."""

from __future__ import annotations

from typing import Any

import pytest

from api.config import ServerConfig
from tests.routes import ROUTES, Reply, ask
from tests.scripted import EOS, ScriptedModel
from tests.unit.conftest import Api

EVERYWHERE = pytest.mark.parametrize(
    ("route", "stream"), [(route, stream) for route in ROUTES for stream in (False, True)]
)
INTERVALS = (1, 3)
TOKENS_PER_STEP = (1, 2, 3, 8)


async def replies(model: ScriptedModel, route: str, marker: str, stream: bool, **fields: Any) -> Reply:
    """The reply, which is the same whatever the stream interval is, and however many tokens a step brings."""
    first, *others = [
        await ask(
            Api(model.fake(ServerConfig(stream_interval=interval), tokens_per_step=tokens)),
            route,
            marker,
            stream=stream,
            **fields,
        )
        for interval in (INTERVALS if stream else (1,))
        for tokens in TOKENS_PER_STEP
    ]
    assert all(reply == first for reply in others)
    return first


@EVERYWHERE
async def test_an_end_token_that_is_not_special_is_no_text(route: str, stream: bool) -> None:
    model = ScriptedModel(eos="<|im_end|>", eos_is_special=False)
    marker = model.says("yes", "y", "es", "<|im_end|>")
    reply = await replies(model, route, marker, stream)
    assert (reply.text, reply.finish) == ("yes", "stop")


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_token_is_no_text(route: str, stream: bool) -> None:
    model = ScriptedModel()
    marker = model.says("yes", "yes", "\x0b", "more")
    stop_token_ids = [model.token("\x0b")]
    reply = await replies(model, route, marker, stream, stop_token_ids=stop_token_ids)
    assert (reply.text, reply.finish) == ("yes", "stop")
    reply = await replies(model, route, marker, stream, stop_token_ids=stop_token_ids, include_stop_str_in_output=True)
    assert (reply.text, reply.finish) == ("yes\x0b", "stop")


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_end_token_is_no_text_where_special_tokens_are_shown(route: str, stream: bool) -> None:
    model = ScriptedModel(special=["<|note|>"])
    marker = model.says("note", "a", "<|note|>", "b", EOS)
    reply = await replies(model, route, marker, stream, skip_special_tokens=False)
    assert (reply.text, reply.finish) == ("a<|note|>b", "stop")
    reply = await replies(model, route, marker, stream, skip_special_tokens=False, include_stop_str_in_output=True)
    assert reply.text == f"a<|note|>b{EOS}"


@EVERYWHERE
async def test_a_special_token_as_stop_string(route: str, stream: bool) -> None:
    model = ScriptedModel(special=["<|stop|>", "<|other|>"])
    marker = model.says("stop", "one", "<|other|>", " two", "<|stop|>", " three")
    reply = await replies(model, route, marker, stream, stop=["<|stop|>"])
    assert (reply.text, reply.finish) == ("one two", "stop")
    reply = await replies(model, route, marker, stream, stop=["o<|stop|> th"])
    assert reply.text == "one tw"
    reply = await replies(model, route, marker, stream, stop=["<|nothing|>"])
    assert reply.text == "one two three"


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_special_token_in_a_stop_pattern(route: str, stream: bool) -> None:
    model = ScriptedModel(special=["<|stop|>"])
    marker = model.says("stop", "one", " two", "<|stop|>", " three")
    reply = await replies(model, route, marker, stream, stop_regex=[r"<\|\w+\|>"])
    assert (reply.text, reply.finish) == ("one two", "stop")


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [{"stop": ["STOP"]}, {"stop_regex": ["S[A-Z]+P"]}])
async def test_a_stop_string_that_begins_before_min_tokens(route: str, stream: bool, stop: dict[str, Any]) -> None:
    model = ScriptedModel()
    marker = model.says("stop", *"aSTOPxy")
    for min_tokens, text in ((0, "a"), (2, "a"), (5, "a"), (6, "aSTOPxy")):
        reply = await replies(model, route, marker, stream, min_tokens=min_tokens, **stop)
        assert (reply.text, reply.finish) == (text, "stop"), min_tokens
