"""Adapters in PEFT's format: rows with one compute what the merged weights do, rows without one are as ever."""

from __future__ import annotations

import gc
import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from executor.adapter_files import adapter_hash, read_adapter_files, rescaled
from executor.adapters import LoadedAdapters, check_adapters
from executor.adapters.peft import read_modules
from executor.base import ModelError
from executor.config import LoRAConfig
from executor.layers.moe import SmallLinear
from executor.layers.parameter import Weights
from executor.loader import LoadedModel
from executor.messages import LoRARequest
from tests import tiny
from tests.lora import ALL_LINEAR, ATTENTION, as_gguf, merge, write_adapter
from tests.models.harness import Chunk, Runner, load, random_tokens

CONFIG = LoRAConfig(enable_lora=True, max_loras=3, max_lora_rank=8)


def request(path: Path) -> LoRARequest:
    return LoRARequest(path.name, 1, str(path), adapter_hash(path))


def adapted(base: Path, *paths: Path, **fields: Any) -> tuple[LoadedModel, LoadedAdapters]:
    """A model with adapters, numbered from 1 on."""
    loaded = load(base, max_adapters=CONFIG.max_loaded, **fields)
    adapters = LoadedAdapters(loaded, CONFIG)
    for number, path in enumerate(paths, 1):
        adapters.load(number, request(path))
    return loaded, adapters


STEPS = [
    [Chunk(0, random_tokens(20), 1), Chunk(1, random_tokens(7, 2)), Chunk(2, random_tokens(33, 3), 2)],
    [Chunk(3, random_tokens(5, 4), 1), Chunk(2, random_tokens(1, 5), 2), Chunk(0, random_tokens(1, 6), 1)],
    [Chunk(1, random_tokens(1, 8)), Chunk(3, random_tokens(1, 9), 1), Chunk(2, random_tokens(2, 1), 2)],
]


def check(base: Path, *paths: Path, atol: float = 2e-5, captured: bool = True) -> None:
    """Compares a model with adapters with those that they are merged into, and with itself without them."""
    mixed = Runner(adapted(base, *paths)[0], captured=captured)
    plain = [Runner(load(path), captured=captured) for path in (base, *(merge(base, path) for path in paths))]
    bases = Runner(load(base), captured=captured)
    for step in STEPS:
        results = mixed.step(step).split([len(chunk.token_ids) for chunk in step])
        for chunk, logits in zip(step, results, strict=True):
            alone = [Chunk(chunk.request, chunk.token_ids)]
            if chunk.adapter == 0:
                assert torch.equal(logits, plain[0].step(alone))
                continue
            number = min(chunk.adapter, len(paths))
            torch.testing.assert_close(logits, plain[number].step(alone), rtol=1e-5, atol=atol)
            if chunk.request == 2 and len(logits) == 33:
                assert (logits - bases.step(alone)).abs().max() > 0.01


def two(base: Path, **fields: Any) -> tuple[Path, Path]:
    return write_adapter(base, **fields), write_adapter(base, **{**fields, "seed": 2, "rank": 3})


CASES: dict[str, Callable[[], tuple[Path, ...]]] = {}


def case(function: Callable[[], tuple[Path, ...]]) -> Callable[[], tuple[Path, ...]]:
    CASES[function.__name__] = function
    return function


@case
def all_linear() -> tuple[Path, ...]:
    base = tiny.checkpoint("llama")
    return base, *two(base, rank_pattern={r"layers\.1\.mlp\.down_proj": 6}, alpha_pattern={"q_proj": 3.0})


@case
def some_of_the_merged() -> tuple[Path, ...]:
    base = tiny.checkpoint("llama")
    return base, *two(base, targets=r"(q|v|up)_proj$", use_rslora=True)


@case
def dora() -> tuple[Path, ...]:
    base = tiny.checkpoint("llama")
    return base, *two(base, targets=r"(q|v|down)_proj$", dora=True)


@case
def biases() -> tuple[Path, ...]:
    base = tiny.checkpoint("qwen2")
    return base, *two(base, targets=ATTENTION, biases=("k_proj", "q_proj"))


@case
def whole_modules() -> tuple[Path, ...]:
    base = tiny.checkpoint("llama", tied=False)
    saved = ("lm_head", "model.embed_tokens", "model.layers.0.self_attn.k_proj")
    adapter = write_adapter(base, targets="(q|v|o|up|down)_proj$", saved=saved)
    return base, adapter, write_adapter(base, seed=2, targets="lm_head|o_proj")


@case
def tables() -> tuple[Path, ...]:
    base = tiny.checkpoint("llama", tied=False)
    tokens = {"embed_tokens": [0, 7, 5, 90]}
    return base, write_adapter(base, table="model.embed_tokens"), write_adapter(base, seed=2, tokens=tokens)


@case
def tokens_of_a_tied_table() -> tuple[Path, ...]:
    base = tiny.checkpoint("llama", tied=True)
    return base, *(write_adapter(base, seed=seed, tokens={"embed_tokens": [90, 7 * seed]}) for seed in (1, 2))


@case
def fused_in_files() -> tuple[Path, ...]:
    base = tiny.checkpoint("phi3")
    return base, *two(base, targets="(qkv|o|gate_up|down)_proj$")


@case
def transposed_in_files() -> tuple[Path, ...]:
    base = tiny.checkpoint("gpt2")
    return base, *two(base, targets=r"(c_attn|c_proj|c_fc)$", transposed=True)


@case
def grouped_heads_in_files() -> tuple[Path, ...]:
    base = tiny.checkpoint("gpt_neox")
    return base, *two(base, targets=r"(query_key_value|dense|dense_h_to_4h)$")


@case
def experts() -> tuple[Path, ...]:
    base = per_expert(tiny.checkpoint("mixtral"))
    return base, *two(base, targets=r"experts\.\d+\.(w[123]|\w+_proj)$|q_proj$")


@case
def experts_without_gates_of_latents() -> tuple[Path, ...]:
    base = per_expert(tiny.checkpoint("nemotron_h", moe_latent_size=32, n_group=1, topk_group=1))
    return base, *two(base, targets=r"experts\.\d+\.(up|down)_proj$|fc1_latent_proj$")


@case
def experts_in_stacks() -> tuple[Path, ...]:
    """As PEFT writes them with transformers 5, and the router that chooses them."""
    base, stacks = in_stacks(tiny.checkpoint("mixtral")), ("gate_up_proj", "down_proj")
    adapter = write_adapter(base, targets="gate$|v_proj$", stacks=stacks)
    return base, adapter, write_adapter(base, targets="none", seed=2, rank=3, stacks=stacks[1:])


@case
def gates_and_ups_that_alternate() -> tuple[Path, ...]:
    base = tiny.checkpoint("gpt_oss")
    return base, *two(base, targets="none", stacks=("gate_up_proj", "down_proj"), transposed=True)


@case
def stacks_that_peft_takes_for_transposed_ones() -> tuple[Path, ...]:
    base = tiny.checkpoint("llama4")
    return base, *two(base, targets="none", stacks=("gate_up_proj", "down_proj"))


@case
def gates_of_experts() -> tuple[Path, ...]:
    base = tiny.checkpoint("qwen2_moe")
    return base, *two(base, targets="gate$|shared_expert.down_proj$")


def in_stacks(folder: Path) -> Path:
    """A Mixtral with a tensor for all experts, as transformers holds it."""
    target = Path(tempfile.mkdtemp(prefix="mixtral-", dir=tiny.session_folder()))
    shutil.copytree(folder, target, dirs_exist_ok=True)
    tensors = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        found = re.fullmatch(r"(.*)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight", name)
        if found is None:
            tensors[name.replace(".block_sparse_moe.", ".mlp.")] = tensor
        else:
            experts.setdefault(f"{found[1]}.mlp.experts.{found[3]}", {})[int(found[2])] = tensor
    stacks = {name: torch.stack([each[index] for index in range(len(each))]) for name, each in experts.items()}
    for name in [name for name in stacks if name.endswith("w1")]:
        prefix = name.removesuffix("w1")
        tensors[f"{prefix}gate_up_proj"] = torch.cat((stacks[name], stacks[f"{prefix}w3"]), 1)
        tensors[f"{prefix}down_proj"] = stacks[f"{prefix}w2"]
    save_file(tensors, target / "model.safetensors")
    return target


def per_expert(folder: Path) -> Path:
    """The checkpoint with a tensor for each expert, as on the hub."""
    target = Path(tempfile.mkdtemp(prefix="mixtral-", dir=tiny.session_folder()))
    shutil.copytree(folder, target, dirs_exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        prefix, found, leaf = name.partition(".experts.")
        if not found or tensor.dim() != 3:
            tensors[name] = tensor
            continue
        for index, matrix in enumerate(tensor):
            parts = {leaf: matrix}
            if leaf == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            for part, rows in parts.items():
                tensors[f"{prefix}.experts.{index}.{part}.weight"] = rows.contiguous()
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize("name", CASES)
def test_rows_compute_with_the_merged_weights(name: str) -> None:
    check(*CASES[name]())


@pytest.mark.parametrize("base_kind", ["folder", "gguf"])
def test_adapters_of_llama_cpp(base_kind: str) -> None:
    folder = tiny.checkpoint("llama", tied=False)
    config = json.loads((folder / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    adapter = write_adapter(folder, table="model.embed_tokens")
    path = as_gguf(adapter, "llama", config["num_hidden_layers"], heads)
    base = tiny.gguf_file(folder, GGMLQuantizationType.F32).path if base_kind == "gguf" else folder
    loaded, _ = adapted(base, path)
    step = [Chunk(0, random_tokens(20), 1), Chunk(1, random_tokens(20))]
    found = Runner(loaded).step(step).split(20)
    torch.testing.assert_close(
        found[0], Runner(load(merge(folder, adapter))).step([Chunk(0, random_tokens(20))]), rtol=0, atol=5e-5
    )
    assert torch.equal(found[1], Runner(load(base)).step([Chunk(1, random_tokens(20))]))
    damaged = adapter / "damaged.gguf"
    whole = path.read_bytes()
    for data, message in (
        (whole[:-9], "not a GGUF file, or a damaged one"),
        (whole.replace(b"llama", b"qwen2"), "general.architecture is 'qwen2'"),
        (whole[4:], "not a GGUF file, or a damaged one"),
        (whole.replace(b"blk.1.attn_q", b"blk.0.attn_q"), r"'blk.0.attn_q.weight.lora_a': a second a of .*0.*q_proj"),
    ):
        damaged.write_bytes(data)
        with pytest.raises(ModelError, match=message):
            adapted(base, damaged)


def test_experts_of_llama_cpp() -> None:
    folder = tiny.checkpoint("mixtral")
    config = json.loads((folder / "config.json").read_text())
    adapter = write_adapter(folder, targets=r"experts\.\d+\.w[123]$|\.gate$|v_proj$")
    loaded, _ = adapted(folder, as_gguf(adapter, "llama", config["num_hidden_layers"]))
    step = [Chunk(0, random_tokens(20), 1)]
    expected = Runner(load(merge(folder, adapter))).step([Chunk(0, random_tokens(20))])
    torch.testing.assert_close(Runner(loaded).step(step), expected, rtol=0, atol=5e-5)


def test_eager() -> None:
    check(*all_linear(), captured=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("fields", [{}, {"quantization": "int8", "quantized_activations": "int8"}], ids=["", "int8"])
def test_bits_do_not_depend_on_other_rows(dtype: str, fields: dict[str, Any]) -> None:
    base, *paths = all_linear()
    mixed = Runner(adapted(base, *paths, dtype=dtype, **fields)[0], captured=True)
    alone = Runner(adapted(base, *paths, dtype=dtype, **fields)[0], captured=True)
    plain = Runner(load(base, dtype=dtype, **fields), captured=True)
    for step in STEPS:
        results = mixed.step(step).split([len(chunk.token_ids) for chunk in step])
        for chunk, logits in zip(step, results, strict=True):
            runner = alone if chunk.adapter else plain
            assert torch.equal(logits, runner.step([chunk]))


def test_a_scale() -> None:
    base = tiny.checkpoint("llama")
    adapter, double = (write_adapter(base, alpha=alpha) for alpha in (4.0, 8.0))
    loaded, adapters = adapted(base, double)
    scaled = LoRARequest("x", 1, str(adapter), adapter_hash(adapter, 2.0), 2.0)
    adapters.load(2, scaled)
    first, second = Runner(loaded).step([Chunk(0, random_tokens(9), 1), Chunk(1, random_tokens(9), 2)]).split(9)
    assert torch.equal(first, second)
    assert scaled.content_hash != adapter_hash(adapter)
    adapters.load(3, LoRARequest("x", 1, str(adapter), rescaled(scaled.content_hash, 0.0), 0.0))
    chunks = [Chunk(number, random_tokens(9), number) for number in range(4)]
    together = Runner(loaded).step(chunks).split(9)
    assert all(torch.equal(each, Runner(loaded).step([chunk])) for each, chunk in zip(together, chunks, strict=True))
    torch.testing.assert_close(together[3], together[0], rtol=0, atol=1e-6)
    assert (together[1] - together[0]).abs().max() > 0.01
    dora = write_adapter(base, targets="q_proj", dora=True)
    with pytest.raises(ModelError, match="has a magnitude .*; use a scale of 1"):
        adapters.load(2, LoRARequest("x", 1, str(dora), adapter_hash(dora, 2.0), 2.0))


def test_nothing_is_left_of_an_adapter() -> None:
    base, first, second = all_linear()
    loaded, adapters = adapted(base, first)
    tables = [module.adapters for module in loaded.model.modules() if isinstance(module, Weights) and module.adapters]
    found = [weakref.ref(table.adapters[1]) for table in tables if table.adapters[1] is not None]
    assert found and all(each() is not None for each in found)
    adapters.load(1, request(second))
    adapters.unload(1)
    gc.collect()
    assert all(each() is None for each in found)
    assert all(not table.addresses.any() for table in tables)


def test_adapters_come_and_go() -> None:
    base, first, second = all_linear()
    loaded, adapters = adapted(base, first)
    prompt = random_tokens(9)
    with_first = Runner(loaded).step([Chunk(0, prompt, 1)])
    adapters.load(2, request(second))
    with_second = Runner(loaded).step([Chunk(0, prompt, 2)])
    adapters.load(1, request(second))
    assert torch.equal(Runner(loaded).step([Chunk(0, prompt, 1)]), with_second)
    adapters.load(1, request(first))
    assert torch.equal(Runner(loaded).step([Chunk(0, prompt, 1)]), with_first)
    adapters.unload(1)
    adapters.unload(2)
    adapters.load(0, request(second))  # a trial leaves nothing
    plain = Runner(load(base)).step([Chunk(0, prompt)])
    assert torch.equal(Runner(loaded).step([Chunk(0, prompt, 1)]), plain)
    assert torch.equal(Runner(loaded).step([Chunk(0, prompt, 2)]), plain)


def broken(edit: Callable[[dict[str, torch.Tensor]], object] | None = None, **fields: Any) -> Path:
    folder = write_adapter(tiny.checkpoint("llama"), **fields)
    if edit is not None:
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: broken(rank=9), r"the rank of .* is 9, and the server was started with --max-lora-rank 8"),
        (lambda: broken(peft_type="LOHA"), "peft_type is 'LOHA'; only LORA"),
        (lambda: broken(use_qalora=True), "use_qalora: QA-LoRA are not supported yet"),
        (lambda: broken(rank_pattern={"(a+)+": 2}), "rank_pattern: .* is too complex"),
        (lambda: broken(r=2), "has rank 4, and .* says 2"),
        (lambda: broken(lambda t: t.pop(Q.format("B"))), "has no b of"),
        (
            lambda: broken(lambda t: t.update({Q.format("A"): torch.zeros(4, 3)})),
            r"has shape \[4, 3\], the model needs",
        ),
        (lambda: broken(lambda t: t[Q.format("A")].fill_(torch.nan)), "not finite"),
        (lambda: broken(lambda t: t.update({"base_model.model.x.weight": torch.zeros(3)})), "no layer x"),
        (lambda: broken(lambda t: t.update({"x.lora_C": torch.zeros(3)})), "of a kind that is not supported"),
        (
            lambda: broken(lambda t: t.update({Q.format("A.default"): torch.zeros(4, 64)})),
            r"lora_A.*weight': a second a of 'model.layers.0.self_attn.q_proj', after .*lora_A",
        ),
    ],
)
def test_errors_name_the_cause(make: Callable[[], Path], message: str) -> None:
    loaded, adapters = adapted(tiny.checkpoint("llama"))
    with pytest.raises(ModelError, match=message):
        adapters.load(1, request(make()))
    prompt = [Chunk(0, random_tokens(9), 1)]
    assert torch.equal(Runner(loaded).step(prompt), Runner(load(tiny.checkpoint("llama"))).step(prompt))


def test_layers_that_peft_saves_with_what_wraps_them() -> None:
    """The weight is there twice then, and beside it the one that it replaces."""
    folder = write_adapter(tiny.checkpoint("llama"), targets="none", saved=("lm_head", "model.embed_tokens"))
    path = folder / "adapter_model.safetensors"
    stored = load_file(path)
    expected = {name: list(each.stored) for name, each in read_modules(read_adapter_files(folder)).items()}
    assert list(expected.values()) == [["weight"]] * 2
    for suffix in (".modules_to_save.weight", ".modules_to_save.default.weight"):
        wrapped = {name.replace(".weight", suffix): each.clone() for name, each in stored.items()}
        original = {name.replace(".weight", ".original_module.weight"): 2 * each for name, each in stored.items()}
        for tensors in (wrapped | original, stored | wrapped | original):
            save_file(tensors, path)
            found = read_modules(read_adapter_files(folder))
            assert {name: list(each.stored) for name, each in found.items()} == expected
            for module in found.values():
                (tensor,) = (each for name, each in stored.items() if f"{module.name}.weight" in name)
                assert torch.equal(module.read("weight", *tensor.shape), tensor)


def test_files() -> None:
    loaded, adapters = adapted(tiny.checkpoint("llama"))
    folder = write_adapter(tiny.checkpoint("llama"))
    known = request(folder)
    (folder / "adapter_config.json").write_text((folder / "adapter_config.json").read_text() + " ")
    with pytest.raises(ModelError, match="files have changed"):
        adapters.load(1, known)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="truncated"):
        adapters.load(1, request(folder))
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled weights"):
        adapter_hash(folder)
    with pytest.raises(ModelError, match="no such folder"):
        adapter_hash(folder / "nothing")
    with pytest.raises(ModelError, match=re.escape("--lora-dtype float16: activations are float32")):
        check_adapters(LoRAConfig(enable_lora=True, lora_dtype="float16"), loaded, 1, "cpu")
    with pytest.raises(ModelError, match=r"--enable-lora: kernels of the device \(toy\) do not compute"):
        check_adapters(CONFIG, loaded, 1, "toy")
    with pytest.raises(ModelError, match="--enable-lora: adapters on several ranks"):
        check_adapters(CONFIG, loaded, 2, "cpu")


def test_stacks_that_do_not_fit() -> None:
    base = in_stacks(tiny.checkpoint("mixtral"))
    _, adapters = adapted(base)
    folder = write_adapter(base, targets="none", stacks=("down_proj",))
    stored = load_file(folder / "adapter_model.safetensors")
    for kind, message in (("A", r"both must be the rank times \d+ experts"), ("B", r"down_proj has \d+ results of")):
        cut = {name: tensor[1:].clone() if f"lora_{kind}" in name else tensor for name, tensor in stored.items()}
        save_file(cut, folder / "adapter_model.safetensors")
        with pytest.raises(ModelError, match=message):
            adapters.load(1, request(folder))


def test_names_that_no_adapter_has() -> None:
    """None takes the place of another unnoticed, is left out, or takes forever to be refused."""
    base = in_stacks(tiny.checkpoint("mixtral"))
    _, adapters = adapted(base)
    folder = write_adapter(base, targets="none", stacks=("down_proj",))
    stored = load_file(folder / "adapter_model.safetensors")
    nested = {name.replace(".lora_", ".base_layer.lora_"): tensor for name, tensor in stored.items()}
    lengths = {name.replace("lora_A.weight", "lora_magnitude_vector"): tensor for name, tensor in stored.items()}
    endless = {name.replace("experts", "x" + ".base_layer" * 100_000 + "y"): each for name, each in stored.items()}
    for tensors, message in (
        (stored | nested, r"two adapters of .*\.experts\.\d+\.down_proj; the other one is"),
        (stored | lengths, "the model has no layer .*experts that an adapter can change"),
        (endless, "the model has no layer .* that an adapter can change"),
    ):
        save_file({name: each.clone() for name, each in tensors.items()}, folder / "adapter_model.safetensors")
        with pytest.raises(ModelError, match=message):
            adapters.load(1, request(folder))


def test_matrices_between_latents_and_heads() -> None:
    base = tiny.checkpoint("deepseek_v3")
    _, adapters = adapted(base)
    with pytest.raises(ModelError, match=r"self_attn.kv_b_proj, which attention multiplies .* no adapter yet"):
        adapters.load(1, request(write_adapter(base, targets="kv_b_proj$")))


def test_memory_is_known() -> None:
    _, adapters = adapted(tiny.checkpoint("llama"))
    assert adapters.num_bytes(0) > 0 and ALL_LINEAR


def test_the_adapters_of_a_router_are_looked_up_on_its_device() -> None:
    sizes = SimpleNamespace(hidden_size=8)
    context: Any = SimpleNamespace(config=sizes, dtype=torch.bfloat16, device=torch.device("meta"), max_adapters=2)
    adapters = SmallLinear(context, 4).weights.adapters
    assert adapters is not None and adapters.addresses.is_meta
