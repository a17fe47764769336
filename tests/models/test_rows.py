"""What belongs to a row reaches every product: adapters of some rows of a batch, and positions of several numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ops
from executor.config import StepSize
from executor.device.cpu import CpuDevice
from executor.graphs import Program
from executor.input_batch import InputBatch, adapter_columns, adapter_rows
from executor.layers.attention import form_groups
from executor.layers.context import ModelContext
from executor.layers.parameter import Weights
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.loader import LoadedModel
from executor.messages import InitKVCache, ModelRunnerOutput, NewRequest, ResolvedParams, SchedulerOutput, i32
from executor.model_runner import ModelRunner
from executor.models.decoder import CausalDecoder, DecoderParts
from executor.quantization.base import EmbeddingMethod, LinearMethod, LinearShape, QuantizationConfig, TableShape
from executor.quantization.unquantized import UnquantizedEmbedding, UnquantizedLinear
from ops import AdapterRows
from ops.dispatch import Spec, like_first, op
from tests.models.harness import Chunk, Runner, random_model, random_tokens

RANK, ADAPTERS = 4, 3
"""Adapter 0 is none."""


# ---------------------------------------------------------------------------------------------------------
# adapters (Hu et al., LoRA, arXiv:2106.09685) as a method that wraps another


@op(like_first)
def add_adapters(out: Tensor, x: Tensor, rows: AdapterRows | None, a: Tensor, b: Tensor) -> Tensor:
    """``out + B A x`` in the rows of each adapter; x may be the ids of columns of A."""
    result = out.clone()
    if rows is not None:
        starts = rows.starts.tolist()
        for i, adapter in enumerate(rows.adapters.tolist()):
            mine = rows.rows[starts[i] : starts[i + 1]]
            inner = a[adapter].T[x[mine]] if x.dim() == 1 else x[mine].float() @ a[adapter].T
            result[mine] += (inner @ b[adapter].T).to(out.dtype)
    return result


class AdaptedWeights(Weights):
    """A [adapters, rank, inputs] and B [adapters, outputs, rank], beside the weights of the method that is wrapped."""

    def __init__(self, base: Weights, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(inputs * 1000 + outputs)
        self.a, self.b = (
            0.2 * torch.randn(ADAPTERS, *sizes, generator=generator) for sizes in ((RANK, inputs), (outputs, RANK))
        )

    def pack(self) -> None:
        """The loader packs the inner weights, as it does all."""


@dataclass
class AdaptedLinear:
    base: LinearMethod[Any]

    def create(self, shape: LinearShape) -> AdaptedWeights:
        return AdaptedWeights(self.base.create(shape), shape.input.size, sum(p.size for p in shape.outputs.values()))

    def apply(self, weights: AdaptedWeights, x: Tensor, batch: InputBatch) -> Tensor:
        out = self.base.apply(weights.base, x, batch)
        return add_adapters(out, x, batch.row_adapters, weights.a, weights.b)


@dataclass
class AdaptedTable:
    base: EmbeddingMethod[Any]

    def create(self, shape: TableShape) -> AdaptedWeights:
        sizes = (shape.hidden.size, shape.vocab.size)
        return AdaptedWeights(self.base.create(shape), *(sizes if shape.makes_logits else sizes[::-1]))

    def embed(self, weights: AdaptedWeights, ids: Tensor, batch: InputBatch) -> Tensor:
        out = self.base.embed(weights.base, ids, batch)
        return add_adapters(out, ids, batch.row_adapters, weights.a, weights.b)

    def logits(self, weights: AdaptedWeights, hidden: Tensor, batch: InputBatch) -> Tensor:
        out = self.base.logits(weights.base, hidden, batch)
        return add_adapters(out, hidden, batch.sample_adapters, weights.a, weights.b)


class Adapted(QuantizationConfig):
    """A quantisation that gives every product adapters."""

    def __init__(self, fields: object = None) -> None:
        pass

    def linear_method(self, names: Sequence[str]) -> LinearMethod[Any]:
        return AdaptedLinear(UnquantizedLinear())

    def embedding_method(self, name: str) -> EmbeddingMethod[Any]:
        return AdaptedTable(UnquantizedEmbedding())


def decoder(context: ModelContext) -> CausalDecoder:
    rotary = RotaryEmbedding(context)
    return CausalDecoder(
        context, DecoderParts(lambda index, prefix: SelfAttention(context, rotary, qkv_bias=True, prefix=prefix))
    )


def adapted(dtype: torch.dtype = torch.float32) -> LoadedModel:
    return random_model(decoder, dtype, Adapted())[0]


def merged(adapter: int) -> LoadedModel:
    """The model with the weights that an adapter makes of it; 0: as it is."""
    loaded, weights = random_model(decoder, torch.float32, Adapted())
    for name, module in loaded.model.named_modules():
        if isinstance(module, AdaptedWeights) and adapter:
            change = module.b[adapter] @ module.a[adapter]
            weight = weights[f"{name.removesuffix('.weights')}.weight"]
            weight += change.T if "embed_tokens" in name else change
    return random_model(decoder, torch.float32, weights=weights)[0]


STEPS = [
    [Chunk(0, random_tokens(20), 1), Chunk(1, random_tokens(7, 2)), Chunk(2, random_tokens(33, 3), 2)],
    [Chunk(3, random_tokens(5, 4), 1), Chunk(2, random_tokens(1, 5), 2), Chunk(0, random_tokens(1, 6), 1)],
    [Chunk(1, random_tokens(1, 7))],  # no row has one
    [Chunk(1, random_tokens(1, 8)), Chunk(3, random_tokens(1, 9), 1), Chunk(2, random_tokens(2, 1), 2)],
]


@pytest.mark.parametrize("is_captured", [False, True], ids=["eager", "captured"])
def test_rows_with_an_adapter_compute_with_the_merged_weights(is_captured: bool) -> None:
    runner = Runner(adapted(), captured=is_captured)
    plain = [Runner(merged(adapter)) for adapter in range(ADAPTERS)]
    for step in STEPS:
        results = runner.step(step).split([len(chunk.token_ids) for chunk in step])
        for chunk, logits in zip(step, results, strict=True):
            expected = plain[chunk.adapter].step([Chunk(chunk.request, chunk.token_ids)])
            if chunk.adapter == 0:
                assert torch.equal(logits, expected)
            else:
                torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)
                assert (logits - plain[0].step([Chunk(chunk.request, chunk.token_ids)])).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_captured_equals_eager_whatever_the_rows_have(dtype: torch.dtype) -> None:
    loaded = adapted(dtype)
    eager = Runner(loaded)
    expected = [eager.step(step) for step in STEPS]
    captured = Runner(loaded, captured=True)
    for step, logits in zip(STEPS, expected, strict=True):
        assert torch.equal(captured.step(step), logits)


# ---------------------------------------------------------------------------------------------------------
# from the plan to the rows


def run(loaded: LoadedModel, lora_ids: list[int]) -> list[ModelRunnerOutput]:
    """Prompts of three requests, then two decode steps, by the plans that a scheduler would make."""
    groups = form_groups(loaded.model.attention_layers(), 32)
    runner = ModelRunner(
        loaded, CpuDevice(), groups, step_size=StepSize(max_num_seqs=3, max_num_batched_tokens=256), enforce_eager=False
    )
    runner.initialize(InitKVCache(num_blocks=(12,), max_model_len=128))
    params = ResolvedParams(temperature=0, prompt_logprobs=1, logprobs=0)
    requests = [
        NewRequest(
            slot=slot,
            token_ids=np.array(random_tokens(20 + slot, slot + 1), np.int32).tobytes(),
            num_prompt_tokens=20 + slot,
            num_computed_tokens=0,
            block_ids=(np.arange(4 * slot, 4 * slot + 4, dtype=np.int32).tobytes(),),
            params=params,
            lora_id=lora_id,
        )
        for slot, lora_id in enumerate(lora_ids)
    ]
    outputs = []
    for step_id in (1, 2, 3):
        counts = [20, 21, 22] if step_id == 1 else [1, 1, 1]
        plan = SchedulerOutput(
            step_id=step_id,
            slots=np.arange(3, dtype=np.int32).tobytes(),
            num_scheduled_tokens=np.array(counts, np.int32).tobytes(),
            num_sampled=np.ones(3, np.uint8).tobytes(),
            new_reqs=tuple(requests) if step_id == 1 else (),
        )
        outputs.append(runner.execute(plan))
    return outputs


def test_the_runner_gives_each_row_the_adapter_of_its_request() -> None:
    mixed = run(adapted(), [1, 0, 2])
    alone = [run(merged(adapter), [0, 0, 0]) for adapter in range(ADAPTERS)]
    for step, output in enumerate(mixed):
        tokens = [i32(alone[adapter][step].sampled_token_ids)[row] for row, adapter in enumerate([1, 0, 2])]
        assert i32(output.sampled_token_ids).tolist() == tokens
        for row, adapter in enumerate([1, 0, 2]):
            for entries, others in (
                (output.logprobs, alone[adapter][step].logprobs),
                (output.prompt_logprobs, alone[adapter][step].prompt_logprobs),
            ):
                mine, theirs = (
                    np.concatenate(
                        [np.frombuffer(e.logprobs, np.float32) for e in each if e.row == row]
                        or [np.empty(0, np.float32)]
                    )
                    for each in (entries, others)
                )
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=0 if adapter == 0 else 1e-4)
    assert len(mixed[0].prompt_logprobs) == 19 + 20 + 21


def test_rows_are_sorted_by_adapter() -> None:
    columns = adapter_columns("x", np.array([0, 7, 2, 0, 7, 2, 2], np.int32))
    rows = adapter_rows("x", {name: torch.from_numpy(column) for name, column in columns.items()})
    assert rows is not None
    assert rows.rows.tolist() == [2, 5, 6, 1, 4]
    assert (rows.adapters.tolist(), rows.starts.tolist()) == ([2, 7], [0, 3, 5])
    assert adapter_columns("x", np.zeros(3, np.int32)) == {}
    assert adapter_rows("x", {}) is None


# ---------------------------------------------------------------------------------------------------------
# positions of several numbers


@op(like_first)
def rotate_by_axes(x: Tensor, positions: Tensor) -> Tensor:
    """Columns are turned by the numbers of the position in turn."""
    axes = torch.arange(x.shape[1]) % len(positions)
    return x * torch.cos(positions[axes].float()).T.to(x.dtype)


@op(lambda positions: positions.spec)
def later(positions: Tensor) -> Tensor:
    return positions + 1


class AxesRotary(RotaryEmbedding):
    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rotate_by_axes(q, later(positions)), rotate_by_axes(k, positions)


def test_positions_may_have_several_axes() -> None:
    def model(context: ModelContext) -> CausalDecoder:
        rotary = AxesRotary(context)
        return CausalDecoder(context, DecoderParts(lambda index, prefix: SelfAttention(context, rotary, prefix=prefix)))

    loaded = random_model(model)[0]
    runner = Runner(loaded)
    batch = runner._batch([Chunk(0, random_tokens(9)), Chunk(1, random_tokens(4, 2))])
    batch.positions = torch.randint(0, 50, (3, 13), generator=torch.Generator().manual_seed(0)).int()
    expected = loaded.model.forward(batch).hidden
    program = Program("cpu", max_tokens=4, max_samples=1)
    symbolic = InputBatch.symbolic(program, len(runner.groups), position_axes=3)
    program.finish(loaded.model.forward(symbolic).hidden)
    (hidden,) = program.replay(batch.step_inputs())
    assert torch.equal(hidden, expected)
    batch.positions = batch.positions.flip(0)
    assert not torch.equal(program.replay(batch.step_inputs())[0], expected)


def test_a_kernel_for_one_axis_takes_no_others() -> None:
    table = torch.zeros(10, 16)
    program = Program("cpu")
    positions: Any = program.input("positions", Spec("tokens", 3, torch.int32, is_transposed=True))
    x: Any = program.input("x", Spec("tokens", 64, torch.float32))
    program.finish(ops.rotary_embedding(x, positions, table, 16))
    assert (program.native_ops, program.python_ops) == (0, 1)
    with pytest.raises(ValueError, match="cannot split"):
        positions.split([1, 2])
