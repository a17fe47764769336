"""From the fields of a request to ``SamplingParams``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.requests import Request

from api.admission import check_number
from api.config import ServerConfig
from api.errors import RequestError
from api.openai.protocol import GenerationRequest
from api.params.sampling import MAX_LOGIT_BIAS, SamplingParams

MAX_KEY_DIGITS = 20
MAX_SHOWN_KEY = 40
"""Characters of a client's key that an error repeats."""

_SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "stop",
    "stop_regex",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "logprob_token_ids",
    "repetition_detection",
    "thinking_token_budget",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)


def sampling_params(
    request: GenerationRequest,
    defaults: Mapping[str, Any],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    best_of: int | None = None,
) -> SamplingParams:
    """What a request asks for, then what the server prefers, then the built-in defaults.

    Its grammar is not among them, see ``requested_grammar``.

    Args:
        request: Has the fields whose names and meanings are those of ``SamplingParams``.
        defaults: The server's.
        max_tokens: Longest completion.
        logprobs: Most likely tokens to report at each place.
        prompt_logprobs: The same for the prompt.
        best_of: Completions of which the best are returned.

    Raises:
        RequestError: A field is out of range.
    """
    fields = msgspec.structs.asdict(request)
    wanted = {name: fields[name] for name in _SAME_NAME if fields[name] is not None}
    if request.logit_bias is not None:
        wanted["logit_bias"] = _logit_bias(request.logit_bias)
    if logprobs is None and request.logprob_token_ids:
        logprobs = 0
    return SamplingParams(
        **{**defaults, **wanted},
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        best_of=best_of,
    )


def _logit_bias(biases: Mapping[str, float]) -> dict[int, float]:
    """By token id. JSON knows texts as keys only; the decoder could not say which one is no number.

    Raises:
        RequestError: There are too many, or a key is not a token id.
    """
    check_number(len(biases), MAX_LOGIT_BIAS, "logit_bias", "token ids")
    # There may be many, so they are walked through without a line of Python for each.
    is_good = all(map(str.isdecimal, biases)) and all(map(str.isascii, biases))
    if not is_good or max(map(len, biases), default=0) > MAX_KEY_DIGITS:
        bad = next(key for key in biases if not (key.isdecimal() and key.isascii() and len(key) <= MAX_KEY_DIGITS))
        shown = bad if len(bad) <= MAX_SHOWN_KEY else bad[:MAX_SHOWN_KEY] + "..."
        raise RequestError(f'logit_bias has the key {shown!r}, which is not a token id such as "42"', "logit_bias")
    return dict(zip(map(int, biases), biases.values(), strict=True))


def check_stream_fields(request: GenerationRequest) -> None:
    """Refuses what makes no sense together with, or without, ``stream``.

    Raises:
        RequestError: It names the field.
    """
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream to be true", "stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs cannot be streamed", "prompt_logprobs")
    check_positive("stream_interval", request.stream_interval)


def check_positive(name: str, value: int | None) -> None:
    """Refuses a count that is not at least 1.

    Raises:
        RequestError: It names the field.
    """
    if value is not None and value < 1:
        raise RequestError(f"{name} must be at least 1, got {value}", name)


def stream_interval(config: ServerConfig, request: GenerationRequest) -> int:
    """Tokens of a choice in each chunk; an answer in one piece has no use for it."""
    if not request.stream:
        return 1
    return request.stream_interval or config.stream_interval


def answer_id(prefix: str, request: Request, label: str | None) -> str:
    """The id of an answer: with the client's own label, if it gave one."""
    return f"{prefix}-{label or request.state.request_id}"


def wants_usage(request: GenerationRequest, *, always: bool) -> tuple[bool, bool]:
    """Whether a stream ends with its usage, and whether every chunk has it. ``always``: both, as with vLLM."""
    options = request.stream_options
    if always or options is None:
        return always, always
    has_usage = bool(options.include_usage)
    return has_usage, has_usage and bool(options.continuous_usage_stats)
