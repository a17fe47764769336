"""Checkpoints in the safetensors format: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.base import ModelError
from executor.checkpoint import read_safetensors
from executor.config import ModelConfig
from executor.layers.parameter import MISFIT
from executor.loader import load_model
from executor.parallel import ParallelState
from tests import tiny
from tests.models.harness import CPU, load, logits_of, random_tokens, refusal, split_shares, weights_of

NORM = "model.norm.weight"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def edited(tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], None], **options: Any) -> Path:
    """A copy of a checkpoint with other tensors."""
    folder = tiny.copy_of(tiny.checkpoint("llama", **options), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


# ---------------------------------------------------------------------------------------------------------
# what is read


def test_sharded_equals_single() -> None:
    sharded = tiny.checkpoint("llama", shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    single, several = weights_of(load(tiny.checkpoint("llama"))), weights_of(load(sharded))
    assert single.keys() == several.keys()
    for name, tensor in single.items():
        assert torch.equal(tensor, several[name]), name


def test_several_files_without_an_index(tmp_path: Path) -> None:
    folder = tiny.copy_of(tiny.checkpoint("llama", shard_size="100KB"), tmp_path / "model")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "consolidated.safetensors").write_bytes(b"Mistral's own format")
    assert weights_of(load(folder)).keys() == weights_of(load(tiny.checkpoint("llama"))).keys()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_ranks_share_the_weights(kind: str) -> None:
    folder = tiny.checkpoint(kind)
    whole = load(folder)
    ranks = [load(folder, parallel=ParallelState(tp_rank=rank, tp_size=2)) for rank in range(2)]
    stored = load_file(folder / "model.safetensors")
    columns = ("o_proj.weight", "down_proj.weight")
    for rank in ranks:
        assert rank.weight_bytes < 0.6 * whole.weight_bytes
    # Put together from both ranks' shares, split as the projections are, it is the checkpoint's tensor again.
    shares = [split_shares(rank) for rank in ranks]
    for name, tensor in stored.items():
        first, second = (share[name] for share in shares)
        if first.shape == tensor.shape:
            assert torch.equal(first, tensor)
            assert torch.equal(second, tensor)
        else:
            assert torch.equal(torch.cat([first, second], dim=1 if name.endswith(columns) else 0), tensor), name


def test_more_ranks_than_kv_heads_hold_copies() -> None:
    folder = tiny.checkpoint("llama", intermediate_size=128)  # 4 heads, 2 KV heads of 16
    k_proj = load_file(folder / "model.safetensors")[K_PROJ]
    for rank in range(4):
        loaded = load(folder, parallel=ParallelState(tp_rank=rank, tp_size=4))
        shares = split_shares(loaded)
        assert torch.equal(shares[K_PROJ], k_proj[rank // 2 * 16 :][:16])
        shape = loaded.model.attention_layers()[0].shape
        assert (shape.num_heads, shape.num_kv_heads) == (1, 1)


def test_weights_are_converted() -> None:
    folder = tiny.checkpoint("llama", dtype="float16")
    loaded = load(folder, dtype="bfloat16")
    assert {tensor.dtype for tensor in weights_of(loaded).values()} == {torch.bfloat16}
    assert torch.equal(weights_of(loaded)[NORM], load_file(folder / "model.safetensors")[NORM].bfloat16())
    assert loaded.weight_bytes == sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


def test_a_tied_table_may_be_stored_twice_or_under_either_name(tmp_path: Path) -> None:
    expected = logits_of(load(tiny.checkpoint("llama", tied=True)), random_tokens(20))

    def twice(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    def other_name(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    for index, edit in enumerate((twice, other_name)):
        folder = edited(tmp_path / str(index), edit, tied=True)
        assert torch.equal(logits_of(load(folder), random_tokens(20)), expected)


def test_dummy_weights_need_no_file_and_are_the_same_each_time(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny.checkpoint("qwen3") / "config.json").read_bytes())
    first, second = (load(folder, load_format="dummy") for _ in range(2))
    for name, tensor in weights_of(first).items():
        assert torch.equal(tensor, weights_of(second)[name])
    assert logits_of(first, random_tokens(5)).isfinite().all()


def test_progress_counts_bytes() -> None:
    folder = tiny.checkpoint("llama")
    seen: list[tuple[str, int, int]] = []
    config = ModelConfig(model=str(folder), dtype="float32")
    loaded = load_model(config, ParallelState(), CPU, None, lambda *step: seen.append(step))
    assert seen[0] == ("weights", 0, loaded.weight_bytes)
    assert seen[-1] == ("weights", loaded.weight_bytes, loaded.weight_bytes)
    assert [step[1] for step in seen] == sorted(step[1] for step in seen)


# ---------------------------------------------------------------------------------------------------------
# what is refused: weights


def test_truncated_file(tmp_path: Path) -> None:
    folder = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        message = refusal(folder)
        assert str(path) in message
        assert size == 0 or "truncated" in message
    assert "tensor" in message


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    path = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model") / "model.safetensors"
    first, *_, last = read_safetensors(path)
    os.truncate(path, path.stat().st_size - 1)
    first.prefetch()
    with pytest.raises(ModelError, match=f"{re.escape(str(path))}: cannot be read: it has become shorter"):
        last.prefetch()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data + b"\0",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: data.replace(b'"F32"', b'"F16"', 1),
        lambda data: data.replace(b'"F32"', b'"X32"', 1),
        lambda data: data.replace(b'"shape"', b'"shade"', 1),
        lambda data: data.replace(b"[64]", b"[63]", 1),
        lambda data: data.replace(b"[0,", b"[4,", 1),
    ],
    ids=["more", "huge header", "no object", "other type", "unknown type", "no shape", "other shape", "gap"],
)
def test_corrupt_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model")
    path = folder / "model.safetensors"
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    assert str(path) in refusal(folder)


def test_missing_tensor(tmp_path: Path) -> None:
    folder = edited(tmp_path, lambda tensors: tensors.__delitem__(K_PROJ))
    assert refusal(folder) == f"{folder / 'model.safetensors'}: tensor {K_PROJ!r} is missing{MISFIT}"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn.weight"),
        ("internlm2", "model.layers.2.attention.wqkv.weight"),
        ("phi", "model.layers.0.self_attn.dense.bias"),
    ],
)
def test_a_missing_tensor_has_its_name_in_the_checkpoint(tmp_path: Path, kind: str, name: str) -> None:
    folder = tiny.copy_of(tiny.checkpoint(kind), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    assert f"tensor {name!r} is missing" in refusal(folder)


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(4, "'transformer.h.3.attn.c_attn.weight' is missing"), (2, "is not part of this model")],
)
def test_weights_of_another_depth(tmp_path: Path, num_layers: int, expected: str) -> None:
    folder = tiny.copy_of(tiny.checkpoint("gpt2"), tmp_path / "model")
    tiny.edit_json(folder / "config.json", lambda config: config.update(n_layer=num_layers))
    message = refusal(folder)
    assert expected in message and message.endswith(MISFIT)


def test_extra_tensor(tmp_path: Path) -> None:
    folder = edited(tmp_path, lambda tensors: tensors.update({"model.layers.3.mlp.up_proj.weight": torch.ones(2)}))
    message = refusal(folder)
    assert message.startswith(f"{folder / 'model.safetensors'}: tensor 'model.layers.3.mlp.up_proj.weight' is not")


def test_untied_output_layer_must_be_there(tmp_path: Path) -> None:
    folder = edited(tmp_path, lambda tensors: tensors.__delitem__("lm_head.weight"))
    message = refusal(folder)
    assert "'lm_head.weight' is missing" in message and '{"tie_word_embeddings": true}' in message


def test_wrong_shape(tmp_path: Path) -> None:
    folder = edited(tmp_path, lambda tensors: tensors.update({K_PROJ: torch.ones(32, 65)}))
    message = refusal(folder)
    assert (
        message
        == f"{folder / 'model.safetensors'}: tensor {K_PROJ!r} has shape [32, 65], the model needs [32, 64]{MISFIT}"
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn], ids=str)
def test_wrong_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = edited(tmp_path, lambda tensors: tensors.update({NORM: torch.ones(64).to(dtype)}))
    message = refusal(folder)
    assert message.startswith(f"{folder / 'model.safetensors'}: tensor {NORM!r} has type")
    assert "BF16" in message


def test_shard_that_lacks_what_the_index_lists(tmp_path: Path) -> None:
    folder = tiny.copy_of(tiny.checkpoint("llama", shard_size="100KB"), tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    file = json.loads(index.read_text())["weight_map"][NORM]
    tensors = load_file(folder / file)
    del tensors[NORM]
    save_file(tensors, folder / file)
    message = refusal(folder)
    assert message.startswith(f"{folder / file}: tensor {NORM!r} is missing")
    (folder / file).unlink()
    assert str(folder / file) in refusal(folder)
    index.write_text("{}")
    assert str(index) in refusal(folder)


def test_the_index_decides(tmp_path: Path) -> None:
    """Merged and converted checkpoints have left-overs in their shards."""
    folder = tiny.copy_of(tiny.checkpoint("llama", shard_size="100KB"), tmp_path / "model")
    expected = weights_of(load(folder))
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in sorted(set(weight_map.values())) if file != weight_map[NORM])
    tensors = load_file(folder / other)
    save_file({**tensors, NORM: torch.full((64,), 7.0), "model.visual.weight": torch.ones(3)}, folder / other)
    found = weights_of(load(folder))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_tensor_that_the_index_forgot(tmp_path: Path) -> None:
    folder = tiny.copy_of(tiny.checkpoint("llama", shard_size="100KB"), tmp_path / "model")
    expected = weights_of(load(folder))[NORM]

    def forget(index: dict[str, Any]) -> None:
        del index["weight_map"][NORM]

    tiny.edit_json(folder / "model.safetensors.index.json", forget)
    assert torch.equal(weights_of(load(folder))[NORM], expected)


@pytest.mark.parametrize(("factor", "is_told"), [(1.0, False), (1.5, True)])
def test_a_second_head_of_a_tied_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, factor: float, is_told: bool
) -> None:
    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor

    folder = edited(tmp_path, add_head, tied=True)
    expected = logits_of(load(tiny.checkpoint("llama", tied=True)), random_tokens(20))
    caplog.clear()
    assert torch.equal(logits_of(load(folder), random_tokens(20)), expected)
    assert ("'lm_head.weight': it differs from 'model.embed_tokens.weight'" in caplog.text) == is_told
    caplog.clear()
    load(folder, hf_overrides={"tie_word_embeddings": True})
    assert not caplog.text


def test_tensor_in_two_files(tmp_path: Path) -> None:
    folder = tiny.copy_of(tiny.checkpoint("llama", shard_size="100KB"), tmp_path / "model")
    (folder / "model.safetensors.index.json").unlink()
    save_file({NORM: torch.ones(64)}, folder / "more.safetensors")
    assert NORM in refusal(folder)


def test_folder_without_weights(tmp_path: Path) -> None:
    folder = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(folder)
