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


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def test_numbers_of_8_bits() -> None:
    """All codes, with a scale for each row and for each 128 columns, the last group being shorter."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    plain = codes.view(torch.float8_e4m3fn).float()
    assert plain[0].isnan().nonzero().flatten().tolist() == [127, 255]
    for columns, size, groups in ((256, None, 1), (200, 128, 2)):
        scales = randn(3, groups)
        options: Any = {"format": "fp8_e4m3", "group_size": size, "dtype": torch.bfloat16}
        weight = ops.pack_floats(codes[:, :columns], scales, **options)
        spread = scales.repeat_interleave(size or columns, dim=1)[:, :columns]
        assert torch.equal(ops.dequantized(weight).nan_to_num(7.0), (plain[:, :columns] * spread).nan_to_num(7.0))
        numbers = ops.dequantized(weight).bfloat16()
        x = randn(2, columns).bfloat16()
        assert torch.equal(ops.linear(x, weight).isnan(), numbers.isnan().any(dim=1).repeat(2, 1))
        assert torch.equal(ops.embedding(torch.tensor([1]), weight).nan_to_num(7.0), numbers[1:2].nan_to_num(7.0))


def test_numbers_of_4_bits() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(4, 8)
    options: Any = {"dtype": torch.float32}
    scales = randn(4, 2)
    nf4 = ops.dequantized(ops.pack_floats(codes, scales, format="nf4", group_size=64, **options))
    assert nf4[1, 0] == -scales[1, 0] and nf4[1, 15 + 64] == scales[1, 1] and not nf4[:, 7].any()
    assert ((nf4[:, 1:16] - nf4[:, :15]) * scales[:, :1] > 0).all()
    fp4 = ops.dequantized(ops.pack_floats(codes, scales, format="fp4", group_size=64, **options))
    sizes = torch.tensor([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
    torch.testing.assert_close(fp4[:, :16], torch.cat([sizes, -sizes]) * scales[:, :1], rtol=1e-7, atol=0)

    values = torch.tensor(E2M1).repeat(8)
    exponents = torch.tensor([[0, 1, 2, 127], [126, 130, 100, 254]], dtype=torch.uint8).repeat(2, 1)
    weight = ops.pack_floats(codes, exponents, format="mxfp4", **options)
    powers = 2.0 ** (exponents.double() - 127)
    assert torch.equal(ops.dequantized(weight), (powers.repeat_interleave(32, dim=1) * values.double()).float())

    small = torch.randint(0, 126, (4, 8), dtype=torch.uint8).view(torch.float8_e4m3fn)
    rows = torch.tensor([3.0, 0.7, 1e-3, 100.0])
    for divides in (False, True):
        weight = ops.pack_floats(codes, small, rows, format="nvfp4", divides=divides, **options)
        scales = small.float() / rows[:, None] if divides else small.float() * rows[:, None]
        assert torch.equal(ops.dequantized(weight), scales.repeat_interleave(16, dim=1) * values)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_numbers_of_4_bits_with_int8_activations(name: str) -> None:
    codes = torch.randint(0, 16, (5, 80), dtype=torch.uint8)
    options: Any = {"format": name, "dtype": torch.float32, "activations": "int8"}
    if name == "mxfp4":
        weight = ops.pack_floats(codes, torch.randint(120, 130, (5, 3), dtype=torch.uint8), **options)
    else:
        scales = torch.randint(30, 80, (5, 5), dtype=torch.uint8).view(torch.float8_e4m3fn)
        weight = ops.pack_floats(codes, scales, randn(5), **options)
    x = randn(3, 80, seed=1)
    int8, factors = quantized.quantize(x)
    rounded = (int8.double() * factors.double()[..., None]).flatten(1)[:, :80]
    exact = rounded @ ops.dequantized(weight).double().T
    size = rounded.abs() @ ops.dequantized(weight).double().abs().T
    assert ((ops.logits(x, weight).double() - exact).abs() <= 1e-5 * size).all()


def test_activations_that_are_rounded_by_row() -> None:
    codes, scales = torch.randint(0, 256, (5, 45), dtype=torch.uint8), randn(5, 1)
    options: Any = {"bits": 8, "dtype": torch.bfloat16, "activations": "int8_per_token"}
    weight = ops.pack_groups(codes, scales, **options)
    x, bias = randn(4, 45, seed=1).bfloat16(), randn(5).bfloat16()
    x[2], x[3, 7] = 0, math.inf
    largest = x.float().abs().amax(dim=1, keepdim=True)
    rounded = (x.float() * (127 / largest)).round().nan_to_num(0.0)
    sums = (rounded.double() @ (codes.double() - 128).T).float()
    expected = sums * (scales.T * (largest / 127)) + bias.float()
    result = ops.logits(x, weight, bias)
    assert torch.equal(result[:3], expected[:3]) and result[3].isnan().all()
    assert torch.equal(ops.linear(x, weight, bias)[:3], expected[:3].bfloat16())
    with pytest.raises(ValueError, match="^int8_per_token needs 8 bits, one scale for each row, and neither zeros nor"):
        ops.pack_groups(codes, scales, codes[:, :1], **options)
    with pytest.raises(ValueError, match="^int8_per_token supports 131072 columns, not 131073$"):
        ops.pack_groups(torch.zeros(1, (1 << 17) + 1, dtype=torch.uint8), scales[:1], **options)
    with pytest.raises(ValueError, match="^blocks are multiplied with activations in float or int8, not int8_per_"):
        ops.pack_blocks([(blocks("Q8_0", 2, 32), "Q8_0")], dtype=torch.float32, activations="int8_per_token")


def test_what_cannot_be_packed_of_small_floats() -> None:
    codes = torch.zeros(2, 96, dtype=torch.uint8)
    options: Any = {"dtype": torch.float32}
    with pytest.raises(ValueError, match="^unknown format 'fp8' of numbers; choose from fp8_e4m3, nf4, fp4, mxfp4, nv"):
        ops.pack_floats(codes, torch.ones(2, 1), format="fp8", **options)
    with pytest.raises(
        ValueError, match="^groups of 48 columns: a group of nf4 is a multiple of 32 columns, or a row$"
    ):
        ops.pack_floats(codes, torch.ones(2, 2), format="nf4", group_size=48, **options)
    with pytest.raises(ValueError, match=r"^2 rows of 96 columns in groups of 64 have scales \[2, 2\], not \[2, 1\]$"):
        ops.pack_floats(codes, torch.ones(2, 1), format="nf4", group_size=64, **options)
    with pytest.raises(ValueError, match="^scales of rows belong to nvfp4 alone"):
        ops.pack_floats(codes, torch.ones(2, 1), torch.ones(2), format="fp4", **options)
    with pytest.raises(ValueError, match="^fp8_e4m3 is not multiplied with activations in int8$"):
        ops.pack_floats(codes, torch.ones(2, 1), format="fp8_e4m3", activations="int8", **options)


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
