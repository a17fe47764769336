"""Decoders put together from parts, each against the same in plain torch, without caches and batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from executor.layers.context import ModelContext
from executor.layers.mlp import MLP, GatedMLP
from executor.layers.norm import LayerNorm, RMSNorm
from executor.layers.positions import LearnedPositions
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.loader import LoadedModel
from executor.models.decoder import CausalDecoder, DecoderParts, Norms, ParallelDecoderLayer, PostNormDecoderLayer
from ops.cpu import build
from ops.cpu.program import NativeProgram, Segment
from tests.models.harness import RANDOM_MODEL, Chunk, Runner, assert_close, logits_of, random_model, random_tokens
from tests.ops.cpu import NEEDS_KERNELS

LAYERS, HEADS, KV_HEADS, HEAD_DIM = (
    RANDOM_MODEL[name] for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
)
EPS = RANDOM_MODEL["rms_norm_eps"]
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

Weights = dict[str, Tensor]
Block = Callable[[int, Tensor], Tensor]
Norm = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """A kind of decoder: how it is made of parts, and how plain torch computes it."""

    parts: Callable[[ModelContext], DecoderParts]
    layer: Callable[[str, Tensor, Norm, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], Tensor]
    """Takes the layer's name, its input, and the functions for norms (by name), attention and MLP."""
    theta: Callable[[int], float | None] = lambda index: 10000.0
    """Base of the angles of a layer; None: nothing is rotated."""
    window: Callable[[int], int | None] = lambda index: None
    rotary_dim: int = HEAD_DIM
    is_interleaved: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    attention_scale: float = HEAD_DIM**-0.5
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    is_layer_norm: bool = False
    has_final_norm: bool = True
    position_offset: int | None = None
    activation: Callable[[Tensor], Tensor] = F.silu
    has_gate: bool = True
    config: dict[str, Any] = field(default_factory=dict)


def layer_norm(context: ModelContext, *, bias: bool) -> Callable[[int], nn.Module]:
    return lambda size: LayerNorm(context, size, EPS, bias=bias)


# ---------------------------------------------------------------------------------------------------------
# the parts of each


def pre_norm(context: ModelContext) -> DecoderParts:
    rotary = RotaryEmbedding(context)
    return DecoderParts(lambda index, prefix: SelfAttention(context, rotary, prefix=prefix))


def pre_norm_with_factors(context: ModelContext) -> DecoderParts:
    """As Granite."""
    rotary = RotaryEmbedding(context)
    return DecoderParts(
        lambda index, prefix: SelfAttention(context, rotary, scale=0.2, prefix=prefix),
        embedding_scale=3.0,
        residual_scale=0.6,
        logit_scale=0.7,
    )


def sandwich(context: ModelContext) -> DecoderParts:
    """As Gemma 2 and 3."""
    rotary = {kind: RotaryEmbedding(context, context.config.rope_for(kind)) for kind in KINDS}

    def attention(index: int, prefix: str) -> SelfAttention:
        kind = KINDS[index]
        return SelfAttention(
            context,
            rotary[kind],
            head_norm=lambda size: RMSNorm(context, size, EPS),
            scale=0.3,
            sliding_window=11 if kind == "sliding_attention" else None,
            logit_softcap=2.0,
            prefix=prefix,
        )

    return DecoderParts(
        attention,
        norms=Norms(
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_norm"
        ),
        embedding_scale=8.0,
        logit_softcap=1.5,
    )


def post_norm_on_the_branch(context: ModelContext) -> DecoderParts:
    """As OLMo 2; every other layer does not rotate, as in SmolLM3."""
    rotary = RotaryEmbedding(context)
    return DecoderParts(
        lambda index, prefix: SelfAttention(context, rotary if index % 2 else None, prefix=prefix),
        norms=Norms(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm"),
    )


def parallel(context: ModelContext) -> DecoderParts:
    """As GPT-NeoX."""
    rotary = RotaryEmbedding(context, is_interleaved=True)
    return DecoderParts(
        lambda index, prefix: SelfAttention(context, rotary, qkv_bias=True, out_bias=True, prefix=prefix),
        lambda index, prefix: MLP(context, bias=True, prefix=prefix),
        layer_norm(context, bias=True),
        ParallelDecoderLayer,
    )


def parallel_with_one_norm(context: ModelContext) -> DecoderParts:
    """As Cohere; the first layer has an MLP without a gate."""
    rotary = RotaryEmbedding(context)
    return DecoderParts(
        lambda index, prefix: SelfAttention(context, rotary, prefix=prefix),
        lambda index, prefix: (GatedMLP if index else MLP)(context, prefix=prefix),
        layer_norm(context, bias=False),
        ParallelDecoderLayer,
        Norms(before_attention="input_layernorm"),
        residual_scale=0.6,
        logit_bias=True,
        logit_scale=1.3,
    )


def norm_without_weight(context: ModelContext) -> DecoderParts:
    """As OLMo, with the squared relu of Nemotron."""
    rotary = RotaryEmbedding(context)
    return DecoderParts(
        lambda index, prefix: SelfAttention(context, rotary, prefix=prefix),
        lambda index, prefix: MLP(context, prefix=prefix),
        lambda size: LayerNorm(context, size, EPS, weight=False, bias=False),
    )


def post_norm_on_the_sum(context: ModelContext) -> DecoderParts:
    """As OPT with ``do_layer_norm_before`` false."""
    return DecoderParts(
        lambda index, prefix: SelfAttention(context, None, qkv_bias=True, out_bias=True, prefix=prefix),
        lambda index, prefix: MLP(context, bias=True, prefix=prefix),
        layer_norm(context, bias=True),
        PostNormDecoderLayer,
        Norms(after_attention="self_attn_layer_norm", after_mlp="final_layer_norm"),
        has_final_norm=False,
        positions=LearnedPositions(context, offset=2),
    )


def pre_norm_layer(name: str, h: Tensor, norm: Any, attention: Any, mlp: Any, factor: float = 1.0) -> Tensor:
    h = h + factor * attention(norm(f"{name}.input_layernorm", h))
    out: Tensor = h + factor * mlp(norm(f"{name}.post_attention_layernorm", h))
    return out


def sandwich_layer(name: str, h: Tensor, norm: Any, attention: Any, mlp: Any) -> Tensor:
    h = h + norm(f"{name}.post_attention_layernorm", attention(norm(f"{name}.input_layernorm", h)))
    out = mlp(norm(f"{name}.pre_feedforward_layernorm", h))
    result: Tensor = h + norm(f"{name}.post_feedforward_norm", out)
    return result


def branch_layer(name: str, h: Tensor, norm: Any, attention: Any, mlp: Any) -> Tensor:
    h = h + norm(f"{name}.post_attention_layernorm", attention(h))
    out: Tensor = h + norm(f"{name}.post_feedforward_layernorm", mlp(h))
    return out


def parallel_layer(name: str, h: Tensor, norm: Any, attention: Any, mlp: Any) -> Tensor:
    first, second = norm(f"{name}.input_layernorm", h), norm(f"{name}.post_attention_layernorm", h)
    out: Tensor = h + attention(first) + mlp(second)
    return out


def one_norm_layer(name: str, h: Tensor, norm: Any, attention: Any, mlp: Any) -> Tensor:
    normed = norm(f"{name}.input_layernorm", h)
    out: Tensor = h + 0.6 * attention(normed) + 0.6 * mlp(normed)
    return out


def sum_layer(name: str, h: Tensor, norm: Any, attention: Any, mlp: Any) -> Tensor:
    h = norm(f"{name}.self_attn_layer_norm", h + attention(h))
    out: Tensor = norm(f"{name}.final_layer_norm", h + mlp(h))
    return out


SHAPES = {
    "pre-norm": Shape(pre_norm, pre_norm_layer),
    "pre-norm with factors": Shape(
        pre_norm_with_factors,
        partial(pre_norm_layer, factor=0.6),
        attention_scale=0.2,
        embedding_scale=3.0,
        logit_scale=0.7,
    ),
    "norm without weight": Shape(
        norm_without_weight,
        pre_norm_layer,
        is_layer_norm=True,
        activation=lambda x: F.relu(x).square(),
        has_gate=False,
        config={"hidden_act": "relu2"},
    ),
    "sandwich": Shape(
        sandwich,
        sandwich_layer,
        theta=lambda index: 100.0 if index % 2 == 0 else 5000.0,
        window=lambda index: 11 if index % 2 == 0 else None,
        attention_scale=0.3,
        attention_softcap=2.0,
        logit_softcap=1.5,
        embedding_scale=8.0,
        activation=lambda x: F.gelu(x, approximate="tanh"),
        config={
            "hidden_act": "gelu_pytorch_tanh",
            "rope_parameters": {
                "sliding_attention": {"rope_theta": 100.0},
                "full_attention": {"rope_theta": 5000.0, "rope_type": "default"},
            },
        },
    ),
    "post-norm on the branch": Shape(
        post_norm_on_the_branch, branch_layer, theta=lambda index: 10000.0 if index % 2 else None
    ),
    "parallel": Shape(
        parallel,
        parallel_layer,
        rotary_dim=HEAD_DIM // 2,
        is_interleaved=True,
        is_layer_norm=True,
        activation=F.gelu,
        has_gate=False,
        config={"hidden_act": "gelu", "rope_parameters": {"partial_rotary_factor": 0.5}},
    ),
    "parallel with one norm": Shape(parallel_with_one_norm, one_norm_layer, is_layer_norm=True, logit_scale=1.3),
    "post-norm on the sum": Shape(
        post_norm_on_the_sum,
        sum_layer,
        theta=lambda index: None,
        is_layer_norm=True,
        has_final_norm=False,
        position_offset=2,
        activation=F.relu,
        has_gate=False,
        config={"hidden_act": "relu"},
    ),
}


# ---------------------------------------------------------------------------------------------------------
# the same in plain torch


class Plain:
    """Computes a whole sequence at once."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        self.shape = shape
        self.weights = weights

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights.get(f"{name}.weight"), self.weights.get(f"{name}.bias")
        if self.shape.is_layer_norm:
            return F.layer_norm(x, (x.shape[-1],), weight, bias, EPS)
        return F.rms_norm(x, (x.shape[-1],), weight, EPS)

    def rotate(self, x: Tensor, theta: float) -> Tensor:
        """``x`` [heads, tokens, head_dim], as complex numbers times unit vectors."""
        dim = self.shape.rotary_dim
        angles = torch.outer(torch.arange(x.shape[1]).float(), theta ** (-torch.arange(0, dim, 2).float() / dim))
        pairs = x[..., :dim].unflatten(-1, (-1, 2)) if self.shape.is_interleaved else None
        if pairs is None:
            pairs = torch.stack(x[..., :dim].chunk(2, dim=-1), dim=-1)
        rotated = torch.view_as_real(
            torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
        )
        flat = rotated.flatten(-2) if self.shape.is_interleaved else torch.cat(rotated.unbind(-1), dim=-1)
        return torch.cat((flat, x[..., dim:]), dim=-1)

    def attention(self, index: int, x: Tensor) -> Tensor:
        name, shape = f"model.layers.{index}.self_attn", self.shape
        projected = self.linear(f"{name}.qkv_proj", x).unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1)
        q, k, v = projected.split([HEADS, KV_HEADS, KV_HEADS])
        if f"{name}.q_norm.weight" in self.weights:
            q, k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", k)
        theta = shape.theta(index)
        if theta is not None:
            q, k = self.rotate(q, theta), self.rotate(k, theta)
        k, v = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=0) for tensor in (k, v))
        scores = q @ k.transpose(1, 2) * shape.attention_scale
        if shape.attention_softcap is not None:
            scores = shape.attention_softcap * torch.tanh(scores / shape.attention_softcap)
        distance = torch.arange(len(x)).unsqueeze(1) - torch.arange(len(x))
        visible = (distance >= 0) & (distance < (shape.window(index) or len(x)))
        weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
        return self.linear(f"{name}.o_proj", (weights @ v).transpose(0, 1).flatten(1))

    def mlp(self, index: int, x: Tensor) -> Tensor:
        name = f"model.layers.{index}.mlp"
        if f"{name}.up_proj.weight" in self.weights:
            inner = self.shape.activation(self.linear(f"{name}.up_proj", x))
        else:
            gate, up = self.linear(f"{name}.gate_up_proj", x).chunk(2, dim=-1)
            inner = self.shape.activation(gate) * up
        return self.linear(f"{name}.down_proj", inner)

    def logits(self, token_ids: list[int]) -> Tensor:
        shape, weights = self.shape, self.weights
        hidden = weights["model.embed_tokens.weight"][token_ids] * shape.embedding_scale
        if shape.position_offset is not None:
            hidden = hidden + weights["model.embed_positions.weight"][shape.position_offset :][: len(token_ids)]
        for index in range(LAYERS):
            hidden = shape.layer(
                f"model.layers.{index}",
                hidden,
                self.norm,
                lambda x, index=index: self.attention(index, x),  # type: ignore[misc]
                lambda x, index=index: self.mlp(index, x),  # type: ignore[misc]
            )
        if shape.has_final_norm:
            hidden = self.norm("model.norm", hidden)
        logits = shape.logit_scale * self.linear("lm_head", hidden)
        return logits if shape.logit_softcap is None else shape.logit_softcap * torch.tanh(logits / shape.logit_softcap)


def make(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[LoadedModel, Weights]:
    return random_model(lambda context: CausalDecoder(context, shape.parts(context)), dtype, **shape.config)


@pytest.mark.parametrize("name", SHAPES)
def test_a_decoder_of_parts_equals_plain_torch(name: str) -> None:
    shape = SHAPES[name]
    loaded, weights = make(shape)
    token_ids = random_tokens(70)
    assert_close(logits_of(loaded, token_ids), Plain(shape, weights).logits(token_ids), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_captured_equals_eager(name: str, dtype: torch.dtype) -> None:
    loaded, _ = make(SHAPES[name], dtype)
    steps = [
        [Chunk(0, random_tokens(40)), Chunk(1, random_tokens(7, 2))],
        [Chunk(1, random_tokens(1, 3)), Chunk(2, random_tokens(33, 4)), Chunk(0, random_tokens(1, 5))],
    ]
    eager = Runner(loaded)
    expected = [eager.step(step) for step in steps]
    captured = Runner(loaded, captured=True)
    for step, logits in zip(steps, expected, strict=True):
        assert torch.equal(captured.step(step), logits)
    if build.available():
        assert captured.program is not None
        assert captured.program.python_ops == 0


@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("pre-norm", 2),  # the embedding; the final norm and the logits
        ("pre-norm with factors", 3),  # and the embedding's factor
        ("norm without weight", 2),
        ("sandwich", 3 + 2 * LAYERS),  # the embedding's factor; norms after a block are fused with the sums
        ("parallel", 2),
        ("parallel with one norm", 2 + LAYERS),  # the norm has two readers
        ("post-norm on the sum", 3 + 2 * LAYERS),  # the positions, their sum; norms follow sums, the last one is fused
    ],
)
def test_fusion_leaves_five_calls_per_layer(name: str, others: int) -> None:
    loaded, _ = make(SHAPES[name], torch.bfloat16)
    program = Runner(loaded, captured=True).program
    assert program is not None
    native = program._runner
    assert isinstance(native, NativeProgram)
    (segment,) = native._parts
    assert isinstance(segment, Segment)
    assert len(segment.items) == 5 * LAYERS + others


def test_layers_of_one_kind_form_a_group() -> None:
    loaded, _ = make(SHAPES["sandwich"])
    runner = Runner(loaded)
    assert [group.layers for group in runner.groups] == [(0, 2), (1, 3)]
    assert [group.shape.sliding_window for group in runner.groups] == [11, None]
