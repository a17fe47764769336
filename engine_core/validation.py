"""Final validation of a request before it may run alongside others.

The api has already checked it; this ensures that no out-of-range number reaches an array or a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from engine_core.config import SchedulerConfig
from engine_core.encoder_cache_manager import feature_problem
from engine_core.messages import (
    POOLING_TYPES,
    EngineCoreRequest,
    MultiModalSupport,
    PoolingSupport,
    ResolvedParams,
    ResolvedPoolingParams,
    Thought,
    i32,
    is_pooling_type,
)

ANY_POOLING = PoolingSupport()
MAX_TOKEN_IDS = 1 << 20
"""Maximum ids in a list that every step reads; no vocabulary is larger."""
INT32_MAX = 2**31 - 1
MAX_PATTERN_SIZE = 1024
"""Longest pattern of repetition detection in tokens: every length is checked at every step."""
FLOAT32_MAX = 3.4e38
"""Largest parameter value: parameters are float32 when combined with logits."""


def request_problem(
    request: EngineCoreRequest,
    vocab_size: int,
    max_model_len: int,
    hidden_size: int = 0,
    pooling: PoolingSupport = ANY_POOLING,
    *,
    multimodal: MultiModalSupport | None = None,
    has_adapters: bool = False,
) -> str | None:
    """The problem with a request, or None.

    Args:
        request: The request as received.
        vocab_size: Width of the logits.
        max_model_len: Longest sequence.
        hidden_size: Size of pooled vectors; 0: the executor cannot pool.
        pooling: What the model does with them.
        multimodal: What it does with images; None: it takes none.
        has_adapters: Whether the executor can load adapters.
    """
    if not -(2**63) <= request.index < 2**63:
        return "index does not fit 64 bits"
    if not math.isfinite(request.arrival_time):
        return "arrival_time is not finite"
    if len(request.prompt_token_ids) % 4 or len(request.resumed_output_token_ids) % 4:
        return "token ids are not an int32 column"
    prompt = i32(request.prompt_token_ids)
    outputs = i32(request.resumed_output_token_ids)
    params = request.sampling_params
    if not len(prompt):
        return "the prompt is empty"
    for ids in (prompt, outputs):
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            return f"a token id is outside the vocabulary of {vocab_size}"
    if request.lora_request is not None and not has_adapters:
        return "adapters need a server started with --enable-lora"
    if request.mm_features:
        problem = feature_problem(request.mm_features, prompt, multimodal)
        if problem is not None:
            return problem
    if request.pooling_params is not None:
        if params is not None or len(outputs) or request.grammar is not None:
            return "a request either generates or is pooled, not both"
        if len(prompt) > max_model_len:
            return f"the prompt has {len(prompt)} tokens and the maximum context length is {max_model_len}"
        return _pooling_problem(request.pooling_params, hidden_size, len(prompt), pooling)
    if params is None:
        return "sampling parameters are missing"
    if not pooling.generates:
        return "the model generates no text"
    if len(prompt) >= max_model_len:
        return f"the prompt has {len(prompt)} tokens and the maximum context length is {max_model_len}"
    if len(outputs) >= params.max_tokens or len(prompt) + len(outputs) >= max_model_len:
        return "no tokens are left to generate"
    if request.grammar is not None and request.grammar.thought is not None:
        problem = _thought_problem(request.grammar.thought, vocab_size)
        if problem is not None:
            return problem
    return _params_problem(params, vocab_size)


def image_problem(support: MultiModalSupport | None, config: SchedulerConfig) -> str | None:
    """The problem with a model's images in steps as configured, or None."""
    if support is None or not support.whole_images or support.max_image_tokens <= config.step_tokens:
        return None
    return (
        f"--max-num-batched-tokens {config.step_tokens} is too small: a step must compute all tokens of an image "
        f"({support.max_image_tokens}); or omit images with --language-model-only"
    )


def _thought_problem(thought: Thought, vocab_size: int) -> str | None:
    if not thought.end or not thought.end_token_ids or not (thought.is_open or thought.start_token_ids):
        return "grammar.thought has no beginning or no end"
    if any(not 0 <= token_id < vocab_size for token_id in thought.start_token_ids + thought.end_token_ids):
        return f"grammar.thought has a token id outside the vocabulary of {vocab_size}"
    if thought.max_tokens is not None and thought.max_tokens < 0:
        return "grammar.thought has a negative max_tokens"
    return None


def _pooling_problem(
    params: ResolvedPoolingParams, hidden_size: int, num_tokens: int, pooling: PoolingSupport
) -> str | None:
    if not hidden_size:
        return "pooling is not supported by this executor"
    if not is_pooling_type(params.pooling_type):
        return f"pooling_type is not one of {', '.join(POOLING_TYPES)}"
    size = (pooling.token_size if params.pooling_type == "ALL" else 0) or hidden_size
    if params.dimensions is not None and not 1 <= params.dimensions <= size:
        return f"dimensions is not between 1 and {size}"
    if params.classifies and not pooling.head_pooling:
        return "the model has no classifier"
    if not 0 <= params.num_skipped < num_tokens or not 0 <= params.second_segment < num_tokens:
        return "num_skipped or second_segment is outside the prompt"
    if not 0 <= params.num_attended <= num_tokens or (params.num_attended and not pooling.needs_whole_prompts):
        return "num_attended is outside the prompt, or the model is causal"
    return None


def _params_problem(params: ResolvedParams, vocab_size: int) -> str | None:
    numbers = (
        params.temperature,
        params.top_p,
        params.min_p,
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
        *(bias for _, bias in params.logit_bias),
    )
    if not all(abs(number) <= FLOAT32_MAX for number in numbers):  # also false for NaN
        return "a sampling parameter is not a finite number"
    if params.temperature < 0 or not 0 < params.top_p <= 1 or not 0 <= params.min_p <= 1:
        return "temperature, top_p or min_p is out of range"
    if params.repetition_penalty <= 0 or not 0 <= params.seed < 2**64:
        return "repetition_penalty or seed is out of range"
    if params.max_tokens < 1 or not 0 <= params.min_tokens <= INT32_MAX or not 0 <= params.top_k <= INT32_MAX:
        return "max_tokens, min_tokens or top_k is out of range"
    if any(count is not None and not -1 <= count <= vocab_size for count in (params.logprobs, params.prompt_logprobs)):
        return f"logprobs or prompt_logprobs is neither -1 nor between 0 and {vocab_size}"
    for name, ids in _token_id_fields(params):
        if len(ids) > MAX_TOKEN_IDS:
            return f"{name} has more than {MAX_TOKEN_IDS} token ids"
        if any(not 0 <= token_id < vocab_size for token_id in ids):
            return f"{name} has a token id outside the vocabulary of {vocab_size}"
    if not all(params.bad_words_token_ids):
        return "bad_words has an empty word"
    thinking = params.thinking_budget
    if thinking is not None and (thinking.max_tokens < 0 or not thinking.end_token_ids):
        return "thinking_budget is negative or has no end marker"
    loops = params.repetition_detection
    if loops is not None and not (
        1 <= loops.min_pattern_size <= loops.max_pattern_size <= MAX_PATTERN_SIZE and 2 <= loops.min_count <= INT32_MAX
    ):
        return "repetition_detection is out of range"
    if params.num_speculative_tokens is not None and not 0 <= params.num_speculative_tokens <= INT32_MAX:
        return "num_speculative_tokens is out of range"
    if params.allowed_token_ids is not None and not params.allowed_token_ids:
        return "allowed_token_ids is empty"
    return None


def _token_id_fields(params: ResolvedParams) -> Iterable[tuple[str, Collection[int]]]:
    yield "stop_token_ids", params.stop_token_ids
    yield "eos_token_ids", params.eos_token_ids
    yield "logit_bias", [token_id for token_id, _ in params.logit_bias]
    yield "allowed_token_ids", params.allowed_token_ids or ()
    yield "logprob_token_ids", params.logprob_token_ids
    if params.thinking_budget is not None:
        yield "thinking_budget", params.thinking_budget.start_token_ids + params.thinking_budget.end_token_ids
    yield "bad_words", [token_id for word in params.bad_words_token_ids for token_id in word]
