"""Every encoder against transformers, with all its facts set to values that matter (``tests/encoder_families.py``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from executor.models.registry import ENCODERS as REGISTRY
from executor.models.registry import resolve_model, split_architecture
from tests import tiny
from tests.encoder_families import ENCODERS
from tests.family import FULL
from tests.models.harness import Chunk, Runner, assert_close, load, random_tokens
from tests.ops.cpu import DTYPES, NEEDS_KERNELS, threads

encoders = pytest.mark.parametrize("name", ENCODERS)


def states_of(name: str, token_ids: list[int], **inputs: Any) -> torch.Tensor:
    """transformers' hidden states, float32 [num_tokens, hidden_size]."""
    model = transformers.AutoModel.from_pretrained(tiny.checkpoint(name), attn_implementation="eager").eval()
    with torch.inference_mode():
        states: torch.Tensor = model(torch.tensor([token_ids]), **inputs).last_hidden_state[0]
    return states


def tokens(count: int, seed: int = 1) -> list[int]:
    """Random tokens without the padding token, whose position transformers does not count."""
    return [token if token > 2 else 5 for token in random_tokens(count, seed)]


@encoders
def test_same_states_as_transformers(name: str) -> None:
    token_ids = tokens(100)
    expected = states_of(name, token_ids)
    for old_spelling in (False, True):
        loaded = load(tiny.checkpoint(name, old_rope_spelling=old_spelling))
        assert not loaded.pooling.generates and loaded.pooling.needs_whole_prompts
        assert_close(Runner(loaded, captured=True).step([Chunk(0, token_ids)]), expected)


@pytest.mark.parametrize("power", [None, 0.625])
def test_rotary_scaling_of_gte(power: float | None) -> None:
    """transformers lacks it: its angles are replaced by those of the definition (kexue.fm/archives/9706)."""
    factor, base, size, token_ids = 8.0, 3000.0, 16, tokens(100)
    pairs = torch.arange(0, size, 2).double()
    if power is None:
        angles = (factor * base) ** (-pairs / size) / factor ** (2 / size)
    else:
        scale = torch.tensor(factor).double().log() / (size / 2) ** power
        angles = base ** (-pairs / size) / (scale * (pairs / 2 + 1) ** power).exp()
    folder = tiny.checkpoint("gte")
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    assert model.rotary_emb.inv_freq.shape == angles.shape
    model.rotary_emb.inv_freq = angles.float()
    with torch.inference_mode():
        expected = model(torch.tensor([token_ids])).last_hidden_state[0]
    scaling = {"type": "ntk", "factor": factor} | ({} if power is None else {"mixed_b": power})
    old = tiny.checkpoint("gte", old_rope_spelling=True)
    loaded = load(old, hf_overrides={"rope_scaling": scaling})
    assert_close(Runner(loaded).step([Chunk(0, token_ids)]), expected)
    assert loaded.max_model_len == 512


@pytest.mark.parametrize("name", ["bert", "nomic", "xlm_roberta"])
def test_types_of_tokens(name: str) -> None:
    token_ids = tokens(60)
    types = [0] * 23 + [1] * 37
    expected = states_of(name, token_ids, token_type_ids=torch.tensor([types]))
    runner = Runner(load(tiny.checkpoint(name)), captured=True)
    states = runner.step([Chunk(1, tokens(20, 2)), Chunk(0, token_ids, second_segment=23)])
    assert_close(states[20:], expected)


@NEEDS_KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@encoders
def test_all_ops_run_on_the_kernels_and_bits_do_not_depend_on_the_batch(name: str, dtype: torch.dtype) -> None:
    loaded = load(tiny.checkpoint(name), dtype=str(dtype).removeprefix("torch."))
    prompts = [tokens(count, count) for count in (1, 40, 3, 131)]
    captured, eager = Runner(loaded, captured=True), Runner(loaded)
    with threads(2):
        together = captured.step([Chunk(row, prompt) for row, prompt in enumerate(prompts)])
    assert captured.program is not None and captured.program.python_ops == 0
    for prompt, states in zip(prompts, together.split([len(prompt) for prompt in prompts]), strict=True):
        eager.lengths = [0] * 4
        assert torch.equal(eager.step([Chunk(2, prompt)]), states)


@encoders
def test_defaults_are_those_of_transformers(name: str) -> None:
    made = getattr(transformers, ENCODERS[name].config)()
    rope = made.to_dict().get("rope_parameters") or {}
    theirs = {**vars(type(made)), **rope.get(FULL, rope)}
    ours = resolve_model(ENCODERS[name].model)
    for key, value in ours.config_defaults.items():
        own = ours.attribute_map.get(key, made.attribute_map.get(key, key))
        found = [source[each] for source in (theirs, vars(made)) for each in (own, key) if each in source]
        assert not found or value in found, key


def test_every_encoder_is_tested() -> None:
    tested = {family.model for family in ENCODERS.values()} | {"CLIPModel", "SiglipModel"}  # these in test_clip.py
    assert {resolve_model(name) for name in REGISTRY} <= {resolve_model(name) for name in tested}


def test_names_of_architectures() -> None:
    assert split_architecture("BertForMaskedLM") == ("BertModel", "none")
    assert split_architecture("XLMRobertaForSequenceClassification") == ("XLMRobertaModel", "sequence")
    assert split_architecture("Qwen3Model") == ("Qwen3ForCausalLM", "none")
    assert split_architecture("Gemma3TextModel") == ("Gemma3ForCausalLM", "none")
    assert split_architecture("LlamaForTokenClassification") == ("LlamaForCausalLM", "token")
    assert split_architecture("Qwen3ForCausalLM") == ("Qwen3ForCausalLM", "lm")
    assert split_architecture("WhisperModel") == ("WhisperModel", "lm")
