"""Our products and embeddings in the place of transformers' modules, and parameters that the loader can fill."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from executor.input_batch import InputBatch
from executor.layers.context import ModelContext
from executor.layers.embedding import VocabParallelEmbedding, output_layer
from executor.layers.linear import ReplicatedLinear
from executor.layers.parameter import Part, WeightParameter, single
from executor.models.fallback.attention import Step


class StepLinear(ReplicatedLinear):
    """A product that finds the batch in the step, since transformers does not pass it."""

    def __init__(self, context: ModelContext, replaced: nn.Linear, step: Step, *, prefix: str) -> None:
        bias = replaced.bias is not None
        super().__init__(context, replaced.in_features, replaced.out_features, bias=bias, prefix=prefix)
        self.step = step

    def forward(self, x: Tensor, batch: InputBatch | None = None) -> Tensor:
        """``x`` [..., in_features] -> [..., out_features]."""
        rows = x.reshape(-1, x.shape[-1])
        out = super().forward(rows, _current(self.step) if batch is None else batch)
        return out.view(*x.shape[:-1], out.shape[-1])


class StepEmbedding(VocabParallelEmbedding):
    """The token embedding."""

    def __init__(self, context: ModelContext, step: Step, *, prefix: str) -> None:
        super().__init__(context, prefix=prefix)
        self.step = step

    def forward(self, ids: Tensor, batch: InputBatch | None = None) -> Tensor:
        """``ids`` [1, num_tokens] -> [1, num_tokens, hidden_size]."""
        return super().forward(ids.reshape(-1).int(), _current(self.step) if batch is None else batch).unsqueeze(0)


class StepOutput(nn.Module):
    """The output layer: a table of its own, or the embedding's."""

    def __init__(self, context: ModelContext, embedding: VocabParallelEmbedding, step: Step, *, prefix: str) -> None:
        super().__init__()
        layer = output_layer(context, embedding, prefix=prefix)
        self._logits = layer.logits
        self.step = step
        if layer is not embedding:
            self.weights = layer.weights  # its parameters are this module's, under the names in checkpoints

    def forward(self, hidden: Tensor) -> Tensor:
        """``hidden`` [1, num_samples, hidden_size] -> float32 [1, num_samples, vocab_size]."""
        return self._logits(hidden.squeeze(0), _current(self.step)).unsqueeze(0)


def _current(step: Step) -> InputBatch:
    assert step.batch is not None, "a module was called outside of a step"
    return step.batch


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the named one."""
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)


def replace_tables(context: ModelContext, network: Any, step: Step) -> tuple[dict[str, str], set[str]]:
    """Replaces the token embedding and the output layer, if they are of the plain kind.

    Returns:
        The output layer's name -> the embedding's, if they share a table; and names of linear layers that must stay.
    """
    names = {module: name for name, module in network.named_modules()}
    embedding, output = network.get_input_embeddings(), network.get_output_embeddings()
    is_tied = output is not None and output.weight is embedding.weight
    table = [context.config.vocab_size, context.config.hidden_size]
    is_plain = type(embedding) is nn.Embedding and list(embedding.weight.shape) == table
    makes_logits = type(output) is nn.Linear and output.bias is None and list(output.weight.shape) == table
    if is_plain and (makes_logits or not is_tied):
        values = {**context.config.values, "tie_word_embeddings": is_tied}
        own = replace(context, config=replace(context.config, values=values))
        ours = StepEmbedding(own, step, prefix=names[embedding])
        replace_module(network, names[embedding], ours)
        if makes_logits:
            replace_module(network, names[output], StepOutput(own, ours, step, prefix=names[output]))
            return ({names[output]: names[embedding]} if is_tied else {}), set()
    return {}, {names[output]} if is_tied else set()


def replace_parameters(network: nn.Module, device: torch.device, precise: Collection[str]) -> dict[str, str]:
    """Replaces parameters and persistent buffers, which the loader must fill, by ``WeightParameter``s.

    Args:
        network: Its other buffers stay as they are.
        device: Where the weights go.
        precise: Parts of the names of tensors that stay in float32.

    Returns:
        Names of modules whose tensors are shared -> names under which the loader fills them.
    """
    made: dict[int, tuple[str, WeightParameter]] = {}
    shared: dict[str, str] = {}
    for prefix, module in network.named_modules():
        persistent = {name for name in module._buffers if name not in module._non_persistent_buffers_set}
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            is_buffer = name in module._buffers
            if tensor is None or isinstance(tensor, WeightParameter) or (is_buffer and name not in persistent):
                continue
            full = f"{prefix}.{name}" if prefix else name
            if id(tensor) not in made:
                is_precise = tensor.is_floating_point() and any(part in full for part in precise)
                dtype = torch.float32 if is_precise else tensor.dtype
                parts = single(*map(Part.whole, tensor.shape))
                made[id(tensor)] = (full, WeightParameter.empty(parts, dtype=dtype, device=device))
            first, parameter = made[id(tensor)]
            if first != full:
                shared[prefix] = first.rpartition(".")[0]
            if is_buffer:
                del module._buffers[name]
            module.register_parameter(name, parameter)
    return shared


def fill_buffers(network: Any, device: torch.device) -> None:
    """Computes the buffers that no checkpoint holds, such as rotary frequencies, as transformers does."""

    def fill(module: Any, owner: Any) -> None:
        owner = module if hasattr(module, "_init_weights") else owner
        empty = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in empty:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if empty:
            owner._init_weights(module)
        for child in module.children():
            fill(child, owner)

    with torch.no_grad():
        fill(cast(nn.Module, network), network)
