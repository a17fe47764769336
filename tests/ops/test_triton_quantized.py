"""Quantised weights in Triton, interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ops
from executor.base import ModelError
from executor.quantization.base import Options
from executor.quantization.codes import Floats
from executor.quantization.fp8 import FP8
from executor.quantization.packed import chosen_activations, describe
from ops import OpSet, QuantizedWeight
from ops.packed import Encoding
from ops.reference.quantized import SMALLEST
from ops.reference.small_floats import FLOAT_FORMATS
from tests import tiny
from tests.models.harness import load
from tests.ops.cpu import randn, using
from tests.ops.quantized import BLOCK_TYPES, blocks, float_arguments
from tests.triton_interpreter import Order, count_bytes, grid_order

gemm: Any = pytest.importorskip("ops.triton.gemm")
linear: Any = pytest.importorskip("ops.triton.linear")
codes: Any = pytest.importorskip("ops.triton.codes")
per_token: Any = pytest.importorskip("ops.triton.per_token")
pointwise: Any = pytest.importorskip("ops.triton.pointwise")

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gemm, "MIN_SEGMENT", 128)
    with using("triton"):
        yield


def pairs(name: str, rows: int = 40, columns: int = 512, dtype: torch.dtype = BF16) -> tuple[QuantizedWeight, Tensor]:
    """A random weight for the kernels, and its numbers according to the reference."""

    def weight() -> QuantizedWeight:
        if name in BLOCK_TYPES:
            return ops.pack_blocks([(blocks(name, rows, columns), name)], dtype=dtype, activations="float")
        if name in FLOAT_FORMATS:
            return ops.pack_floats(**float_arguments(name, rows, columns), format=name, dtype=dtype)
        bits, kind, size = name.split()
        return groups(int(bits), kind, int(size), rows, columns, dtype)

    packed = weight()
    with using(OpSet()):
        return packed, ops.dequantized(weight()).to(dtype)


def groups(bits: int, kind: str, size: int, rows: int, columns: int, dtype: torch.dtype) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(3)
    count = -(-columns // (size or columns))
    found = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = randn(rows, count, seed=4, dtype=torch.float16)
    zeros = (
        torch.randint(0, 1 << bits, (rows, count), dtype=torch.uint8, generator=generator) if kind == "zeros" else None
    )
    minimums = randn(rows, count, seed=5, dtype=torch.float16) if kind == "minimums" else None
    return ops.pack_groups(found, scales, zeros, minimums, bits=bits, dtype=dtype, activations="float")


GROUPS = ["4 none 32", "4 zeros 128", "4 minimums 64", "8 none 0", "8 zeros 256", "4 none 96", "8 minimums 0"]


@pytest.mark.parametrize("name", [*BLOCK_TYPES, *FLOAT_FORMATS, *GROUPS])
def test_numbers_are_the_references(name: str) -> None:
    columns = 576 if name.endswith("96") else 512 if "K" in name or "XS" in name else 320
    weight, expected = pairs(name, 40, columns if not name.endswith(("128", "256")) else 512)
    ids = torch.tensor([39, 0, 7], dtype=torch.int32)
    torch.testing.assert_close(linear.embedding(ids, weight), expected[ids.long()] + 0, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("order", "name"),
    [("forward", "Q4_K"), ("reversed", "Q6_K"), ("shuffled", "4 zeros 128"), ("shuffled", "fp8_e4m3")],
)
def test_products_are_those_of_the_numbers(order: Order, name: str) -> None:
    weight, plain = pairs(name)
    x, bias = randn(11, 512, dtype=BF16), randn(40, seed=2, dtype=BF16)
    with grid_order(order):
        assert torch.equal(linear.linear(x, weight, bias), linear.linear(x, plain, bias))
        assert torch.equal(linear.logits(x[:3], weight), linear.logits(x, plain)[:3])


def test_epilogues_and_selected_rows() -> None:
    weight, plain = pairs("Q4_K")
    x, residual, rows = randn(6, 512, dtype=BF16), randn(6, 40, dtype=BF16), torch.tensor([5, 0])
    for epilogue in (gemm.Epilogue(residual=residual), gemm.Epilogue(activation="silu", is_gated=True)):
        assert torch.equal(linear.matmul(x, weight, epilogue), linear.matmul(x, plain, epilogue))
    assert torch.equal(linear.matmul(x, weight, rows=rows), linear.linear(x, plain)[rows])


@pytest.mark.parametrize("is_gated", [False, True])
def test_rows_in_several_encodings(is_gated: bool) -> None:
    names = ("Q4_K", "Q6_K")
    found = [pairs(name, 24) for name in names]
    weight, plain = ops.join_rows([each for each, _ in found]), torch.cat([each for _, each in found])
    x, bias = randn(3, 512, dtype=BF16), randn(48, seed=2, dtype=BF16)
    epilogue = gemm.Epilogue(bias, activation="silu", is_gated=True) if is_gated else gemm.Epilogue(bias)
    result, expected = linear.matmul(x, weight, epilogue), linear.matmul(x, plain, epilogue)
    # Their sums have other segments of k than those of one weight.
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.05)
    ids = torch.tensor([23, 24, 47, 0])
    assert torch.equal(linear.embedding(ids, weight), plain[ids])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_types_of_activations(dtype: torch.dtype) -> None:
    weight, plain = pairs("Q5_K", dtype=dtype)
    x = randn(4, 512, dtype=dtype)
    assert torch.equal(linear.linear(x, weight), linear.linear(x, plain))


@pytest.mark.parametrize(("name", "num_bytes"), [("Q4_K", 144), ("Q6_K", 210), ("Q8_0", 8 * 34), ("Q4_0", 8 * 18)])
def test_little_more_is_stored_and_read_than_in_files(name: str, num_bytes: int) -> None:
    layout = codes.Layout(64, 4096, Encoding(name))
    assert layout.num_bytes <= 1.05 * 64 * 16 * num_bytes
    weight, _ = pairs(name, 64)
    x = randn(8, 512, dtype=BF16)
    with count_bytes() as traffic:
        linear.linear(x, weight)
    segments = gemm.num_segments(64, 512)
    partials = segments * 64 * 8 * 4
    again = segments * 64 * num_bytes // 2  # the last tile of a segment, from the L2 cache
    assert traffic.loaded <= 1.05 * (64 * 2 * num_bytes + x.nbytes + partials + again) + 256


def test_activations_in_8_bits_are_refused() -> None:
    weight = ops.pack_blocks([(blocks("Q8_0", 8, 32), "Q8_0")], dtype=BF16, activations="int8")
    with pytest.raises(
        NotImplementedError, match="GPUs multiply quantised weights with activations in float, not int8"
    ):
        linear.linear(randn(1, 32, dtype=BF16), weight)


def test_activations_stay_in_float_unless_asked_otherwise() -> None:
    device = torch.device("cpu")
    assert chosen_activations(Options(), BF16, device, prefers_int8=True) == "float"
    assert chosen_activations(Options(activations="int8"), BF16, device) == "int8"
    with using(OpSet()):
        assert chosen_activations(Options(), BF16, device, prefers_int8=True) == "int8"


@pytest.mark.parametrize(("size", "is_gated"), [(None, False), (128, True)])
def test_activations_in_fp8(size: int | None, is_gated: bool) -> None:
    """Weights with a scale for each row, and for blocks; a row's bits do not depend on others."""
    rows, columns = 40, 300
    codes = randn(rows, columns, seed=1).to(torch.float8_e4m3fn)
    scales, bias = randn(rows, -(-columns // (size or columns)), seed=4).abs(), randn(rows, seed=6, dtype=BF16)

    def weight() -> QuantizedWeight:
        return ops.pack_floats(
            codes, scales, format="fp8_e4m3", group_size=size, dtype=BF16, activations="fp8_per_token"
        )

    x = randn(18, columns, dtype=BF16) * 3
    x[0], x[1, 5], x[2, 7] = 0.9 * SMALLEST, 1e4, torch.inf
    epilogue = gemm.Epilogue(bias, "silu", True) if is_gated else gemm.Epilogue(bias)
    with using(OpSet()):
        expected = ops.linear(x, weight(), bias)
        expected = ops.act_and_mul(expected, "silu") if is_gated else expected
    packed = weight()
    found = linear.matmul(x, packed, epilogue)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=2**-6, atol=2**-6)
    assert torch.equal(linear.matmul(x[3:5], packed, epilogue), found[3:5])
    assert torch.equal(linear.matmul(x, packed, epilogue, rows=torch.tensor([7, 4])), found[[7, 4]])


def test_activations_in_fp8_are_asked_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Of weights that are quantised while they are loaded, and of a checkpoint."""
    asked: dict[str, Any] = {"dtype": "bfloat16", "quantized_activations": "fp8"}
    base = tiny.checkpoint("llama", num_hidden_layers=1)
    at_load = describe(load(base, quantization="fp8", **asked).model)
    assert at_load == "fp8_e4m3, int8, with activations in float and fp8_per_token"
    stored = [
        Floats(torch.zeros(2, 256, dtype=torch.uint8), torch.ones(2, 256 // size), "fp8_e4m3", size)
        for size in (128, 64)
    ]
    assert [each.has_fp8_products for each in stored] == [True, False]
    for activations, count in (("fp8", 0), ("float", 1)):
        caplog.clear()
        with caplog.at_level("INFO"):
            FP8({"quant_method": "fp8"}, Options(activations=activations))  # type: ignore[arg-type]
        assert caplog.text.count("activations are not rounded to FP8") == count
    monkeypatch.setattr(ops.op_set("cpu"), "multiplies_fp8", False)
    with pytest.raises(ModelError, match="--quantized-activations fp8: needs an NVIDIA GPU of compute capability 8.9"):
        load(base, quantization="fp8", **asked)


@pytest.mark.parametrize(("rows", "dtype", "is_gated"), [(3, BF16, False), (18, torch.float32, True)])
def test_activations_in_8_bits_per_token(rows: int, dtype: torch.dtype, is_gated: bool) -> None:
    """Sums are exact: what a product stores is the reference's, bit for bit."""
    found = torch.randint(1, 256, (72, 200), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    scales, bias = randn(72, 1, seed=4, dtype=BF16).abs(), randn(72, seed=6, dtype=dtype)

    def weight() -> QuantizedWeight:
        return ops.pack_groups(found, scales, None, None, bits=8, dtype=dtype, activations="int8_per_token")

    x = randn(rows, 264, dtype=dtype)[:, 32:232] * 3
    assert per_token.SMALLEST == SMALLEST
    x[0] = 0.9 * SMALLEST
    x[1, 5] = 1e4
    x[2, 7] = torch.inf
    with using(OpSet()):
        expected = ops.linear(x, weight(), bias)
        activated = ops.act_and_mul(expected, "silu")
        plain = ops.logits(x, weight())
    packed = weight()
    if is_gated:
        gated = linear.matmul(x, packed, gemm.Epilogue(bias, "silu", True))
        torch.testing.assert_close(gated, activated, equal_nan=True, rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(linear.linear(x, packed, bias), expected, equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(linear.logits(x, packed), plain, equal_nan=True, rtol=0, atol=0)
