"""What is refused by config.json alone, before weights are downloaded."""

from __future__ import annotations

from typing import Any

import pytest

from executor.base import ModelError
from executor.supported import check_gguf_architecture, check_supported

LLAMA = {"architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"architectures": ["JambaForCausalLM"], "model_type": "jamba"}, "it keeps a recurrent state"),
        ({**LLAMA, "dtype": "int4"}, "^dtype must be one of bfloat16, .* takes precedence\\), not 'int4'"),
        ({**LLAMA, "torch_dtype": "torch.float8_e4m3fn"}, "^torch_dtype must be one of"),
        ({**LLAMA, "dtype": {"text": "bfloat16"}}, "^dtype must be one of"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quant_method is missing"),
        (
            {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModel": "x.Own"}},
            "Python code from the model's repository",
        ),
    ],
)
def test_refused_by_name(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        check_supported(fields)


def test_what_the_command_line_decides() -> None:
    check_supported({**LLAMA, "dtype": "int4"}, dtype="bfloat16")
    check_supported({**LLAMA, "dtype": None, "torch_dtype": "torch.float16", "quantization_config": {}})
    check_supported({**LLAMA, "auto_map": {"AutoModelForCausalLM": "x.Own"}})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Gemma5ForCausalLM", "(the closest: GemmaForCausalLM, Gemma4ForCausalLM, Gemma3ForCausalLM; docs/models.md"),
        ("LLaMAForCausalLM", "(the closest: LlamaForCausalLM, Llama4ForCausalLM; docs/models.md lists"),
        ("Zzz", "another one (docs/models.md lists all)"),
        ("x" * 10_000, "x...' is not supported"),
    ],
)
def test_an_unknown_architecture_is_answered_with_the_closest(name: str, expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_supported({"architectures": [name]})
    message = str(caught.value)
    assert expected in message and "nor can it run through transformers: " in message and len(message) < 500
    with pytest.raises(ModelError, match="use --model-impl auto"):
        check_supported({"architectures": [name]}, model_impl="octavo")


def test_an_unknown_architecture_of_a_gguf_file() -> None:
    with pytest.raises(ModelError) as caught:
        check_gguf_architecture("starcoder")
    message = str(caught.value)
    assert "(the closest: starcoder2; docs/models.md" in message and "--model-impl" in message and len(message) < 500
