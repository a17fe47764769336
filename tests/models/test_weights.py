"""What the weights of a layer may be: packed, stacked, fused, ragged. Each kind through the loader, to logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from executor.base import ModelError
from executor.checkpoint import read_safetensors
from executor.input_batch import InputBatch
from executor.layers.parameter import Part, WeightParameter, single
from executor.loader import LoadedModel
from executor.models import registry
from executor.parallel import ParallelState
from executor.quantization import base as quantization
from tests import tiny
from tests.models import toys
from tests.models.harness import CPU, assert_close, load, logits_of, random_tokens, refusal

Tensors = dict[str, Tensor]

IGNORED = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
"""One of several merged projections, and all of them."""
QUANTIZED: dict[str, Any] = {"quantization_config": {"quant_method": "toy", "ignore": IGNORED}}

both_modes = pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toys have names, as everything that is loaded has."""
    monkeypatch.setitem(quantization.REGISTRY, "toy", "tests.models.toys:Toy")
    for name in ("ToyMixtral", "ToyPhi3", "ToyRagged", "ToyRenamed"):
        monkeypatch.setitem(registry.REGISTRY, name, f"tests.models.toys:{name}")


def rewritten(folder: Path, to: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """A copy of a checkpoint with other tensors and fields of config.json."""
    folder = tiny.copy_of(folder, to)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    tiny.edit_json(folder / "config.json", lambda fields: fields.update(config))
    return folder


def part_of(loaded: LoadedModel, name: str) -> Any:
    return loaded.model.get_submodule(name)


# ---------------------------------------------------------------------------------------------------------
# packed weights


def is_packed(name: str) -> bool:
    return name.endswith("_proj.weight") and name.removesuffix(".weight") not in IGNORED


def is_table(name: str) -> bool:
    return name in ("model.embed_tokens.weight", "lm_head.weight")


def pack(tensors: Tensors) -> Tensors:
    packed = {}
    for name, tensor in tensors.items():
        if is_packed(name):
            packed[f"{name}_packed"], packed[f"{name}_scale"] = toys.pack_int4(tensor)
        elif is_table(name):
            packed[name], packed[f"{name}_scale"] = toys.pack_int8(tensor)
        else:
            packed[name] = tensor
    return packed


def unpack(tensors: Tensors) -> Tensors:
    """What ``pack`` leaves of them."""
    plain = dict(tensors)
    for name, tensor in tensors.items():
        if is_packed(name):
            plain[name] = toys.unpack_int4(*toys.pack_int4(tensor))
        elif is_table(name):
            plain[name] = toys.unpack_int8(*toys.pack_int8(tensor))
    return plain


def packed_folder(tmp_path: Path, **fields: Any) -> Path:
    return rewritten(tiny.checkpoint("llama", **fields), tmp_path / "packed", pack, **QUANTIZED)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@both_modes
def test_packed_weights(tmp_path: Path, tied: bool, dtype: str, captured: bool) -> None:
    fields: dict[str, Any] = {"attention_bias": True, "tied": tied}
    plain = rewritten(tiny.checkpoint("llama", **fields), tmp_path / "plain", unpack)
    tokens = random_tokens(40)
    expected = logits_of(load(plain, dtype=dtype), tokens)
    loaded = load(packed_folder(tmp_path, **fields), dtype=dtype)
    assert torch.equal(logits_of(loaded, tokens, captured=captured), expected)
    assert loaded.weight_bytes < 0.7 * load(plain, dtype="float16").weight_bytes


def test_a_tied_packed_table_may_be_stored_twice_or_under_either_name(tmp_path: Path) -> None:
    def change(tensors: Tensors, *, moves: bool) -> Tensors:
        packed = pack(tensors)
        for leaf in ("weight", "weight_scale"):
            name = f"model.embed_tokens.{leaf}"
            packed[f"lm_head.{leaf}"] = packed.pop(name) if moves else packed[name].clone()
        return packed

    expected = logits_of(load(packed_folder(tmp_path, tied=True)), random_tokens(10))
    for moves in (False, True):
        source, to = tiny.checkpoint("llama", tied=True), tmp_path / f"moves-{moves}"
        folder = rewritten(source, to, partial(change, moves=moves), **QUANTIZED)
        assert torch.equal(logits_of(load(folder), random_tokens(10)), expected)


def test_random_packed_weights(tmp_path: Path) -> None:
    loaded = load(packed_folder(tmp_path), load_format="dummy")
    codes = part_of(loaded, "model.layers.0.self_attn.o_proj.weights").weight_packed
    assert codes.unique().numel() > 200
    assert logits_of(loaded, random_tokens(10)).isfinite().all()


def test_a_tensor_must_have_the_type_of_the_format(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"

    def change(tensors: Tensors) -> Tensors:
        return {**pack(tensors), f"{name}_packed": torch.zeros(64, 48)}

    folder = rewritten(tiny.checkpoint("llama"), tmp_path / "model", change, **QUANTIZED)
    assert refusal(folder).endswith(f"tensor '{name}_packed' has type F32; supported: I8")


def test_a_tensor_of_the_format_must_be_there(tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.v_proj.weight_scale"

    def change(tensors: Tensors) -> Tensors:
        return {key: tensor for key, tensor in pack(tensors).items() if key != name}

    folder = rewritten(tiny.checkpoint("llama"), tmp_path / "model", change, **QUANTIZED)
    assert f"tensor '{name}' is missing" in refusal(folder)


def test_a_split_must_leave_groups_whole(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path, intermediate_size=128, head_dim=24)
    message = refusal(folder, parallel=ParallelState(tp_rank=1, tp_size=4))
    assert message.startswith(
        "model.layers.0.self_attn.o_proj: 24 of 96 elements starting at 24 are not whole units of 16"
    )


# ---------------------------------------------------------------------------------------------------------
# against transformers


def saved(folder: Path, kind: str, tokens: list[int], **fields: Any) -> Tensor:
    """Writes a checkpoint of one of transformers' models, and returns its logits."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**tiny.COMMON, **fields})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    tiny.randomize(model)
    model.save_pretrained(folder)
    tiny.edit_json(folder / "config.json", lambda config: config.update(architectures=[f"Toy{kind}"]))
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens])).logits[0].float()
    return logits


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Tensor]]:
    folder = tmp_path_factory.mktemp("mixtral")
    logits = saved(folder, "Mixtral", random_tokens(40), num_local_experts=5, num_experts_per_tok=2)
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    yield folder, logits


@both_modes
def test_stacked_experts(mixtral: tuple[Path, Tensor], captured: bool) -> None:
    folder, logits = mixtral
    assert_close(logits_of(load(folder), random_tokens(40), captured=captured), logits)


def test_ranks_share_each_expert(mixtral: tuple[Path, Tensor]) -> None:
    folder, _ = mixtral
    stored = load_file(folder / "model.safetensors")
    for rank in range(2):
        loaded = load(folder, parallel=ParallelState(tp_rank=rank, tp_size=2))
        experts = part_of(loaded, "model.layers.1.mlp.experts")
        for index in range(5):
            gate, up, down = (
                stored[f"model.layers.1.mlp.experts.{index}.{name}.weight"] for name in ("w1", "w3", "w2")
            )
            rows = (slice(64), slice(64, 96))[rank]
            assert torch.equal(experts.gate_up.weight[index], torch.cat([gate[rows], up[rows]]))
            assert torch.equal(experts.down.weight[index], down[:, rows])


@both_modes
def test_fused_projections(tmp_path: Path, captured: bool) -> None:
    logits = saved(tmp_path, "Phi3", random_tokens(40))
    assert_close(logits_of(load(tmp_path), random_tokens(40), captured=captured), logits)


def test_ranks_share_fused_projections(tmp_path: Path) -> None:
    saved(tmp_path, "Phi3", [0])
    fused = load_file(tmp_path / "model.safetensors")["model.layers.1.self_attn.qkv_proj.weight"]
    q, k, v = fused.split([64, 32, 32])
    for rank in range(2):
        loaded = load(tmp_path, parallel=ParallelState(tp_rank=rank, tp_size=2))
        layer = part_of(loaded, "model.layers.1.self_attn.qkv_proj")
        assert layer.output_sizes == [32, 16, 16]
        expected = torch.cat([q[32 * rank :][:32], k[16 * rank :][:16], v[16 * rank :][:16]])
        assert torch.equal(apply(layer, torch.eye(64)).T, expected)


# ---------------------------------------------------------------------------------------------------------
# other names and layouts


def rename(tensors: Tensors) -> Tensors:
    """The tensors of Llama, as ``toys.ToyRenamed`` reads them."""
    renamed = {"transformer.h.0.attn.mask": torch.ones(3), "transformer.h.7.mlp.draft.weight": torch.ones(2)}
    for name, tensor in tensors.items():
        name = name.replace("model.layers.", "transformer.h.").replace("model.", "transformer.")
        name = name.replace(".self_attn.", ".attn.")
        renamed[name] = tensor.t().contiguous() if ".down_proj." in name else tensor
    for index in range(3):
        q, k, v = (renamed.pop(f"transformer.h.{index}.attn.{name}_proj.weight") for name in "qkv")
        heads = (q.view(2, 2, 16, 64), k.view(2, 1, 16, 64), v.view(2, 1, 16, 64))
        renamed[f"transformer.h.{index}.attn.qkv_proj.weight"] = torch.cat(heads, dim=1).reshape(128, 64)
    return renamed


def renamed_folder(tmp_path: Path) -> Path:
    folder = rewritten(tiny.checkpoint("llama"), tmp_path / "renamed", rename, architectures=["ToyRenamed"])

    def respell(config: dict[str, Any]) -> None:
        config["n_embd"], config["n_layer"] = config.pop("hidden_size"), config.pop("num_hidden_layers")

    tiny.edit_json(folder / "config.json", respell)
    return folder


@both_modes
def test_other_names_and_layouts(tmp_path: Path, captured: bool) -> None:
    expected = logits_of(load(tiny.checkpoint("llama")), random_tokens(40))
    assert torch.equal(logits_of(load(renamed_folder(tmp_path)), random_tokens(40), captured=captured), expected)


def test_ranks_share_projections_stored_by_head(tmp_path: Path) -> None:
    folder = renamed_folder(tmp_path)
    for size in (2, 3):
        for rank in range(size):
            place = ParallelState(tp_rank=rank, tp_size=size)
            plain, renamed = load(tiny.checkpoint("llama"), parallel=place), load(folder, parallel=place)
            for name in ("model.layers.1.self_attn.qkv_proj", "model.layers.2.mlp.down_proj"):
                x = torch.eye(part_of(plain, name).shape.input.size)
                assert torch.equal(apply(part_of(renamed, name), x), apply(part_of(plain, name), x))


def test_two_tensors_for_one_place(tmp_path: Path) -> None:
    folder = renamed_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.norm.weight": torch.ones(64)}, folder / "model.safetensors")
    assert "'transformer.norm.weight' and " in (message := refusal(folder)) or "'model.norm.weight' and " in message
    assert message.endswith("are the same tensor of the model")


# ---------------------------------------------------------------------------------------------------------
# ragged shares


def apply(layer: Any, x: Tensor) -> Tensor:
    nothing = torch.empty(0, dtype=torch.int32)
    with torch.inference_mode():
        out: Tensor = layer.method.apply(layer.weights, x, InputBatch(nothing, nothing, [], nothing))
    return out


@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
def test_ragged_shares(tmp_path: Path, is_packed: bool) -> None:
    folder = packed_folder(tmp_path) if is_packed else tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "plain")
    whole = load(folder)
    tiny.edit_json(folder / "config.json", lambda config: config.update(architectures=["ToyRagged"]))
    ranks = [load(folder, parallel=ParallelState(tp_rank=rank, tp_size=2)) for rank in range(2)]
    x, inner = torch.randn(7, 64), torch.randn(7, 96)
    for index in range(3):

        def layer(loaded: LoadedModel, name: str, index: int = index) -> Any:
            return part_of(loaded, f"model.layers.{index}.mlp.{name}")

        gate, up = apply(layer(whole, "gate_up_proj"), x).split([96, 96], dim=-1)
        down = torch.zeros(7, 64)
        for loaded, (start, end) in zip(ranks, toys.RAGGED, strict=True):
            columns = torch.cat([gate[:, start:end], up[:, start:end]], dim=-1)
            assert torch.equal(apply(layer(loaded, "gate_up_proj"), x), columns)
            down += apply(layer(loaded, "down_proj"), inner[:, start:end].contiguous())
        torch.testing.assert_close(down, apply(layer(whole, "down_proj"), inner), rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------
# types


TYPES = {
    "F4": torch.float4_e2m1fn_x2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "I32": torch.int32,
    "I8": torch.int8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "U8": torch.uint8,
}


def test_types_that_are_no_plain_numbers_are_read_as_they_are_stored(tmp_path: Path) -> None:
    raw = {name: (torch.arange(48, dtype=torch.uint8) * seed % 251).view(2, 24) for seed, name in enumerate(TYPES, 3)}
    # One byte before the others, so that none lies where its type would like it to.
    save_file({"a": torch.zeros(1, dtype=torch.int8), **{k: v.view(TYPES[k]) for k, v in raw.items()}}, tmp_path / "x")
    tensors = {tensor.name: tensor for tensor in read_safetensors(tmp_path / "x")}
    for name, dtype in TYPES.items():
        parameter = WeightParameter.empty(
            single(Part.piece(2, 1, 1), Part.whole(24 // dtype.itemsize)), dtype=dtype, device=CPU
        )
        parameter.load(tensors[name].read(dtype))
        assert torch.equal(parameter.data.view(torch.uint8), raw[name][1:]), name
        # Powers of 2 are scales in float32, too.
        numbers = torch.float16 if name == "F8_E8M0" else torch.float32
        for other in (numbers, torch.bool):
            with pytest.raises(ValueError, match=f"has type {name}; supported: "):
                tensors[name].read(other)


def test_pairs_of_numbers_fill_their_rows(tmp_path: Path) -> None:
    """Three numbers of 4 bits a row: the second row would begin within a byte."""
    header = json.dumps({"x": {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    with pytest.raises(ModelError, match=r"corrupt header: shape \[2, 3\] does not fit bytes 0 to 3"):
        read_safetensors(tmp_path / "x")


def test_tensors_of_any_type_may_lie_in_a_file_unread(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        unused = {f"{name}.rotary_emb.inv_freq": torch.zeros(24).view(dtype) for name, dtype in TYPES.items()}
        return {**tensors, **unused}

    folder = rewritten(tiny.checkpoint("llama"), tmp_path / "model", change)
    assert load(folder).weight_bytes == load(tiny.checkpoint("llama")).weight_bytes
