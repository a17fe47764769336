"""Captured programs on the CPU kernels: nothing left in Python, and the same bits whatever the batch is."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import ops
from executor.graphs import Program
from executor.input_batch import InputBatch
from executor.loader import LoadedModel
from executor.quantization.unquantized import PlainLinear
from ops.cpu import build
from ops.cpu.program import NativeProgram
from ops.dispatch import Spec, StepInput, like_first, op
from tests import tiny
from tests.models.harness import Chunk, Runner, assert_independent_of_batch, load, random_tokens, steps_of
from tests.ops.cpu import DTYPES, NEEDS_KERNELS, use, using

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tied": True}),
    "llama head of 24": ("llama", {"head_dim": 24}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama odd sizes": ("llama", {"hidden_size": 60, "intermediate_size": 90, "head_dim": 20, "vocab_size": 384}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"tied": True}),
}

pytestmark = NEEDS_KERNELS


def load_tiny(name: str, dtype: torch.dtype) -> LoadedModel:
    kind, fields = MODELS[name]
    return load(tiny.checkpoint(kind, **fields), dtype=str(dtype).removeprefix("torch."))


def capture(loaded: LoadedModel, **options: Any) -> Program:
    program = Runner(loaded, captured=True, **options).program
    assert program is not None
    return program


# ---------------------------------------------------------------------------------------------------------
# everything runs on the kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_all_ops_run_on_the_kernels(name: str, dtype: torch.dtype) -> None:
    loaded = load_tiny(name, dtype)
    assert {layer.backend.name for layer in loaded.model.attention_layers()} == {"cpu"}
    program = capture(loaded)
    assert program.python_ops == 0
    recorded = sum(node.name != "slice" for node in program.nodes)
    assert program.native_ops == recorded > 30


def test_fusion_leaves_five_calls_per_layer() -> None:
    """Norm and product, attention, product and sum, norm and product and activation, product and sum."""
    for name in ("llama", "qwen3"):
        native = capture(load_tiny(name, torch.bfloat16))._runner
        assert isinstance(native, NativeProgram)
        (segment,) = native._parts
        # Before the layers the embedding; after them the last norm, the wanted rows and the logits, all in one.
        assert len(segment.items) == 1 + 3 * 5 + 1  # type: ignore[union-attr]


def test_without_kernels_every_op_is_python() -> None:
    with using("reference"):
        loaded = load_tiny("llama", torch.float32)
        assert {layer.backend.name for layer in loaded.model.attention_layers()} == {"reference"}
        program = capture(loaded)
        assert program.native_ops == 0
        assert program.python_ops > 30


# ---------------------------------------------------------------------------------------------------------
# the same bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_captured_equals_eager(name: str, dtype: torch.dtype) -> None:
    loaded = load_tiny(name, dtype)
    steps = steps_of(1)
    eager = Runner(loaded)
    expected = [eager.step(step) for step in steps]
    captured = Runner(loaded, captured=True)
    for step, logits in zip(steps, expected, strict=True):
        assert torch.equal(captured.step(step), logits)


@pytest.mark.parametrize("capability", [*build.CAPABILITIES, build.AMX_EMULATION.name])
def test_captured_equals_eager_on_every_capability(capability: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        with use(capability):
            loaded = load_tiny("qwen3", dtype)
            steps = steps_of(2, num_steps=3)
            eager = Runner(loaded)
            expected = [eager.step(step) for step in steps]
            captured = Runner(loaded, captured=True)
            for step, logits in zip(steps, expected, strict=True):
                assert torch.equal(captured.step(step), logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama tied", "mistral", "qwen3"])
def test_logits_do_not_depend_on_the_batch(name: str, dtype: torch.dtype) -> None:
    assert_independent_of_batch(load_tiny(name, dtype))


def test_only_the_wanted_rows_get_logits_and_all_hidden_states_stay_readable() -> None:
    loaded = load_tiny("qwen3", torch.bfloat16)
    runner = Runner(loaded)
    program = Program("cpu", max_tokens=4, max_samples=1)
    symbolic = InputBatch.symbolic(program, len(runner.groups))
    hidden: Any = loaded.model.forward(symbolic).hidden
    program.finish(hidden, loaded.model.compute_logits(ops.gather_rows(hidden, symbolic.logits_rows), symbolic))
    batch = runner._batch([Chunk(0, random_tokens(40)), Chunk(1, random_tokens(3, 2))])
    for rows in ([39, 42], [], [42, 0, 7]):
        batch.logits_rows = torch.tensor(rows, dtype=torch.int64)
        states, logits = program.replay(batch.step_inputs())
        assert states.shape == (43, 64)
        assert logits.shape == (len(rows), tiny.VOCAB_SIZE)
        assert torch.equal(logits, loaded.model.compute_logits(states[rows], batch))


def test_a_program_grows_with_its_largest_step() -> None:
    loaded = load_tiny("llama", torch.bfloat16)
    small, large = Runner(loaded, captured=True), Runner(loaded)
    for count in (1, 3, 100, 2, 101, 1):
        chunks = [Chunk(0, random_tokens(count, count))]
        assert torch.equal(small.step(chunks), large.step(chunks))


# ---------------------------------------------------------------------------------------------------------
# Python between the kernels


@op(like_first)
def halved(x: torch.Tensor) -> torch.Tensor:
    """An op that no device has a kernel for."""
    return x / 2


def test_ops_without_a_kernel_run_between_segments() -> None:
    weight = ops.pack_linear(torch.randn(48, 40, generator=torch.Generator().manual_seed(0)), paired=True)
    norm, rows = torch.rand(40), torch.tensor([2, 0])
    program = Program("cpu")
    x: Any = program.input("x", Spec("tokens", 40, torch.float32))

    def forward(x: Any, rows: Any) -> tuple[Any, ...]:
        first, second = ops.linear(ops.rms_norm(x, norm, 1e-5), weight).split([40, 8], dim=-1)
        half = halved(first)
        summed = ops.add(half, x)
        return summed, halved(ops.activation(second, "relu")), ops.gather_rows(halved(summed + first), rows)

    program.finish(*forward(x, StepInput("rows")))
    assert (program.native_ops, program.python_ops) == (6, 3)
    for count in (3, 70, 5):
        tensor = torch.randn(count, 40)
        for ours, theirs in zip(program.replay({"x": tensor, "rows": rows}), forward(tensor, rows), strict=True):
            assert torch.equal(ours, theirs)


def test_values_that_are_used_twice_are_not_fused_away() -> None:
    weight = ops.pack_linear(torch.randn(40, 40, generator=torch.Generator().manual_seed(0)))
    program = Program("cpu")
    x: Any = program.input("x", Spec("tokens", 40, torch.float32))

    def forward(x: Any) -> tuple[Any, ...]:
        y = ops.linear(x, weight)
        z = ops.linear(y, weight)
        return ops.add(x, y), ops.add(y, z), ops.add(z, z), z

    program.finish(*forward(x))
    tensor = torch.randn(9, 40)
    for ours, theirs in zip(program.replay({"x": tensor}), forward(tensor), strict=True):
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------------------------------------------------
# memory


def test_weights_are_freed_after_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked: list[weakref.ref[torch.Tensor]] = []
    pack = PlainLinear.pack

    def watch(weights: PlainLinear) -> None:
        unpacked.append(weakref.ref(weights.weight))
        pack(weights)

    monkeypatch.setattr(PlainLinear, "pack", watch)
    loaded = load_tiny("llama", torch.bfloat16)
    gc.collect()
    assert len(unpacked) == 12
    assert all(reference() is None for reference in unpacked)
    assert isinstance(loaded.model.get_submodule("lm_head.weights").packed, ops.PackedWeight)
    # What is left are the numbers of the checkpoint, once: all sizes are multiples of 32.
    assert loaded.weight_bytes == sum(parameter.nbytes for parameter in loaded.model.parameters())


def test_a_tied_table_is_there_once() -> None:
    tied, untied = load_tiny("llama tied", torch.bfloat16), load_tiny("llama", torch.bfloat16)
    assert untied.weight_bytes - tied.weight_bytes == tiny.VOCAB_SIZE * 64 * 2
