"""Attention of transformers' models through its interface: which layers call it, and what they get.

A layer calls ``attend`` with q, k and v of all tokens of the step. During a trial run on the meta device a ``Survey``
records the calls; in service ``PagedCalls`` answers them with our layers. Calls are told apart by their order, which is
the same in every step, so a module may attend more than once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from executor.base import ModelError
from executor.input_batch import InputBatch
from executor.layers.attention import Attention
from ops import AttentionShape

INTERFACE = "octavo"
"""Our name in transformers' ``AttentionInterface``."""
SURVEY = "octavo_survey"
"""The same while a network is tried out: transformers also makes masks, as ``Mask``s."""
STEP = "octavo_step"
"""Attribute of each of transformers' modules that holds the network's ``Step``."""

HARMLESS = frozenset(
    {"cache_position", "dropout", "is_causal", "max_length_k", "max_length_q", "output_attentions"}
) | {
    *("output_router_logits", "position_embeddings", "position_ids", "return_dict", "use_cache", "num_items_in_batch"),
    *("scaling", "sliding_window", "softcap", "s_aux"),
}
"""Arguments of an attention call that do not change its result, or that a ``Survey`` reads."""


class Calls(Protocol):
    """Answers the attention calls of one forward pass."""

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, options: Mapping[str, Any]
    ) -> Tensor:
        """Attention of all tokens.

        Args:
            module: The layer that calls.
            q: [1, num_heads, num_tokens, head_dim].
            k: [1, num_kv_heads, num_tokens, head_dim].
            v: [1, num_kv_heads, num_tokens, v_head_dim].
            mask: None unless the layer computes a mask of its own.
            options: The other arguments of transformers' interface.

        Returns:
            [1, num_tokens, num_heads, v_head_dim].
        """


@dataclass
class Step:
    """The forward pass that is under way. transformers' modules take no batch, so they find it here."""

    calls: Calls
    batch: InputBatch | None = None
    """None outside of a forward pass."""


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **options: Any
) -> tuple[Tensor, None]:
    """The function that transformers' attention layers call."""
    step: Step = getattr(module, STEP)
    return step.calls.attend(module, query, key, value, attention_mask, options), None


@dataclass
class Mask:
    """What a layer may attend to, as transformers describes it."""

    function: Callable[..., Any]
    """Takes indices of sequence, head, query and key."""

    def is_causal(self, window: int | None, max_model_len: int) -> bool:
        """Whether it is the causal mask with this window, for sequences up to this length."""
        edges = (0, 1, 2) if window is None else (0, 1, window - 1, window, window + 1)
        edges = (*edges, *(max_model_len // 2 + edge for edge in edges), max_model_len - 1)
        q = torch.tensor(sorted({edge for edge in edges if 0 <= edge < max_model_len})).unsqueeze(1)
        k = torch.arange(max_model_len)
        allowed: Tensor = self.function(torch.zeros_like(k), torch.zeros_like(k), q, k)
        expected = k <= q if window is None else (k <= q) & (k > q - window)
        return not allowed.is_meta and torch.equal(allowed.expand(expected.shape), expected)


def describe_mask(*_: object, mask_function: Callable[..., Any], **__: object) -> Mask:
    """What transformers calls to make a mask."""
    return Mask(mask_function)


@dataclass
class Survey:
    """Records the attention calls of a forward pass; the results have the right shapes and no meaning."""

    source: str
    """Names the configuration in errors."""
    max_model_len: int
    shapes: list[AttentionShape] = field(default_factory=list)

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, options: Mapping[str, Any]
    ) -> Tensor:
        problem = self._problem(module, q, k, v, mask, options)
        if problem is not None:
            raise ModelError(f"{self.source}: {type(module).__name__} {problem}; the fallback cannot run this model")
        scaling, window = options.get("scaling"), options.get("sliding_window")
        self.shapes.append(
            AttentionShape(
                num_heads=q.shape[1],
                num_kv_heads=k.shape[1],
                head_dim=q.shape[3],
                v_head_dim=0 if v.shape[3] == q.shape[3] else v.shape[3],
                scale=q.shape[3] ** -0.5 if scaling is None else float(scaling),
                sliding_window=window or None,
                logit_softcap=options.get("softcap") or None,
                has_sinks=options.get("s_aux") is not None,
            )
        )
        return unmixed(q, v)

    def _problem(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, options: Mapping[str, Any]
    ) -> str | None:
        causal = options.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            return "attends to later tokens"
        if mask is not None:
            window = options.get("sliding_window") or None
            if not isinstance(mask, Mask) or not mask.is_causal(window, self.max_model_len):
                return f"has an attention mask of its own within {self.max_model_len} tokens (--max-model-len)"
        if q.shape[2] != k.shape[2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
            return "attends to something other than the tokens of the sequence"
        if q.shape[1] % k.shape[1]:
            return f"has {q.shape[1]} heads for {k.shape[1]} KV heads"
        if isinstance(options.get("scaling"), Tensor):
            return "scales attention scores by a tensor"
        unknown = sorted(name for name, value in options.items() if value is not None and name not in HARMLESS)
        if unknown:
            return f"passes {', '.join(unknown)} to attention, which is not supported"
        return None


class Unmixed:
    """Every token attends to itself alone, so tokens must not influence each other."""

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, options: Mapping[str, Any]
    ) -> Tensor:
        return unmixed(q, v)


class Dense:
    """Causal attention over the tokens at hand, without a cache."""

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, options: Mapping[str, Any]
    ) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()


def unmixed(q: Tensor, v: Tensor) -> Tensor:
    """The value of each token, for each of its heads."""
    return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).transpose(1, 2).contiguous()


class PagedCalls:
    """Attention of one step over the paged KV cache."""

    def __init__(self, layers: Sequence[Attention], batch: InputBatch) -> None:
        self._layers = iter(layers)
        self._batch = batch

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, options: Mapping[str, Any]
    ) -> Tensor:
        layer = next(self._layers)
        rows = [x.transpose(1, 2).reshape(x.shape[2], -1) for x in (q, k, v)]
        if layer.shape.has_sinks:
            rows.append(options["s_aux"].reshape(-1))
        out: Tensor = layer(*rows, batch=self._batch)
        return out.view(1, out.shape[0], layer.shape.num_heads, layer.shape.v_dim)


def register() -> None:
    """Makes ``attend`` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(INTERFACE, attend)
    AttentionInterface.register(SURVEY, attend)
    AttentionMaskInterface.register(SURVEY, describe_mask)
