"""Mixtures of experts: routing, and the sum of the experts' results."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from ops import ExpertWeights, GatedActivation, Routing, SwiGLUOAI
from tests.ops.cpu import randn, using

TOKENS, HIDDEN, INNER, EXPERTS = 7, 40, 24, 6


def routed_by_hand(logits: Tensor, routing: Routing, bias: Tensor | None = None) -> Tensor:
    """Token by token, with Python's sort."""
    result = torch.zeros_like(logits)
    for token, row in enumerate(logits):
        scores = row.softmax(0) if routing.scores == "softmax" else row.sigmoid()
        choice = (scores if bias is None else scores + bias).tolist()
        size = len(choice) // routing.num_groups
        groups = [choice[i : i + size] for i in range(0, len(choice), size)]
        best = sorted(range(len(groups)), key=lambda i: -sum(sorted(groups[i])[-routing.group_best :]))[
            : routing.top_groups
        ]
        among = [i for i in range(len(choice)) if i // size in best]
        chosen = sorted(among, key=lambda i: -choice[i])[: routing.top_k]  # sorted is stable: lower ids come first
        weights = scores[chosen]
        if routing.normalize:
            weights = weights / weights.sum()
        result[token, chosen] = weights * routing.factor
    return result


ROUTINGS = [
    pytest.param(Routing(2), False, id="softmax"),
    pytest.param(Routing(3, normalize=True), False, id="softmax, normalised"),
    pytest.param(Routing(1, "sigmoid"), False, id="one sigmoid"),
    pytest.param(Routing(3, "sigmoid", normalize=True, factor=2.5), True, id="corrected sigmoids"),
    pytest.param(Routing(2, "sigmoid", normalize=True, num_groups=4, top_groups=2), True, id="groups"),
    pytest.param(Routing(2, num_groups=4, top_groups=1, factor=1.5), False, id="groups of softmax"),
    pytest.param(Routing(2, num_groups=4, top_groups=2, group_best=1), False, id="groups by their best"),
    pytest.param(Routing(8, normalize=True), False, id="all"),
]


@pytest.mark.parametrize("op_set", ["reference", "cpu"])
@pytest.mark.parametrize(("routing", "is_corrected"), ROUTINGS)
def test_route(routing: Routing, is_corrected: bool, op_set: str) -> None:
    logits = 2 * randn(50, 8)
    bias = randn(8, seed=1) if is_corrected else None
    with using(op_set):
        found = ops.route(logits, routing, bias)
    torch.testing.assert_close(found, routed_by_hand(logits, routing, bias), rtol=1e-5, atol=1e-6)
    assert ((found != 0).sum(-1) == routing.top_k).all()


@pytest.mark.parametrize("op_set", ["reference", "cpu"])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid", "sparsemixer"])
def test_of_equal_experts_the_lower_ids_are_chosen(scores: str, op_set: str) -> None:
    logits = torch.tensor([[0.5] * 8, [0.0, 1, 1, 0, 1, 0, 1, 1], [2.0, 2, 3, 2, 2, 2, 2, 2]])
    with using(op_set):
        found = ops.route(logits, Routing(2, scores, jitter=0.1))  # type: ignore[arg-type]
    assert [row.nonzero().flatten().tolist() for row in found] == [[0, 1], [1, 2], [0, 2]]


@pytest.mark.parametrize("op_set", ["reference", "cpu"])
def test_sparsemixer_has_the_weights_of_transformers(op_set: str) -> None:
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    logits = randn(50, 8)
    weights, chosen = sparsemixer(logits, 0.2, False)
    expected = torch.zeros_like(logits).scatter(-1, chosen, weights)
    factors = randn(8, seed=1)
    with using(op_set):
        torch.testing.assert_close(ops.route(logits, Routing(2, "sparsemixer", jitter=0.2)), expected)
        found = ops.route(logits, Routing(2, "sparsemixer", factor=0.5, jitter=0.2), None, factors)
    torch.testing.assert_close(found, expected * 0.5 * factors)


def routed_tokens(kind: str, tokens: int = TOKENS) -> Tensor:
    """Weights of experts: two for each token, the same two for all, one for all, or some tokens without any."""
    logits = randn(tokens, EXPERTS, seed=5)
    if kind == "the same":
        logits = logits[:1].expand(tokens, -1)
    elif kind == "one":
        return F.one_hot(torch.full((tokens,), 4), EXPERTS) * 0.75
    routed = ops.route(logits.contiguous(), Routing(2, normalize=True))
    if kind == "none":
        routed[::2] = 0
    return routed


@pytest.mark.parametrize("kind", ["two", "the same", "one", "none"])
@pytest.mark.parametrize("scales_input", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", SwiGLUOAI(1.5, 1.0)], ids=str)
def test_experts(kind: str, scales_input: bool, has_bias: bool, activation: GatedActivation) -> None:
    x, routed = randn(TOKENS, HIDDEN), routed_tokens(kind)
    gate_up = [randn(2 * INNER, HIDDEN, seed=10 + index) for index in range(EXPERTS)]
    down = [randn(HIDDEN, INNER, seed=20 + index) for index in range(EXPERTS)]
    biases = [randn(2 * INNER, seed=30 + index) for index in range(EXPERTS)]
    down_biases = [randn(HIDDEN, seed=40 + index) for index in range(EXPERTS)]
    shared, gate = randn(TOKENS, HIDDEN, seed=2), randn(TOKENS, 1, seed=3)
    expected = shared.double() * gate.double().sigmoid()
    for token in range(TOKENS):
        for index in range(EXPERTS):
            weight = float(routed[token, index])
            if weight == 0:
                continue
            row = x[token].double() * (weight if scales_input else 1)
            inner = gate_up[index].double() @ row + (biases[index] if has_bias else 0)
            gated = F.silu(inner[:INNER]) * inner[INNER:]
            if activation != "silu":
                low, up = inner[:INNER].clamp(max=1), inner[INNER:].clamp(-1, 1)
                gated = (up + 1) * low / (1 + (-1.5 * low).exp())
            out = down[index].double() @ gated
            expected[token] += (out + (down_biases[index] if has_bias else 0)) * (1 if scales_input else weight)
    weights = ExpertWeights(
        tuple(ops.pack_linear(weight, paired=True) for weight in gate_up),
        tuple(map(ops.pack_linear, down)),
        tuple(biases) if has_bias else None,
        tuple(down_biases) if has_bias else None,
        activation,
        2,
        scales_input,
    )
    found = ops.experts(x, routed.float(), weights, shared, gate)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    without = ops.experts(x, routed.float(), weights)
    torch.testing.assert_close(without.double(), expected - shared * gate.sigmoid(), rtol=1e-4, atol=1e-4)
