"""Turns the fields of a request into ``SamplingParams``."""

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
"""Maximum characters of a client's key to quote in an error."""

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
    "num_speculative_tokens",
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
    """The request's parameters, with the server's and the built-in defaults.

    Without the grammar; see ``requested_grammar``.

    Args:
        request: Provides the fields that it shares with ``SamplingParams``.
        defaults: The server's defaults.
        max_tokens: Maximum length of a completion.
        logprobs: Number of most likely tokens to report per position.
        prompt_logprobs: Same for the prompt.
        best_of: Number of completions to choose the best from.

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
    """Biases by token id. JSON keys are strings; the decoder could not name the invalid one.

    Raises:
        RequestError: There are too many, or a key is not a token id.
    """
    check_number(len(biases), MAX_LOGIT_BIAS, "logit_bias", "token ids")
    # There may be many biases, so avoid a Python loop.
    is_good = all(map(str.isdecimal, biases)) and all(map(str.isascii, biases))
    if not is_good or max(map(len, biases), default=0) > MAX_KEY_DIGITS:
        bad = next(key for key in biases if not (key.isdecimal() and key.isascii() and len(key) <= MAX_KEY_DIGITS))
        shown = bad if len(bad) <= MAX_SHOWN_KEY else bad[:MAX_SHOWN_KEY] + "..."
        raise RequestError(f'logit_bias: keys must be token ids such as "42", got {shown!r}', "logit_bias")
    return dict(zip(map(int, biases), biases.values(), strict=True))


def check_stream_fields(request: GenerationRequest) -> None:
    """Checks fields that require or exclude ``stream``.

    Raises:
        RequestError: It names the field.
    """
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options requires stream: true", "stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs does not support stream", "prompt_logprobs")
    check_positive("stream_interval", request.stream_interval)


def check_positive(name: str, value: int | None) -> None:
    """Checks that a count is at least 1.

    Raises:
        RequestError: It names the field.
    """
    if value is not None and value < 1:
        raise RequestError(f"{name} must be at least 1, got {value}", name)


def stream_interval(config: ServerConfig, request: GenerationRequest) -> int:
    """Tokens per chunk of a choice; irrelevant for whole answers."""
    if not request.stream:
        return 1
    return request.stream_interval or config.stream_interval


def answer_id(prefix: str, request: Request, label: str | None) -> str:
    """The id of an answer, with the client's label if it sent one."""
    return f"{prefix}-{label or request.state.request_id}"


def wants_usage(request: GenerationRequest, *, always: bool) -> tuple[bool, bool]:
    """Whether a stream ends with its usage, and whether every chunk has it. ``always`` forces both, as in vLLM."""
    options = request.stream_options
    if always or options is None:
        return always, always
    has_usage = bool(options.include_usage)
    return has_usage, has_usage and bool(options.continuous_usage_stats)
