"""Sampling parameters as users set them, and their conversion to the engine's."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from api.errors import ContextLengthError, RequestError
from api.model.tokenizer import Tokenizer
from api.params.structured import StructuredOutputsParams, grammar_spec
from api.stop_regex import StopRegexError, stop_automaton
from engine_core.messages import PoolingSupport, RepetitionDetection, ResolvedParams

MAX_N = 16384
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 4096
"""Maximum characters of all stop strings of a request together: the automaton that finds them has as many states."""
MAX_STOP_PATTERNS = 16
MAX_STOP_TOKEN_IDS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 16384
"""Maximum characters of all bad words together, before they are tokenised."""
MAX_BAD_WORD_TOKENS = 1024
MAX_LOGIT_BIAS = 1 << 16
MAX_BIAS = 100.0
MAX_CHILD_ENTRIES = 1 << 24
"""Maximum entries of lists such as ``logit_bias``, times the number of completions."""
MAX_PATTERN_SIZE = 1024
UINT64 = 1 << 64
MAX_REPETITION_PENALTY = 1e20
MAX_INT = (1 << 31) - 1
"""Counts are sent as 32-bit numbers."""
MAX_SHOWN = 200
"""Maximum characters of an invalid value that an error message quotes."""


class RepetitionDetectionParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Ends a completion that repeats itself.

    Attributes:
        max_pattern_size: Maximum tokens of a repeated pattern; 0: off.
        min_pattern_size: Minimum tokens of a repeated pattern; 0 means 1.
        min_count: The completion ends when its last tokens are one pattern this many times in a row; at least 2.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0


class SamplingParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How the tokens of a completion are chosen and when it ends. Names and defaults are vLLM's.

    Attributes:
        n: Number of completions per prompt.
        best_of: Generate this many completions and return the ``n`` with the highest cumulative log probability.
        temperature: 0 takes the most likely token each time.
        top_p: Only the most likely tokens that together have this probability are candidates.
        top_k: Only this many most likely tokens are candidates; 0 or -1: all.
        min_p: Only tokens with at least this fraction of the largest probability are candidates.
        seed: The same seed gives the same tokens. None: a random one.
        presence_penalty: Subtracted from the logit of every token that is already in the output, -2 to 2.
        frequency_penalty: The same, times the number of occurrences.
        repetition_penalty: Divides the logits of tokens in prompt and output; 1e-20 to 1e20, 1: off.
        stop: Strings that end the completion and are not part of it.
        stop_regex: Regular expressions that end the completion like ``stop``; see ``api/stop_regex.py``.
        stop_token_ids: Tokens that end the completion.
        ignore_eos: Continue after the model's EOS token.
        max_tokens: Maximum tokens of the completion. None: as many as fit in the context.
        min_tokens: No end token before this many tokens.
        logprobs: Report log probabilities of this many most likely tokens at each position; -1: of all.
        prompt_logprobs: The same for the prompt.
        logprob_token_ids: Report the log probabilities of these tokens instead of the most likely ones.
        logit_bias: Values to add to the logits of these token ids.
        allowed_token_ids: Only these tokens are candidates.
        bad_words: Texts that must not be generated.
        include_stop_str_in_output: Keep the stop string that was found in the text.
        detokenize: False: token ids only, no text.
        skip_special_tokens: Omit special tokens from the text.
        spaces_between_special_tokens: Put spaces between special tokens (some tokenizers only).
        structured_outputs: Constrains the output, for example to a JSON schema.
        repetition_detection: End a completion that repeats itself, with the finish reason ``repetition``.
        thinking_token_budget: Maximum tokens of a section of thinking. Needs ``reasoning_parser``.
        num_speculative_tokens: Maximum drafts that a step verifies, if the engine speculates; 0: none, None: the
            engine's maximum. It changes no token.
        truncate_prompt_tokens: Keep only this many tokens of a longer prompt, including those that the tokenizer adds;
            -1: as many as leave room for the output.
        truncation_side: The side on which tokens are removed: ``left`` keeps the last tokens, ``right`` the first.
        output_kind: Accepted for compatibility with vLLM and ignored: results are always complete.
        flat_logprobs: Accepted and ignored: log probabilities are a list by position.
        extra_args: Accepted and ignored: there are no logits processors to read it.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | list[str] | None = None
    stop_regex: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    thinking_token_budget: int | None = None
    num_speculative_tokens: int | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    output_kind: Any = None
    flat_logprobs: bool = False
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.verify()

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def stop_patterns(self) -> list[str]:
        if self.stop_regex is None:
            return []
        return [self.stop_regex] if isinstance(self.stop_regex, str) else self.stop_regex

    @property
    def num_completions(self) -> int:
        """Number of completions that are generated; ``n`` of them are returned."""
        return self.n if self.best_of is None else self.best_of

    def verify(self) -> None:
        """Checks everything that can be checked without a model.

        Raises:
            RequestError: A field is out of range; it is a ValueError.
        """
        _check(1 <= self.n <= MAX_N, "n", f"must be between 1 and {MAX_N}", self.n)
        if self.best_of is not None:
            _check(self.n <= self.best_of <= MAX_N, "best_of", f"must be between n and {MAX_N}", self.best_of)
        _check_range("temperature", self.temperature, 0, 2)
        _check(math.isfinite(self.top_p) and 0 < self.top_p <= 1, "top_p", "must be in (0, 1]", self.top_p)
        _check(-1 <= self.top_k <= MAX_INT, "top_k", "must be 0 or -1 (off), or at least 1", self.top_k)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("presence_penalty", self.presence_penalty, -2, 2)
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        # Logits are float32: beyond these bounds they could overflow to infinity or NaN.
        _check_range("repetition_penalty", self.repetition_penalty, 1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        _check(self.n == 1 or self.temperature > 0, "n", "must be 1 with temperature 0", self.n)
        _check(
            self.num_completions == 1 or self.temperature > 0, "best_of", "must be 1 with temperature 0", self.best_of
        )
        if self.seed is not None:
            _check(-(1 << 63) <= self.seed < UINT64, "seed", "must fit in 64 bits", self.seed)
        self._verify_end()
        self._verify_words()
        budget = self.thinking_token_budget
        _check(budget is None or 0 <= budget <= MAX_INT, "thinking_token_budget", "must be at least 0", budget)
        most = self.num_speculative_tokens
        _check(most is None or 0 <= most <= MAX_INT, "num_speculative_tokens", "must be at least 0", most)
        keep = self.truncate_prompt_tokens
        _check(keep is None or -1 <= keep <= MAX_INT, "truncate_prompt_tokens", "must be at least -1", keep)
        if self.repetition_detection is not None:
            _check_repetition(self.repetition_detection)
        if self.structured_outputs is not None:
            grammar_spec(self.structured_outputs)
        biases = self.logit_bias or {}
        _check(
            len(biases) <= MAX_LOGIT_BIAS, "logit_bias", f"may contain at most {MAX_LOGIT_BIAS} token ids", len(biases)
        )
        if not all(map(math.isfinite, biases.values())):
            bad = next(bias for bias in biases.values() if not math.isfinite(bias))
            _check(False, "logit_bias", "must contain finite numbers only", bad)
        self._verify_children()

    def _verify_end(self) -> None:
        """Checks the fields that end a completion, and those for log probabilities."""
        if self.max_tokens is not None:
            _check(1 <= self.max_tokens <= MAX_INT, "max_tokens", "must be at least 1", self.max_tokens)
            _check(
                self.min_tokens <= self.max_tokens,
                "min_tokens",
                f"must be at most max_tokens ({self.max_tokens})",
                self.min_tokens,
            )
        _check(0 <= self.min_tokens <= MAX_INT, "min_tokens", "must be at least 0", self.min_tokens)
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            _check(count is None or count >= -1, name, "must be at least 0, or -1 for the whole vocabulary", count)
        stops = self.stop_strings
        _check(len(stops) <= MAX_STOP_STRINGS, "stop", f"may contain at most {MAX_STOP_STRINGS} strings", len(stops))
        num_chars = sum(map(len, stops))
        _check(
            num_chars <= MAX_STOP_CHARS, "stop", f"may contain at most {MAX_STOP_CHARS} characters in total", num_chars
        )
        _check(all(stops), "stop", "must not contain an empty string", stops)
        _check(self.detokenize or not stops, "stop", "requires detokenize", stops)
        self._verify_patterns()
        stop_ids = self.stop_token_ids or []
        _check(
            len(stop_ids) <= MAX_STOP_TOKEN_IDS,
            "stop_token_ids",
            f"may contain at most {MAX_STOP_TOKEN_IDS} ids",
            len(stop_ids),
        )

    def _verify_words(self) -> None:
        """Checks the fields that select candidate tokens."""
        words = self.bad_words or []
        _check(len(words) <= MAX_BAD_WORDS, "bad_words", f"may contain at most {MAX_BAD_WORDS} words", len(words))
        num_chars = sum(map(len, words))
        _check(
            num_chars <= MAX_BAD_WORD_CHARS,
            "bad_words",
            f"may contain at most {MAX_BAD_WORD_CHARS} characters in total",
            num_chars,
        )
        _check(all(words), "bad_words", "must not contain an empty string", words)
        _check(
            self.allowed_token_ids is None or bool(self.allowed_token_ids), "allowed_token_ids", "must not be empty", []
        )

    def _verify_children(self) -> None:
        """Checks lists that every completion carries, for all completions together."""
        most = MAX_CHILD_ENTRIES // self.num_completions
        for name, items in (("logit_bias", self.logit_bias), ("allowed_token_ids", self.allowed_token_ids)):
            if items is not None and len(items) > most:
                raise RequestError(
                    f"{name} may contain at most {most} token ids with {self.num_completions} completions, "
                    f"got {len(items)}",
                    name,
                )

    def _verify_patterns(self) -> None:
        patterns = self.stop_patterns
        if not patterns:
            return
        _check(self.detokenize, "stop_regex", "requires detokenize", patterns)
        most = MAX_STOP_PATTERNS
        _check(len(patterns) <= most, "stop_regex", f"may contain at most {most} patterns", len(patterns))
        try:
            stop_automaton(tuple(self.stop_strings), tuple(patterns))
        except StopRegexError as error:
            _check(False, "stop_regex", str(error), patterns)


def _check_repetition(wanted: RepetitionDetectionParams) -> None:
    if wanted.max_pattern_size == 0 and wanted.min_pattern_size == 0:
        return
    name = "repetition_detection"
    _check(
        1 <= wanted.max_pattern_size <= MAX_PATTERN_SIZE,
        name,
        f"must have a max_pattern_size between 1 and {MAX_PATTERN_SIZE}",
        wanted.max_pattern_size,
    )
    _check(
        0 <= wanted.min_pattern_size <= wanted.max_pattern_size,
        name,
        "must have a min_pattern_size between 0 and max_pattern_size",
        wanted.min_pattern_size,
    )
    _check(2 <= wanted.min_count <= MAX_INT, name, "must have a min_count of at least 2", wanted.min_count)


def _check(good: bool, name: str, rule: str, value: object) -> None:
    if not good:
        shown = repr(value)
        raise RequestError(
            f"{name} {rule}, got {shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + '...'}", name
        )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    _check(math.isfinite(value) and low <= value <= high, name, f"must be between {low} and {high}", value)


class ModelLimits(msgspec.Struct, frozen=True):
    """Limits of the model and the server for requests."""

    max_model_len: int
    vocab_size: int
    """Width of the logits."""
    max_logprobs: int = 20
    """-1: no limit."""
    max_output_tokens: int | None = None
    """Cap from the model's generation configuration."""
    eos_token_ids: tuple[int, ...] = ()
    hidden_size: int = 0
    """Width of pooled vectors; 0: the engine cannot pool."""
    pooling: PoolingSupport = PoolingSupport()
    """What the model does with pooled states."""


def resolve_params(
    params: SamplingParams, num_prompt_tokens: int, limits: ModelLimits, tokenizer: Tokenizer | None
) -> ResolvedParams:
    """Converts a user's parameters to numbers and token ids, for a completion of one prompt.

    Args:
        params: The user's parameters.
        num_prompt_tokens: Length of the prompt.
        limits: Limits of the model and the server.
        tokenizer: Tokenizer for ``bad_words``; needed only with them.

    Raises:
        RequestError: A field is invalid for the model, or the prompt is too long.
    """
    resolved = resolve_shared_params(params, limits, tokenizer)
    return msgspec.structs.replace(
        resolved,
        seed=secrets.randbits(64) if params.seed is None else resolved.seed,
        max_tokens=resolve_max_tokens(params, num_prompt_tokens, limits),
    )


def resolve_shared_params(params: SamplingParams, limits: ModelLimits, tokenizer: Tokenizer | None) -> ResolvedParams:
    """The parameters that all completions of a request share: all but ``max_tokens``, and the seed if none is given.

    Raises:
        RequestError: A field is invalid for the model.
    """
    return ResolvedParams(
        temperature=params.temperature,
        top_k=max(0, params.top_k),
        top_p=params.top_p,
        min_p=params.min_p,
        seed=(params.seed or 0) % UINT64,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        max_tokens=1,
        min_tokens=params.min_tokens,
        stop_token_ids=_token_ids("stop_token_ids", params.stop_token_ids, limits),
        eos_token_ids=() if params.ignore_eos else limits.eos_token_ids,
        logit_bias=_logit_bias(params.logit_bias or {}, limits),
        allowed_token_ids=None
        if params.allowed_token_ids is None
        else tuple(dict.fromkeys(_token_ids("allowed_token_ids", params.allowed_token_ids, limits))),
        bad_words_token_ids=_bad_words(params.bad_words or [], limits, tokenizer),
        # The log probabilities of the tokens decide which completions are the best.
        logprobs=0
        if params.logprobs is None and params.num_completions > params.n
        else _num_logprobs("logprobs", params.logprobs, limits),
        prompt_logprobs=_num_logprobs("prompt_logprobs", params.prompt_logprobs, limits),
        logprob_token_ids=_logprob_token_ids(params, limits),
        repetition_detection=_repetition_detection(params.repetition_detection),
        num_speculative_tokens=params.num_speculative_tokens,
    )


def child_seed(seed: int, child: int) -> int:
    """The seed of one of ``n`` completions: the parent's for the first, mixed by SplitMix64's constants for others."""
    if child == 0:
        return seed
    mixed = (seed + child * 0x9E3779B97F4A7C15) % UINT64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % UINT64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % UINT64
    return mixed ^ (mixed >> 31)


def check_room(num_prompt_tokens: int, limits: ModelLimits) -> None:
    """Rejects a prompt that fills the context.

    Raises:
        RequestError: There is no room for an output token.
    """
    if num_prompt_tokens >= limits.max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {limits.max_model_len} tokens. However, your prompt contains "
            f"{num_prompt_tokens} input tokens, which leaves no room for output. Please shorten the prompt.",
        )


def resolve_max_tokens(params: SamplingParams, num_prompt_tokens: int, limits: ModelLimits) -> int:
    """Maximum tokens of a completion of a prompt of the given length.

    Raises:
        RequestError: There is not enough room for ``max_tokens``.
    """
    check_room(num_prompt_tokens, limits)
    room = limits.max_model_len - num_prompt_tokens
    if params.max_tokens is None:
        return min(room, limits.max_output_tokens or room)
    if params.max_tokens > room:
        raise ContextLengthError(
            f"This model's maximum context length is {limits.max_model_len} tokens. However, you requested "
            f"{params.max_tokens} output tokens and your prompt contains {num_prompt_tokens} input tokens, "
            f"{num_prompt_tokens + params.max_tokens} in all. Please shorten the prompt or set max_tokens to {room} "
            "or less.",
        )
    return min(params.max_tokens, limits.max_output_tokens or params.max_tokens)


def _token_ids(name: str, ids: Iterable[int] | None, limits: ModelLimits) -> tuple[int, ...]:
    result = tuple(ids or ())
    if result and not (min(result) >= 0 and max(result) < limits.vocab_size):
        bad = next(token_id for token_id in result if not 0 <= token_id < limits.vocab_size)
        raise RequestError(f"{name} contains token id {bad}, but the vocabulary ends at {limits.vocab_size - 1}", name)
    return result


def _logit_bias(biases: Mapping[int, float], limits: ModelLimits) -> tuple[tuple[int, float], ...]:
    ids = _token_ids("logit_bias", biases, limits)
    if not ids or (min(biases.values()) >= -MAX_BIAS and max(biases.values()) <= MAX_BIAS):
        return tuple(zip(ids, biases.values(), strict=True))
    return tuple((token_id, max(-MAX_BIAS, min(MAX_BIAS, bias))) for token_id, bias in biases.items())


def _num_logprobs(name: str, count: int | None, limits: ModelLimits) -> int | None:
    wanted = limits.vocab_size if count == -1 else count or 0
    if limits.max_logprobs >= 0 and wanted > limits.max_logprobs:
        raise RequestError(f"{name} must be at most {limits.max_logprobs} (--max-logprobs), got {count}", name)
    return None if count is None else -1 if wanted >= limits.vocab_size else count


def _logprob_token_ids(params: SamplingParams, limits: ModelLimits) -> tuple[int, ...]:
    ids = params.logprob_token_ids or ()
    most = limits.vocab_size if limits.max_logprobs < 0 else limits.max_logprobs
    if len(ids) > most:
        raise RequestError(
            f"logprob_token_ids may contain at most {most} ids (--max-logprobs), got {len(ids)}", "logprob_token_ids"
        )
    return _token_ids("logprob_token_ids", ids, limits)


def _repetition_detection(wanted: RepetitionDetectionParams | None) -> RepetitionDetection | None:
    if wanted is None or wanted.max_pattern_size == 0:
        return None
    return RepetitionDetection(
        max_pattern_size=wanted.max_pattern_size,
        min_pattern_size=max(1, wanted.min_pattern_size),
        min_count=wanted.min_count,
    )


def _bad_words(words: Sequence[str], limits: ModelLimits, tokenizer: Tokenizer | None) -> tuple[tuple[int, ...], ...]:
    """The token sequences that spell the words, both at the start of a text and after a space."""
    if words and tokenizer is None:
        raise RequestError("bad_words requires a tokenizer", "bad_words")
    if not words:
        return ()
    assert tokenizer is not None
    texts = [text for word in words for text in (word.lstrip(), " " + word.lstrip())]
    try:
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    except ValueError as error:
        raise RequestError(f"bad_words contains a word that cannot be tokenized: {error}", "bad_words") from error
    found: dict[tuple[int, ...], None] = {tuple(ids): None for ids in encoded if ids}
    if sum(map(len, found)) > MAX_BAD_WORD_TOKENS:
        raise RequestError(f"bad_words exceed {MAX_BAD_WORD_TOKENS} tokens in total", "bad_words")
    for ids in found:
        if max(ids) >= limits.vocab_size:
            raise RequestError(
                f"bad_words contains the token {max(ids)}, which this model cannot generate: its vocabulary ends "
                f"before {limits.vocab_size}",
                "bad_words",
            )
    return tuple(found)
