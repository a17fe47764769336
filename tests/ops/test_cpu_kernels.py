"""Every kernel on every capability against the reference."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ops
from ops import AttentionShape, PackedWeight, SwiGLUOAI
from ops.cpu.kernels import unpack_linear
from ops.reference.kv_codes import encode_heads
from tests.ops.cpu import DTYPES, NAMES, Requests, randn, threads, unit_roundoff, use, using
from tests.ops.test_reference import cos_sin_table

pytestmark = pytest.mark.parametrize("capability", NAMES)


def reference(op: Any, *args: Any) -> Tensor:
    result: Tensor = op.reference(*args)
    return result


def assert_near(ours: Tensor, exact: Tensor, dtype: torch.dtype, scale: Tensor | float) -> None:
    """Within a rounding to ``dtype``, and what float32 loses on the way to a result of sums of size ``scale``."""
    assert ours.dtype == dtype
    error = (ours.double() - exact).abs()
    allowed = 1.01 * unit_roundoff(dtype) * exact.abs() + 4e-6 * scale + torch.finfo(dtype).smallest_normal
    assert (error <= allowed).all(), (error / allowed).max()


# ---------------------------------------------------------------------------------------------------------
# linear layers and embeddings

SHAPES = [(32, 32), (96, 64), (33, 31), (1, 1), (64, 577), (50, 97), (160, 4096), (7, 40)]
"""Out and in features."""
ROWS = [1, 2, 3, 5, 11, 12, 13, 24, 31, 33, 70]


def packed(weight: Tensor, paired: bool = False) -> PackedWeight:
    result = ops.pack_linear(weight, paired)
    assert isinstance(result, PackedWeight)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_linear(capability: str, dtype: torch.dtype, out_features: int, in_features: int) -> None:
    with use(capability):
        weight = randn(out_features, in_features, seed=1, dtype=dtype)
        bias = randn(out_features, seed=2, dtype=dtype)
        layer = packed(weight)
        for rows in ROWS if in_features < 1000 else [1, 14, 40]:
            x = randn(rows, in_features + 3, seed=rows, dtype=dtype)[:, :in_features]  # rows of a larger matrix
            scale = x.double().abs() @ weight.double().abs().T
            exact = x.double() @ weight.double().T
            assert_near(ops.linear(x, layer), exact, dtype, scale)
            assert_near(ops.linear(x, layer, bias), exact + bias.double(), dtype, scale)
            assert_near(ops.logits(x, layer), exact, torch.float32, scale)
            assert_near(ops.logits(x, layer, bias), exact + bias.double(), torch.float32, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), [*SHAPES, (2, 5), (128, 33), (30, 64)])
@pytest.mark.parametrize("paired", [False, True])
def test_packing(capability: str, dtype: torch.dtype, out_features: int, in_features: int, paired: bool) -> None:
    with use(capability) as chosen:
        weight = randn(in_features, out_features, dtype=dtype).T.contiguous()
        layer = packed(weight, paired)
        assert layer.shape == weight.shape
        assert layer.paired == (paired and out_features % 2 == 0)
        assert torch.equal(unpack_linear(chosen.library, layer), weight)
        x = randn(3, in_features, seed=1, dtype=dtype)
        assert torch.equal(ops.linear(x, layer), ops.linear(x, packed(weight)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_embedding(capability: str, dtype: torch.dtype, id_dtype: torch.dtype) -> None:
    with use(capability):
        table = randn(77, 45, dtype=dtype)
        ids = torch.tensor([76, 0, 3, 3, 45, 31, 32], dtype=id_dtype)
        assert torch.equal(ops.embedding(ids, table), table[ids.long()])
        assert torch.equal(ops.embedding(ids, packed(table)), table[ids.long()])
        assert ops.embedding(ids[:0], packed(table)).shape == (0, 45)


# ---------------------------------------------------------------------------------------------------------
# norms, activations, rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "size"), [(1, 64), (1, 576), (3, 24), (4, 128), (1, 1000), (5, 7)])
def test_norms(capability: str, dtype: torch.dtype, groups: int, size: int) -> None:
    x = (3 * randn(6, groups * size + 5) + 0.5).to(dtype)[:, : groups * size]
    weight, bias = randn(size, seed=1, dtype=dtype), randn(size, seed=2, dtype=dtype)
    with use(capability):
        exact = x.double().unflatten(1, (groups, size))
        exact = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        # It is rounded before the weight is applied, and after that.
        expected = (exact * weight.double()).flatten(1)
        error = (ops.rms_norm(x, weight, 1e-5).double() - expected).abs()
        assert (error <= (2.1 * unit_roundoff(dtype) + 4e-6) * expected.abs() + 1e-7).all()
        own, own_bias = randn(groups * size, seed=3, dtype=dtype), randn(groups * size, seed=4, dtype=dtype)
        for factor, offset in ((weight, 1.0), (weight, 0.0), (None, 0.0), (own, 0.0)):  # rounded once
            expected = exact if factor is None else exact * (offset + factor.double().view(-1, size))
            once = ops.rms_norm(x, factor, 1e-5, size=size, offset=offset, round_first=False).double()
            bound = (1.1 * unit_roundoff(dtype) + 4e-6) * expected.abs() + 1e-7
            assert ((once - expected.flatten(1)).abs() <= bound.flatten(1)).all()
        exact = torch.nn.functional.layer_norm(x.double().unflatten(1, (groups, size)), (size,), eps=1e-5)
        for factor, shift in ((weight, bias), (weight, None), (None, bias), (None, None), (own, own_bias)):
            expected = exact if factor is None else exact * factor.double().view(-1, size)
            expected = expected if shift is None else expected + shift.double().view(-1, size)
            assert_near(ops.layer_norm(x, factor, shift, 1e-5, size), expected.flatten(1), dtype, 2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 48, 7, 100, 1536])
def test_activations(capability: str, dtype: torch.dtype, width: int) -> None:
    x = (4 * randn(5, 2 * width)).to(dtype)
    x[0, :3] = torch.tensor([-100.0, 100.0, 0.0])
    with use(capability):
        for kind in ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"):
            expected = reference(ops.activation, x.double(), kind)
            assert_near(ops.activation(x, kind), expected, dtype, 1.0)
            if kind in ("silu", "gelu", "gelu_tanh"):
                active = ops.activation(x[:, :width].contiguous(), kind)
                assert torch.equal(ops.act_and_mul(x, kind), active * x[:, width:])  # type: ignore[arg-type]
        limited = SwiGLUOAI(alpha=1.3, limit=2.0)
        exact = reference(ops.act_and_mul, x.double(), limited)  # rounded twice in between
        tolerance = 2.1 * unit_roundoff(dtype) + 1e-5
        torch.testing.assert_close(ops.act_and_mul(x, limited).double(), exact, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [45, 1536])
def test_scale_softcap_and_clip(capability: str, dtype: torch.dtype, width: int) -> None:
    x = (4 * randn(5, width + 3)).to(dtype)[:, :width]
    with use(capability):
        assert torch.equal(ops.scale(x, 0.30078), reference(ops.scale, x, 0.30078))
        assert torch.equal(ops.clip(x, 1.3), reference(ops.clip, x, 1.3))
        assert_near(ops.softcap(x, 3.0), reference(ops.softcap, x.double(), 3.0), dtype, 3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_and_gather(capability: str, dtype: torch.dtype) -> None:
    x, y = randn(9, 45, dtype=dtype), randn(9, 60, seed=1, dtype=dtype)[:, 7:52]
    rows = torch.tensor([8, 0, 0, 5])
    with use(capability):
        assert torch.equal(ops.add(x, y), x + y)
        assert torch.equal(ops.multiply(x, y), x * y)
        assert torch.equal(ops.gather_rows(y, rows), y[rows])
        assert ops.gather_rows(y, rows[:0]).shape == (0, 45)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (64, 32), (24, 24), (80, 20), (256, 256), (16, 2)])
def test_rotary(capability: str, dtype: torch.dtype, interleaved: bool, head_dim: int, rotary_dim: int) -> None:
    table, positions = cos_sin_table(100, rotary_dim), torch.tensor([5, 0, 99, 5, 17], dtype=torch.int32)
    x = randn(5, 3 * head_dim + 9, dtype=dtype)[:, : 3 * head_dim]
    with use(capability):
        result = ops.rotary_embedding(x, positions, table, head_dim, interleaved)
        assert torch.equal(result, reference(ops.rotary_embedding, x, positions, table, head_dim, interleaved))
        assert torch.equal(ops.rotary_embedding(x, positions.long(), table, head_dim, interleaved), result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "length"), [(45, 3), (1536, 4), (16, 1)])
def test_short_conv(capability: str, dtype: torch.dtype, width: int, length: int) -> None:
    """Three requests: one begins, one goes on in the middle of a block, one decodes."""
    block_size, counts, lens = 4, [7, 3, 1], [7, 6, 30]
    table = torch.randperm(24, generator=torch.Generator().manual_seed(0)).int().view(3, 8)
    cache = randn(24, block_size, width, seed=1, dtype=dtype)
    positions = [torch.arange(end - count, end) for count, end in zip(counts, lens, strict=True)]
    slots = [table[row][at // block_size].long() * block_size + at % block_size for row, at in enumerate(positions)]
    starts = torch.tensor([0, 7, 10, 11], dtype=torch.int32)
    meta = ops.AttentionMetadata(starts, torch.tensor(lens, dtype=torch.int32), table, torch.cat(slots), block_size)
    gate_in, gate_out, x = randn(11, 3 * width, seed=2, dtype=dtype).split([width] * 3, dim=1)
    weight, bias = randn(length, width, seed=3, dtype=dtype), randn(width, seed=4, dtype=dtype)
    for shift in (bias, None):
        theirs = cache.clone()
        expected = reference(ops.short_conv, gate_in, gate_out, x, weight, shift, theirs, meta)
        with use(capability), threads(2):
            ours = cache.clone()
            result = ops.short_conv(gate_in, gate_out, x, weight, shift, ours, meta)
            assert torch.equal(ours, theirs)
            tolerance = 4 * unit_roundoff(dtype)
            torch.testing.assert_close(result, expected, rtol=tolerance, atol=8 * tolerance)
            # The order of the sum depends on nothing but the length.
            one = torch.tensor([0, 1], dtype=torch.int32)
            alone = ops.AttentionMetadata(one, meta.seq_lens[2:], table[2:], meta.slot_mapping[10:], block_size)
            again = ops.short_conv(gate_in[10:], gate_out[10:], x[10:], weight, shift, ours, alone)
            assert torch.equal(again, result[10:])


# ---------------------------------------------------------------------------------------------------------
# attention

ATTENTION = {
    "heads": AttentionShape(4, 4, 64, scale=0.125),
    "groups of 3": AttentionShape(9, 3, 64, scale=0.125),
    "groups of 8": AttentionShape(8, 1, 32, scale=0.2),
    "head of 16": AttentionShape(4, 2, 16, scale=0.25),
    "head of 24": AttentionShape(4, 2, 24, scale=0.25),
    "head of 256": AttentionShape(4, 1, 256, scale=1 / 16),
    "head of 512": AttentionShape(2, 1, 512, scale=1 / 16),
    "v smaller": AttentionShape(4, 2, 96, scale=0.1, v_head_dim=32),
    "v larger": AttentionShape(2, 2, 40, scale=0.1, v_head_dim=128),
    "window": AttentionShape(6, 2, 32, scale=0.2, sliding_window=70),
    "window of one": AttentionShape(4, 2, 32, scale=0.2, sliding_window=1),
    "long window": AttentionShape(4, 2, 32, scale=0.2, sliding_window=300),
    "softcap": AttentionShape(4, 2, 32, scale=1.0, logit_softcap=5.0),
    "alibi": AttentionShape(6, 2, 32, scale=0.3, alibi_slopes=(0.5, 0.25, 0.1, 0.05, 0.02, 0.01)),
    "alibi with a cap": AttentionShape(2, 2, 32, scale=1.0, logit_softcap=5.0, alibi_slopes=(0.2, 0.01)),
    "chunks": AttentionShape(4, 2, 32, scale=0.2, sliding_window=48, is_chunked=True),
    "sinks": AttentionShape(8, 2, 32, scale=0.2, sliding_window=70, has_sinks=True),
    "not causal": AttentionShape(4, 2, 32, scale=0.2, causal=False),
}


CACHES_IN_8_BITS = [
    (torch.bfloat16, torch.int8),
    (torch.float16, torch.float8_e5m2),
    (torch.float32, torch.float8_e4m3fn),
]
"""Types of activations and of caches."""


def requests_and_steps(
    name: str, dtype: torch.dtype, cache_dtype: torch.dtype, *, plain: bool
) -> tuple[Requests, list[dict[int, int]]]:
    """Requests to attend to, with a plain cache or with that of the kernels."""
    shape = ATTENTION[name]
    lengths, block_size = [1, 33, 64, 290, 31, 530], 64 if "window" in name else 32
    steps = [{0: 1, 3: 257}, {1: 20, 3: 3, 5: 256}, {5: 1, 2: 64, 3: 29, 1: 12}, {1: 1, 4: 31, 5: 273, 3: 1}]
    if cache_dtype != dtype:
        lengths, block_size = [1, 33, 64, 31, 280], 32
        steps = [{0: 1, 4: 257}, {1: 20, 2: 64, 4: 22}, {1: 12, 3: 31, 4: 1}, {1: 1}]
    if cache_dtype == torch.float8_e4m3fn:
        shape = replace(shape, k_scale=0.7, v_scale=1.3)
    requests = Requests(shape, lengths, dtype, block_size=block_size, plain=plain, cache_dtype=cache_dtype)
    return requests, steps if shape.causal else [dict(enumerate(lengths))]


@functools.cache
def attention_of_the_reference(name: str, dtype: torch.dtype, cache_dtype: torch.dtype) -> list[dict[int, Tensor]]:
    """The results of each step, which all capabilities are compared with."""
    requests, steps = requests_and_steps(name, dtype, cache_dtype, plain=True)
    with using("reference"):
        return [requests.step(counts) for counts in steps]


@pytest.mark.parametrize(("dtype", "cache_dtype"), [*((dtype, dtype) for dtype in DTYPES), *CACHES_IN_8_BITS], ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(capability: str, name: str, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    with use(capability), threads(2):
        ours, steps = requests_and_steps(name, dtype, cache_dtype, plain=False)
        for counts, expected in zip(steps, attention_of_the_reference(name, dtype, cache_dtype), strict=True):
            for row, result in ours.step(counts).items():
                # Weights are rounded to bfloat16 before they are multiplied with V, where the CPU multiplies that.
                tolerance = {torch.bfloat16: 0.03, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
                torch.testing.assert_close(result, expected[row], rtol=tolerance / 4, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attended", [1, 10, 256, 300])
def test_queries_that_see_nothing(capability: str, attended: int, dtype: torch.dtype) -> None:
    """Queries far behind the last token to which others attend (ColBERT's short queries, filled up)."""
    shape = AttentionShape(4, 2, 32, scale=0.2, sliding_window=9, causal=False)
    lengths = [20, 330, 5]
    ours, plain = (Requests(shape, lengths, dtype, plain=plain) for plain in (False, True))
    with using("reference"):
        expected = plain.step(dict(enumerate(lengths)), attended=attended)
    assert not expected[1][attended + 8 :].any() and expected[1][: attended + 8].any(1).all()
    with use(capability), threads(2):
        for row, result in ours.step(dict(enumerate(lengths)), attended=attended).items():
            tolerance = {torch.bfloat16: 0.03, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
            torch.testing.assert_close(result, expected[row], rtol=tolerance / 4, atol=tolerance)


BY_GROUPS = {
    "groups of 3": AttentionShape(9, 3, 128, scale=0.125),
    "groups of 8": AttentionShape(8, 1, 128, scale=0.1, sliding_window=70, has_sinks=True),
    "head of 256": AttentionShape(2, 1, 256, scale=1 / 16, logit_softcap=5.0),
    "v larger": AttentionShape(2, 2, 130, scale=0.1, v_head_dim=200),
    "chunks": AttentionShape(4, 2, 160, scale=0.1, v_head_dim=128, sliding_window=48, is_chunked=True),
}


@pytest.mark.parametrize(("name", "dtype"), list(zip(BY_GROUPS, [*DTYPES, *DTYPES[:2]], strict=True)))
def test_attention_with_v_in_4_bits(capability: str, name: str, dtype: torch.dtype) -> None:
    lengths = [1, 33, 280]
    with use(capability), threads(2):
        ours, plain = (
            Requests(BY_GROUPS[name], lengths, dtype, plain=plain, cache_dtype=ops.INT4_CACHE)
            for plain in (False, True)
        )
        alone = Requests(BY_GROUPS[name], lengths, dtype, cache_dtype=ops.INT4_CACHE)
        for counts in [{0: 1, 2: 257}, {1: 20, 2: 22}, {1: 13, 2: 1}]:
            results, expected = ours.step(counts), plain.step(counts)
            for row, result in results.items():
                tolerance = {torch.bfloat16: 0.03, torch.float16: 4e-3, torch.float32: 1e-3}[dtype]
                torch.testing.assert_close(result, expected[row], rtol=tolerance / 4, atol=tolerance)
                for begin in range(0, counts[row], 60):
                    count = min(60, counts[row] - begin)
                    assert torch.equal(alone.step({row: count})[row], result[begin : begin + count])


@pytest.mark.parametrize("cache_dtype", ops.KV_CODES, ids=str)
def test_what_a_cache_in_8_bits_stores(capability: str, cache_dtype: torch.dtype) -> None:
    """Numbers of all sizes: the bytes of the reference, in the layout of the kernels."""
    shape = AttentionShape(1, 1, 64, scale=0.1)
    special = [
        0.0,
        -0.0,
        1e-30,
        -1e-4,
        0.001953125,
        0.0029296875,
        0.015,
        447.0,
        464.0,
        1e6,
        -1e30,
        17.0,
        -19.0,
        61440.0,
    ]
    powers = 2.0 ** torch.randint(-20, 20, (40, 1), generator=torch.Generator().manual_seed(0))
    x = randn(40, 64) * powers
    x[7, : len(special)] = torch.tensor(special)
    x[8] = 0
    x[9, 3] = float("nan")
    with use(capability):
        ours = Requests(shape, [40], torch.float32, cache_dtype=cache_dtype)
        ours.data[0] = [x, x, x.flip(0)]
        ours.step({0: 40})
    for cache, numbers, of_keys in zip(ours.cache, (x, x.flip(0)), (True, False), strict=True):
        units = cache.view(torch.uint8)[ours.table[0, :2].long(), 0].flatten(0, 1)
        # unit, block, half of the columns, then fours of k, column, k; or pairs of k, k, column
        if cache_dtype == torch.int8:
            blocks = units[:, : 32 * 64].view(2, 2, 2, 8, 16, 4).transpose(4, 5) ^ 128
        else:
            blocks = units[:, : 32 * 64].view(2, 2, 2, 16, 2, 16)
        tokens = blocks.permute(0, 2, 5, 1, 3, 4) if of_keys else blocks.permute(0, 3, 4, 1, 2, 5)
        codes = tokens.reshape(64, 64)[:40]
        expected = encode_heads(numbers, cache_dtype).view(torch.uint8)
        assert torch.equal(codes, expected[:, :64])
        if cache_dtype == torch.int8:
            scales = units[:, 32 * 64 :].contiguous().view(torch.bfloat16).flatten()[:40]
            wanted = expected[:, 64:].contiguous().view(torch.bfloat16).flatten()
            torch.testing.assert_close(scales, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_to_what_another_layer_has_written(capability: str, dtype: torch.dtype) -> None:
    steps = [{0: 33, 1: 60}, {1: 1, 0: 1}, {0: 36}]
    for plain in (False, True):
        with use(capability), threads(2):
            requests = Requests(AttentionShape(4, 2, 40, scale=0.25, sliding_window=20), [70, 61], dtype, plain=plain)
            for counts in steps:
                before = list(requests.done)
                expected = requests.step(counts)
                cache = [tensor.clone() for tensor in requests.cache]
                requests.done = before
                for row, result in requests.step(counts, writes=False).items():
                    assert torch.equal(result, expected[row])
                pairs = zip(requests.cache, cache, strict=True)
                assert all(torch.equal(one.view(torch.uint8), two.view(torch.uint8)) for one, two in pairs)


def test_first_token_of_a_block_clears_it(capability: str) -> None:
    for dtype in DTYPES:
        with use(capability):
            requests = Requests(AttentionShape(2, 1, 40, scale=0.25), [34], dtype)
            requests.step({0: 32})
            requests.step({0: 1})
        used = requests.table[0, :2].tolist()
        for tensor in requests.cache:
            assert not tensor[used].isnan().any()
            others = [block for block in range(len(tensor)) if block not in used]
            assert tensor[others].isnan().all()


def test_capability_is_the_forced_one(capability: str) -> None:
    with use(capability) as chosen:
        assert chosen.library.capability == capability
        assert ops.op_set("cpu") is chosen
