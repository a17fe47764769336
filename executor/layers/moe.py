"""Mixtures of experts: an MLP of which each token uses a few parts, chosen by a router (Shazeer et al.,
arXiv:1701.06538)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

import ops
from executor.base import ModelError
from executor.hf_config import HFConfig
from executor.input_batch import InputBatch
from executor.layers.context import ModelContext
from executor.layers.linear import LinearLayer, MergedColumnParallelLinear, RowParallelLinear
from executor.layers.mlp import GATED_ACTIVATIONS, GatedMLP
from executor.layers.parameter import Part, WeightParameter, single
from executor.parallel import Share, split_evenly
from executor.quantization import choose_quantization
from executor.quantization.base import LinearShape
from ops import Routing

ExpertActivation = ops.GatedActivation | Literal["relu2"]
MAX_EXPERTS = 4096
"""Of a layer."""


def routing_of(config: HFConfig, num_experts: int, routing: Routing) -> Routing:
    """The routing, once it is checked against the number of experts.

    Raises:
        ModelError: The experts do not suffice, or do not form the groups.
    """
    if num_experts % routing.num_groups:
        config.bad("n_group", f"a divisor of the number of experts, {num_experts}")
    if routing.top_groups > routing.num_groups:
        config.bad("topk_group", f"at most n_group, {routing.num_groups}")
    if routing.top_k > num_experts // routing.num_groups * routing.top_groups:
        config.bad("num_experts_per_tok", f"at most the number of experts to choose from, of {num_experts}")
    return routing


class SmallLinear(nn.Module):
    """A product with float32 results, which say how much of other layers counts. Its weights are never quantised while
    they are loaded."""

    def __init__(self, context: ModelContext, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        columns, rows = Part.whole(context.config.hidden_size), Part.whole(out_features)
        self.shape = LinearShape(columns, {None: rows}, bias, False, context.dtype, context.device)
        self.weights = choose_quantization(None, None).linear_method(["gate"]).create(self.shape)
        if context.max_adapters:
            self.weights.adapters = ops.AdapterTable(context.max_adapters, context.device)

    def logits(self, x: Tensor, batch: InputBatch) -> Tensor:
        """``x`` [num_tokens, hidden_size] -> float32 [num_tokens, out_features]."""
        weights = self.weights
        if weights.adapters is not None:
            return ops.adapted_logits(x, weights.packed, weights.bias, weights.adapters, batch.row_adapters)
        return ops.logits(x, weights.packed, weights.bias)


class Router(SmallLinear):
    """Chooses the experts of a token."""

    def __init__(
        self,
        context: ModelContext,
        routing: Routing,
        num_experts: int,
        *,
        bias: bool = False,
        is_corrected: bool = False,
        has_factors: bool = False,
    ) -> None:
        """Creates the layer.

        Args:
            context: The model's construction context.
            routing: How experts are chosen.
            num_experts: Experts of the layer.
            bias: Whether logits have a bias.
            is_corrected: Whether scores have a bias that counts for the choice alone.
            has_factors: Whether the weights of each expert have a factor.
        """
        super().__init__(context, num_experts, bias=bias)
        self.routing = routing

        def vector() -> WeightParameter:
            rows = Part.whole(num_experts)
            return WeightParameter.empty(single(rows), dtype=torch.float32, device=context.device)

        self.e_score_correction_bias = vector() if is_corrected else None
        self.per_expert_scale = vector() if has_factors else None

    def forward(self, x: Tensor, batch: InputBatch) -> Tensor:
        """``x`` [num_tokens, hidden_size] -> float32 [num_tokens, num_experts], as ``ops.route`` returns it."""
        return ops.route(self.logits(x, batch), self.routing, self.e_score_correction_bias, self.per_expert_scale)


class RowGate(SmallLinear):
    """A number for each token."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__(context, 1)

    def forward(self, x: Tensor, batch: InputBatch) -> Tensor:
        """``x`` [num_tokens, hidden_size] -> float32 [num_tokens, 1]."""
        return self.logits(x, batch)


class Expert(nn.Module):
    """The weights of one expert, an MLP of which each rank has a share. Without a gate ``gate_up_proj`` is up alone."""

    def __init__(
        self, context: ModelContext, hidden: int, inner: int, *, bias: bool, is_gated: bool, prefix: str
    ) -> None:
        super().__init__()
        parts = {"gate_proj": inner, "up_proj": inner} if is_gated else {"up_proj": inner}
        self.gate_up_proj = MergedColumnParallelLinear(
            context, hidden, parts, bias=bias, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            context, inner, hidden, bias=bias, is_summed=False, prefix=f"{prefix}.down_proj"
        )


MakeShared = Callable[[int, str], nn.Module]
"""Makes the expert that all tokens share: takes its intermediate size and its name. Its user sums over ranks."""


class MoE(nn.Module):
    """A router and its experts, and maybe an expert that all tokens share."""

    _adapters: ops.ExpertAdapters | None = None

    def __init__(
        self,
        context: ModelContext,
        routing: Routing,
        num_experts: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        router_bias: bool = False,
        is_corrected: bool = False,
        scales_input: bool = False,
        activation: ExpertActivation | None = None,
        hidden_size: int | None = None,
        shared: tuple[str, int] | None = None,
        shared_gate: str | None = None,
        make_shared: MakeShared | None = None,
        prefix: str,
    ) -> None:
        """Creates the layer. Its parts are named ``gate`` and ``experts``.

        Args:
            context: The model's construction context.
            routing: How experts are chosen.
            num_experts: Experts of the layer.
            intermediate_size: Columns of gate and of up of each.
            bias: Whether their projections have biases.
            router_bias: Whether the router has a bias.
            is_corrected: Whether the router has a bias that counts for the choice alone.
            scales_input: Weights of experts multiply their inputs.
            activation: Of the experts; relu2: they have no gates. Default: ``hidden_act`` of the configuration.
            hidden_size: Columns of the experts' inputs. Default: those of the router's.
            shared: Name and intermediate size of the expert that all tokens share.
            shared_gate: Name of the projection whose sigmoid is the shared expert's weight.
            make_shared: Makes the shared expert. Default: a gated MLP.
            prefix: The layer's name in the model.
        """
        super().__init__()
        config = context.config
        if num_experts > MAX_EXPERTS:
            raise ValueError(f"{prefix}: {num_experts} experts are more than {MAX_EXPERTS}")
        self.routing = routing_of(config, num_experts, routing)
        chosen = config.choice("hidden_act", GATED_ACTIVATIONS) if activation is None else activation
        self.activation: ExpertActivation = chosen
        self.scales_input, self.communicator = scales_input, context.communicator
        self.gate = Router(context, self.routing, num_experts, bias=router_bias, is_corrected=is_corrected)
        sizes, is_gated = (hidden_size or config.hidden_size, intermediate_size), self.activation != "relu2"
        self.num_experts = num_experts
        self.own_experts = _own_experts(context, num_experts)  # if ranks have whole ones
        of_expert = context if self.own_experts is None else context.alone()
        self.experts = nn.ModuleDict()
        for index in map(str, range(num_experts)):
            name = f"{prefix}.experts.{index}"
            self.experts[index] = Expert(of_expert, *sizes, bias=bias, is_gated=is_gated, prefix=name)
        self._shared, self._shared_gate = shared and shared[0], shared_gate
        if shared is not None:
            make = make_shared or (lambda size, prefix: GatedMLP(context, size, is_summed=False, prefix=prefix))
            self.add_module(shared[0], make(shared[1], f"{prefix}.{shared[0]}"))
        if shared_gate is not None:
            self.add_module(shared_gate, RowGate(context))
        self._weights: ops.ExpertWeights | None = None

    def forward(self, x: Tensor, batch: InputBatch, routed: Tensor | None = None) -> Tensor:
        """Applies the experts.

        Args:
            x: [num_tokens, hidden_size].
            batch: The step.
            routed: What ``gate`` returns, if it has read something else than ``x``.

        Returns:
            [num_tokens, hidden_size].
        """
        shared = self.get_submodule(self._shared)(x, batch) if self._shared else None
        gate = self.get_submodule(self._shared_gate)(x, batch) if self._shared_gate else None
        routed = self.gate(x, batch) if routed is None else routed
        own = self.apply_experts(x, batch, routed, shared, gate)
        if self.communicator.cuts_sums:
            return ops.all_reduce(own, self.communicator)
        return ops.all_gather(own, self.communicator, self._first_down().output_widths)

    def apply_experts(
        self, x: Tensor, batch: InputBatch, routed: Tensor, shared: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        """What the experts of this rank yield for ``x``, with the adapters of its rows. See ``ops.experts``."""
        if self.own_experts is not None:
            before, own = self.own_experts.start, self.own_experts.size
            sizes = [before, own, self.num_experts - before - own]
            routed = routed.split([size for size in sizes if size], -1)[before > 0]
        adapters = self.adapters()
        if adapters is None:
            return ops.experts(x, routed, self.weights(), shared, gate)
        return ops.experts(x, routed, self.weights(), shared, gate, adapters, batch.row_adapters)

    def _first_down(self) -> RowParallelLinear:
        """The last product of an expert, which ranks share in the same way in all."""
        down = self._experts()[0].get_submodule("down_proj")
        assert isinstance(down, RowParallelLinear)
        return down

    def _experts(self) -> list[nn.Module]:
        """Those of this rank, in order."""
        return list(self.experts.values())

    def keep_own(self) -> None:
        """Forgets the experts that other ranks have."""
        if self.own_experts is not None:
            own = range(self.own_experts.start, self.own_experts.end)
            self.experts = nn.ModuleDict({str(index): self.experts[str(index)] for index in own})

    def adapters(self) -> ops.ExpertAdapters | None:
        """The adapters of the experts, if there can be any."""
        if self._adapters is None:
            gate_up, down = (
                adapter_tables([expert.get_submodule(name) for expert in self._experts()])
                for name in ("gate_up_proj", "down_proj")
            )
            self._adapters = ops.ExpertAdapters(gate_up, down) if gate_up and down else None
        return self._adapters

    def weights(self) -> ops.ExpertWeights:
        """The packed weights of the experts."""
        if self._weights is None:
            names = ("gate_up_proj", "down_proj")
            layers = [[expert.get_submodule(name) for expert in self._experts()] for name in names]
            (gate_up, gate_up_bias), (down, down_bias) = map(packed, layers)
            activation, top_k = self.activation, min(self.routing.top_k, len(self.experts))
            weights = ops.ExpertWeights(gate_up, down, gate_up_bias, down_bias, activation, top_k, self.scales_input)
            first, second = map(orders, layers)
            weights = replace(weights, gate_up_orders=first, down_orders=second)
            self._weights = self._shared_by_ranks(weights)
        return self._weights

    def _shared_by_ranks(self, weights: ops.ExpertWeights) -> ops.ExpertWeights:
        if self.communicator.size == 1 or self.communicator.cuts_sums:
            return weights
        if weights.has_orders:
            raise ModelError(
                "--tensor-parallel-size: workers cannot share experts that GPTQ quantised with desc_act; use 1"
            )
        if weights.is_gated and any(not isinstance(each, Tensor) and not each.paired for each in weights.gate_up):
            raise ModelError(
                "--tensor-parallel-size: workers cannot share experts whose gates and ups are stored in different "
                "formats; use 1"
            )
        return replace(weights, communicator=self.communicator, inner_widths=self._first_down().input_widths)


def _own_experts(context: ModelContext, num_experts: int) -> Share | None:
    """The experts of a rank, if ranks have whole ones; None: each has a part of every expert.

    Raises:
        ModelError: There are too few, or ranks do not add their results.
    """
    size = context.communicator.size
    if size == 1 or not context.parallel.expert_parallel:
        return None
    if not context.communicator.cuts_sums:
        raise ModelError(
            "--enable-expert-parallel: workers on CPUs divide every expert, which keeps them equally busy; omit it"
        )
    if num_experts < size:
        raise ModelError(
            f"--enable-expert-parallel: {num_experts} experts are too few for {size} workers; use "
            f"--tensor-parallel-size {num_experts} or less, or omit it"
        )
    return split_evenly(num_experts, size)[context.communicator.rank]


def adapter_tables(layers: list[nn.Module]) -> tuple[ops.AdapterTable, ...]:
    """The adapters of the same projection of all experts; empty: there can be none."""
    tables = [layer.weights.adapters for layer in layers if isinstance(layer, LinearLayer)]
    return tuple(table for table in tables if table is not None)


def packed(layers: list[nn.Module]) -> tuple[tuple[ops.Weight, ...], tuple[Tensor, ...] | None]:
    """The weights and biases of the same projection of all experts."""
    weights, biases = [], []
    for layer in layers:
        assert isinstance(layer, LinearLayer)
        weights.append(layer.weights.packed)
        if layer.weights.bias is not None:
            biases.append(layer.weights.bias.data)
    return tuple(weights), tuple(biases) or None


def orders(layers: list[nn.Module]) -> tuple[Tensor, ...] | None:
    """The orders of the columns of the same projection of all experts; None: all are as in the checkpoint."""
    weights = [layer.weights for layer in layers if isinstance(layer, LinearLayer)]
    first = next((each.order for each in weights if each.order is not None), None)
    if first is None:
        return None
    natural = torch.arange(len(first), device=first.device)
    return tuple(natural if each.order is None else each.order for each in weights)


def sparse_layers(config: HFConfig) -> list[bool]:
    """Whether each layer has experts: of Qwen's models every ``decoder_sparse_step``-th does, except
    ``mlp_only_layers``."""
    dense = {int(index) for index in config.numbers("mlp_only_layers")} if config.has("mlp_only_layers") else set()
    step = config.size("decoder_sparse_step")
    return [index not in dense and (index + 1) % step == 0 for index in range(config.num_layers)]
