"""Runs a model without the engine: block tables by hand, KV caches from the backend, eager or captured."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ops
from api.model.gguf_file import read_gguf
from executor.attention.base import AttentionGroup
from executor.base import ModelError
from executor.config import ModelConfig
from executor.forward import step_blocks
from executor.graphs import Program
from executor.hf_config import HFConfig
from executor.input_batch import InputBatch, adapter_columns, adapter_rows
from executor.layers.attention import form_groups
from executor.layers.context import ModelContext
from executor.layers.linear import LinearLayer
from executor.layers.parameter import Weights, named_weights, stored_module
from executor.loader import LoadedModel, build_model, load_model
from executor.models.base import Model
from executor.parallel import ParallelState
from executor.quantization import QuantizationConfig, choose_quantization
from executor.quantization.unquantized import PlainLinear, PlainTable
from ops import AttentionMetadata
from ops.cpu.kernels import unpack_linear
from ops.cpu.op_set import CpuOps
from ops.dispatch import Spec
from tests import tiny
from tests.ops.cpu import threads

CPU = torch.device("cpu")


def load(
    path: Path,
    *,
    parallel: ParallelState | None = None,
    communicator: ops.Communicator | None = None,
    max_adapters: int = 0,
    **fields: Any,
) -> LoadedModel:
    """Loads a folder or a GGUF file; float32 unless ``dtype`` says otherwise."""
    if path.suffix == ".gguf" and "gguf" not in fields:
        fields["gguf"] = read_gguf(path).header()
    config = ModelConfig(**{"model": str(path), "dtype": "float32", **fields})
    place = parallel or ParallelState()
    return load_model(config, place, CPU, None, lambda *_: None, communicator=communicator, max_adapters=max_adapters)


BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
"""Integers by size in bytes."""
RANDOM_MODEL: dict[str, Any] = {
    "vocab_size": tiny.VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
"""Configuration of ``random_model``."""


def random_model(
    make_model: Callable[[ModelContext], Model],
    dtype: torch.dtype = torch.float32,
    quantization: QuantizationConfig | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    **fields: Any,
) -> tuple[LoadedModel, dict[str, torch.Tensor]]:
    """A model that no checkpoint has, with random weights: ready to run, and its weights by name.

    Args:
        make_model: Takes the place of a model's class.
        dtype: Of weights and activations.
        quantization: None: there is none.
        weights: None: random ones, the same in every model of the same parameters.
        fields: More fields of the configuration, beside ``RANDOM_MODEL``.
    """
    config = HFConfig({**RANDOM_MODEL, **fields}, "config.json")
    method = quantization or choose_quantization(None, None)
    context = ModelContext(config, ParallelState(), dtype, CPU, method, config.max_position)
    model = build_model(make_model, context, None)
    generator = torch.Generator().manual_seed(0)
    chosen = {}
    for name, parameter in sorted(named_weights(model), key=lambda pair: pair[0]):
        noise = torch.randn(parameter.shape, generator=generator)
        chosen[name] = 1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.15 * noise
        if weights is not None:
            chosen[name] = weights[name]
        parameter.data.copy_(chosen[name])
    for module in model.modules():
        if isinstance(module, Weights):
            module.pack()
    return LoadedModel(model, config, 0, dtype, config.max_position), chosen


@dataclass
class Chunk:
    """Tokens of one request in one step."""

    request: int
    token_ids: Sequence[int]
    adapter: int = 0
    """0: none."""
    second_segment: int = 0
    """First token of type 1; 0: none."""


class Runner:
    """Steps of a few requests, each with blocks of its own in shuffled order."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        captured: bool = False,
        num_requests: int = 4,
        max_len: int = 256,
        block_size: int = 32,
        seed: int = 0,
        goes_on: bool = False,
    ) -> None:
        """``goes_on``: the model is a pipeline stage after the first one."""
        self.model = loaded.model
        self.block_size = block_size
        layers = self.model.attention_layers()
        self.groups = form_groups(layers, block_size, self.model.attention_of_stages)
        self.hidden = Spec("tokens", loaded.hf_config.hidden_size, loaded.dtype) if goes_on else None
        generator = torch.Generator().manual_seed(seed)
        self.block_tables = []
        for group in self.groups:  # those without a cache get as many blocks for each step
            blocks_each = -(-max_len // group.block_size)
            num_blocks = num_requests * blocks_each
            order = torch.randperm(num_blocks, generator=generator).int()
            self.block_tables.append(order.view(num_requests, blocks_each))
            shapes = group.backend.kv_shape(num_blocks, group.block_size, group.shape, group.kv_dtype)
            for index in group.layers:
                # What an earlier owner left in a block must not matter: all bits set are NaN in every type of floats.
                layers[index].kv_cache = tuple(
                    torch.full(shape, -1, dtype=BITS[group.kv_dtype.itemsize]).view(group.kv_dtype) for shape in shapes
                )
        self.model.reserve_positions(loaded.max_model_len)
        self.lengths = [0] * num_requests
        self.program = self._capture() if captured else None

    def _capture(self) -> Program:
        program = Program(CPU.type)
        has_types = self.model.num_token_types > 0
        batch = InputBatch.symbolic(program, len(self.groups), has_token_types=has_types, hidden=self.hidden)
        logits: Any = self._forward(batch)
        program.finish(logits)
        return program

    def _forward(self, batch: InputBatch) -> torch.Tensor:
        hidden = self.model.forward(batch, batch.hidden).hidden
        return self.model.compute_logits(ops.gather_rows(hidden, batch.logits_rows), batch)

    def step(self, chunks: Sequence[Chunk], hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Runs one step and returns the logits of all its tokens, float32 [num_tokens, vocab_size]; of a pipeline stage
        before the last, hidden states. ``hidden``: those of the stage before."""
        batch = self._batch(chunks)
        batch.hidden = hidden
        with torch.inference_mode():
            if self.program is not None:
                return self.program.replay(batch.step_inputs())[0].clone()  # the next replay overwrites it
            return self._forward(batch)

    def _table(self, group: AttentionGroup, table: torch.Tensor, rows: list[int], counts: torch.Tensor) -> torch.Tensor:
        """The blocks of a step's requests, int32 [num_reqs, blocks]."""
        if group.is_cached:
            return table[rows]
        return torch.from_numpy(step_blocks(counts.numpy().astype(np.int32), self.block_size))

    def _batch(self, chunks: Sequence[Chunk]) -> InputBatch:
        positions = []
        for chunk in chunks:
            start = self.lengths[chunk.request]
            self.lengths[chunk.request] += len(chunk.token_ids)
            positions.append(torch.arange(start, self.lengths[chunk.request]))
        counts = torch.tensor([len(chunk.token_ids) for chunk in chunks])
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
        seq_lens = torch.tensor([self.lengths[chunk.request] for chunk in chunks], dtype=torch.int32)
        rows = [chunk.request for chunk in chunks]
        attention = []
        for group, table in zip(self.groups, self.block_tables, strict=True):
            size = group.block_size
            blocks = self._table(group, table, rows, counts)
            slots = [
                row[position // size].long() * size + position % size
                for row, position in zip(blocks, positions, strict=True)
            ]
            columns = AttentionMetadata(starts, seq_lens, blocks, torch.cat(slots), size)
            attention.append(group.plan(columns))
        adapters = np.repeat(np.array([chunk.adapter for chunk in chunks], np.int32), counts.numpy())
        columns_of_adapters = {
            name: torch.from_numpy(column) for name, column in adapter_columns("adapters", adapters).items()
        }
        return InputBatch(
            input_ids=torch.tensor([token for chunk in chunks for token in chunk.token_ids], dtype=torch.int32),
            positions=torch.cat(positions).int(),
            attention=attention,
            logits_rows=torch.arange(int(counts.sum())),
            row_adapters=adapter_rows("adapters", columns_of_adapters),
            sample_adapters=adapter_rows("adapters", columns_of_adapters),
            token_types=self._token_types(chunks, positions),
        )

    def _token_types(self, chunks: Sequence[Chunk], positions: list[torch.Tensor]) -> torch.Tensor | None:
        """int32 [num_tokens]: 1 from a chunk's second segment on."""
        if not self.model.num_token_types:
            return None
        types = [
            position >= (chunk.second_segment or len(position))
            for chunk, position in zip(chunks, positions, strict=True)
        ]
        return torch.cat(types).int()


def logits_of(loaded: LoadedModel, token_ids: Sequence[int], **options: Any) -> torch.Tensor:
    """Logits of one sequence in one step, float32 [num_tokens, vocab_size]."""
    return Runner(loaded, **options).step([Chunk(0, token_ids)])


@functools.cache
def reference(folder: Path, attention: str = "eager") -> Any:
    """A checkpoint as transformers loads it, in float32, with one of its implementations of attention."""
    from transformers import AutoModelForCausalLM  # takes seconds

    folder = tiny.saved_by_transformers(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


def reference_logits(folder: Path, token_ids: list[int], attention: str = "eager") -> torch.Tensor:
    """transformers' logits of one sequence, float32 [num_tokens, vocab_size]."""
    with torch.inference_mode():
        logits: torch.Tensor = reference(folder, attention)(torch.tensor([token_ids])).logits[0]
    return logits


def random_tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(0, tiny.VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def steps_of(seed: int, num_requests: int = 4, num_steps: int = 6) -> list[list[Chunk]]:
    """Steps of a few requests, at random."""
    rng = random.Random(seed)
    steps = []
    for _ in range(num_steps):
        rows = rng.sample(range(num_requests), rng.randint(1, num_requests))
        steps.append([Chunk(row, random_tokens(rng.choice([1, 1, 3, 17, 33]), rng.randrange(1000))) for row in rows])
    return steps


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert ours.dtype == torch.float32
    assert theirs.std() > 0.1, "logits that say nothing prove nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def assert_independent_of_batch(loaded: LoadedModel) -> None:
    """Random chunks beside random neighbours, by two threads, give the bits of each request alone, token by token."""
    steps = steps_of(3, num_steps=8)
    with threads(2):
        runner = Runner(loaded, captured=True)
        batched: dict[int, list[torch.Tensor]] = {}
        for step in steps:
            rows = runner.step(step).split([len(chunk.token_ids) for chunk in step])
            for chunk, logits in zip(step, rows, strict=True):
                batched.setdefault(chunk.request, []).append(logits)
    runner = Runner(loaded, captured=True)
    for request, logits in batched.items():
        tokens = [token for step in steps for chunk in step if chunk.request == request for token in chunk.token_ids]
        alone = torch.cat([runner.step([Chunk(request, [token])]) for token in tokens])
        assert torch.equal(torch.cat(logits), alone)


def refusal(path: Path, **fields: Any) -> str:
    """The message with which a model is refused: one line."""
    with pytest.raises(ModelError) as caught:
        load(path, **fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


def weights_of(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """The parameters by name, as they were before they were packed."""
    weights = {name: parameter.data for name, parameter in named_weights(loaded.model)}
    chosen = ops.op_set("cpu")
    for name, module in loaded.model.named_modules():
        if isinstance(module, PlainLinear | PlainTable) and isinstance(module.packed, ops.PackedWeight):
            assert isinstance(chosen, CpuOps), "packed weights come from the kernels"
            weights[f"{name.removesuffix('.weights')}.weight"] = unpack_linear(chosen.library, module.packed)
    return weights


def split_shares(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """A rank's share of each tensor of the checkpoint."""
    shares = {}
    for name, weight in weights_of(loaded).items():
        module, _, leaf = name.rpartition(".")
        layer = loaded.model.get_submodule(module)
        if not isinstance(layer, LinearLayer):
            shares[name] = weight
            continue
        for shard_id, tensor in zip(layer.shape.outputs, weight.split(layer.output_sizes), strict=True):
            shares[f"{stored_module(module, shard_id)}.{leaf}"] = tensor
    return shares
