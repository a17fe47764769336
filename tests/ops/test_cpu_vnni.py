"""The path of AVX-VNNI, with its instruction emulated: the reference's bits, as on all capabilities."""

from __future__ import annotations

import pytest
import torch

import ops
from ops.cpu import build
from tests.ops.cpu import Requests, randn, use
from tests.ops.quantized import extreme_blocks
from tests.ops.test_cpu_invariance import same_bits
from tests.ops.test_cpu_quantized import of_blocks, of_groups

CAPABILITY = build.VNNI_EMULATION.name


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_XS"])
def test_blocks(name: str) -> None:
    x = torch.where(randn(13, 256) > 0, 2.0, -2.0)
    x[2:] *= randn(11, 256, seed=1)
    with use(CAPABILITY):
        of_blocks(name, extreme_blocks(name, 34, 256), torch.float32).check(x)


def test_rows_with_a_scale_each() -> None:
    with use(CAPABILITY):
        options = {"dtype": torch.float32, "activations": "int8_per_token"}
        of_groups(50, 288, 1, 8, torch.float32, "none", **options).check(randn(13, 288, seed=1))


def test_a_cache_in_int8() -> None:
    """Sums of integers are exact, so both ways to multiply them give the same bits."""
    shape = ops.AttentionShape(4, 2, 64, 0.125)
    results = []
    for capability in (CAPABILITY, "avx2"):
        with use(capability):
            requests = Requests(shape, [70], torch.float32, cache_dtype=torch.int8)
            results.append([requests.step({0: count})[0] for count in (60, 1, 9)])
    assert all(map(same_bits, *results))
