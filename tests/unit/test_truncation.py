"""A prompt that is cut keeps what the tokenizer puts around a text, on every route."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from api.model.tokenizer import Tokenizer, kept_tokens
from engine_core.messages import i32
from tests.fakes import BOS, EOS, FakeServer, tiny_tokenizer, tokens_of
from tests.unit.conftest import Api
from tests.unit.test_tokenizer import unigram, word_piece

TEMPLATES = ("$A", "<s> $A", "$A </s>", "<s> $A </s>", "<s> <s> $A </s>")


def tokenizer_of(template: str) -> Tokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


def backends() -> list[Backend]:
    return [*(tokenizer_of(template).backend for template in TEMPLATES), word_piece(), unigram()]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", backends())
def test_cut_as_the_library_cuts(backend: Backend, side: Literal["left", "right"]) -> None:
    ours = Tokenizer(backend, special_tokens_map={})
    theirs = Backend.from_str(backend.to_str())
    for text in ("a hello world test", "a", "</s>a<s>b"):
        for adds in (True, False):
            ids, around = ours.encode(text, adds), ours.added_around(adds)
            for keep in range(sum(around) + 1, len(ids) + 2):
                theirs.enable_truncation(keep, direction=side)
                expected = theirs.encode(text, add_special_tokens=adds).ids
                assert [ids[place] for place in kept_tokens(len(ids), keep, side, around)] == expected
            for keep in range(sum(around) + 1):
                assert len(kept_tokens(len(ids), keep, side, around)) == min(keep, len(ids))


@pytest.mark.parametrize("template", TEMPLATES)
async def test_every_route_cuts_the_text(template: str) -> None:
    server = FakeServer(tokenizer=tokenizer_of(template))
    api = Api(server)
    before = [BOS] * template.count("<s>")
    after = [EOS] * template.count("</s>")

    async def prompts(path: str, **body: Any) -> list[list[int]]:
        first = len(server.engine.submitted)
        await api.ok(path, body)
        return [i32(request.prompt_token_ids).tolist() for request in server.engine.submitted[first:]]

    keep = len(before) + len(after) + 2
    cut = {"truncate_prompt_tokens": keep}
    for side, text in (("left", "ef"), ("right", "ab")):
        expected = [*before, *tokens_of(text), *after]
        fields = {**cut, "truncation_side": side}
        assert await prompts("/v1/completions", prompt="abcdef", max_tokens=1, **fields) == [expected]
        assert await prompts("/v1/embeddings", input="abcdef", **fields) == [expected]
        assert await prompts("/score", text_1="abcdef", text_2="abcdef", **fields) == [expected] * 2
        messages = [{"role": "user", "content": "abcdef"}]
        more: dict[str, Any] = {"messages": messages, "add_generation_prompt": False, "max_tokens": 1}
        (whole,) = await prompts("/v1/chat/completions", **more, add_special_tokens=True)
        own = whole[len(before) : len(whole) - len(after)]
        own = own[-2:] if side == "left" else own[:2]
        (chat,) = await prompts("/v1/chat/completions", **more, add_special_tokens=True, **fields)
        assert chat == [*before, *own, *after]
    # Ids are the client's own.
    ids = [BOS, *tokens_of("abcdef"), EOS]
    assert await prompts("/v1/completions", prompt=ids, max_tokens=1, **cut) == [ids[-keep:]]

    limits = {"max_tokens_per_query": 1, "max_tokens_per_doc": 3}
    ranked = await prompts("/rerank", query="xyz", documents=["abcdef", "abc"], **limits)
    assert ranked == [[*before, *tokens_of(text), *after] for text in ("x", "abc", "abc")]
    assert await prompts("/rerank", query="x", documents=["abcdef"], **limits, **cut) == [
        [*before, *tokens_of(text), *after] for text in ("x", "bc")
    ]
