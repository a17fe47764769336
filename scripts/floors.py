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

BANDWIDTH_BYTES = 512 << 20


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


def bytes_read(gguf: GGUFFile) -> tuple[int, int]:
    """Bytes of a file's weights that a step reads: all but the input embedding, unless it also computes the logits.

    Returns:
        Those of experts come second, apart from the others.
    """
    sizes = {tensor.name: tensor.num_bytes for tensor in gguf.tensors}
    experts = sum(size for name, size in sizes.items() if "_exps." in name)
    unread = sizes.get("token_embd.weight", 0) if "output.weight" in sizes else 0
    return sum(sizes.values()) - unread - experts, experts


@dataclass(frozen=True)
class ModelCost:
    """What one token of a Llama model costs, or of one with experts in all layers."""

    weight_bytes: int
    """Read once per step: all but experts and the input embedding, unless that also computes the logits."""
    layer_parameters: int
    """Multiplied with every token."""
    head_parameters: int
    """Multiplied with tokens whose logits are needed."""
    kv_bytes_per_token: int
    expert_bytes: int = 0
    """Of all experts."""
    expert_share: float = 1.0
    """Of the experts, those that a token has."""

    @classmethod
    def of(cls, config: dict[str, Any], itemsize: int = 2, gguf: GGUFFile | None = None) -> ModelCost:
        """From config.json, with ``itemsize`` bytes per number; weights take what they take in a GGUF file."""
        hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        heads = config["num_attention_heads"]
        kv = config.get("head_dim", hidden // heads) * config.get("num_key_value_heads", heads)
        own = config.get("head_dim", hidden // heads) * heads
        attention, head = layers * (2 * hidden * own + 2 * hidden * kv), config["vocab_size"] * hidden
        kv_bytes = 2 * layers * kv * itemsize
        count = config.get("num_experts") or config.get("num_local_experts") or 0
        if not count:
            layer = attention + layers * 3 * hidden * inner
            read = (layer + head) * itemsize if gguf is None else sum(bytes_read(gguf))
            return cls(read, layer, head, kv_bytes)
        top_k, one = config["num_experts_per_tok"], 3 * hidden * (config.get("moe_intermediate_size") or inner)
        always = attention + layers * count * hidden  # with the router
        sizes = ((always + head) * itemsize, layers * count * one * itemsize) if gguf is None else bytes_read(gguf)
        return cls(sizes[0], always + layers * top_k * one, head, kv_bytes, sizes[1], top_k / count)

    def bytes_of_step(self, tokens: int) -> float:
        """Bytes of weights that a step reads; of experts those that its tokens have, if each has any of them alike."""
        return self.weight_bytes + self.expert_bytes * (1 - (1 - self.expert_share) ** tokens)

    def prefill(self, rates: Rates, tokens: int, prompts: int = 1) -> float:
        """The least seconds for prompts with so many tokens in total."""
        operations = 2 * (tokens * self.layer_parameters + prompts * self.head_parameters)
        return max(self.bytes_of_step(tokens) / rates.bytes_per_s, operations / rates.operations_per_s)

    def decode(self, rates: Rates, requests: int, context: float) -> float:
        """The least seconds for a step of so many requests with a mean context of so many tokens."""
        num_bytes = self.bytes_of_step(requests) + requests * context * self.kv_bytes_per_token
        operations = 2 * requests * (self.layer_parameters + self.head_parameters)
        return max(num_bytes / rates.bytes_per_s, operations / rates.operations_per_s)

    def operations(self, prompt_tokens: int, output_tokens: int) -> float:
        """Multiplications and additions of prompts and outputs, attention apart."""
        tokens = prompt_tokens + output_tokens
        return 2.0 * (tokens * self.layer_parameters + output_tokens * self.head_parameters)
