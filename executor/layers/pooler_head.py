"""What turns pooled hidden states into scores or shorter vectors: a few small products in float32, on the host."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from executor.base import Head
from executor.hf_config import HFConfig
from executor.layers.context import ModelContext
from executor.layers.parameter import Part, WeightParameter, single

F32 = npt.NDArray[np.float32]
Activation = Callable[[F32], F32]


def _torch(function: Callable[[torch.Tensor], torch.Tensor]) -> Activation:
    return lambda x: function(torch.from_numpy(x)).numpy()


ACTIVATIONS: dict[str, Activation] = {
    "gelu": _torch(torch.nn.functional.gelu),
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, np.float32(0)),
    "sigmoid": _torch(torch.sigmoid),
    "silu": _torch(torch.nn.functional.silu),
    "softmax": _torch(lambda x: torch.softmax(x, dim=-1)),
    "tanh": np.tanh,
}
"""By the names of config.json. softmax is over the last dimension."""


class HeadLinear(nn.Module):
    """``x @ weight.T + bias`` in float32. Each vector is multiplied alone, so its bits depend on no other."""

    def __init__(self, context: ModelContext, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        rows = Part.whole(out_features)
        self.weight = _parameter(context, rows, Part.whole(in_features))
        self.bias = _parameter(context, rows) if bias else None

    def forward(self, x: F32) -> F32:
        """``x`` [..., in_features] -> [..., out_features]."""
        weight = _numpy(self.weight)
        rows = x.reshape(-1, x.shape[-1])
        out = np.stack([weight @ row for row in rows]).reshape(*x.shape[:-1], len(weight))
        return out if self.bias is None else out + _numpy(self.bias)


class HeadNorm(nn.Module):
    """Layer norm in float32."""

    def __init__(self, context: ModelContext, size: int, eps: float, *, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(context, Part.whole(size))
        self.bias = _parameter(context, Part.whole(size)) if bias else None

    def forward(self, x: F32) -> F32:
        """``x`` [..., size] -> the same."""
        centred = x - x.mean(axis=-1, keepdims=True)
        out: F32 = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(self.eps))
        out = out * _numpy(self.weight)
        return out if self.bias is None else out + _numpy(self.bias)


def _parameter(context: ModelContext, *parts: Part) -> WeightParameter:
    return WeightParameter.empty(single(*parts), dtype=torch.float32, device=context.device)


def _numpy(parameter: WeightParameter) -> F32:
    data: F32 = parameter.data.cpu().numpy()
    return data


CROSS_ENCODER_ACTIVATION = "sbert_ce_default_activation_function"


def score_activation(config: HFConfig) -> str:
    """What turns the logits of a classifier into scores: as sentence-transformers wrote it, else by the type of the
    problem."""
    section = config.section("sentence_transformers")
    for fields, name in ((section, "activation_fn"), (config, CROSS_ENCODER_ACTIVATION)):
        if fields.has(name):
            own = fields.string(name).rpartition(".")[2].lower()
            if own not in ACTIVATIONS:
                fields.bad(name, f"one of {', '.join(sorted(ACTIVATIONS))} of torch.nn")
            return own
    kind = config.string("problem_type", "")
    count = len(config.labels)
    if kind == "regression":
        return "identity"
    return "sigmoid" if kind == "multi_label_classification" or count == 1 else "softmax"


def with_labels(config: HFConfig, head: Head) -> HFConfig:
    """The configuration with what the classifier of a reward model says, whatever the file names."""
    if head == "reward":
        return config.replaced(id2label={"0": "reward"}, problem_type="regression")
    return config.replaced(id2label={"0": "bad", "1": "good"}, problem_type=None) if head == "process" else config


class PoolingHead(nn.Module):
    """A classifier: ``out(norm(act(dense(x))))``, of which each part but the last may be missing.

    Its weights are ``dense``, ``norm`` and ``out``.
    """

    def __init__(
        self,
        context: ModelContext,
        pooling_type: str,
        *,
        activation: str | None = None,
        dense_bias: bool = True,
        norm: HeadNorm | None = None,
        bias: bool = True,
    ) -> None:
        """Creates the head with as many outputs as the configuration has labels.

        Args:
            context: The model's construction context.
            pooling_type: What it reads of a prompt: one of ``POOLING_TYPES``.
            activation: That of ``dense``; None: there is no such layer.
            dense_bias: Whether it has a bias.
            norm: Follows the activation.
            bias: Whether ``out`` has a bias.
        """
        super().__init__()
        size = context.config.hidden_size
        self.activate = ACTIVATIONS[score_activation(context.config)]
        self.pooling_type = pooling_type
        self.activation = ACTIVATIONS[activation or "identity"]
        self.dense = None if activation is None else HeadLinear(context, size, size, bias=dense_bias)
        self.norm = norm
        self.out = HeadLinear(context, size, len(context.config.labels), bias=bias)

    def forward(self, x: F32) -> F32:
        """``x`` float32 [..., hidden_size] -> logits, float32 [..., num_labels]."""
        if self.dense is not None:
            x = self.activation(self.dense(x))
        if self.norm is not None:
            x = self.norm(x)
        logits: F32 = self.out(x)
        return logits
