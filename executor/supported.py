"""Checks whether a model can be served, before its weights are downloaded. Needs no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from executor.base import ModelError
from executor.config import DTYPE_NAMES, GOOD_DTYPES, QUANTIZATION_ALIASES
from executor.language_part import language_fields
from executor.models import registry
from executor.models.catalog import CATALOG, ONE_RANK, ONE_STAGE
from executor.models.registry import ENCODERS, FALLBACK, implementation, split_architecture
from executor.quantization.base import quantization_name
from executor.registry import advice

GGUF_ARCHITECTURES = tuple(sorted({name for entry in CATALOG for name in entry.gguf}))
"""The keys of ``ARCHITECTURES`` in ``gguf_architectures.py``, which needs torch."""


PACKAGES = {
    "fastsafetensors": ("fastsafetensors", "fastsafetensors"),
    "runai_streamer": ("runai_model_streamer", "runai-model-streamer"),
    "tensorizer": ("tensorizer", "tensorizer"),
}
"""Load formats read by another package: its module, and its name for pip."""


def check_load_format(load_format: str) -> None:
    """Checks that the package of a load format is installed.

    Raises:
        ModelError: It is not.
    """
    module, package = PACKAGES.get(load_format, ("executor", ""))
    if importlib.util.find_spec(module) is None:
        raise ModelError(f"--load-format {load_format} needs its package: pip install {package}")


def check_gguf_architecture(architecture: str) -> None:
    """Checks the ``general.architecture`` of a GGUF file.

    Raises:
        ModelError: It is not supported.
    """
    if architecture not in GGUF_ARCHITECTURES:
        shown = architecture if len(architecture) <= 100 else f"{architecture[:100]}..."
        raise ModelError(
            f"architecture {shown!r} is not supported yet in GGUF files; choose a file of another one "
            f"({advice(architecture, GGUF_ARCHITECTURES)}), or the model in safetensors format, which may run through "
            "transformers (--model-impl)"
        )


def check_supported(
    fields: Mapping[str, Any],
    quantization: str | None = None,
    model_impl: str = "auto",
    dtype: str = "auto",
    num_ranks: int = 1,
    num_stages: int = 1,
) -> None:
    """Checks architecture, quantisation, type and number of ranks; loading the model checks the rest.

    Args:
        fields: Contents of config.json, with the user's overrides applied.
        quantization: ``--quantization``.
        model_impl: ``--model-impl``.
        dtype: ``--dtype``.
        num_ranks: ``--tensor-parallel-size``.
        num_stages: ``--pipeline-parallel-size``.

    Raises:
        ModelError: One of them is missing, invalid or not supported.
    """
    language = language_fields(fields)
    names = language.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ModelError("architectures must be a list of at least one name")
    chosen = implementation(names[0], language, model_impl)
    if num_ranks > 1:
        _check_ranks(names[0], chosen, f"--tensor-parallel-size {num_ranks}", ONE_RANK, language)
    if num_stages > 1:
        _check_ranks(names[0], chosen, f"--pipeline-parallel-size {num_stages}", ONE_STAGE, language)
    saved = fields.get("quantization_config")
    if saved is not None and not isinstance(saved, dict):
        raise ModelError("quantization_config must be an object")
    if quantization == "gguf":
        raise ModelError("--quantization is gguf, but the model is no GGUF file; name one, or use --load-format gguf")
    method = QUANTIZATION_ALIASES.get(quantization or "", quantization)
    if saved or method != "modelopt":  # which may have a file of its own
        quantization_name(quantization, saved or None)
    name = "dtype" if language.get("dtype") is not None else "torch_dtype"
    stored = language.get(name)
    if dtype == "auto" and stored is not None and str(stored).removeprefix("torch.") not in DTYPE_NAMES:
        raise ModelError(f"{name} must be {GOOD_DTYPES}, not {str(stored)[:100]!r}")


def can_generate(fields: Mapping[str, Any]) -> bool:
    """Whether a model generates text, judging by a config.json that is supported."""
    return registry.can_generate(language_fields(fields)["architectures"][0])


def _check_ranks(
    architecture: str, chosen: str, flag: str, unshared: Mapping[str, str], fields: Mapping[str, Any]
) -> None:
    """Refuses several ranks for a model that they cannot share. ``unshared`` says what of which architectures."""
    base, _ = split_architecture(architecture)
    what = "models of transformers" if chosen == FALLBACK else "encoders" if base in ENCODERS else unshared.get(base)
    types = fields.get("layer_types")
    if (
        base == "GraniteMoeHybridForCausalLM"
        and isinstance(types, list)
        and set(types) <= {"attention", "full_attention"}
    ):
        what = None
    if what is not None:
        raise ModelError(f"{flag}: workers cannot share {what} yet ({architecture[:100]}); use 1")
