"""Each reference op against an independent formulation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import ops
from executor.graphs import Program
from ops import AttentionMetadata, AttentionShape
from ops.dispatch import Spec, StepInput
from ops.reference.kv_codes import decode_heads, encode_heads
from ops.reference.sampling import UNIT_BITS, kept_tokens, log_probs, philox, token_weights, uniform, units
from tests.ops.cpu import using

FLOATS = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def reference_only() -> Iterator[None]:
    with using("reference"):
        yield


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---------------------------------------------------------------------------------------------------------
# basic


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_linear_and_logits(dtype: torch.dtype) -> None:
    x, weight, bias = randn(5, 16, dtype=dtype), randn(7, 16, seed=1, dtype=dtype), randn(7, seed=2, dtype=dtype)
    exact = x.double() @ weight.double().T
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ops.linear(x, weight).double(), exact, rtol=tolerance, atol=tolerance)
    with_bias = exact + bias.double()
    torch.testing.assert_close(ops.linear(x, weight, bias).double(), with_bias, rtol=tolerance, atol=tolerance)
    assert ops.linear(x, weight).dtype == dtype
    logits = ops.logits(x, weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ops.logits(x, weight, bias).double(), with_bias, rtol=tolerance, atol=tolerance)


def test_embedding_and_rows() -> None:
    table = randn(10, 4)
    ids = torch.tensor([3, 3, 9], dtype=torch.int32)
    assert torch.equal(ops.embedding(ids, table), torch.stack([table[3], table[3], table[9]]))
    assert torch.equal(ops.gather_rows(table, torch.tensor([2, 0])), torch.stack([table[2], table[0]]))
    assert torch.equal(ops.add(table, table), 2 * table)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_activations(dtype: torch.dtype) -> None:
    x = randn(6, 20, dtype=dtype)
    exact: dict[Any, Any] = {
        "silu": lambda y: y / (1 + torch.exp(-y)),
        "gelu": lambda y: y * 0.5 * (1 + torch.erf(y / math.sqrt(2))),
        "gelu_tanh": lambda y: 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
        "quick_gelu": lambda y: y / (1 + torch.exp(-1.702 * y)),
        "relu": lambda y: y.clamp(min=0),
        "relu2": lambda y: y.clamp(min=0) ** 2,
    }
    tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-6
    for kind, function in exact.items():
        expected = function(x.double())
        torch.testing.assert_close(ops.activation(x, kind).double(), expected, rtol=tolerance, atol=tolerance)
        if kind in ("silu", "gelu", "gelu_tanh"):
            gated = function(x.double()[:, :10]) * x.double()[:, 10:]
            torch.testing.assert_close(ops.act_and_mul(x, kind).double(), gated, rtol=tolerance, atol=tolerance)


def test_scale_rounds_once() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = randn(6, 20, dtype=dtype)
        assert torch.equal(ops.scale(x, 8.046875), (x.double() * 8.046875).to(dtype))


def test_clip() -> None:
    x = 10 * randn(6, 20)
    result = ops.clip(x, 3.0)
    assert (result.abs() <= 3).all()
    assert torch.equal(result[x.abs() <= 3], x[x.abs() <= 3])
    assert torch.equal(result[x.abs() > 3], 3 * x[x.abs() > 3].sign())


def test_softcap() -> None:
    x = 10 * randn(6, 20)
    result = ops.softcap(x, 3.0)
    assert result.abs().max() <= 3
    torch.testing.assert_close(result.double(), 3 * torch.tanh(x.double() / 3), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------
# norms and rotary


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rms_norm_is_that_of_llama(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(24, eps=1e-5)
    norm.weight.data = randn(24, seed=1, dtype=dtype)
    x = 3 * randn(5, 24, dtype=dtype)
    assert torch.equal(ops.rms_norm(x, norm.weight.data, 1e-5), norm(x))
    heads = 3 * randn(5, 4 * 24, seed=2, dtype=dtype)
    expected = norm(heads.view(5, 4, 24)).flatten(1)
    assert torch.equal(ops.rms_norm(heads, norm.weight.data, 1e-5), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rms_norm_is_that_of_gemma_and_olmo2(dtype: torch.dtype) -> None:
    weight, x = randn(24, seed=1, dtype=dtype), 3 * randn(5, 4 * 24, seed=2, dtype=dtype)
    heads = x.view(5, 4, 24)
    gemma, olmo = Gemma3RMSNorm(24, eps=1e-5), Olmo2RMSNorm(24, eps=1e-5)
    gemma.weight.data = olmo.weight.data = weight
    ours = ops.rms_norm(x, weight, 1e-5, offset=1.0, round_first=False)
    assert torch.equal(ours, gemma(heads).flatten(1))
    assert torch.equal(ops.rms_norm(x, weight, 1e-5, round_first=False), olmo(heads).flatten(1))
    assert torch.equal(ops.rms_norm(x, None, 1e-5, size=24), ops.rms_norm(x, torch.ones(24, dtype=dtype), 1e-5))
    assert torch.equal(ops.rms_norm(x, weight.repeat(4), 1e-5, size=24), ops.rms_norm(x, weight, 1e-5))


def test_layer_norm() -> None:
    x, weight, bias = 3 * randn(5, 24) + 1, randn(24, seed=1), randn(24, seed=2)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(ops.layer_norm(x, weight, None, 1e-5), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops.layer_norm(x, weight, bias, 1e-5), expected + bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops.layer_norm(x, None, None, 1e-5) * weight, expected, rtol=1e-5, atol=1e-5)


def test_layer_norm_of_groups() -> None:
    x, weights, biases = 3 * randn(5, 24) + 1, randn(24, seed=1), randn(24, seed=2)
    for columns in (slice(0, 8), slice(8, 16), slice(16, 24)):
        alone = ops.layer_norm(x[:, columns], weights[columns], biases[columns], 1e-5)
        assert torch.equal(ops.layer_norm(x, weights, biases, 1e-5, 8)[:, columns], alone)
        shared = ops.layer_norm(x[:, columns], weights[:8], biases[:8], 1e-5)
        assert torch.equal(ops.layer_norm(x, weights[:8], biases[:8], 1e-5, 8)[:, columns], shared)


def cos_sin_table(max_positions: int, rotary_dim: int) -> Tensor:
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim))
    angles = torch.outer(torch.arange(max_positions).float(), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rotary_is_that_of_transformers(dtype: torch.dtype) -> None:
    table, positions = cos_sin_table(64, 16), torch.tensor([5, 0, 63, 5], dtype=torch.int32)
    x = randn(4, 3 * 16, dtype=dtype)
    cos, sin = (torch.cat((half, half), dim=-1)[positions].to(dtype) for half in table.chunk(2, dim=-1))
    heads = x.view(4, 3, 16).transpose(0, 1).unsqueeze(0)  # [1, num_heads, num_tokens, head_dim]
    expected, _ = apply_rotary_pos_emb(heads, heads, cos.unsqueeze(0), sin.unsqueeze(0))
    result = ops.rotary_embedding(x, positions, table, 16)
    assert torch.equal(result, expected[0].transpose(0, 1).flatten(1))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 16])
def test_rotary_multiplies_by_a_complex_number(rotary_dim: int, interleaved: bool) -> None:
    table, positions = cos_sin_table(64, rotary_dim), torch.tensor([5, 0, 63])
    x = randn(3, 2 * 16)
    heads = x.view(3, 2, 16)
    half = rotary_dim // 2
    if interleaved:
        pairs = torch.complex(heads[..., 0:rotary_dim:2], heads[..., 1:rotary_dim:2])
    else:
        pairs = torch.complex(heads[..., :half], heads[..., half:rotary_dim])
    turned = pairs * torch.complex(table[:, :half], table[:, half:])[positions].unsqueeze(1)
    halves = torch.cat((turned.real, turned.imag), dim=-1)
    first = torch.view_as_real(turned).flatten(-2) if interleaved else halves
    expected = torch.cat((first, heads[..., rotary_dim:]), dim=-1).flatten(1)
    result = ops.rotary_embedding(x, positions, table, 16, interleaved)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------
# attention


def step(
    shape: AttentionShape, contexts: list[int], queries: list[int], block_size: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], AttentionMetadata, list[Tensor], list[Tensor]]:
    """A step of requests with random blocks: its arguments, and each request's whole K and V."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-context // block_size) for context in contexts]
    order = torch.randperm(sum(blocks) + 3, generator=generator).int()
    cache = tuple(
        torch.full((len(order), block_size, shape.num_kv_heads, dim), float("nan"))
        for dim in (shape.head_dim, shape.v_dim)
    )
    table = torch.full((len(contexts), max(blocks) + 2), -1, dtype=torch.int32)
    keys, values, slots, used = [], [], [], 0
    for row, (context, num_queries) in enumerate(zip(contexts, queries, strict=True)):
        table[row, : blocks[row]] = order[used : used + blocks[row]]
        used += blocks[row]
        keys.append(torch.randn(context, shape.num_kv_heads, shape.head_dim, generator=generator))
        values.append(torch.randn(context, shape.num_kv_heads, shape.v_dim, generator=generator))
        position = torch.arange(context)
        slot = table[row][position // block_size].long() * block_size + position % block_size
        cached = slot[: context - num_queries]
        for tensor, whole in zip(cache, (keys[-1], values[-1]), strict=True):
            tensor.flatten(0, 1)[cached] = whole[: len(cached)]
        slots.append(slot[len(cached) :])
    starts = torch.tensor([0, *np.cumsum(queries)], dtype=torch.int32)
    meta = AttentionMetadata(starts, torch.tensor(contexts, dtype=torch.int32), table, torch.cat(slots), block_size)
    q = torch.randn(sum(queries), shape.q_width, generator=generator)
    k = torch.cat([key[len(key) - count :].flatten(1) for key, count in zip(keys, queries, strict=True)])
    v = torch.cat([value[len(value) - count :].flatten(1) for value, count in zip(values, queries, strict=True)])
    return q, k, v, (cache[0], cache[1]), meta, keys, values


@pytest.mark.parametrize("block_size", [4, 32])
@pytest.mark.parametrize(
    "shape",
    [
        AttentionShape(4, 4, 16, scale=0.25),
        AttentionShape(6, 2, 16, scale=0.3),
        AttentionShape(8, 1, 8, scale=0.25, v_head_dim=24),
        AttentionShape(4, 2, 16, scale=0.25, sliding_window=7),
        AttentionShape(4, 2, 16, scale=0.25, sliding_window=1),
        AttentionShape(4, 2, 16, scale=0.25, sliding_window=8, is_chunked=True),
        AttentionShape(4, 2, 16, scale=0.25, causal=False),
        AttentionShape(4, 2, 16, scale=0.25, causal=False, sliding_window=6),
    ],
    ids=["heads", "groups", "one kv head", "window", "window of one", "chunks", "not causal", "window both ways"],
)
def test_attention_is_scaled_dot_product_attention(shape: AttentionShape, block_size: int) -> None:
    contexts, queries = [1, 37, 64, 20, 33], [1, 1, 64, 7, 33]
    q, k, v, cache, meta, keys, values = step(shape, contexts, queries, block_size)
    result = ops.paged_attention(q, k, v, cache, meta, shape)
    assert result.shape == (sum(queries), shape.out_width)
    group = shape.num_heads // shape.num_kv_heads
    start = 0
    for context, count, key, value in zip(contexts, queries, keys, values, strict=True):
        distance = torch.arange(context - count, context).unsqueeze(1) - torch.arange(context)
        visible = torch.ones_like(distance, dtype=torch.bool)
        if not shape.causal:
            visible = distance.abs() < (shape.sliding_window or context)
        else:
            visible = (distance >= 0) & (distance < (shape.sliding_window or context))
        if shape.is_chunked:
            chunks = torch.arange(context) // 8
            visible &= chunks[context - count :].unsqueeze(1) == chunks
        expected = F.scaled_dot_product_attention(
            q[start : start + count].view(count, shape.num_heads, shape.head_dim).transpose(0, 1),
            key.transpose(0, 1).repeat_interleave(group, dim=0),
            value.transpose(0, 1).repeat_interleave(group, dim=0),
            attn_mask=visible,
            scale=shape.scale,
        )
        torch.testing.assert_close(
            result[start : start + count], expected.transpose(0, 1).flatten(1), rtol=1e-5, atol=1e-5
        )
        start += count


@pytest.mark.parametrize("dtype", ops.KV_CODES, ids=str)
def test_heads_in_8_bits(dtype: torch.dtype) -> None:
    x = randn(50, 3, 24) * torch.logspace(-3, 1, 50).view(50, 1, 1)
    stored = encode_heads(x, dtype)
    assert stored.dtype == dtype and stored.shape == (50, 3, ops.stored_size(24, dtype))
    numbers, scales = decode_heads(stored, 24)
    if scales is None:
        error, bits = (numbers - x).abs(), {torch.float8_e4m3fn: 4, torch.float8_e5m2: 3}[dtype]
        smallest = {torch.float8_e4m3fn: 2.0**-9, torch.float8_e5m2: 2.0**-16}[dtype]
        assert (error <= x.abs() * 2.0**-bits + smallest / 2).all()
        assert decode_heads(encode_heads(1e9 * torch.ones(1), dtype), 1)[0] == ops.KV_CODES[dtype]
    else:
        assert (numbers.abs().amax(dim=-1) == 127).all(), "the whole range is used, whatever the rounding of the scale"
        assert ((numbers * scales.unsqueeze(-1) - x).abs() <= 0.505 * scales.unsqueeze(-1)).all()
    assert (decode_heads(encode_heads(torch.zeros(2, 5), dtype), 5)[0] == 0).all()


def test_heads_of_v_in_4_bits() -> None:
    x = randn(50, 3, 136) * torch.logspace(-3, 1, 50).view(50, 1, 1)
    x[0, 0], x[1, 0], x[2, 0, :32] = 1.001, 0, x[2, 0, :32] + 100  # a minimum rounded up, nothing, a narrow range
    stored = encode_heads(x, ops.INT4_CACHE)
    assert stored.shape == (50, 3, ops.stored_size(136, ops.INT4_CACHE, is_value=True))
    assert stored.shape[-1] == 5 * 20
    numbers, scales = decode_heads(stored, 136)
    assert scales is None
    groups = x[..., :128].unflatten(-1, (4, 32))
    step, least = (groups.amax(-1) - groups.amin(-1)) / 15, groups.amin(-1).abs()
    error = (numbers[..., :128] - x[..., :128]).unflatten(-1, (4, 32)).abs().amax(-1)
    assert (error <= 0.51 * step + 2.0**-8 * (15 * step + least)).all()
    assert (numbers[1, 0] == 0).all() and (numbers[0, 0] - 1.001).abs().max() < 1e-4
    x[3, 1, 2] = float("inf")
    numbers, _ = decode_heads(encode_heads(x, ops.INT4_CACHE), 136)
    assert numbers[3, 1, :32].isnan().all() and not numbers[3, 1, 32:].isnan().any()


@pytest.mark.parametrize("dtype", [*ops.KV_CODES, ops.INT4_CACHE], ids=str)
def test_attention_with_a_cache_in_8_bits_is_that_of_the_decoded_numbers(dtype: torch.dtype) -> None:
    shape = AttentionShape(4, 2, 16, scale=0.25, v_head_dim=24, sliding_window=9, logit_softcap=5.0)
    q, k, v, cache, meta, _, _ = step(shape, [12, 25], [12, 25], 8)

    def decoded(x: Tensor, dtype: torch.dtype) -> Tensor:
        heads = x.unflatten(1, (2, -1))
        numbers, scales = decode_heads(encode_heads(heads, dtype), heads.shape[-1])
        return (numbers if scales is None else numbers * scales.unsqueeze(-1)).flatten(1)

    keys_dtype = torch.int8 if dtype == ops.INT4_CACHE else dtype
    expected = ops.paged_attention(q, decoded(k, keys_dtype), decoded(v, dtype), cache, meta, shape)
    sizes = [
        (*tensor.shape[:3], ops.stored_size(tensor.shape[3], dtype, is_value=is_value))
        for tensor, is_value in zip(cache, (False, True), strict=True)
    ]
    keys, values = (torch.full(size, 0xFF, dtype=torch.uint8).view(dtype) for size in sizes)
    result = ops.paged_attention(q, k, v, (keys, values), meta, shape)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_attention_softcap() -> None:
    shape = AttentionShape(2, 1, 8, scale=2.0, logit_softcap=3.0)
    q, k, v, cache, meta, (key,), (value,) = step(shape, [19], [5], 4)
    result = ops.paged_attention(q, k, v, cache, meta, shape)
    for i in range(5):
        for head in range(2):
            query = q[i].view(2, 8)[head].double()
            scores = [3.0 * math.tanh(float(query @ key[j, 0].double()) * 2.0 / 3.0) for j in range(15 + i)]
            weights = [math.exp(score) for score in scores]
            expected = sum(w * value[j, 0].double() for j, w in enumerate(weights)) / sum(weights)
            torch.testing.assert_close(result[i].view(2, 8)[head].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_biases_by_distance(causal: bool) -> None:
    shape = AttentionShape(4, 2, 8, scale=0.7, causal=causal, is_cached=causal, has_biases=True)
    q, k, v, cache, meta, (key,), (value,) = step(shape, [19], [19], 32)
    biases = randn(4, 128)
    result = ops.paged_attention(q, k, v, cache, meta, shape, biases=biases)
    distance = torch.arange(19) - torch.arange(19).unsqueeze(1)
    mask = biases[:, 64 + distance]
    mask = mask.masked_fill(distance > 0, float("-inf")) if causal else mask
    tensors = (q, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1))
    query, keys, values = (x.view(19, -1, 8).transpose(0, 1) for x in tensors)
    expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.7)
    torch.testing.assert_close(result, expected.transpose(0, 1).flatten(1), rtol=1e-5, atol=1e-5)


def test_attention_alibi() -> None:
    """Biases that grow with the position, as BLOOM adds them: the softmax sees differences alone."""
    shape = AttentionShape(4, 2, 8, scale=0.7, alibi_slopes=(0.5, 0.2, 0.1, 0.0))
    q, k, v, cache, meta, (key,), (value,) = step(shape, [19], [5], 4)
    result = ops.paged_attention(q, k, v, cache, meta, shape)
    for i in range(5):
        for head, slope in enumerate((0.5, 0.2, 0.1, 0.0)):
            query = q[i].view(4, 8)[head].double()
            scores = [float(query @ key[j, head // 2].double()) * 0.7 + slope * j for j in range(15 + i)]
            weights = [math.exp(score) for score in scores]
            expected = sum(w * value[j, head // 2].double() for j, w in enumerate(weights)) / sum(weights)
            torch.testing.assert_close(result[i].view(4, 8)[head].double(), expected, rtol=1e-5, atol=1e-5)


def test_attention_sinks() -> None:
    """They are weights without a value."""
    shape = AttentionShape(2, 1, 8, scale=0.7, sliding_window=6, has_sinks=True)
    q, k, v, cache, meta, (key,), (value,) = step(shape, [19], [5], 4)
    sinks = torch.tensor([1.5, -0.5])
    result = ops.paged_attention(q, k, v, cache, meta, shape, "plain", sinks)
    for i in range(5):
        for head, sink in enumerate(sinks.tolist()):
            query = q[i].view(2, 8)[head].double()
            seen = range(15 + i - 6, 15 + i)
            weights = [math.exp(float(query @ key[j, 0].double()) * 0.7) for j in seen]
            sums = sum(weight * value[j, 0].double() for j, weight in zip(seen, weights, strict=True))
            expected = sums / (sum(weights) + math.exp(sink))
            torch.testing.assert_close(result[i].view(2, 8)[head].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 3, 4])
def test_short_conv_is_a_causal_convolution(length: int) -> None:
    contexts, width, block_size = [1, 9, 8, 23], 6, 4
    weight, bias = randn(length, width, seed=1), randn(width, seed=2)
    gate_in, gate_out, x = (randn(len(contexts), 23, width, seed=seed) for seed in (3, 4, 5))
    padded = F.pad((gate_in * x).transpose(1, 2), (length - 1, 0))
    expected = gate_out * F.conv1d(padded, weight.T.unsqueeze(1), bias, groups=width).transpose(1, 2)
    table = torch.randperm(24, generator=torch.Generator().manual_seed(0)).int().view(4, 6)
    cache = torch.full((24, block_size, width), float("nan"))
    done = [0] * 4
    for counts in ({0: 1, 1: 5}, {3: 2, 1: 1, 2: 7}, {1: 3, 3: 21, 2: 1}):  # every chunk begins somewhere else
        rows = list(counts)
        at = {row: torch.arange(done[row], done[row] + counts[row]) for row in rows}
        for row in rows:
            done[row] += counts[row]
        slots = [table[row][at[row] // block_size].long() * block_size + at[row] % block_size for row in rows]
        starts = torch.tensor([0, *np.cumsum([counts[row] for row in rows])], dtype=torch.int32)
        lens = torch.tensor([done[row] for row in rows], dtype=torch.int32)
        meta = AttentionMetadata(starts, lens, table[rows], torch.cat(slots), block_size)
        first, last, inputs, wanted = (
            torch.cat([tensor[row, at[row]] for row in rows]) for tensor in (gate_in, gate_out, x, expected)
        )
        result = ops.short_conv(first, last, inputs, weight, bias, cache, meta)
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)
        plain = ops.short_conv(first, last, inputs, weight, None, cache, meta)
        torch.testing.assert_close(plain, wanted - last * bias, rtol=1e-5, atol=1e-5)
    assert done == contexts


def test_the_first_token_of_a_block_clears_it() -> None:
    shape = AttentionShape(2, 1, 8, scale=0.25)
    q, k, v, cache, meta, _, _ = step(shape, [9], [2], 8)  # positions 7 and 8: the last and the first of a block
    others = sorted(set(range(len(cache[0]))) - set(meta.block_table[0, :2].tolist()))
    ops.paged_attention(q, k, v, cache, meta, shape)
    for tensor, new in zip(cache, (k, v), strict=True):
        first, second = tensor[meta.block_table[0, :2]]
        assert torch.equal(first[7, 0], new[0])
        assert torch.equal(second[0, 0], new[1])
        assert (second[1:] == 0).all()
        assert tensor[others].isnan().all()


def test_requests_may_share_blocks_that_one_of_them_fills_in_this_step() -> None:
    shape = AttentionShape(2, 2, 8, scale=0.25)
    q, k, v, cache, meta, _, _ = step(shape, [12], [12], 4)
    table = meta.block_table[0]
    shared = torch.stack([table, torch.cat([table[:2], torch.tensor([5, *table[3:]])])]).int()
    shared[1, 2] = next(block for block in range(len(cache[0])) if block not in table[:3])
    slots = torch.cat([meta.slot_mapping, shared[1, 2].long() * 4 + torch.arange(4)])
    lens, starts = torch.tensor([12, 12], dtype=torch.int32), torch.tensor([0, 12, 16], dtype=torch.int32)
    both = AttentionMetadata(starts, lens, shared, slots, 4)
    again = [torch.cat([tensor, tensor[8:]]) for tensor in (q, k, v)]
    result = ops.paged_attention(again[0], again[1], again[2], cache, both, shape)
    torch.testing.assert_close(result[12:], result[8:12], rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------
# sampling


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as in the paper, one number at a time."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_known_answers() -> None:
    """The vectors that come with Random123. Ours has no fourth counter word, so the others check the oracle below."""
    zero = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(word[0]) for word in philox(np.zeros(1, np.uint64), np.zeros(1, np.int64), 0)] == zero
    assert philox_by_hand([0] * 4, [0] * 2) == zero
    ones = [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox_by_hand([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2) == ones
    pi = [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    assert philox_by_hand([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]) == pi


def test_philox_by_hand() -> None:
    generator = np.random.default_rng(0)
    seeds = generator.integers(0, 2**64, 50, dtype=np.uint64)
    counters = generator.integers(0, 2**63, 50, dtype=np.int64)
    for stream in (0, 3):
        words = philox(seeds, counters, stream)
        for i, (seed, counter) in enumerate(zip(seeds.tolist(), counters.tolist(), strict=True)):
            expected = philox_by_hand([counter % 2**32, counter >> 32, stream, 0], [seed % 2**32, seed >> 32])
            assert [int(word[i]) for word in words] == expected


def test_uniform_numbers() -> None:
    count = 100_000
    numbers = uniform(np.full(count, 7, np.uint64), np.arange(count))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert (numbers * 2.0**53 == np.floor(numbers * 2.0**53)).all()
    assert abs(numbers.mean() - 0.5) < 0.005
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    assert chi_square(counts, np.full(100, 0.01)) < 149  # 99 degrees of freedom: 1 in 1000
    assert (uniform(np.full(5, 7, np.uint64), np.arange(5), 1) != numbers[:5]).all()
    assert (uniform(np.full(5, 8, np.uint64), np.arange(5)) != numbers[:5]).all()


def chi_square(counts: Any, probabilities: Any) -> float:
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


def draw(
    logits: Tensor, numbers: Any, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Any:
    """Samples every row with the same parameters."""
    rows = len(logits)
    return ops.sample(
        logits,
        torch.full((rows,), temperature),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        torch.as_tensor(numbers, dtype=torch.float64),
    )


def kept_by_brute_force(
    logits: list[float], weights: list[float], counts: list[int], top_k: int, top_p: float, min_p: float
) -> set[int]:
    """Token ids that the filters leave, by the definition: min-p, then top-k, then top-p of what is left."""
    kept = [i for i, weight in enumerate(weights) if weight >= min_p]
    kept.sort(key=lambda i: (-logits[i], i))
    if top_k:
        kept = kept[:top_k]
    if top_p < 1:
        total, mass, count = sum(counts[i] for i in kept), 0, 0
        while mass < top_p * total:
            mass += counts[kept[count]]
            count += 1
        kept = kept[:count]
    return set(kept)


@pytest.mark.parametrize("top_k", [0, 1, 5, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_filters_against_brute_force(top_k: int, top_p: float, min_p: float) -> None:
    for seed in range(3):
        logits = 2 * randn(50, seed=seed)
        logits[10:14] = logits[3]  # equals: low ids first
        weights = token_weights(logits, 1.0)
        counts = units(weights)
        expected = kept_by_brute_force(logits.tolist(), weights.tolist(), counts.tolist(), top_k, top_p, min_p)
        kept = kept_tokens(logits, weights, top_k, top_p, min_p)
        assert set(torch.nonzero(kept).flatten().tolist()) == expected
        # Numbers spread evenly over [0, 1) reach every token that is left, in the order of the ids.
        tokens = draw(
            logits.expand(200, -1), np.arange(200) / 200, temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p
        )
        assert (tokens.diff() >= 0).all()
        assert set(tokens.tolist()) <= expected
        total = int(counts[kept].sum())
        likely = {i for i in expected if int(counts[i]) / total > 1 / 100}
        assert likely <= set(tokens.tolist())


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 30.0])
def test_weights_are_exponentials(temperature: float) -> None:
    logits = 10 * randn(2000)
    logits[5] = -math.inf
    logits[6:8] = logits.amax()
    temperature = float(torch.tensor(temperature))
    exact = torch.exp((logits.double() - logits.amax().double()) / temperature)
    weights = token_weights(logits, temperature)
    assert weights.dtype == torch.float32
    assert (weights[6:8] == 1).all()
    assert int(units(weights[5])) == 0
    counted = exact > 2.0**-43
    torch.testing.assert_close(weights[counted].double(), exact[counted], rtol=4e-6, atol=0)
    assert units(weights)[exact < 2.0**-44].sum() == 0
    torch.testing.assert_close(units(weights).double() * 2.0**-42, exact, rtol=4e-6, atol=2.0**-42)


def test_weights_add_up_to_the_softmax_denominator() -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(2)) * 4
    logits[1, 7] = float("-inf")
    expected = (logits.double() - logits.double().amax(dim=1, keepdim=True)).exp().sum(dim=1)
    torch.testing.assert_close(ops.weight_sum(logits).double() / 2.0**UNIT_BITS, expected, rtol=1e-6, atol=0)
    assert ops.weight_sum(logits[:0]).shape == (0,)


def test_log_probs_are_those_of_torch() -> None:
    logits = 5 * randn(1000)
    logits[3] = -math.inf
    expected = torch.log_softmax(logits.double(), dim=-1).float()
    torch.testing.assert_close(log_probs(logits), expected, rtol=1e-6, atol=1e-6)


def test_sampled_frequencies() -> None:
    logits, rows = randn(16, seed=3), 5_000
    for temperature in (0.5, 1.0, 1.7):
        numbers = uniform(np.full(rows, 11, np.uint64), np.arange(rows))
        tokens = draw(logits.expand(rows, -1), numbers, temperature=temperature)
        counts = torch.bincount(tokens, minlength=16).numpy()
        probabilities = torch.softmax(logits.double() / temperature, dim=0).numpy()
        assert chi_square(counts, probabilities) < 37.7  # 15 degrees of freedom: 1 in 1000


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [-math.inf, -math.inf, 5.0, 5.0]])
    assert draw(logits, [0.9, 0.9], temperature=0.0).tolist() == [1, 2]


def test_rows_have_parameters_of_their_own() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4, 1)
    tokens = ops.sample(
        logits,
        torch.tensor([0.0, 1.0, 1.0, 1.0]),
        torch.tensor([0, 0, 1, 2], dtype=torch.int32),
        torch.ones(4),
        torch.zeros(4),
        torch.zeros(4, dtype=torch.float64),
    )
    assert tokens.tolist() == [3, 0, 3, 2]
    assert tokens.dtype == torch.int64


def test_what_is_masked_is_never_taken() -> None:
    logits = torch.full((5, 6), -math.inf)
    logits[:, 2] = 1.0
    logits[:, 4] = 1.0
    numbers = [0.0, 0.4999, 0.5, 0.9999, 1 - 2.0**-53]
    assert draw(logits, numbers, temperature=1.0).tolist() == [2, 2, 4, 4, 4]


# ---------------------------------------------------------------------------------------------------------
# shapes under capture


def test_ops_infer_what_they_return() -> None:
    """A program of all ops: each inferred width and type is that of the result."""
    shape = AttentionShape(4, 2, 8, scale=0.3, v_head_dim=16)
    q, k, v, cache, meta, _, _ = step(shape, [9], [6], 4)
    weight, table, positions = randn(20, 12), randn(30, 12), torch.arange(6)
    program = Program("cpu")

    def value(name: str, tensor: Tensor) -> Any:
        return program.input(name, Spec("tokens", tensor.shape[-1] if tensor.ndim > 1 else 1, tensor.dtype))

    ids, x = value("ids", positions), value("x", table[:6])
    results: list[Any] = [
        ops.embedding(ids, table.bfloat16()),
        ops.linear(x, weight),
        ops.linear(x, weight, weight[:, 0]),
        ops.add(x, x),
        x + x,
        ops.act_and_mul(x, "silu"),
        ops.activation(x, "relu"),
        ops.rms_norm(x, weight[0, :4], 1e-5),
        ops.layer_norm(x, weight[0], None, 1e-5),
        ops.rotary_embedding(x, ids, cos_sin_table(8, 4), 4),
        ops.paged_attention(value("q", q), value("k", k), value("v", v), cache, StepInput("meta"), shape),
        *x.split([2, 7, 3]),
    ]
    rows = ops.gather_rows(results[1], StepInput("rows"))
    results += [rows, ops.logits(rows, randn(9, 20))]
    program.finish(*results)
    inputs = {"ids": positions, "x": table[:6], "q": q, "k": k, "v": v, "meta": meta, "rows": torch.tensor([1, 3])}
    for symbolic, actual in zip(results, program.replay(inputs), strict=True):
        assert (actual.shape[1], actual.dtype) == (symbolic.width, symbolic.dtype)
        assert len(actual) == (6 if symbolic.spec.rows == "tokens" else 2)
