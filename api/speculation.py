"""``--speculative-config``: vLLM's names and defaults for the source of draft tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace

from api.flags import ConfigError, did_you_mean
from engine_core.config import MAX_DRAFT_TOKENS, QUANTIZATIONS, ModelConfig, SpeculativeConfig

FLAG = "--speculative-config"
NOT_YET = {
    "eagle": "heads of EAGLE 1 and 2",
    "medusa": "Medusa heads",
    "mlp_speculator": "MLP speculators",
    "dflash": "drafts by diffusion",
    "dspark": "drafts by diffusion",
}
"""vLLM's methods that need another kind of second model."""
OFF = "none"
METHODS = ("suffix", "ngram", "draft_model", "eagle3", "mtp")
WITH_MODEL = ("draft_model", "eagle3")
DRAFT_SAMPLE_METHODS = ("greedy", "probabilistic")
ALIASES = {
    "[ngram]": "ngram",
    "ngram_gpu": "ngram",
    "prompt_lookup": "ngram",
    "deepseek_mtp": "mtp",
    "glm4_moe_mtp": "mtp",
    "glm4_moe_lite_mtp": "mtp",
    "qwen3_next_mtp": "mtp",
    "qwen3_5_mtp": "mtp",
}
OLD_NAMES = {
    "ngram_prompt_lookup_min": "prompt_lookup_min",
    "ngram_prompt_lookup_max": "prompt_lookup_max",
    "speculative_model": "model",
    "draft_tensor_parallel_size": "draft_tensor_parallel_size",
}
SHARED = "the draft model runs like the model itself"
DRAFT_FIELDS = {
    "code_revision": "no code of a model's repository is ever run",
    "revision": "the draft model's latest version is used; name a folder for another",
    "max_model_len": SHARED,
    "moe_backend": SHARED,
    "attention_backend": SHARED,
    "use_local_argmax_reduction": SHARED,
    "parallel_drafting": "drafts are proposed one after the other",
    "speculative_token_tree": "drafts are chains, since a tree would change bits",
    "use_heterogeneous_vocab": "both models must have the same vocabulary",
}
"""Fields of vLLM for methods with a second model, and why they do not exist."""
EXACT = "drafts are verified exactly: one is accepted if it is the token that would have been sampled"
REFUSED = {
    "rejection_sample_method": EXACT,
    "acceptance_method": EXACT,
    "synthetic_acceptance_rate": EXACT,
    "posterior_threshold": EXACT,
    "posterior_alpha": EXACT,
    "disable_by_batch_size": "the number of drafts adapts to the load by itself",
    "speculative_disable_by_batch_size": "the number of drafts adapts to the load by itself",
    "num_speculative_tokens_per_batch_size": "the number of drafts adapts to the load by itself",
}
HARMLESS = {
    "disable_logprobs",
    "disable_padded_drafter_batch",
    "enforce_eager",
    "disable_mqa_scorer",
    "tensor_parallel_size",
}
"""Fields that have no effect here."""

Check = Callable[[Any], bool]


def _is_count(value: Any, least: int = 1, most: int = 1 << 20) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


CHECKS: dict[str, tuple[tuple[str, ...], str, Check]] = {
    "num_speculative_tokens": (
        METHODS,
        f"a whole number from 1 to {MAX_DRAFT_TOKENS}",
        lambda value: _is_count(value, 1, MAX_DRAFT_TOKENS),
    ),
    "model": (WITH_MODEL, "a folder, GGUF file or hub id", lambda value: isinstance(value, str) and value != ""),
    "quantization": (WITH_MODEL, "one of " + ", ".join(QUANTIZATIONS), lambda value: value in QUANTIZATIONS),
    "draft_sample_method": (
        (*WITH_MODEL, "mtp"),
        " or ".join(DRAFT_SAMPLE_METHODS),
        lambda value: value in DRAFT_SAMPLE_METHODS,
    ),
    "draft_tensor_parallel_size": (WITH_MODEL, "1", lambda value: _is_count(value, 1, 1)),
    "prompt_lookup_min": (("ngram",), "a whole number of at least 1", _is_count),
    "prompt_lookup_max": (("ngram",), "a whole number from 1 to 128", lambda value: _is_count(value, 1, 128)),
    "suffix_decoding_max_tree_depth": (
        ("suffix",),
        "a whole number from 1 to 128",
        lambda value: _is_count(value, 1, 128),
    ),
    "suffix_decoding_max_cached_requests": (
        ("suffix",),
        "a whole number of at least 0",
        lambda value: _is_count(value, 0),
    ),
    "suffix_decoding_max_spec_factor": (("suffix",), "a number above 0", lambda value: _is_number(value) and value > 0),
    "suffix_decoding_min_token_prob": (
        ("suffix",),
        "a number from 0 to 1",
        lambda value: _is_number(value) and 0 <= value <= 1,
    ),
}
"""Field -> its methods, what is expected, and whether a value is that."""


def speculative_config(fields: Mapping[str, Any] | None) -> SpeculativeConfig | None:
    """Reads the option.

    Args:
        fields: The JSON object; None or empty: the default, for devices on which it costs nothing.

    Raises:
        ConfigError: A field is unknown, invalid or not supported; the message names it and says what to do.
    """
    given = {OLD_NAMES.get(name, name): value for name, value in (fields or {}).items() if value is not None}
    if not given:
        return replace(_suffix({}), is_default=True)
    if given.get("method") == OFF:
        for name in given.keys() - {"method"}:
            raise ConfigError(f"{FLAG}: {name} is not for the method {OFF!r}, which turns drafts off; omit it")
        return None
    method = _method(given)
    for name in given:
        _check_field(method, name, given[name])
    makers: dict[str, Callable[[Mapping[str, Any]], SpeculativeConfig]] = {
        "ngram": _ngram,
        "suffix": _suffix,
        "draft_model": _draft_model,
        "eagle3": _eagle3,
        "mtp": lambda given: _head("mtp", given, None),
    }
    return makers[method](given)


def _method(given: Mapping[str, Any]) -> str:
    model = given.get("model")
    by_name = "eagle3" if "eagle3" in str(model).lower() else "draft_model"
    default = None if model is None else ALIASES.get(str(model), by_name)
    method = given.get("method", default)
    method = ALIASES.get(str(method), method)
    if method in METHODS:
        return str(method)
    *others, last = (f'"{name}"' for name in METHODS)
    choices = f'{", ".join(others)} or {last}; "{OFF}" turns drafts off'
    if method is None:
        raise ConfigError(f"{FLAG}: method is missing; use {choices}")
    kind = NOT_YET.get(str(method))
    if kind is not None:
        raise ConfigError(f"{FLAG}: method {method!r}: {kind} are not supported yet; use {choices}")
    raise ConfigError(f"{FLAG}: unknown method {method!r}; use {choices}")


def _check_field(method: str, name: str, value: Any) -> None:
    if name == "method" or name in HARMLESS or (name == "model" and str(value) in (*ALIASES, *METHODS)):
        return
    if name in DRAFT_FIELDS:
        reason = DRAFT_FIELDS[name] if method in WITH_MODEL else "it is for methods with a second model"
        raise ConfigError(f"{FLAG}: {name} is not supported, since {reason}; omit it")
    if name in REFUSED:
        raise ConfigError(f"{FLAG}: {name} is not supported, since {REFUSED[name]}; omit it")
    known = CHECKS.get(name)
    if known is None:
        raise ConfigError(f"{FLAG}: unknown field {name!r}{did_you_mean(name, ['method', *CHECKS])}")
    owners, expected, is_good = known
    if method not in owners:
        plural = "s" if len(owners) > 1 else ""
        *others, last = (repr(owner) for owner in owners)
        names = " and ".join([*([", ".join(others)] if others else []), last])
        raise ConfigError(f"{FLAG}: {name} is for the method{plural} {names}; omit it for {method!r}")
    if not is_good(value):
        raise ConfigError(f"{FLAG}: {name} must be {expected}, got {value!r}")


def _ngram(given: Mapping[str, Any]) -> SpeculativeConfig:
    """n-grams of vLLM's default length: 5, or exactly the one bound that is given."""
    if "num_speculative_tokens" not in given:
        raise ConfigError(f"{FLAG}: num_speculative_tokens is missing; 4 is a good start")
    shortest = given.get("prompt_lookup_min", given.get("prompt_lookup_max", 5))
    longest = given.get("prompt_lookup_max", shortest)
    if shortest > longest:
        raise ConfigError(f"{FLAG}: prompt_lookup_min must be at most prompt_lookup_max ({longest}), got {shortest}")
    return SpeculativeConfig(
        method="ngram",
        num_speculative_tokens=given["num_speculative_tokens"],
        prompt_lookup_min=shortest,
        prompt_lookup_max=longest,
        min_token_prob=0.0,
    )


def _draft_model(given: Mapping[str, Any]) -> SpeculativeConfig:
    if "model" not in given:
        raise ConfigError(f"{FLAG}: model is missing: one of the same family, about a tenth of the size")
    return SpeculativeConfig(
        method="draft_model",
        num_speculative_tokens=given.get("num_speculative_tokens", 5),
        min_token_prob=0.0,
        draft=ModelConfig(model=given["model"], quantization=given.get("quantization")),
        draft_sample_method=given.get("draft_sample_method", DRAFT_SAMPLE_METHODS[0]),
    )


def _eagle3(given: Mapping[str, Any]) -> SpeculativeConfig:
    if "model" not in given:
        raise ConfigError(f"{FLAG}: model is missing: an EAGLE-3 head that was trained for the model")
    return _head("eagle3", given, ModelConfig(model=given["model"], quantization=given.get("quantization")))


def _head(method: str, given: Mapping[str, Any], head: ModelConfig | None) -> SpeculativeConfig:
    return SpeculativeConfig(
        method=method,
        num_speculative_tokens=given.get("num_speculative_tokens", 3),
        min_token_prob=0.0,
        draft=head,
        draft_sample_method=given.get("draft_sample_method", DRAFT_SAMPLE_METHODS[0]),
    )


def _suffix(given: Mapping[str, Any]) -> SpeculativeConfig:
    return SpeculativeConfig(
        method="suffix",
        num_speculative_tokens=given.get("num_speculative_tokens", 32),
        prompt_lookup_max=given.get("suffix_decoding_max_tree_depth", 24),
        max_cached_requests=given.get("suffix_decoding_max_cached_requests", 10_000),
        max_spec_factor=float(given.get("suffix_decoding_max_spec_factor", 2.0)),
        min_token_prob=float(given.get("suffix_decoding_min_token_prob", 0.1)),
    )
