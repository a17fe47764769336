"""Comparing formats of a model: with permuted channels, it computes what the model computes; the table in the docs."""

from __future__ import annotations

from pathlib import Path

import eval_formats
import pytest
import torch
from gguf import GGMLQuantizationType
from permute_channels import permute_gguf, permuted
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.models.harness import load, logits_of


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_logits_stay(kind: str) -> None:
    folder = tiny.checkpoint(kind)
    tensors = load_file(folder / "model.safetensors")
    changed = permuted(tensors)
    assert not torch.equal(
        tensors["model.layers.0.mlp.down_proj.weight"], changed["model.layers.0.mlp.down_proj.weight"]
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = model(ids).logits
        model.load_state_dict(changed, strict=False)
        after = model(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_logits_of_a_gguf_file_stay(tmp_path: Path) -> None:
    file = tiny.gguf_file(tiny.checkpoint("gemma3"), GGMLQuantizationType.BF16)
    permute_gguf(file.path, tmp_path / "permuted.gguf")
    ids = list(range(3, 20))
    before = logits_of(load(file.path, dtype="float32"), ids)
    after = logits_of(load(tmp_path / "permuted.gguf", dtype="float32"), ids)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_the_table_of_formats() -> None:
    row = {"weight_bytes": 2e6, "tokens_per_second": 51.4, "change": 0.0123, "kl": 0.02}
    both = {"bf16": row, "int4@float": row, "nearest": {**row, "kl": 0.05}}
    results, rows = [both, {"bf16": row}], ["int4@float", "nearest"]
    share = "A, share of the divergence of `nearest` that is left: `int4@float` 40%."
    lines = eval_formats.table(["A", "B"], results, rows, eval_formats.COLUMNS)
    assert lines == [
        "| | A | | | | B | | | |",
        "|---|---|---|---|---|---|---|---|---|",
        "| | MB | NLL | KL | tokens/s | MB | NLL | KL | tokens/s |",
        "| `bf16` | 2 | | | 51 | 2 | | | 51 |",
        "| `int4@float` | 2 | +1.23% | 0.0200 | 51 | refused | | | |",
        "| `nearest` | 2 | +1.23% | 0.0500 | 51 | refused | | | |",
        "",
        share,
    ]
    assert eval_formats.table(["A"], [both], rows, eval_formats.COLUMNS[:-1])[-4:] == [
        "| `int4@float` | 2 | +1.23% | 0.0200 |",
        "| `nearest` | 2 | +1.23% | 0.0500 |",
        "",
        share,
    ]
    for file in (eval_formats.TARGET, eval_formats.README):
        page = file.read_text()
        assert page.count(eval_formats.START) == page.count(eval_formats.END) == 1
        written = eval_formats.with_table(page, lines)
        assert written == eval_formats.with_table(written, lines)
        assert written.partition(eval_formats.END)[2] == page.partition(eval_formats.END)[2]
