"""Any causal language model of transformers that supports its attention interface, on our engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from executor.base import ModelError
from executor.checkpoint import Checkpoint
from executor.hf_config import HFConfig
from executor.input_batch import InputBatch, ModelOutput
from executor.layers.attention import Attention
from executor.layers.context import ModelContext
from executor.models.base import Model
from executor.models.fallback.attention import Calls, Dense, PagedCalls, Unmixed
from executor.models.fallback.layers import (
    StepLinear,
    fill_buffers,
    replace_module,
    replace_parameters,
    replace_tables,
)
from executor.models.fallback.network import (
    COMMON_NAMES,
    Network,
    Trial,
    as_model_errors,
    build_network,
    freeze_rotations,
    read_config,
    try_out,
)
from executor.models.fallback.weights import ConvertedCheckpoint

logger = logging.getLogger(__name__)

CHECKED_TOKENS, FIRST_CHECKED = 6, 10
"""Number of tokens to try the loaded model on, and the id of the first."""
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Relative differences that rounding may make."""


class TransformersForCausalLM(Model):
    """transformers' implementation with our attention, products and embeddings.

    The forward pass is Python code of transformers, so it cannot be captured; its norms, activations and positions are
    torch's, whose bits may depend on the batch.
    """

    can_be_captured = False

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        source = context.config.source
        if context.parallel.tp_size * context.parallel.pp_size > 1:
            raise ModelError(f"{source}: {context.config.architecture} runs through transformers on one rank only")
        network = build_network(context)
        trial = try_out(network, source, context.max_model_len)
        self.context = context
        self.source = source
        self.network = network
        self.tied_modules = self._replace_modules(context, network, trial)
        self.layers = [Attention(context, shape) for shape in trial.shapes]
        for index, layer in enumerate(self.layers):
            layer.scales = None  # checkpoints have them under other names
            self.add_module(f"attention_{index}", layer)
        for name, child in network.whole.named_children():
            self.add_module(name, child)
        network.isolate_head(trial.output_type)

    @classmethod
    def configure(cls, config: HFConfig) -> HFConfig:
        """The configuration as transformers completes it, with the common names of fields."""
        parsed = read_config(config)
        with as_model_errors(config.source, "not the configuration of a language model"):
            text = parsed.get_text_config()
            values = {**config.values, **parsed.to_dict()}
            values |= {name: getattr(text, name) for name in COMMON_NAMES}
            values["architectures"] = config.values["architectures"]
            values["tie_word_embeddings"] = bool(getattr(text, "tie_word_embeddings", False))
            length = getattr(text, "max_position_embeddings", None)
            if length is not None:
                values["max_position_embeddings"] = length
        return replace(config, values=values)

    def _replace_modules(self, context: ModelContext, network: Network, trial: Trial) -> Mapping[str, str]:
        """Puts our layers in place, and parameters that the loader fills; returns ``tied_modules``."""
        whole, step = network.whole, network.step
        tied, plain = replace_tables(context, whole, step)
        for name, module in list(whole.named_modules()):
            if type(module) is nn.Linear and name not in trial.read_directly | plain:
                replace_module(whole, name, StepLinear(context, module, step, prefix=name))
        precise = set(whole._keep_in_fp32_modules_strict or ())
        if context.dtype == torch.float16:
            precise |= set(whole._keep_in_fp32_modules or ())
        tied |= replace_parameters(whole, context.device, precise)
        fill_buffers(whole, context.device)
        freeze_rotations(whole, context.max_model_len, context.device)
        return tied

    # -- a step -------------------------------------------------------------------------------------------

    def forward(self, batch: InputBatch, hidden: Tensor | None = None) -> ModelOutput:
        return ModelOutput(self._hidden(batch, PagedCalls(self.layers, batch)))

    def _hidden(self, batch: InputBatch, calls: Calls, *, is_whole: bool = False) -> Tensor:
        """Hidden states of the batch. ``is_whole``: it is one sequence from its beginning."""
        step = self.network.step
        step.calls, step.batch = calls, batch
        ids, positions = batch.input_ids.long().unsqueeze(0), batch.positions.long().unsqueeze(0)
        out = self.network.hidden_states(ids, None if is_whole else positions)
        hidden: Tensor = out.last_hidden_state.squeeze(0)
        step.batch = None
        return hidden

    def compute_logits(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        network = self.network
        network.step.batch = batch
        logits = network.logits(hidden.unsqueeze(0))
        network.step.batch = None
        return logits.squeeze(0).float()

    def stored_as(self, checkpoint: Checkpoint) -> Checkpoint:
        # Conversions may look at modules that are replaced here. Without weights, a second model costs little.
        return ConvertedCheckpoint(checkpoint, build_network(self.context).whole)

    def loaded(self) -> None:
        """Warns, and checks that attention alone connects tokens: any other state would be lost between steps.

        Raises:
            ModelError: Tokens influence each other in another way.
        """
        logger.warning(
            "%s runs through transformers: slower than a built-in model, and the same request may get "
            "other tokens in another batch",
            type(self.network.whole).__name__,
        )
        name = type(self.network.whole).__name__
        ids = torch.arange(CHECKED_TOKENS, device=self.context.device)
        batch, last = lone_batch(ids + FIRST_CHECKED, ids), lone_batch(ids[-1:] + FIRST_CHECKED, ids[-1:])
        if not torch.equal(self._hidden(batch, Dense()), self._hidden(batch, Dense(), is_whole=True)):
            raise ModelError(
                f"{self.source}: {name} does not count positions from 0; the fallback cannot run this model"
            )
        if not _is_close(self._hidden(batch, Unmixed())[-1:], self._hidden(last, Unmixed())):
            raise ModelError(
                f"{self.source}: in {name}, tokens influence each other outside of attention; the fallback cannot run "
                "this model"
            )

    def attention_layers(self) -> list[Attention]:
        return self.layers


def _is_close(one: Tensor, other: Tensor) -> bool:
    """False if anything is not a number."""
    return bool((one - other).abs().max() <= TOLERANCES[one.dtype] * other.abs().max())


def lone_batch(ids: Tensor, positions: Tensor) -> InputBatch:
    """Tokens without a KV cache."""
    return InputBatch(ids, positions, [], torch.arange(0, device=ids.device))
