"""Quantised weights: the reference against independent formulations."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

import ops
from executor.graphs import Program
from ops.dispatch import Spec
from ops.reference import quantized
from tests.ops.cpu import randn, using
from tests.ops.quantized import BLOCK_TYPES, blocks, extreme_blocks, meaning


@pytest.fixture(autouse=True)
def _references() -> Any:
    with using("reference"):
        yield


def packed(rows: Tensor, name: str, activations: Literal["float", "int8"] = "int8") -> ops.QuantizedWeight:
    return ops.pack_blocks([(rows, name)], dtype=torch.float32, activations=activations)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_stand_for_the_numbers_that_gguf_says(name: str) -> None:
    for rows in (blocks(name, 6, 512), extreme_blocks(name, 4, 512)):
        weight = packed(rows, name)
        assert weight.shape == (len(rows), 512)
        assert torch.equal(ops.dequantized(weight), meaning(rows, name))
        ids = torch.tensor([3, 0, 3])
        assert torch.equal(ops.embedding(ids, weight), meaning(rows, name)[ids])


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("columns", "groups"), [(128, 4), (256, 2), (45, 1), (20, 1)])
def test_groups(columns: int, groups: int, scale_dtype: torch.dtype) -> None:
    for bits, low, high in ((4, 0, 16), (8, 0, 256)):
        codes = torch.randint(low, high, (6, columns), dtype=torch.uint8)
        scales = (randn(6, groups).abs() + 0.1).to(scale_dtype)
        zeros = torch.randint(low, high, (6, groups), dtype=torch.uint8)
        minimums = randn(6, groups, seed=1).to(scale_dtype)

        def spread(values: Tensor) -> Tensor:
            return values.float().repeat_interleave(columns // groups, dim=1)

        def pack(*args: Tensor | None, bits: int = bits) -> Tensor:
            return ops.dequantized(ops.pack_groups(*args, bits=bits, dtype=torch.float32, activations="float"))  # type: ignore[arg-type]

        middle = high // 2
        assert torch.equal(pack(codes, scales), spread(scales) * (codes.float() - middle))
        assert torch.equal(pack(codes, scales, zeros), spread(scales) * (codes.float() - spread(zeros)))
        shifted = spread(scales) * codes.float() + spread(minimums)
        assert torch.equal(pack(codes, scales, None, minimums), shifted)
        signed = (codes.int() - middle).to(torch.int8)
        assert torch.equal(pack(signed, scales), pack(codes, scales))


def test_float_activations_multiply_the_rounded_numbers() -> None:
    rows = blocks("Q4_K", 10, 256)
    x, bias = randn(3, 256, seed=1).bfloat16(), randn(10, seed=2).bfloat16()
    weight = ops.pack_blocks([(rows, "Q4_K")], dtype=torch.bfloat16, activations="float")
    plain = meaning(rows, "Q4_K").bfloat16()
    assert torch.equal(ops.linear(x, weight, bias), ops.linear(x, plain, bias))
    assert torch.equal(ops.logits(x, weight, bias), ops.logits(x, plain, bias))
    assert torch.equal(ops.embedding(torch.tensor([7]), weight), plain[7:8])


def fma(a: float, b: float, c: float) -> float:
    """In float32, by way of Python's exact integers."""
    scale = 2**1000
    exact = int(a * 2.0**300) * int(b * 2.0**300) * (scale >> 600) + int(c * 2.0**300) * (scale >> 300)
    numerator = exact
    if numerator == 0:
        return 0.0
    shift = max(abs(numerator).bit_length() - 24, 0)
    quotient, rest = divmod(abs(numerator), 1 << shift)
    half = (1 << shift) >> 1
    quotient += rest > half or (rest == half and shift > 0 and quotient % 2 == 1)
    return math.copysign(math.ldexp(quotient, shift - 1000), numerator)


def test_products_are_added_with_one_rounding() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 2000)).astype(np.float32)
    c = (-a * b * (1 + generator.standard_normal(2000) * 2.0 ** -generator.integers(1, 30, 2000))).astype(np.float32)
    ours = quantized.fma(*map(torch.from_numpy, (a, b, c)))
    assert ours.tolist() == [fma(*map(float, each)) for each in zip(a, b, c, strict=True)]
    # Rounding to float64 first would round a tie.
    factor = torch.tensor(1 + 2.0**-12)
    for rest, expected in ((2.0**-90, 1 + 2.0**-11 + 2.0**-23), (0.0, 1 + 2.0**-11), (-(2.0**-90), 1 + 2.0**-11)):
        assert quantized.fma(factor, factor, torch.tensor(rest)).item() == expected


def test_activations_are_rounded_in_blocks() -> None:
    x = randn(2, 70)
    x[0, 5], x[0, 33], x[1, :32] = 2.0**-120, math.inf, 0
    x[0, :32] *= 127 / x[0, :32].abs().max()
    x[0, 3:5] = torch.tensor([2.5, -3.5])
    codes, scales = quantized.quantize(x)
    assert codes.shape == (2, 3, 32) and scales.shape == (2, 3)
    assert codes[0, 0, 3:6].tolist() == [2, -4, 0] and codes[0, 0].abs().max() == 127
    assert scales[0, 1].isnan() and scales[1, 0] == 0 and not codes[1, 0].any()
    assert not codes[:, 2, 6:].any()
    error = (codes[:, 2] * scales[:, 2, None])[:, :6] - x[:, 64:]
    assert (error.abs() <= 0.501 * scales[:, 2, None]).all()


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_int8_activations(name: str) -> None:
    """The sums of a product with rounded activations, in float64."""
    rows = blocks(name, 5, 512)
    x, bias = randn(3, 512, seed=1), randn(5, seed=2)
    weight = packed(rows, name)
    codes, scales = quantized.quantize(x)
    rounded = (codes.double() * scales.double()[..., None]).flatten(1)
    exact = rounded @ meaning(rows, name).double().T + bias.double()
    size = rounded.abs() @ meaning(rows, name).double().abs().T
    for result in (ops.linear(x, weight, bias), ops.logits(x, weight, bias)):
        assert ((result.double() - exact).abs() <= 1e-5 * size).all()
    assert torch.equal(ops.linear(x.bfloat16(), weight), ops.logits(x.bfloat16(), weight).bfloat16())
    each = torch.cat([ops.logits(row, weight) for row in x.split(1)])
    assert torch.equal(ops.logits(x, weight), each)


def test_segments_of_several_types() -> None:
    """Merged projections of a mix such as Q4_K_M."""
    parts = [
        (blocks("Q4_K", 64, 256), "Q4_K"),
        (blocks("Q4_K", 20, 256, seed=1), "Q4_K"),
        (blocks("Q6_K", 20, 256), "Q6_K"),
    ]
    merged = ops.pack_blocks(parts, dtype=torch.float32, activations="int8", paired=True)
    assert merged.shape == (104, 256) and not merged.paired
    x = randn(2, 256)
    alone = [packed(rows, name) for rows, name in parts]
    expected = torch.cat([ops.linear(x, weight) for weight in alone], dim=1)
    assert torch.equal(ops.linear(x, merged), expected)
    assert torch.equal(ops.linear(x, ops.join_rows(alone)), expected)
    ids = torch.tensor([103, 63, 64])
    assert torch.equal(ops.embedding(ids, merged), ops.dequantized(merged)[ids])


def test_what_cannot_be_packed() -> None:
    rows = torch.zeros(2, 144, dtype=torch.uint8)
    with pytest.raises(ValueError, match="^unknown type 'Q9_K' of blocks; choose from Q4_0, "):
        packed(rows, "Q9_K")
    with pytest.raises(ValueError, match="^rows of 144 bytes are not whole blocks of Q6_K$"):
        packed(rows, "Q6_K")
    with pytest.raises(ValueError, match=r"^the rows of a weight have equal lengths, not \[256, 512\]$"):
        ops.pack_blocks([(rows, "Q4_K"), (rows.repeat(1, 2), "Q4_K")], dtype=torch.float32, activations="int8")
    codes = torch.zeros(2, 96, dtype=torch.uint8)
    with pytest.raises(ValueError, match="^2 groups of 96 columns: a group is a multiple of 32 columns, or a row$"):
        ops.pack_groups(codes, torch.ones(2, 2), bits=4, dtype=torch.float32, activations="int8")
    with pytest.raises(ValueError, match="^codes have 4 or 8 bits, not 3$"):
        ops.pack_groups(codes, torch.ones(2, 3), bits=3, dtype=torch.float32, activations="int8")


def test_programs_run_what_kernels_cannot() -> None:
    """Ops without an instruction run their reference between the kernels of a captured program."""
    rows = blocks("Q4_0", 64, 64)
    weight = packed(rows, "Q4_0")
    with using("cpu"):
        program = Program("cpu", max_tokens=4)
        x: Any = program.input("x", Spec("tokens", 64, torch.float32))
        program.finish(ops.add(x, ops.linear(ops.rms_norm(x, None, 1e-5), weight)))
        tensor = randn(3, 64)
        expected = ops.add(tensor, ops.linear(ops.rms_norm(tensor, None, 1e-5), weight))
        assert torch.equal(program.replay({"x": tensor})[0], expected)
