"""Products with quantised weights on every capability: the reference's bits, for any number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import ops
from executor.graphs import Program
from ops.dispatch import Spec, StepInput
from ops.reference.small_floats import FLOAT_FORMATS
from tests.ops.cpu import DTYPES, NAMES, randn, threads, use, using
from tests.ops.quantized import BLOCK_TYPES, blocks, extreme_blocks, float_arguments
from tests.ops.test_cpu_invariance import same_bits

pytestmark = pytest.mark.parametrize("capability", NAMES)

ROWS = 13, 1, 2, 3, 4, 6, 8

_expected: dict[tuple[str, bytes, bool], tuple[Tensor, Tensor]] = {}
"""Results of the reference, which is the same for all capabilities."""


class Weights:
    """A weight as the reference and as the kernels have it."""

    def __init__(self, name: str, pack: Any) -> None:
        self.name = name
        self.ours: ops.QuantizedWeight = pack()
        with using("reference"):
            self.plain: ops.QuantizedWeight = pack()

    @property
    def numbers(self) -> Tensor:
        return ops.dequantized(self.plain)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.ours.tensors)

    def check(self, x: Tensor, bias: Tensor | None = None, counts: Sequence[int] = ROWS) -> None:
        """Some of the rows, by one thread or by two."""
        key = self.name, x.float().numpy().tobytes(), bias is None
        if key not in _expected:
            with using("reference"):
                _expected[key] = ops.logits(x, self.plain, bias), ops.linear(x, self.plain, bias)
        logits, product = _expected[key]
        for count in counts:
            with threads(1 + count % 2):
                assert same_bits(ops.logits(x[:count], self.ours, bias), logits[:count])
                assert same_bits(ops.linear(x[:count], self.ours, bias), product[:count])


def of_blocks(name: str, rows: Tensor, dtype: torch.dtype, activations: Any = "int8", paired: bool = False) -> Weights:
    key = f"{name} {rows.shape} {int(rows.sum())} {dtype}"
    return Weights(key, lambda: ops.pack_blocks([(rows, name)], dtype=dtype, activations=activations, paired=paired))


def of_groups(
    rows: int, columns: int, groups: int, bits: int, scale_dtype: torch.dtype, shift: str, **options: Any
) -> Weights:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = randn(rows, groups).to(scale_dtype)
    zeros = (
        torch.randint(0, 1 << bits, scales.shape, dtype=torch.uint8, generator=generator) if shift == "zeros" else None
    )
    minimums = randn(rows, groups, seed=1) if shift == "minimums" else None
    key = f"{rows} {columns} {groups} {bits} {scale_dtype} {shift}"
    return Weights(key, lambda: ops.pack_groups(codes, scales, zeros, minimums, bits=bits, **options))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_with_int8_activations(capability: str, name: str) -> None:
    with use(capability):
        for rows, columns, dtype in ((50, 768, torch.float32), (33, 256, torch.bfloat16)):
            x = randn(13, columns + 3, seed=1, dtype=dtype)[:, :columns]
            of_blocks(name, blocks(name, rows, columns), dtype).check(x, randn(rows, seed=2, dtype=dtype))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_extreme_codes(capability: str, name: str) -> None:
    """Sums of products that would not fit 16 bits."""
    x = torch.where(randn(13, 256) > 0, 2.0, -2.0)
    x[0], x[1] = 2.0, -2.0
    with use(capability):
        of_blocks(name, extreme_blocks(name, 34, 256), torch.float32).check(x)


def test_many_rows_with_int8_activations(capability: str) -> None:
    """Several tiles of rows, that blocks are decoded for anew or once, in parts of the columns where these are many."""
    x, bias = randn(45, 800, seed=1, dtype=torch.bfloat16), randn(50, seed=2, dtype=torch.bfloat16)
    with use(capability):
        for name in ("Q8_0", "Q5_0", "Q4_K", "Q6_K", "IQ4_XS"):
            of_blocks(name, blocks(name, 50, 768), torch.bfloat16).check(x[:, :768], bias, (45, 17))
        options: Any = {"dtype": torch.bfloat16, "activations": "int8"}
        for shift in ("none", "zeros"):
            of_groups(50, 800, 5, 4, torch.float16, shift, **options).check(x, bias, (45, 17, 7, 1))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("Q4_0", torch.float16), ("Q6_K", torch.float32), *((name, torch.bfloat16) for name in BLOCK_TYPES)],
    ids=str,
)
def test_float_activations_give_the_bits_of_plain_weights(capability: str, name: str, dtype: torch.dtype) -> None:
    rows = blocks(name, 70, 512)
    x, bias = randn(33, 512, seed=1, dtype=dtype), randn(70, seed=2, dtype=dtype)
    with use(capability), threads(2):
        weights = of_blocks(name, rows, dtype, "float")
        plain = ops.pack_linear(weights.numbers.to(dtype))
        for count in (33, 1, 2):
            assert same_bits(ops.linear(x[:count], weights.ours, bias), ops.linear(x[:count], plain, bias))
            assert same_bits(ops.logits(x[:count], weights.ours), ops.logits(x[:count], plain))


@pytest.mark.parametrize(
    ("shift", "scale_dtype"),
    [("none", torch.bfloat16), ("zeros", torch.float16), ("zeros", torch.float32), ("minimums", torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("bits", [4, 8])
def test_groups(capability: str, bits: int, shift: str, scale_dtype: torch.dtype) -> None:
    """Groups of 32, 64 and 96 columns, and of whole rows that are not whole blocks."""
    with use(capability):
        for columns, groups in ((320, 5), (288, 3), (45, 1)):
            x, bias = randn(13, columns, seed=1), randn(50, seed=2)
            options: Any = {"dtype": torch.float32, "activations": "int8"}
            of_groups(50, columns, groups, bits, scale_dtype, shift, **options).check(x, bias)
            options["activations"] = "float"
            weights = of_groups(50, columns, groups, bits, scale_dtype, shift, **options)
            plain = ops.pack_linear(weights.numbers)
            assert same_bits(ops.linear(x, weights.ours, bias), ops.linear(x, plain, bias))
            ids = torch.tensor([49, 0, 17])
            assert torch.equal(ops.embedding(ids, weights.ours), weights.numbers[ids])


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_embedding_and_memory(capability: str, name: str) -> None:
    rows = blocks(name, 96, 512)
    ids = torch.tensor([95, 0, 3, 3, 31, 32], dtype=torch.int32)
    with use(capability) as chosen:
        for dtype in DTYPES:
            weights = of_blocks(name, rows, dtype, paired=dtype == torch.float32)
            assert torch.equal(ops.embedding(ids, weights.ours), weights.numbers.to(dtype)[ids])
        assert weights.num_bytes <= 1.04 * rows.nbytes
        assert name in ops.block_types("cpu") and chosen.capability == capability


def of_floats(name: str, rows: int, columns: int, *, seed: int = 0, **options: Any) -> Weights:
    arguments = float_arguments(name, rows, columns, seed)
    key = f"{name} {rows} {columns} {seed} {options}"
    return Weights(key, lambda: ops.pack_floats(**arguments, format=name, **options))


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_numbers_of_4_and_8_bits_give_the_bits_of_plain_weights(capability: str, name: str) -> None:
    """Also where the last block of a row or the last group is incomplete; products, logits and single rows."""
    with use(capability), threads(2):
        for dtype, columns in (*((dtype, 208) for dtype in DTYPES), (torch.bfloat16, 45)):
            weights = of_floats(name, 70, columns, seed=columns % 2, dtype=dtype, paired=True)
            x, bias = randn(33, columns, seed=1, dtype=dtype), randn(70, seed=2, dtype=dtype)
            plain = ops.pack_linear(weights.numbers.to(dtype), paired=True)
            for count in (33, 1, 2):
                assert same_bits(ops.linear(x[:count], weights.ours, bias), ops.linear(x[:count], plain, bias))
                assert same_bits(ops.logits(x[:count], weights.ours), ops.logits(x[:count], plain))
            ids = torch.tensor([69, 0, 17])
            assert torch.equal(ops.embedding(ids, weights.ours), weights.numbers.to(dtype)[ids])


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_memory_of_numbers_of_4_and_8_bits(capability: str, name: str) -> None:
    with use(capability):
        weights = of_floats(name, 96, 512, dtype=torch.float32)
    plain = weights.plain.segments[0].data
    assert weights.num_bytes <= 1.02 * (plain.nbytes - 96 * 512 * (1 - FLOAT_FORMATS[name].bits / 8))


def test_all_codes_of_8_bits(capability: str) -> None:
    """Subnormal numbers and NaN too, which stays in its row of the weight."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    options: Any = {"format": "fp8_e4m3", "dtype": torch.float32}
    with use(capability):
        weight = ops.pack_floats(codes, torch.tensor([[1.0], [3e-7]]), **options)
        found = ops.embedding(torch.tensor([0, 1]), weight)
        plain = codes[0].view(torch.float8_e4m3fn).float()
        assert torch.equal(found.isnan(), plain.isnan().repeat(2, 1))
        assert same_bits(found.nan_to_num(9.0), torch.stack([plain, plain * torch.tensor(3e-7)]).nan_to_num(9.0))
        codes[1, [127, 255]] = 0
        product = ops.linear(randn(3, 256), ops.pack_floats(codes, torch.ones(2, 1), **options))
        assert product[:, 0].isnan().all() and product[:, 1].isfinite().all()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_numbers_of_4_bits_with_int8_activations(capability: str, name: str) -> None:
    with use(capability):
        for columns in (208, 45):
            for dtype, seed in ((torch.float32, 0), (torch.bfloat16, 1)):
                weights = of_floats(name, 50, columns, seed=seed, dtype=dtype, activations="int8")
                weights.check(randn(13, columns, seed=1, dtype=dtype), randn(50, seed=2, dtype=dtype))
        arguments = float_arguments(name, 34, 64)
        arguments["codes"][0::2], arguments["codes"][1::2] = 7, 15
        options: Any = {"format": name, "dtype": torch.float32, "activations": "int8"}
        weights = Weights(f"largest {name}", lambda: ops.pack_floats(**arguments, **options))
        x = torch.where(randn(13, 64) > 0, 2.0, -2.0)
        x[0], x[1] = 2.0, -2.0
        weights.check(x)


def test_activations_that_are_rounded_by_row(capability: str) -> None:
    """Also with the largest numbers, whose sums over all columns still fit 32 bits."""
    with use(capability):
        for columns, dtype in ((96, torch.float32), (320, torch.bfloat16), (45, torch.float16)):
            options: Any = {"dtype": dtype, "activations": "int8_per_token"}
            weights = of_groups(70, columns, 1, 8, torch.float16, "none", **options)
            weights.name += "per token"
            x = randn(40, columns, seed=1, dtype=dtype)
            x[2], x[3, 7] = 0, 2.0**-110
            weights.check(x, randn(70, seed=2, dtype=dtype))
        codes = torch.full((34, 1 << 17), 255, dtype=torch.uint8)
        codes[::2] = 0
        options = {"bits": 8, "dtype": torch.float32, "activations": "int8_per_token"}
        weight = ops.pack_groups(codes, torch.ones(34, 1), **options)
        x = torch.ones(2, 1 << 17)
        x[1] = -1.0
        numbers = torch.where(torch.arange(34) % 2 == 0, -128.0, 127.0)
        expected = torch.stack([numbers, -numbers]) * 127 * (1 << 17) * (torch.tensor(1.0) / 127)
        assert same_bits(ops.linear(x, weight), expected)


def test_programs_fuse_what_surrounds_a_product(capability: str) -> None:
    """A layer's norm, activation, addition and selection of rows, on merged weights of two types."""
    for dtype, activations in ((torch.bfloat16, "int8"), (torch.float32, "float")):
        options: Any = {"dtype": dtype, "activations": activations}
        with use(capability), threads(2):
            mixed = [(blocks("Q4_K", 64, 256), "Q4_K"), (blocks("Q6_K", 40, 256), "Q6_K")]
            qkv = ops.pack_blocks(mixed, **options)
            gate_up = ops.pack_blocks([(blocks("Q5_0", 512, 256, seed=1), "Q5_0")], paired=True, **options)
            down = ops.pack_blocks([(blocks("Q4_0", 256, 256), "Q4_0")], **options)
            norm = randn(256, seed=3, dtype=dtype)

            def run(x: Any, rows: Any) -> Any:
                merged = ops.linear(ops.rms_norm(x, norm, 1e-5), qkv)  # noqa: B023
                gated = ops.act_and_mul(ops.linear(ops.layer_norm(x, norm, None, 1e-5), gate_up), "silu")  # noqa: B023
                x = ops.add(x, ops.linear(gated, down))  # noqa: B023
                return ops.softcap(ops.logits(ops.gather_rows(x, rows), qkv), 30.0), merged  # noqa: B023

            program = Program("cpu", max_tokens=20, max_samples=4)
            x = program.input("x", Spec("tokens", 256, dtype))
            program.finish(*run(x, StepInput("rows")))
            assert program.python_ops == 0
            for num_rows in (1, 3, 20):
                tensor, rows = randn(num_rows, 256, dtype=dtype), torch.tensor([num_rows - 1, 0])
                replayed = program.replay({"x": tensor, "rows": rows})
                for ours, eager in zip(replayed, run(tensor, rows), strict=True):
                    assert same_bits(ours, eager)


def test_activations_that_are_not_finite_stay_in_their_row(capability: str) -> None:
    x = randn(13, 128)
    with use(capability):
        weights = of_blocks("Q8_0", blocks("Q8_0", 40, 128), torch.float32)
        expected = ops.linear(x, weights.ours)
        x[3, 5], x[7, 100], x[9, :] = float("inf"), float("nan"), 0
        result = ops.linear(x, weights.ours)
        assert result[[3, 7]].isnan().all() and not result[9].any()
        others = [row for row in range(13) if row not in (3, 7, 9)]
        assert same_bits(result[others], expected[others])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_all_cpus_quantise_alike(capability: str, dtype: torch.dtype) -> None:
    source = (randn(70, 160) * torch.logspace(-6, 3, 70)[:, None]).to(dtype)[:, :128]
    source[3, :32], source[4, 32:64], source[5] = 0, 0.01, torch.tensor([-3.0, 1.0] * 64, dtype=dtype)
    source[6, 7] = 1000
    importance = randn(128, seed=1).abs() + 1e-4
    with use(capability):
        for bits, weights in ((8, None), (4, None), (4, importance)):
            expected = ops.quantize_groups.reference(source, bits, weights)
            assert torch.equal(ops.quantize_groups(source, bits, weights), expected)
