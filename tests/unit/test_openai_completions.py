"""/v1/completions."""

from __future__ import annotations

from typing import Any

import pytest

from api.config import ServerConfig
from tests.fakes import BOS, EOS, MAX_MODEL_LEN, MODEL, VOCAB_SIZE, FakeServer, says, token_of, tokens_of
from tests.unit.conftest import Api

PATH = "/v1/completions"


async def streamed(api: Api, body: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The choices of a stream, put together by hand."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in await api.stream(PATH, body):
        for piece in chunk["choices"]:
            choice = choices.setdefault(piece["index"], {"text": "", "token_ids": [], "logprobs": None})
            choice["text"] += piece["text"]
            choice["token_ids"] += piece.get("token_ids", [])
            if "prompt_token_ids" in piece:
                choice["prompt_token_ids"] = piece["prompt_token_ids"]
            assert choice.get("finish_reason") is None, "nothing comes after the end"
            choice["finish_reason"], choice["stop_reason"] = piece["finish_reason"], piece["stop_reason"]
            if piece["logprobs"] is not None:
                columns = choice["logprobs"] or {name: [] for name in piece["logprobs"]}
                choice["logprobs"] = {name: columns[name] + piece["logprobs"][name] for name in columns}
    return choices


async def test_a_completion(api: Api) -> None:
    answer = await api.complete("abc", max_tokens=5, model=MODEL)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == MODEL
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "abcab",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": None,
            "prompt_token_ids": None,
            "prompt_logprobs": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 5,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_max_tokens_null_is_16_or_what_is_left(api: Api) -> None:
    assert (await api.complete("abc", max_tokens=None))["usage"]["completion_tokens"] == 16
    long = tokens_of("a" * (MAX_MODEL_LEN - 3))
    assert (await api.complete(long, max_tokens=None))["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["abab"]),
        (["ab", "xyz"], ["abab", "xyzx"]),
        (tokens_of("ab"), ["abab"]),
        ([tokens_of("ab"), tokens_of("c")], ["abab", "cccc"]),
    ],
)
async def test_four_kinds_of_prompts(api: Api, prompt: Any, texts: list[str]) -> None:
    answer = await api.complete(prompt, max_tokens=4)
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"logprobs": 2},
        {"logprobs": 0, "return_tokens_as_token_ids": True},
        {"echo": True},
        {"echo": True, "logprobs": 1},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"return_token_ids": True},
        {"return_token_ids": True, "echo": True, "logprobs": 3},
        {"n": 3, "seed": 1},
        {"stop": ["ob"]},
        {"stop": ["ob"], "include_stop_str_in_output": True, "logprobs": 1},
        {"stop": "ow", "min_tokens": 9},
        {"stop_token_ids": [token_of(ord("w"))]},
        {"stream_options": {"continuous_usage_stats": True}},
    ],
)
async def test_streamed_is_whole(fields: dict[str, Any]) -> None:
    """Both forms say the same, whatever is asked for."""
    api = Api(FakeServer(script=says("löwe 🦁 bottle robot")))
    body = {"prompt": ["the prompt", "another ü"], "max_tokens": 20, **fields}
    only_streamed = {"stream_options"} & set(body)
    whole = await api.ok(PATH, {name: value for name, value in body.items() if name not in only_streamed})
    choices = await streamed(api, body)
    assert sorted(choices) == [choice["index"] for choice in whole["choices"]]
    for choice in whole["choices"]:
        piece = choices[choice["index"]]
        for name in ("text", "finish_reason", "stop_reason", "logprobs"):
            assert piece[name] == choice[name], name
        assert piece["token_ids"] == (choice["token_ids"] or [])
        assert piece.get("prompt_token_ids") == choice.get("prompt_token_ids")


async def test_one_token_per_event(api: Api) -> None:
    chunks = await api.stream(PATH, {"prompt": "hey", "max_tokens": 7})
    assert len(chunks) == 7
    assert all("usage" not in chunk for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["system_fingerprint"]) for chunk in chunks}) == 1


async def test_usage_in_a_stream(api: Api) -> None:
    api.server.engine.num_cached_tokens = 3
    body = {"prompt": ["ab", "cd"], "n": 2, "max_tokens": 4}
    *chunks, last = await api.stream(PATH, {**body, "stream_options": {"include_usage": True}})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 16,
        "total_tokens": 22,
        "prompt_tokens_details": {"cached_tokens": 6},
    }
    assert last["usage"] == (await api.ok(PATH, body))["usage"]
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await api.stream(PATH, {"prompt": "ab", "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [*range(1, 17), 16]


async def test_usage_in_every_stream() -> None:
    api = Api(FakeServer(ServerConfig(enable_force_include_usage=True)))
    for options in (None, {"include_usage": False}, {"continuous_usage_stats": False}):
        chunks = await api.stream(PATH, {"prompt": "ab", "max_tokens": 2, "stream_options": options})
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 2]


async def test_stop_strings_that_span_tokens() -> None:
    api = Api(FakeServer(script=says("one two three")))
    answer = await api.complete(stop=["o th"], max_tokens=30)
    assert answer["choices"][0]["text"] == "one tw"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] == "o th"
    assert answer["usage"]["completion_tokens"] == len("one two th")
    answer = await api.complete(stop=["o th"], max_tokens=30, include_stop_str_in_output=True)
    assert answer["choices"][0]["text"] == "one two th"


async def test_end_tokens() -> None:
    api = Api(FakeServer(script=says("done")))
    answer = await api.complete(max_tokens=30)
    assert answer["choices"][0]["text"] == "done"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] is None
    assert answer["usage"]["completion_tokens"] == 5
    answer = await api.complete(max_tokens=30, stop_token_ids=[token_of(ord("n"))])
    assert answer["choices"][0]["text"] == "do"
    assert answer["choices"][0]["stop_reason"] == token_of(ord("n"))
    answer = await api.complete(max_tokens=7, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert (await api.complete(max_tokens=7, ignore_eos=True, skip_special_tokens=False))["choices"][0]["text"] == (
        "done</s></s></s>"
    )
    assert (await api.complete(max_tokens=30, min_tokens=6))["usage"]["completion_tokens"] == 6


async def test_characters_cut_in_pieces() -> None:
    text = "aé漢🦁z"
    api = Api(FakeServer(script=says(text)))
    chunks = await api.stream(PATH, {"prompt": "x", "max_tokens": 50})
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == text
    assert "\ufffd" not in "".join(texts)
    assert len(texts) == len(text.encode()) + 1  # a token that completes no character has an event, too


async def test_logprobs(api: Api) -> None:
    answer = await api.complete(tokens_of("ab"), max_tokens=2, logprobs=2)
    assert answer["choices"][0]["logprobs"] == {
        "text_offset": [0, 1],
        "token_logprobs": [-1.0, -1.0],
        "tokens": ["a", "b"],
        "top_logprobs": [{"b": -2.0, "c": -3.0, "a": -1.0}, {"c": -2.0, "d": -3.0, "b": -1.0}],
    }
    answer = await api.complete(tokens_of("ab"), max_tokens=1, logprobs=1, return_tokens_as_token_ids=True)
    a = token_of(ord("a"))
    assert answer["choices"][0]["logprobs"]["tokens"] == [f"token_id:{a}"]
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{f"token_id:{a + 1}": -2.0, f"token_id:{a}": -1.0}]
    wanted = [token_of(ord("x")), token_of(ord("y"))]
    answer = await api.complete(tokens_of("ab"), max_tokens=1, logprob_token_ids=wanted)
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{"x": -2.0, "y": -3.0, "a": -1.0}]


async def test_logprobs_of_parts_of_characters() -> None:
    api = Api(FakeServer(script=says("é!")))
    logprobs = (await api.complete(max_tokens=3, logprobs=0))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert logprobs["text_offset"] == [0, 0, 1]


async def test_echo_with_logprobs_scores_the_prompt(api: Api) -> None:
    """What lm-eval asks for: the log probabilities of a text, with one token generated, or none."""
    for max_tokens in (0, 1):
        answer = await api.complete("héy", max_tokens=max_tokens, echo=True, logprobs=1)
        choice = answer["choices"][0]
        assert choice["text"] == "héy" + "h" * max_tokens
        assert choice["finish_reason"] == "length"
        logprobs = choice["logprobs"]
        assert logprobs["tokens"][:5] == ["<s>", "h", "bytes:\\xc3", "bytes:\\xa9", "y"]
        assert len(logprobs["tokens"]) == 5 + max_tokens
        assert logprobs["text_offset"][:5] == [0, 0, 1, 1, 2]
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:] == [-1.0] * (4 + max_tokens)
        assert answer["usage"]["completion_tokens"] == max_tokens
    params = api.server.engine.submitted[-1].sampling_params
    assert params is not None and params.prompt_logprobs == 1


async def test_echo_of_token_ids_and_of_a_cut_prompt(api: Api) -> None:
    assert (await api.complete([BOS, *tokens_of("ab")], max_tokens=1, echo=True))["choices"][0]["text"] == "<s>aba"
    for side, echo in (("left", "efe"), ("right", "aba")):
        fields = {"truncate_prompt_tokens": 3, "truncation_side": side}
        (choice,) = (await api.complete("abcdef", max_tokens=1, echo=True, logprobs=0, **fields))["choices"]
        assert choice["text"] == echo
        assert choice["logprobs"]["tokens"] == ["<s>", *echo]
        assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]
    answer = await api.complete("abcdef", max_tokens=1, echo=True, truncate_prompt_tokens=1)
    assert answer["choices"][0]["text"] == "."  # the start token is no text


@pytest.mark.parametrize(
    ("prompt", "tokens", "offsets"),
    [
        ("h</s>i", ["<s>", "h", "</s>", "i"], [0, 0, 1, 5]),
        ([token_of(ord("h")), EOS, token_of(ord("i"))], ["h", "</s>", "i"], [0, 1, 5]),
        ("é!", ["<s>", "bytes:\\xc3", "bytes:\\xa9", "!"], [0, 0, 0, 1]),
    ],
)
async def test_where_the_tokens_of_an_echo_lie(api: Api, prompt: Any, tokens: list[str], offsets: list[int]) -> None:
    answer = await api.complete(prompt, max_tokens=2, echo=True, logprobs=0)
    logprobs, text = answer["choices"][0]["logprobs"], answer["choices"][0]["text"]
    assert logprobs["tokens"][: len(tokens)] == tokens
    assert logprobs["text_offset"][: len(tokens)] == offsets
    echo = prompt if isinstance(prompt, str) else "h</s>i"
    assert text.startswith(echo) and logprobs["text_offset"][len(tokens)] == len(echo)
    assert [list(entry) for entry in logprobs["top_logprobs"][-2:]] == [[token] for token in logprobs["tokens"][-2:]]


async def test_ids_beyond_the_tokenizer_have_entries_of_their_own() -> None:
    server = FakeServer(vocab_size=VOCAB_SIZE + 8)
    server.engine.likely = lambda before: {VOCAB_SIZE + 1: -1.0, VOCAB_SIZE + 2: -2.0}
    answer = await Api(server).complete("a", max_tokens=1, logprobs=2)
    (entry,) = answer["choices"][0]["logprobs"]["top_logprobs"]
    assert entry == {f"token_id:{VOCAB_SIZE + 1}": -1.0, f"token_id:{VOCAB_SIZE + 2}": -2.0}


async def test_prompt_logprobs(api: Api) -> None:
    answer = await api.complete(tokens_of("ab"), max_tokens=1, prompt_logprobs=1)
    b = token_of(ord("b"))
    assert answer["choices"][0]["prompt_logprobs"] == [
        None,
        {
            str(b): {"logprob": -1.0, "rank": 1, "decoded_token": "b"},
            str(b + 1): {"logprob": -2.0, "rank": 1, "decoded_token": "c"},
        },
    ]


async def test_n_and_seeds(api: Api) -> None:
    answer = await api.complete(["ab", "cd"], n=2, seed=7, max_tokens=2)
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "ab", "cd", "cd"]
    seeds = [request.sampling_params.seed for request in api.server.engine.submitted if request.sampling_params]
    assert seeds[:2] == seeds[2:]
    assert len(set(seeds)) == 2
    assert seeds[0] == 7


async def test_truncation(api: Api) -> None:
    async def prompt(**fields: Any) -> list[int]:
        answer = await api.complete("abcdef", max_tokens=2, return_token_ids=True, **fields)
        tokens: list[int] = answer["choices"][0]["prompt_token_ids"]
        return tokens

    assert await prompt() == [BOS, *tokens_of("abcdef")]
    assert await prompt(add_special_tokens=False) == tokens_of("abcdef")
    assert await prompt(truncate_prompt_tokens=3) == [BOS, *tokens_of("ef")]
    assert await prompt(truncate_prompt_tokens=3, add_special_tokens=False) == tokens_of("def")
    assert await prompt(truncate_prompt_tokens=3, truncation_side="right") == [BOS, *tokens_of("ab")]
    assert await prompt(truncate_prompt_tokens=-1) == [BOS, *tokens_of("abcdef")]
    long = await api.complete("x" * 9000, max_tokens=12, return_token_ids=True, truncate_prompt_tokens=-1)
    assert len(long["choices"][0]["prompt_token_ids"]) == MAX_MODEL_LEN - 12
    assert long["usage"]["completion_tokens"] == 12


async def test_fields_reach_the_engine(api: Api) -> None:
    await api.complete(
        "x",
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        logit_bias={"5": 2, "6": -100},
        allowed_token_ids=[7, 8],
        bad_words=["the"],
        min_tokens=1,
        max_tokens=4,
        seed=-1,
        cache_salt="salt",
        request_id="mine",
        user="somebody",
        unknown_field={"is": "ignored"},
    )
    request = api.server.engine.submitted[0]
    params = request.sampling_params
    assert params is not None
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.25, 3, 0.125)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.5)
    assert params.logit_bias == ((5, 2.0), (6, -100.0))
    assert params.allowed_token_ids == (7, 8)
    assert params.bad_words_token_ids
    assert (params.min_tokens, params.max_tokens, params.seed) == (1, 4, (1 << 64) - 1)
    assert (request.cache_salt, request.request_id) == ("salt", "cmpl-mine")


async def test_precedence_of_sampling_values() -> None:
    """The request, then the server's configuration and the model's, then the built-in value."""
    api = Api(FakeServer(ServerConfig(), generation_config={"temperature": 0.5, "top_k": 9, "max_new_tokens": 6}))
    await api.complete("x", temperature=0.25, top_k=None, max_tokens=100)
    params = api.server.engine.submitted[0].sampling_params
    assert params is not None
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.25, 9, 1.0, 6)
    assert params.eos_token_ids[0] == EOS


async def test_priority_needs_its_policy(api: Api) -> None:
    error = await api.error(PATH, {"prompt": "x", "priority": 1})
    assert error["param"] == "priority"
    await api.complete("x", priority=0)
