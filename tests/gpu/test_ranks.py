"""Two cards that share a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.e2e.rank_harness import MAX_TOKENS, ranks
from tests.gpu.conftest import has_gpu

pytestmark = pytest.mark.skipif(not has_gpu() or torch.cuda.device_count() < 2, reason="there are no two GPUs")


def test_stages_have_the_bits_of_one_card(tmp_path: Path) -> None:
    outputs = []
    for num_stages in (1, 2):
        with ranks(tiny.checkpoint("llama"), tmp_path, 1, num_stages, device="cuda") as some:
            outputs.append(some.generate())
    assert outputs[0] == outputs[1]


def test_ranks_that_add_their_sums_repeat_their_tokens(tmp_path: Path) -> None:
    with ranks(tiny.checkpoint("llama"), tmp_path, 2, device="cuda") as two:
        first = two.generate()
        assert [len(tokens) for tokens in first] == [MAX_TOKENS] * 6 and two.generate() == first
