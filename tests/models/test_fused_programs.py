"""Captured programs on GPUs: fewer launches than ops, and the same bits as the ops one by one. Interpreted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ops
from executor.base import ModelError
from executor.config import DeviceConfig
from executor.device.cpu import CpuDevice
from executor.graphs import Program
from executor.input_batch import InputBatch
from executor.models.registry import REGISTRY
from executor.registry import resolve
from ops.dispatch import Spec
from tests import triton_interpreter  # noqa: F401  # amends the interpreter
from tests.models.harness import Chunk, Runner, random_model

fused: Any = pytest.importorskip("ops.triton.fusion").fused
op_set: Any = pytest.importorskip("ops.triton.op_set")
launch: Any = pytest.importorskip("ops.triton.launch")


@pytest.fixture(autouse=True)
def triton_ops() -> Iterator[None]:
    """The CPU uses the kernels of GPUs."""
    before = ops.op_set("cpu")
    ops.use("cpu", "triton")
    yield
    ops.use("cpu", before)


class SizedRunner(Runner):
    """Captures programs with room for the steps of these tests."""

    def _capture(self) -> Program:
        program = Program("cpu", max_tokens=16, max_samples=16)
        logits: Any = self._forward(InputBatch.symbolic(program, len(self.groups)))
        program.finish(logits)
        return program


SIZES: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}
SAVED = {
    "Qwen3ForCausalLM": {"rms_norm_kernel": 2, "rotary_kernel": 2, "write_kv_kernel": 1, "act_and_mul_kernel": 1},
    "Gemma2ForCausalLM": {"rotary_kernel": 2, "write_kv_kernel": 1, "act_and_mul_kernel": 1},
    "GPTNeoXForCausalLM": {"rotary_kernel": 2, "write_kv_kernel": 1, "pointwise_kernel": 1},
    "Qwen2MoeForCausalLM": {"rotary_kernel": 2, "write_kv_kernel": 1, "act_and_mul_kernel": 1},
}
"""Launches of a layer that are part of others. Sums are besides: eager mode leaves them to torch."""
FIELDS: dict[str, dict[str, Any]] = {
    "Qwen2MoeForCausalLM": {
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "Gemma2ForCausalLM": {"query_pre_attn_scalar": 16, "hidden_activation": "gelu_pytorch_tanh"},
    "GPTNeoXForCausalLM": {"hidden_act": "gelu", "rotary_pct": 0.5},
}


def run(architecture: str, *, captured: bool) -> tuple[list[torch.Tensor], list[str]]:
    """Logits and caches after a step, and its kernels."""
    torch.manual_seed(0)
    model = resolve(REGISTRY, architecture, "model")
    fields = {**model.config_defaults, **SIZES, **FIELDS.get(architecture, {})}
    loaded, _ = random_model(model, torch.bfloat16, **fields)
    runner = SizedRunner(loaded, captured=captured, num_requests=2, max_len=32, block_size=16)
    with launch.counted() as names:
        logits = runner.step([Chunk(0, [9, 33, 2, 7]), Chunk(1, [5])])
    caches = [part for layer in loaded.model.attention_layers() for part in layer.kv_cache]
    return [logits, *(part.view(torch.int16) for part in caches)], names


@pytest.mark.parametrize("architecture", SAVED)
def test_fused_programs_have_the_bits_of_the_ops(architecture: str) -> None:
    expected, one_by_one = run(architecture, captured=False)
    found, fused = run(architecture, captured=True)
    assert all(map(torch.equal, expected, found))
    assert Counter(one_by_one) - Counter(fused) == SAVED[architecture]


def test_what_cannot_be_fused_stays() -> None:
    """A product that something else reads, a sum of a value with itself, a norm of another size than the heads."""
    program = Program("cpu", max_tokens=4, max_samples=4)
    x: Any = program.input("x", Spec("tokens", 32, torch.float32))
    weight, table = torch.randn(32, 32), torch.randn(8, 16)
    first = ops.linear(x, weight)
    twice = ops.linear(x, weight)
    positions: Any = program.input("positions", Spec("tokens", 1, torch.int32))
    turned = ops.rotary_embedding(ops.rms_norm(first, None, 1e-5), positions, table, 16)
    program.finish(first, turned, twice + twice, ops.activation(first, "silu"))
    names = [node.name for node in fused(program.nodes, program.outputs)]
    assert names == ["linear", "linear", "rms_norm", "rotary_embedding", "add", "activation"]


def test_the_library_multiplies_what_is_not_quantised() -> None:
    ops.use("cpu", op_set.TritonOps(uses_library=True))
    program = Program("cpu", max_tokens=4, max_samples=4)
    x: Any = program.input("input_ids", Spec("tokens", 16, torch.bfloat16))
    weight, bias = torch.randn(24, 16).bfloat16(), torch.randn(24).bfloat16()
    program.finish(ops.activation(ops.linear(x, weight, bias), "silu"), ops.linear(x, weight))
    given = torch.randn(3, 16).bfloat16()
    with launch.counted() as names:
        activated, plain = program.replay({"input_ids": given, "logits_rows": torch.zeros(0)})
    assert names == ["_multiply", "pointwise_kernel", "_multiply"]
    torch.testing.assert_close(plain, given @ weight.t())
    torch.testing.assert_close(activated, torch.nn.functional.silu(plain + bias), rtol=0.02, atol=0.02)


def test_a_cpu_has_no_library_to_choose() -> None:
    with pytest.raises(ModelError, match="--matmul cublas: only GPUs have it"):
        CpuDevice().initialize(DeviceConfig(matmul="cublas"), 0)
