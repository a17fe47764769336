"""Limits of this machine, measured by loops that share no code with the kernels, and the least time that work needs."""

from __future__ import annotations

import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gguf import GGMLQuantizationType

from api.model.gguf_file import GGUFFile
from ops.cpu import library, memory

BANDWIDTH_BYTES = 256 << 20


@dataclass(frozen=True)
class Rates:
    """What the machine could do at one time."""

    bytes_per_s: float
    operations_per_s: float
    """Multiplications and additions of the fastest instructions for the model's numbers."""


class Machine:
    """Measures the limits of all threads together, with the kernels' capability."""

    def __init__(self) -> None:
        """
        Raises:
            RuntimeError: The kernels, which contain the loops, cannot be used.
        """
        kernels = library.chosen()
        if kernels is None:
            raise RuntimeError("no kernels are available on this machine, and so no floors")
        self._kernels = kernels
        self.threads = len(os.sched_getaffinity(0))
        self.capability = kernels.capability
        self._buffer = memory.map_zeros(BANDWIDTH_BYTES).fill_(1)

    def measure(self, numbers: int = library.TYPES[torch.bfloat16]) -> Rates:
        """The rates right now; other programs use part of them.

        Args:
            numbers: What is multiplied: one of ``library.TYPES``, or ``library.INT8``.
        """
        data, size = self._buffer.data_ptr(), len(self._buffer)
        kernels, threads = self._kernels, self.threads
        bandwidth = statistics.median(kernels.measure_bandwidth(data, size, threads) for _ in range(5))
        peak = max(kernels.measure_peak(numbers, threads) for _ in range(5))
        return Rates(bandwidth, 2 * peak)


def is_quantized(gguf: GGUFFile) -> bool:
    """Whether most weights of a file are quantised, so that engines multiply activations in int8."""
    plain = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}
    quantized = sum(tensor.num_bytes for tensor in gguf.tensors if tensor.ggml_type not in plain)
    return 2 * quantized > sum(tensor.num_bytes for tensor in gguf.tensors)


def bytes_read(gguf: GGUFFile) -> int:
    """Bytes of a file's weights that a step reads: all but the input embedding, unless it also computes the logits."""
    sizes = {tensor.name: tensor.num_bytes for tensor in gguf.tensors}
    return sum(sizes.values()) - (sizes.get("token_embd.weight", 0) if "output.weight" in sizes else 0)


@dataclass(frozen=True)
class ModelCost:
    """What one token of a Llama model costs."""

    weight_bytes: int
    """Read once per step: all but the input embedding, unless that also computes the logits."""
    layer_parameters: int
    """Multiplied with every token."""
    head_parameters: int
    """Multiplied with tokens whose logits are needed."""
    kv_bytes_per_token: int

    @classmethod
    def of(cls, config: dict[str, Any], itemsize: int = 2, gguf: GGUFFile | None = None) -> ModelCost:
        """From config.json, with ``itemsize`` bytes per number; weights take what they take in a GGUF file."""
        hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        heads = config["num_attention_heads"]
        kv = config.get("head_dim", hidden // heads) * config.get("num_key_value_heads", heads)
        own = config.get("head_dim", hidden // heads) * heads
        layer = layers * (2 * hidden * own + 2 * hidden * kv + 3 * hidden * inner)
        head = config["vocab_size"] * hidden
        weight_bytes = (layer + head) * itemsize if gguf is None else bytes_read(gguf)
        return cls(weight_bytes, layer, head, 2 * layers * kv * itemsize)

    def prefill(self, rates: Rates, tokens: int, prompts: int = 1) -> float:
        """The least seconds for prompts with so many tokens in total."""
        operations = 2 * (tokens * self.layer_parameters + prompts * self.head_parameters)
        return max(self.weight_bytes / rates.bytes_per_s, operations / rates.operations_per_s)

    def decode(self, rates: Rates, requests: int, context: float) -> float:
        """The least seconds for a step of so many requests with a mean context of so many tokens."""
        num_bytes = self.weight_bytes + requests * context * self.kv_bytes_per_token
        operations = 2 * requests * (self.layer_parameters + self.head_parameters)
        return max(num_bytes / rates.bytes_per_s, operations / rates.operations_per_s)

    def operations(self, prompt_tokens: int, output_tokens: int) -> float:
        """Multiplications and additions of prompts and outputs, attention apart."""
        tokens = prompt_tokens + output_tokens
        return 2.0 * (tokens * self.layer_parameters + output_tokens * self.head_parameters)
