"""Sampling defaults of a model, for parameters that a request does not set."""

from __future__ import annotations

from typing import Any

import msgspec

from api.errors import ModelFileError
from api.model.files import ModelFiles
from api.params.sampling import SamplingParams


def check_defaults(files: ModelFiles) -> None:
    """Rejects a model whose sampling defaults are invalid.

    Raises:
        ModelFileError: A value is out of range.
    """
    defaults = default_params(files.generation_config)
    defaults["max_tokens"] = defaults.pop("max_new_tokens", None)
    try:
        msgspec.convert(defaults, SamplingParams)
    except msgspec.ValidationError as error:
        hint = "set it with --override-generation-config"
        raise ModelFileError(files.generation_config_file, f"{error}; {hint}") from error


def default_params(generation_config: dict[str, Any]) -> dict[str, Any]:
    """The sampling defaults in a generation_config.json, by the names of ``SamplingParams`` and ``max_new_tokens``."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    defaults = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    if generation_config.get("max_new_tokens") is not None:
        defaults["max_new_tokens"] = generation_config["max_new_tokens"]
    return defaults
