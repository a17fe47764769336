"""Mixtures of experts: which experts a token gets, and the sum of their results."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.adapters import ExpertAdapters
from ops.dispatch import Spec, StepInput, like_first, op
from ops.metadata import AdapterRows, Routing
from ops.packed import ExpertWeights
from ops.reference.adapters import adapted, of_rows
from ops.reference.basic import act_and_mul, activation, linear
from ops.reference.basic import logits as unrounded
from ops.reference.quantized import fma

TINY = 1e-20
"""Added to a sum of sigmoids that divides."""


@op(like_first)
def route(logits: Tensor, routing: Routing, bias: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
    """Chooses the experts of each token, all in float32. Of equal ones, those with lower ids come first.

    The experts with the highest scores plus ``bias`` are chosen (without a bias: the highest logits). With groups, only
    experts of the best groups count; a group is as good as the sum of its ``group_best`` best experts.
    The weight of an expert is its score, without the bias. Normalised softmax weights are the softmax over the chosen
    logits; normalised sigmoids are divided by their sum plus 1e-20.

    sparsemixer chooses one expert after the other, the one with the highest logit. Its weight is its softmax among
    those not chosen before whose logit l is not much lower than the chosen one's, m:
    ``(m - l) / max(|l|, m) <= 2 * jitter``.

    Args:
        logits: float32 [tokens, experts].
        routing: How experts are chosen.
        bias: float32 [experts], added to the scores for the choice alone.
        factors: float32 [experts] of the weights.

    Returns:
        float32 [tokens, experts]: the weights of the chosen experts, and 0 for all others.
    """
    if routing.scores == "sparsemixer":
        weights = _sparsemixer(logits, routing)
    else:
        scores = logits.softmax(-1) if routing.scores == "softmax" else logits.sigmoid()
        choice = logits if bias is None and routing.num_groups == 1 else scores if bias is None else scores + bias
        if routing.num_groups > 1:
            choice = _of_best_groups(choice, routing)
        chosen = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, : routing.top_k]
        own = scores.gather(-1, chosen)
        if routing.normalize and routing.scores == "softmax":
            own = logits.gather(-1, chosen).softmax(-1)
        elif routing.normalize:
            own = own / (own.sum(-1, keepdim=True) + TINY)
        weights = torch.zeros_like(logits).scatter(-1, chosen, own * routing.factor)
    return weights if factors is None else weights * factors


def _of_best_groups(choice: Tensor, routing: Routing) -> Tensor:
    groups = choice.unflatten(-1, (routing.num_groups, -1))
    best = groups.topk(min(routing.group_best, groups.shape[-1]), dim=-1).values.sum(-1)
    kept = torch.sort(best, dim=-1, descending=True, stable=True).indices[:, : routing.top_groups]
    is_kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, kept, True)
    result: Tensor = groups.masked_fill(~is_kept[..., None], -torch.inf).flatten(-2)
    return result


def _sparsemixer(logits: Tensor, routing: Routing) -> Tensor:
    weights, rest = torch.zeros_like(logits), logits
    for _ in range(routing.top_k):
        chosen = torch.sort(rest, dim=-1, descending=True, stable=True).indices[:, :1]
        highest = rest.gather(-1, chosen)
        is_low = (highest - logits) / torch.maximum(logits.abs(), highest) > 2 * routing.jitter
        scores = rest.masked_fill(is_low, -torch.inf).softmax(-1)
        weights = weights.scatter(-1, chosen, scores.gather(-1, chosen) * routing.factor)
        rest = rest.scatter(-1, chosen, -torch.inf)
    return weights


@op(
    lambda x, routed, weights, shared=None, shared_gate=None, adapters=None, rows=None: Spec(
        x.spec.rows, weights.down[0].shape[0], x.spec.dtype
    )
)
def experts(
    x: Tensor,
    routed: Tensor,
    weights: ExpertWeights,
    shared: Tensor | None = None,
    shared_gate: Tensor | None = None,
    adapters: ExpertAdapters | None = None,
    rows: AdapterRows | StepInput | None = None,
) -> Tensor:
    """The weighted sum of the results of each token's experts, and of ``shared``.

    An expert computes ``down(act(gate(x)) * up(x))`` as ``linear`` and ``act_and_mul`` do, or ``down(act(up(x)))``
    without gates, but its result is not rounded. Results times weights are added in float32 (``fma``), those of experts
    in ascending order and then ``shared``, and the sum is rounded once.

    Args:
        x: [tokens, hidden].
        routed: float32 [tokens, experts] as ``route`` returns it: 0 for experts that are not chosen.
        weights: The experts.
        shared: The result of an expert that all tokens have, like the result.
        shared_gate: float32 [tokens, 1]: its sigmoid is the weight of ``shared``; None: 1.
        adapters: Those of the experts. They may change between steps.
        rows: The adapters of the tokens; None: no token has one.

    Returns:
        [tokens, hidden] in the dtype of ``x``; of several ranks, the columns that this one makes.
    """
    chosen = (routed != 0).any(0).nonzero().flatten().tolist()
    tokens_of = [(routed[:, index] != 0).nonzero().flatten() for index in chosen]
    inner_of = []
    for index, tokens in zip(chosen, tokens_of, strict=True):
        selected = _in_order(x[tokens], weights.gate_up_orders, index)
        if weights.scales_input:
            selected = (selected.float() * routed[tokens, index, None]).to(x.dtype)
        up_bias = _of(weights.gate_up_bias, index)
        gate_up = linear(selected, weights.gate_up[index], up_bias)
        for places, adapter in [] if adapters is None else of_rows(adapters.gate_up[index], rows, tokens):
            gate_up[places] = adapted(selected[places], weights.gate_up[index], up_bias, adapter).to(x.dtype)
        inner_of.append(_activated(gate_up, weights))
    if weights.communicator is not None and inner_of:  # all at once
        whole = weights.communicator.all_gather(torch.cat(inner_of), weights.inner_widths)
        inner_of = list(whole.split([len(tokens) for tokens in tokens_of]))
    total = torch.zeros((len(x), weights.down[0].shape[0]), dtype=torch.float32, device=x.device)
    for index, tokens, inner in zip(chosen, tokens_of, inner_of, strict=True):
        weight, down_bias = routed[tokens, index, None], _of(weights.down_bias, index)
        inner = _in_order(inner, weights.down_orders, index)
        out = unrounded(inner, weights.down[index], down_bias)
        for places, adapter in [] if adapters is None else of_rows(adapters.down[index], rows, tokens):
            out[places] = adapted(inner[places], weights.down[index], down_bias, adapter)
        factor = torch.ones_like(weight) if weights.scales_input else weight
        total[tokens] = fma(out, factor, total[tokens])
    if shared is not None:
        factor = torch.ones_like(total[:, :1]) if shared_gate is None else shared_gate.sigmoid()
        total = fma(shared.float(), factor, total)
    return total.to(x.dtype)


def _activated(gate_up: Tensor, weights: ExpertWeights) -> Tensor:
    if weights.activation == "relu2":
        return activation(gate_up, weights.activation)
    return act_and_mul(gate_up, weights.activation)


def _in_order(x: Tensor, orders: tuple[Tensor, ...] | None, index: int) -> Tensor:
    return x if orders is None else x[:, orders[index]]


def _of(biases: tuple[Tensor, ...] | None, index: int) -> Tensor | None:
    return None if biases is None else biases[index]
