"""What is refused by config.json alone, before weights are downloaded."""

from __future__ import annotations

from typing import Any

import pytest

from executor.base import ModelError
from executor.supported import check_supported


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"architectures": ["Qwen3_5ForCausalLM"]}, "its Gated DeltaNet layers keep a recurrent state"),
        (
            {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": {"model_type": "qwen3_5_text"}},
            "its Gated DeltaNet layers keep a recurrent state",
        ),
        (
            {"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": ["mamba", "attention"]},
            "Mamba layers or experts are not supported yet",
        ),
        (
            {
                "architectures": ["GraniteMoeHybridForCausalLM"],
                "layer_types": ["attention"],
                "num_local_experts": 62,
            },
            "Mamba layers or experts are not supported yet",
        ),
    ],
)
def test_refused_by_name(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        check_supported(fields)


def test_granite_without_mamba_layers_is_supported() -> None:
    check_supported(
        {"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": ["attention"], "num_local_experts": 0}
    )
