"""Draft heads: what they propose is what their papers say, and no token depends on it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine_core.messages import ResolvedParams
from executor.base import ModelError
from executor.config import ModelConfig, SpeculativeConfig
from executor.device.cpu import CpuDevice
from executor.messages import I32, I64
from executor.request_states import RequestStates
from executor.sampling.base import SampleRows
from executor.speculative.base import Drafts
from executor.speculative.draft_head import DraftHeadProposer
from executor.speculative.forced_drafts import ForcedDrafts
from tests import tiny
from tests.models.harness import random_tokens
from tests.models.test_late_device import BLOCK_SIZE, Engine, ReferenceCpu, answers, op_set
from tests.models.test_speculation import run_with_restarts

__all__ = ["op_set"]

SIZE, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB, DRAFT_VOCAB = 64, 4, 2, 16, 96, tiny.VOCAB_SIZE, 96
THETA, EPS = 10000.0, 1e-5
HEAD: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": SIZE,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "draft_vocab_size": DRAFT_VOCAB,
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}
Weights = dict[str, Tensor]


def eagle_weights(num_aux: int = 3) -> Weights:
    """Random tensors under the names of EAGLE's authors."""
    generator = torch.Generator().manual_seed(5)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.15

    def norm(size: int = SIZE) -> Tensor:
        return 1 + 0.2 * torch.randn(size, generator=generator)

    ids = torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB].sort().values
    attention, mlp = "midlayer.self_attn.", "midlayer.mlp."
    return {
        "d2t": ids - torch.arange(DRAFT_VOCAB),
        "t2d": torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, ids, True),
        "fc.weight": matrix(SIZE, num_aux * SIZE),
        "lm_head.weight": matrix(DRAFT_VOCAB, SIZE),
        "norm.weight": norm(),
        "midlayer.input_layernorm.weight": norm(),
        "midlayer.hidden_norm.weight": norm(),
        "midlayer.post_attention_layernorm.weight": norm(),
        f"{attention}q_proj.weight": matrix(HEADS * HEAD_DIM, 2 * SIZE),
        f"{attention}k_proj.weight": matrix(KV_HEADS * HEAD_DIM, 2 * SIZE),
        f"{attention}v_proj.weight": matrix(KV_HEADS * HEAD_DIM, 2 * SIZE),
        f"{attention}o_proj.weight": matrix(SIZE, HEADS * HEAD_DIM),
        f"{mlp}gate_proj.weight": matrix(INNER, SIZE),
        f"{mlp}up_proj.weight": matrix(INNER, SIZE),
        f"{mlp}down_proj.weight": matrix(SIZE, INNER),
    }


def write_head(folder: Path, weights: Weights, config: dict[str, Any]) -> ModelConfig:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return ModelConfig(model=str(folder), dtype="float32")


def norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotated(x: Tensor) -> Tensor:
    """x [rows, heads, head_dim], rotated by the rows' numbers."""
    angles = torch.outer(torch.arange(len(x)).double(), THETA ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM))
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def eagle_layer(w: Weights, embeds: Tensor, previous: Tensor, *, norm_before_residual: bool) -> Tensor:
    """EAGLE-3's decoder layer over all rows from the first."""
    normed = norm(previous, w["midlayer.hidden_norm.weight"])
    x = torch.cat([norm(embeds, w["midlayer.input_layernorm.weight"]), normed], -1)
    q, k, v = (
        (x @ w[f"midlayer.self_attn.{name}_proj.weight"].T).view(len(x), -1, HEAD_DIM) for name in ("q", "k", "v")
    )
    q, k = rotated(q), rotated(k)
    k, v = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (k, v))
    q, k, v = (each.transpose(0, 1) for each in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    out = out.transpose(0, 1).reshape(len(x), -1) @ w["midlayer.self_attn.o_proj.weight"].T
    hidden = (normed if norm_before_residual else previous) + out
    x = norm(hidden, w["midlayer.post_attention_layernorm.weight"])
    gate, up = (x @ w[f"midlayer.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return hidden + (F.silu(gate) * up) @ w["midlayer.mlp.down_proj.weight"].T


@dataclass
class Reference:
    """A head, by its formula."""

    embed: Tensor
    start: Callable[[list[int]], Tensor]
    """What the head goes on from after each token of the model."""
    layer: Callable[[Tensor, Tensor], Tensor]
    """Takes embeddings and what the head goes on from, of all rows; returns its hidden states."""
    logits: Callable[[Tensor], Tensor]
    """Of the model's vocabulary, from the head's hidden states."""

    def logits_of(self, tokens: list[int], drafts: list[int]) -> Tensor:
        """The logits of the next draft, after some."""
        previous = self.start(tokens)[:-1]
        followers = tokens[1:]
        for draft in [*drafts, None]:
            hidden = self.layer(self.embed[followers], previous)
            if draft is not None:
                previous, followers = torch.cat([previous, hidden[-1:]]), [*followers, draft]
        return self.logits(hidden[-1])


def eagle_reference(model: Any, w: Weights, config: dict[str, Any], layers: tuple[int, ...]) -> Reference:
    def start(tokens: list[int]) -> Tensor:
        states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        parts = [states[index][0] for index in layers]
        if config.get("fc_norm"):
            parts = [norm(part, w[f"fc_norm.{index}.weight"]) for index, part in enumerate(parts)]
        joined = torch.cat(parts, -1)
        if config.get("norm_before_fc"):
            joined = norm(joined, w["input_norm.weight"])
        return joined @ w["fc.weight"].T

    def layer(embeds: Tensor, previous: Tensor) -> Tensor:
        hidden = eagle_layer(w, embeds, previous, norm_before_residual=config.get("norm_before_residual", False))
        return norm(hidden, w["norm.weight"]) if config.get("norm_output") else hidden

    def logits(hidden: Tensor) -> Tensor:
        normed = hidden if config.get("norm_output") else norm(hidden, w["norm.weight"])
        wide = torch.full((VOCAB,), -torch.inf)
        ids = w["d2t"] + torch.arange(len(w["d2t"])) if "d2t" in w else torch.arange(VOCAB)
        wide[ids] = normed @ w["lm_head.weight"].T
        return wide

    embed = w.get("embed_tokens.weight", model.get_input_embeddings().weight)
    return Reference(embed, start, layer, logits)


def scripted(config: SpeculativeConfig, folder: Path, prompt: list[int], output: list[int]) -> SpeculativeConfig:
    """Drafts of which about half are right."""
    path = folder / "script.json"
    path.write_text(json.dumps([{"prompt": prompt, "output": output}]))
    fields = {name: getattr(config, name) for name in ("method", "num_speculative_tokens", "draft")}
    return SpeculativeConfig(**fields, is_adaptive=False, min_token_prob=0.0, script=str(path), acceptance=0.6)


def check_drafts(
    target: Path, config: SpeculativeConfig, reference: Reference, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compares what a head proposes with its formula, while drafts are accepted and rejected, and prompts cut."""
    prompt = random_tokens(45, 3)
    params = ResolvedParams(temperature=0.0, max_tokens=24)
    plain = Engine(CpuDevice(), monkeypatch, folder=target)
    plain.add(0, prompt, params)
    plain.run()
    seen: list[tuple[list[int], list[int], int]] = []
    replace = ForcedDrafts.replace

    def noted(self: ForcedDrafts, slots: I32, positions: I64, num_prompt: I64, tokens: I64) -> I64:
        states = engine.worker.runner.states
        for slot, position, token in zip(slots.tolist(), positions.tolist(), tokens.tolist(), strict=True):
            known, text = int(states.num_known[slot]), states.token_ids[slot].tolist()
            seen.append((text[:known], text[known:position], token))
        return replace(self, slots, positions, num_prompt, tokens)

    monkeypatch.setattr(ForcedDrafts, "replace", noted)
    config = scripted(config, folder, prompt, plain.outputs[0])
    engine = Engine(CpuDevice(), monkeypatch, folder=target, speculative=config, max_num_batched_tokens=24)
    engine.add(0, prompt, params)
    engine.run()
    assert engine.outputs == plain.outputs
    assert 5 < engine.num_accepted < engine.scheduler.drafts.num_draft_tokens
    assert len(seen) > 20 and len({token for *_, token in seen}) > 3
    for tokens, drafts, token in reversed(seen):
        logits = reference.logits_of(tokens, drafts)
        assert float(logits.max() - logits[token]) < 1e-4, "the likeliest token, but for rounding"


VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "authors": ({}, (2, 1, 0)),
    "speculators": (
        {
            "speculators": True,
            "norm_before_residual": True,
            "eagle_aux_hidden_state_layer_ids": [1, 2],
            "fc_norm": True,
        },
        (1, 2),
    ),
    "own embedding": (
        {
            "own": True,
            "norm_output": True,
            "norm_before_fc": True,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 1]},
        },
        (1, 2, 2),
    ),
}


def eagle_head(folder: Path, variant: str = "authors") -> tuple[SpeculativeConfig, Weights, dict[str, Any]]:
    """Files of a head, its tensors under the names of EAGLE's authors, and its fields."""
    fields, layers = VARIANTS[variant]
    weights = eagle_weights(len(layers))
    config = {**HEAD, **{name: value for name, value in fields.items() if name not in ("speculators", "own")}}
    if fields.get("fc_norm"):
        weights |= {f"fc_norm.{index}.weight": torch.linspace(0.5, 1.5, SIZE) for index in range(len(layers))}
    if fields.get("norm_before_fc"):
        weights["input_norm.weight"] = torch.linspace(0.5, 1.5, len(layers) * SIZE)
    files, written = dict(weights), dict(config)
    if fields.get("own"):  # with all tokens of the vocabulary
        generator = torch.Generator().manual_seed(6)
        weights["embed_tokens.weight"] = torch.randn(VOCAB, SIZE, generator=generator)
        weights["lm_head.weight"] = torch.randn(VOCAB, SIZE, generator=generator) * 0.15
        del weights["d2t"], weights["t2d"], written["draft_vocab_size"]
        files = dict(weights)
    if fields.get("speculators"):
        files = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in files.items()}
        inner = {name: written.pop(name) for name in list(HEAD) if name not in ("architectures", "draft_vocab_size")}
        written |= {"transformer_layer_config": inner, "speculators_model_type": "eagle3"}
    head = write_head(folder, files, written)
    speculative = SpeculativeConfig(
        method="eagle3", num_speculative_tokens=3, draft=head, is_adaptive=False, min_token_prob=0.0
    )
    return speculative, weights, config


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_eagle3_proposes_what_its_formula_says(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny.checkpoint("llama")
    speculative, weights, config = eagle_head(tmp_path / "head", variant)
    reference = eagle_reference(transformers_model(target), weights, config, VARIANTS[variant][1])
    check_drafts(target, speculative, reference, tmp_path, monkeypatch)


def mtp_model(folder: Path, family: str, **fields: Any) -> tuple[Path, Weights]:
    """A model of 3 layers whose files hold a fourth that predicts further tokens; and the tensors of that alone."""
    source = tiny.checkpoint(family, num_hidden_layers=4, **fields)
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(7)
    own = {name: 1 + 0.2 * torch.randn(SIZE, generator=generator) for name in ("enorm", "hnorm", "shared_head.norm")}
    own["eh_proj"] = torch.randn(SIZE, 2 * SIZE, generator=generator) * 0.15
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"model.layers.3.{name}.weight": tensor for name, tensor in own.items()}
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    tiny.edit_json(folder / "config.json", _with_three_layers)
    return source, own


def _with_three_layers(config: dict[str, Any]) -> None:
    config |= {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}
    config.pop("num_mtp_layers", None)
    for name in ("layer_types", "mlp_layer_types"):
        if config.get(name):
            config[name] = config[name][:3]


def mtp_reference(model: Any, w: Weights) -> Reference:
    """The fourth layer of transformers' model takes the place of the one that predicts."""
    inner, eps = model.model, model.config.rms_norm_eps

    def start(tokens: list[int]) -> Tensor:
        normed: Tensor = inner.norm(model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[3])[0]
        return normed

    def layer(embeds: Tensor, previous: Tensor) -> Tensor:
        joined = torch.cat([norm(embeds, w["enorm"], eps), norm(previous, w["hnorm"], eps)], -1) @ w["eh_proj"].T
        positions = torch.arange(len(joined))[None]
        mask = torch.full((len(joined), len(joined)), -torch.inf).triu(1)[None, None]
        rotary = inner.rotary_emb(joined[None], positions)
        out = inner.layers[3](joined[None], attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        result: Tensor = (out[0] if isinstance(out, tuple) else out)[0]
        return result

    def logits(hidden: Tensor) -> Tensor:
        result: Tensor = model.lm_head(norm(hidden, w["shared_head.norm"], eps))
        return result

    return Reference(inner.embed_tokens.weight, start, layer, logits)


def qwen_mtp_model(folder: Path, family: str) -> tuple[Path, Weights]:
    """A hybrid of 3 layers with a fourth under the names of Qwen's MTP; and the tensors of that alone."""
    types = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    source = tiny.checkpoint(family, num_hidden_layers=4, layer_types=types, **QWEN_FAMILIES[family])
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(7)
    own = {
        name: 0.2 * torch.randn(SIZE, generator=generator)
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    }
    own["fc"] = torch.randn(SIZE, 2 * SIZE, generator=generator) * 0.15
    layer = re.compile(r"^model\.layers\.3\.")
    tensors = {layer.sub("mtp.layers.0.", name): each for name, each in load_file(folder / "model.safetensors").items()}
    save_file(tensors | {f"mtp.{name}.weight": each for name, each in own.items()}, folder / "model.safetensors")
    tiny.edit_json(folder / "config.json", _with_three_layers)
    return source, own


def qwen_mtp_reference(model: Any, w: Weights) -> Reference:
    """Likewise; what the head goes on from is normed."""
    eps = model.config.rms_norm_eps
    given = {"enorm": 1 + w["pre_fc_norm_embedding"], "hnorm": 1 + w["pre_fc_norm_hidden"], "eh_proj": w["fc"]}
    plain = mtp_reference(model, {**given, "shared_head.norm": torch.ones(SIZE)})
    longest: tuple[list[int], Tensor] = ([], torch.empty(0, SIZE))

    def start(tokens: list[int]) -> Tensor:
        nonlocal longest  # transformers takes long for a recurrence, and others begin as the longest does
        if longest[0][: len(tokens)] != tokens:
            longest = tokens, plain.start(tokens)
        return longest[1][: len(tokens)]

    def layer(embeds: Tensor, previous: Tensor) -> Tensor:
        return norm(plain.layer(embeds, previous), 1 + w["norm"], eps)

    return Reference(plain.embed, start, layer, model.lm_head)


QWEN_FAMILIES: dict[str, dict[str, Any]] = {"qwen3_5": {}, "qwen3_next": {"mlp_only_layers": [1]}}


MTP = SpeculativeConfig(method="mtp", num_speculative_tokens=3, is_adaptive=False, min_token_prob=0.0)
MTP_FAMILIES: dict[str, dict[str, Any]] = {
    "glm4_moe": {},
    "deepseek_v3": {},
    "glm4_moe_lite": {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]},
}


@pytest.mark.parametrize("family", MTP_FAMILIES)
def test_mtp_layers_propose_what_their_formula_says(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    source, weights = mtp_model(target, family, **MTP_FAMILIES[family])
    reference = mtp_reference(transformers_model(source), weights)
    check_drafts(target, MTP, reference, tmp_path, monkeypatch)


@pytest.mark.parametrize("family", QWEN_FAMILIES)
def test_mtp_layers_of_qwen_propose_what_their_formula_says(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RequestStates, "tokens_of_drafts", BLOCK_SIZE)
    target = tmp_path / "model"
    source, weights = qwen_mtp_model(target, family)
    reference = qwen_mtp_reference(transformers_model(source), weights)
    check_drafts(target, MTP, reference, tmp_path, monkeypatch)


@pytest.mark.parametrize("setup", [{}, {"windows": True, "eager": True}], ids=str)
def test_eagle3_changes_nothing(setup: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(Engine(CpuDevice(), monkeypatch, **setup))
    speculative, _, _ = eagle_head(tmp_path / "head")
    engine = Engine(CpuDevice(), monkeypatch, speculative=speculative, **setup)
    assert answers(engine) == expected, "bit for bit"
    assert engine.scheduler.drafts.num_draft_tokens > 100


@pytest.mark.parametrize("method", ["eagle3", "mtp"])
def test_chunks_preemptions_and_restarts_change_nothing(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup: dict[str, Any] = {"num_blocks": 7, "max_num_batched_tokens": 24}
    if method == "mtp":
        setup["folder"] = tmp_path / "model"
        mtp_model(setup["folder"], "glm4_moe")
    expected = answers(Engine(CpuDevice(), monkeypatch, **setup))
    speculative = MTP if method == "mtp" else eagle_head(tmp_path / "head")[0]
    engine = Engine(CpuDevice(), monkeypatch, speculative=speculative, **setup)
    assert run_with_restarts(engine, setup["num_blocks"]) == expected, "bit for bit"
    assert engine.scheduler.num_preemptions > 0 and engine.scheduler.drafts.num_draft_tokens > 0


@pytest.fixture
def proposed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What heads propose, step by step."""
    proposed: list[list[int]] = []
    propose = DraftHeadProposer.propose

    def noted(self: DraftHeadProposer, *args: Any) -> Any:
        drafts = propose(self, *args)
        proposed.append(drafts.token_ids.tolist())
        return drafts

    monkeypatch.setattr(DraftHeadProposer, "propose", noted)
    return proposed


@pytest.mark.parametrize("method", ["eagle3", "mtp"])
def test_gpus_propose_likewise(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device alone, also where no drafts are wanted and graphs overwrite what the model computed. One request is
    greedy, the other draws."""
    fake_cuda = pytest.importorskip("tests.fake_cuda", reason="Triton is not installed")
    late_drafts = pytest.importorskip("executor.late_drafts")
    proposed: dict[tuple[int, ...], list[int]] = {}
    """By the tokens so far."""

    def note(slots: Any, drafts: Drafts, states: RequestStates) -> None:
        begin = 0
        for slot, count in zip(slots.tolist(), drafts.counts.tolist(), strict=True):
            text = tuple(states.token_ids[slot, : states.num_known[slot]].tolist())
            proposed[text] = drafts.token_ids[begin : begin + count].tolist()
            begin += count

    propose, settled = DraftHeadProposer.propose, late_drafts.LateSpeculation.note

    def noted(self: DraftHeadProposer, slots: Any, limits: Any, states: RequestStates) -> Drafts:
        drafts = propose(self, slots, limits, states)
        note(slots, drafts, states)
        return drafts

    def noted_late(self: Any, rows: SampleRows, *args: Any) -> Drafts:
        drafts: Drafts = settled(self, rows, *args)
        note(rows.slots if rows.offsets is None else rows.slots[rows.offsets == 0], drafts, self._states)
        return drafts

    monkeypatch.setattr(DraftHeadProposer, "propose", noted)
    monkeypatch.setattr(late_drafts.LateSpeculation, "note", noted_late)
    fake = fake_cuda.FakeCuda(by_itself=False, kernels="reference")
    setup: dict[str, Any] = {"max_num_batched_tokens": 24}
    if method == "mtp":
        setup["folder"] = tmp_path / "model"
        mtp_model(setup["folder"], "glm4_moe")
    speculative = MTP if method == "mtp" else eagle_head(tmp_path / "head")[0]
    speculative = replace(speculative, draft_sample_method="probabilistic")
    found = []
    for device in (ReferenceCpu(), fake):
        engine = Engine(device, monkeypatch, speculative=speculative, **setup)
        draft = engine.worker.runner.draft
        assert draft is not None
        if device is fake:
            fake_cuda.put_on_device(draft.loaded.model)
        for most in (None, 0):
            for index, length in enumerate((45, 9), start=2 * (most is None)):
                params = ResolvedParams(temperature=0.9 * index, seed=5, max_tokens=12, num_speculative_tokens=most)
                engine.add(index, random_tokens(length, index), params)
            engine.run()
        found.append((engine.outputs, dict(proposed)))
        proposed.clear()
    fake.close()
    assert found[0][0] == found[1][0]
    # Near the end of an output there may be fewer: the host knows only how long it may be by now.
    same = [(drafts, found[0][1][text][: len(drafts)]) for text, drafts in found[1][1].items() if text in found[0][1]]
    assert all(late == drafts for late, drafts in same)
    assert sum(len(late) for late, _ in same) > 20


def test_a_head_goes_on_after_a_prompt_from_the_prefix_cache(
    proposed: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's K and V of a shared block are those that an earlier request left there."""
    engine = Engine(CpuDevice(), monkeypatch, speculative=eagle_head(tmp_path / "head")[0])
    prompt = random_tokens(70, 3)
    for index in range(2):
        engine.add(index, prompt, ResolvedParams(temperature=0.0, max_tokens=9))
        engine.run()
    half = len(proposed) // 2
    assert proposed[:half] == proposed[half:] and engine.scheduler.kv.num_hit_tokens == 64


def test_what_is_no_head_of_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = eagle_weights()

    def refused(match: str, tensors: Weights, **fields: Any) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        head = write_head(folder, tensors, {**HEAD, **fields})
        config = SpeculativeConfig(method="eagle3", num_speculative_tokens=3, draft=head)
        with pytest.raises(ModelError, match=match):
            Engine(CpuDevice(), monkeypatch, speculative=config)

    refused("vocab_size must be that of the model, 384, not 320", weights, vocab_size=320)
    refused("num_hidden_layers must be 1", weights, num_hidden_layers=2)
    refused("eagle_aux_hidden_state_layer_ids must be a list of layers", weights, eagle_aux_hidden_state_layer_ids=[9])
    refused("d2t names tokens beyond the vocabulary of 384", {**weights, "d2t": weights["d2t"] + 900})
    without = {name: tensor for name, tensor in weights.items() if name != "fc.weight"}
    refused("tensor 'fc.weight' is missing", without)
    with pytest.raises(ModelError, match="MTP layers of LlamaForCausalLM are not supported, only those of Deepseek"):
        Engine(CpuDevice(), monkeypatch, speculative=MTP)
    folder = tmp_path / "none"
    shutil.copytree(tiny.checkpoint("glm4_moe"), folder)
    tiny.edit_json(folder / "config.json", lambda config: config.update(num_nextn_predict_layers=0))
    with pytest.raises(ModelError, match=r"says that the model has no MTP layers \(num_nextn_predict_layers\)"):
        Engine(CpuDevice(), monkeypatch, folder=folder, speculative=MTP)


def test_a_copy_of_the_models_embedding_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny.checkpoint("llama")
    table = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    sizes = []
    for number, copy in enumerate((table, table + 0.5)):
        head = write_head(tmp_path / str(number), {**eagle_weights(), "embed_tokens.weight": copy}, HEAD)
        config = SpeculativeConfig(method="eagle3", num_speculative_tokens=3, draft=head)
        draft = Engine(CpuDevice(), monkeypatch, speculative=config).worker.runner.draft
        assert draft is not None
        sizes.append(draft.loaded.weight_bytes)
    assert sizes[1] - sizes[0] == VOCAB * SIZE * 4
    assert np.isfinite(sizes).all()
