"""Every family against transformers, with all its facts set to values that matter (``tests/families.py``).

In float32: prefill, chunked prefill and decode, greedy tokens, both spellings of config.json. In captured programs on
the CPU kernels: the same bits alone and in any batch.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from ops.cpu import build
from tests import tiny
from tests.families import FAMILIES
from tests.models.harness import (
    Chunk,
    Runner,
    assert_close,
    load,
    logits_of,
    random_tokens,
    reference_logits,
    steps_of,
)
from tests.ops.cpu import DTYPES, threads

NEEDS_KERNELS = pytest.mark.skipif(not build.available(), reason="no kernels are available on this machine")
VARIANTS = [(name, variant) for name, family in FAMILIES.items() for variant in family.variants]

families = pytest.mark.parametrize("name", FAMILIES)


@pytest.mark.parametrize("old_spelling", [False, True], ids=["new", "old"])
@families
def test_same_logits_as_transformers(name: str, old_spelling: bool) -> None:
    token_ids = random_tokens(100)
    expected = reference_logits(tiny.checkpoint(name), token_ids)
    assert_close(logits_of(load(tiny.checkpoint(name, old_rope_spelling=old_spelling)), token_ids), expected)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_variants(name: str, variant: str) -> None:
    folder = tiny.checkpoint(name, **FAMILIES[name].variants[variant])
    token_ids = random_tokens(100)
    assert_close(logits_of(load(folder), token_ids), reference_logits(folder, token_ids))


@families
def test_chunks_and_decode(name: str) -> None:
    folder = tiny.checkpoint(name)
    loaded = load(folder)
    first, second = random_tokens(90), random_tokens(61, 2)
    runner = Runner(loaded, captured=True, block_size=64, seed=3)
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    positions = [0, 0]
    for counts in [(5, 0), (32, 1), (31, 1), (1, 40), (0, 16), *[(1, 1)] * 3, *[(1, 0)] * 18]:
        chunks = []
        for request, (tokens, count) in enumerate(zip((first, second), counts, strict=True)):
            if count:
                chunks.append(Chunk(request, tokens[positions[request] : positions[request] + count]))
                positions[request] += count
        rows = runner.step(chunks).split([len(chunk.token_ids) for chunk in chunks])
        for chunk, logits in zip(chunks, rows, strict=True):
            parts[chunk.request].append(logits)
    assert positions == [90, 61]
    for part, token_ids in zip(parts, (first, second), strict=True):
        assert_close(torch.cat(part), reference_logits(folder, token_ids))


@families
def test_greedy_tokens(name: str) -> None:
    folder = tiny.checkpoint(name)
    runner = Runner(load(folder), captured=True)
    prompt = random_tokens(40)
    ours, theirs = list(prompt), list(prompt)
    chunk = prompt
    for _ in range(32):
        chunk = [int(runner.step([Chunk(0, chunk)])[-1].argmax())]
        ours += chunk
        theirs.append(int(reference_logits(folder, theirs)[-1].argmax()))
    assert ours == theirs


@families
def test_bfloat16_is_close_to_transformers(name: str) -> None:
    folder = tiny.checkpoint(name, dtype="bfloat16")
    loaded = load(folder, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    token_ids = random_tokens(60)
    theirs = reference_logits(folder, token_ids)
    difference = (logits_of(loaded, token_ids) - theirs).abs()
    assert difference.max() < 0.08 * theirs.abs().max()


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_factors_of_embeddings_are_rounded_first(name: str) -> None:
    folder = tiny.checkpoint(name, dtype="bfloat16")
    runner = Runner(load(folder, dtype="auto"))
    batch = runner._batch([Chunk(0, random_tokens(20))])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(runner.model.model.embed(batch), model.model.embed_tokens(batch.input_ids))  # type: ignore[operator, union-attr]


# ---------------------------------------------------------------------------------------------------------
# captured programs on the kernels


@NEEDS_KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@families
def test_all_ops_run_on_the_kernels_and_give_the_bits_of_eager_mode(name: str, dtype: torch.dtype) -> None:
    loaded = load(tiny.checkpoint(name), dtype=str(dtype).removeprefix("torch."))
    assert {layer.backend.name for layer in loaded.model.attention_layers()} == {"cpu"}
    eager, captured = Runner(loaded), Runner(loaded, captured=True)
    for step in steps_of(1):
        assert torch.equal(captured.step(step), eager.step(step))
    assert captured.program is not None
    assert captured.program.python_ops == FAMILIES[name].python_ops


@NEEDS_KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@families
def test_logits_do_not_depend_on_the_batch(name: str, dtype: torch.dtype) -> None:
    """Random chunks beside random neighbours, by two threads, against each request alone, token by token."""
    loaded = load(tiny.checkpoint(name), dtype=str(dtype).removeprefix("torch."))
    steps = steps_of(3, num_steps=8)
    with threads(2):
        runner = Runner(loaded, captured=True)
        batched: dict[int, list[torch.Tensor]] = {}
        for step in steps:
            rows = runner.step(step).split([len(chunk.token_ids) for chunk in step])
            for chunk, logits in zip(step, rows, strict=True):
                batched.setdefault(chunk.request, []).append(logits)
    runner = Runner(loaded, captured=True)
    for request, logits in batched.items():
        tokens = [token for step in steps for chunk in step if chunk.request == request for token in chunk.token_ids]
        alone = torch.cat([runner.step([Chunk(request, [token])]) for token in tokens])
        assert torch.equal(torch.cat(logits), alone)
