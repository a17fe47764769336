"""The demo model in the blocks of its file."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from api import LLM, SamplingParams
from tests.models.harness import load, logits_of


def questions(test_data: Path, count: int) -> list[str]:
    lines = (test_data / "gsm8k_test.jsonl").read_text().splitlines()[:count]
    return [f"Question: {each['question']}\nAnswer: {each['answer']}" for each in map(json.loads, lines)]


def test_tokens_do_not_depend_on_the_batch(demo_model: Path, test_data: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompts = questions(test_data, 5)

    def tokens(llm: LLM, prompts: list[str]) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    with LLM(str(demo_model), dtype="bfloat16") as llm:
        batch = tokens(llm, prompts)
        assert [tokens(llm, [prompt])[0] for prompt in prompts[:2]] == batch[:2]
    with LLM(str(demo_model), dtype="bfloat16", enforce_eager=True, max_num_batched_tokens=48, max_num_seqs=5) as llm:
        assert tokens(llm, prompts) == batch


def test_likelihood_and_memory(demo_model: Path, test_data: Path) -> None:
    """Floating-point activations give the bits of the dequantised model, those of 8 bits its likelihood."""
    with LLM(str(demo_model), dtype="bfloat16", load_format="dummy", max_model_len=64) as llm:
        ids = [llm.get_tokenizer().encode(text) for text in questions(test_data, 2)]

    def logits(quantization: str | None, activations: str) -> list[torch.Tensor]:
        loaded = load(demo_model, dtype="bfloat16", quantization=quantization, quantized_activations=activations)
        if quantization is None:
            assert loaded.weight_bytes < 1.02 * demo_model.stat().st_size
        return [logits_of(loaded, each, num_requests=1, max_len=512) for each in ids]

    def likelihood(found: list[torch.Tensor]) -> float:
        pairs = zip(found, ids, strict=True)
        return sum(
            rows.log_softmax(-1)[:-1].gather(1, torch.tensor(each[1:])[:, None]).sum().item() for rows, each in pairs
        )

    plain, exact, rounded = logits("none", "auto"), logits(None, "float"), logits(None, "auto")
    assert all(map(torch.equal, exact, plain))
    assert not any(map(torch.equal, rounded, plain))
    assert abs(likelihood(rounded) / likelihood(plain) - 1) < 0.005
