"""The fields of each method, to check them before a model is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from executor.base import ModelError
from executor.quantization.compressed_fields import CompressedFields
from executor.quantization.fields import (
    AWQFields,
    BitsAndBytesFields,
    Checked,
    FP8Fields,
    GPTQFields,
    MXFP4Fields,
    read,
)
from executor.quantization.modelopt_fields import ModelOptFields

KINDS: Mapping[str, type[Checked]] = {
    "awq": AWQFields,
    "bitsandbytes": BitsAndBytesFields,
    "compressed-tensors": CompressedFields,
    "fbgemm_fp8": FP8Fields,
    "fp8": FP8Fields,
    "gptq": GPTQFields,
    "modelopt": ModelOptFields,
    "mxfp4": MXFP4Fields,
}
"""By ``quant_method``."""


def check_fields(method: str, values: Mapping[str, Any]) -> None:
    """Checks the fields of a method that has any.

    Raises:
        ModelError: One is invalid, or asks for something that is not supported.
    """
    if method in KINDS:
        read(KINDS[method], values)


def auto_round_method(values: Mapping[str, Any]) -> str:
    """The method whose tensors a checkpoint of auto-round has.

    Raises:
        ModelError: It is not supported.
    """
    packing = str(values.get("packing_format") or values.get("backend") or "")
    for method in ("gptq", "awq"):
        if method in packing:
            return method
    raise ModelError(
        f"quantization_config: packing_format {packing[:100]!r} is not supported; save the model as auto_gptq or "
        "auto_awq"
    )
