"""Weights that no product model has yet, as small as they can be: packed ones, stacked ones, fused ones, ragged ones.

They show what the seams between checkpoints, layers and methods carry. The quantisation ``toy`` packs two numbers of
4 bits into an int8, with a float16 scale for each group of 16; its tables are int8 with a scale per row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from executor.input_batch import InputBatch
from executor.layers.context import ModelContext
from executor.layers.linear import (
    LinearLayer,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    own_columns,
)
from executor.layers.parameter import Part, ShardId, WeightParameter, Weights, single
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import CausalDecoder, DecoderParts
from executor.models.llama import LlamaForCausalLM
from executor.quantization.base import (
    EmbeddingMethod,
    LinearMethod,
    LinearShape,
    Options,
    QuantizationConfig,
    TableShape,
)
from executor.quantization.unquantized import UnquantizedLinear
from ops.dispatch import Spec, op

GROUP = 16

# ---------------------------------------------------------------------------------------------------------
# packed weights


def pack_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds to 4 bits: int8 [out, in / 2], low half first, and float16 scales [out, in / GROUP]."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 7).half()
    codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-8, 7).to(torch.int8).flatten(-2)
    return codes[:, ::2] & 15 | codes[:, 1::2] << 4, scales


def unpack_int4(packed: Tensor, scales: Tensor) -> Tensor:
    """float32 [out, in]: exact."""
    codes = torch.stack([packed << 4 >> 4, packed >> 4], dim=-1).flatten(-2)
    numbers: Tensor = codes.unflatten(-1, (-1, GROUP)) * scales.float().unsqueeze(-1)
    return numbers.flatten(-2)


@op(lambda x, packed, scales, bias: Spec(x.spec.rows, packed.shape[0], x.dtype))
def int4_linear(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """The product with the unpacked weight, rounded to the type of ``x``."""
    return ops.linear(x, ops.pack_linear(unpack_int4(packed, scales).to(x.dtype)), bias)


@op(lambda first, *others: Spec(first.spec.rows, first.width + sum(x.width for x in others), first.dtype))
def side_by_side(first: Tensor, *others: Tensor) -> Tensor:
    return torch.cat([first, *others], dim=-1)


class Int4Weights(Weights):
    """``weight_packed`` and ``weight_scale``, which the op reads as they are stored; ``bias`` or None."""

    bias: nn.Parameter | None

    def __init__(self, shape: LinearShape) -> None:
        super().__init__()

        def parameter(dtype: torch.dtype, *columns: Part) -> WeightParameter:
            parts = {shard_id: (rows, *columns) for shard_id, rows in shape.outputs.items()}
            return WeightParameter.empty(parts, dtype=dtype, device=shape.device)

        self.weight_packed = parameter(torch.int8, shape.input.in_units_of(2))
        self.weight_scale = parameter(torch.float16, shape.input.in_units_of(GROUP))
        self.bias = parameter(shape.dtype) if shape.bias else None

    def pack(self) -> None:
        pass


class Int4Linear:
    def create(self, shape: LinearShape) -> Int4Weights:
        return Int4Weights(shape)

    def apply(self, weights: Int4Weights, x: Tensor, batch: InputBatch) -> Tensor:
        return int4_linear(x, weights.weight_packed.data, weights.weight_scale.data, weights.bias)


class UnmergedWeights(Weights):
    """The weights of each projection of a layer."""

    def __init__(self, projections: Mapping[ShardId, Weights]) -> None:
        super().__init__()
        for shard_id, weights in projections.items():
            self.add_module(str(shard_id), weights)

    def pack(self) -> None:
        pass  # the loader packs each


class UnmergedLinear:
    """A method for each projection, where exceptions name only some."""

    def __init__(self, methods: Sequence[LinearMethod[Any]]) -> None:
        self.methods = methods

    def create(self, shape: LinearShape) -> UnmergedWeights:
        pairs = zip(shape.outputs, self.methods, strict=True)
        return UnmergedWeights({shard_id: method.create(shape.projection(shard_id)) for shard_id, method in pairs})

    def apply(self, weights: UnmergedWeights, x: Tensor, batch: InputBatch) -> Tensor:
        pairs = zip(weights.children(), self.methods, strict=True)
        return side_by_side(*(method.apply(each, x, batch) for each, method in pairs))


def pack_int8(table: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [vocab_size, hidden_size], and float32 scales [vocab_size]."""
    scales = table.float().abs().amax(-1) / 127
    return (table / scales.unsqueeze(-1)).round().to(torch.int8), scales


def unpack_int8(codes: Tensor, scales: Tensor) -> Tensor:
    return codes * scales.unsqueeze(-1)


@op(lambda ids, codes, scales, dtype: Spec(ids.spec.rows, codes.shape[1], dtype))
def int8_embedding(ids: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return unpack_int8(codes[ids], scales[ids]).to(dtype)


@op(lambda hidden, codes, scales: Spec(hidden.spec.rows, codes.shape[0], torch.float32))
def int8_logits(hidden: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return ops.logits(hidden, ops.pack_linear(unpack_int8(codes, scales).to(hidden.dtype)))


class Int8Table(Weights):
    """``weight`` and ``weight_scale``."""

    def __init__(self, shape: TableShape) -> None:
        super().__init__()
        self.dtype = shape.dtype
        self.weight = WeightParameter.empty(single(shape.vocab, shape.hidden), dtype=torch.int8, device=shape.device)
        self.weight_scale = WeightParameter.empty(single(shape.vocab), dtype=torch.float32, device=shape.device)

    def pack(self) -> None:
        pass


class Int8Embedding:
    def create(self, shape: TableShape) -> Int8Table:
        return Int8Table(shape)

    def embed(self, weights: Int8Table, ids: Tensor, batch: InputBatch) -> Tensor:
        return int8_embedding(ids, weights.weight.data, weights.weight_scale.data, weights.dtype)

    def logits(self, weights: Int8Table, hidden: Tensor, batch: InputBatch) -> Tensor:
        return int8_logits(hidden, weights.weight.data, weights.weight_scale.data)


class Toy(QuantizationConfig):
    """``ignore`` lists modules of the checkpoint that are not quantised."""

    def __init__(self, fields: Mapping[str, Any], options: Options) -> None:
        self.ignore = set(fields.get("ignore", []))

    def linear_method(self, names: Sequence[str]) -> LinearMethod[Any]:
        methods = [UnquantizedLinear() if name in self.ignore else Int4Linear() for name in names]
        return methods[0] if len({type(method) for method in methods}) == 1 else UnmergedLinear(methods)

    def embedding_method(self, name: str) -> EmbeddingMethod[Any]:
        return Int8Embedding()


# ---------------------------------------------------------------------------------------------------------
# stacked experts


@op(lambda scores, count: (Spec(scores.spec.rows, count, torch.float32), Spec(scores.spec.rows, count, torch.int64)))
def top_experts(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Each row's ``count`` experts: shares that add up to 1, and which they are."""
    values, ids = scores.float().softmax(-1).topk(count, dim=-1)
    return values / values.sum(-1, keepdim=True), ids


@op(lambda x, shares, ids, gate_up, down: x.spec)
def mixed_experts(x: Tensor, shares: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """``gate_up`` [num_experts, 2 * inner, hidden], ``down`` [num_experts, hidden, inner]."""
    out = torch.zeros_like(x)
    for expert in range(len(down)):
        rows, place = (ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[rows], gate_up[expert]).chunk(2, dim=-1)
        out[rows] += F.linear(F.silu(gate) * up, down[expert]) * shares[rows, place, None].to(x.dtype)
    return out


class Stack(Weights):
    """``weight`` [num_experts, out, in]; the checkpoint has a tensor for each expert and projection."""

    def __init__(self, context: ModelContext, num_experts: int, outputs: Mapping[str, Part], columns: Part) -> None:
        super().__init__()
        parts: dict[ShardId, tuple[Part, ...]] = {
            f"experts.{index}.{name}": (Part.element(index), rows, columns)
            for index in range(num_experts)
            for name, rows in outputs.items()
        }
        self.weight = WeightParameter.empty(parts, dtype=context.dtype, device=context.device)

    def pack(self) -> None:
        pass


class Experts(nn.Module):
    def __init__(self, context: ModelContext, num_experts: int) -> None:
        super().__init__()
        hidden, inner = Part.whole(context.config.hidden_size), context.config.intermediate_size
        gate = own_columns(context, inner, "experts")
        up = gate.moved(gate.size)
        self.gate_up = Stack(context, num_experts, {"w1": gate, "w3": up}, hidden)
        self.down = Stack(context, num_experts, {"w2": hidden}, gate)


class SparseMLP(nn.Module):
    """As in Mixtral."""

    def __init__(self, context: ModelContext, prefix: str) -> None:
        super().__init__()
        num_experts = context.config.integer("num_local_experts")
        self.top_k = context.config.integer("num_experts_per_tok")
        self.gate = ReplicatedLinear(context, context.config.hidden_size, num_experts, prefix=f"{prefix}.gate")
        self.experts = Experts(context, num_experts)

    def forward(self, x: Tensor, batch: InputBatch) -> Tensor:
        shares, ids = top_experts(self.gate(x, batch), self.top_k)
        return mixed_experts(x, shares, ids, self.experts.gate_up.weight.data, self.experts.down.weight.data)


class ToyMixtral(CausalDecoder):
    config_defaults = LlamaForCausalLM.config_defaults

    def __init__(self, context: ModelContext) -> None:
        rotary = RotaryEmbedding(context)
        parts = DecoderParts(
            attention=lambda index, prefix: SelfAttention(context, rotary, prefix=prefix),
            mlp=lambda index, prefix: SparseMLP(context, prefix),
        )
        super().__init__(context, parts)


# ---------------------------------------------------------------------------------------------------------
# fused and ragged projections


def layers_of(model: LlamaForCausalLM) -> list[Any]:
    return list(model.model.layers)


class ToyPhi3(LlamaForCausalLM):
    """One tensor of the checkpoint has q, k and v, another one gate and up."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__(context)
        config = context.config
        heads, kv_heads, inner = config.num_heads, config.num_kv_heads, config.intermediate_size
        for index, layer in enumerate(layers_of(self)):
            prefix = f"model.layers.{index}"
            layer.self_attn.qkv_proj = QKVParallelLinear(
                context,
                config.hidden_size,
                config.head_dim,
                heads,
                kv_heads,
                names=None,
                prefix=f"{prefix}.self_attn.qkv_proj",
            )
            layer.mlp.gate_up_proj = MergedColumnParallelLinear(
                context, config.hidden_size, [inner, inner], prefix=f"{prefix}.mlp.gate_up_proj"
            )


class ToyRenamed(LlamaForCausalLM):
    """Llama under other names (GPT-2's), with q, k and v by head (GPT-NeoX's) and transposed down projections."""

    attribute_map = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer"}
    mapper = WeightsMapper(
        renames=[(r"^transformer\.h\.", "model.layers."), (r"^transformer\.", "model."), (r"\.attn\.", ".self_attn.")],
        ignored=[r"\.masks?$", r"^model\.layers\.[3-9]\."],
        transforms={r"\.down_proj\.weight$": Tensor.t},
    )

    def __init__(self, context: ModelContext) -> None:
        super().__init__(context)
        config = context.config
        for index, layer in enumerate(layers_of(self)):
            layer.self_attn.qkv_proj = QKVParallelLinear(
                context,
                config.hidden_size,
                config.head_dim,
                config.num_heads,
                config.num_kv_heads,
                names=None,
                is_grouped=True,
                prefix=f"model.layers.{index}.self_attn.qkv_proj",
            )


RAGGED = [(0, 64), (64, 96)]
"""Where the shares of two ranks begin and end, of 96."""


class ToyRagged(LlamaForCausalLM):
    """Its MLPs are split over two ranks, two to one."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__(context)
        hidden = Part.whole(context.config.hidden_size)
        start, end = RAGGED[context.parallel.tp_rank]
        size = end - start
        for index, layer in enumerate(layers_of(self)):
            prefix = f"model.layers.{index}.mlp"
            rows: dict[ShardId, Part] = {
                "gate_proj": Part.piece(96, start, size),
                "up_proj": Part.piece(96, start, size, offset=size),
            }
            layer.mlp.gate_up_proj = LinearLayer(context, hidden, rows, bias=False, prefix=f"{prefix}.gate_up_proj")
            columns = Part.piece(96, start, size)
            layer.mlp.down_proj = LinearLayer(
                context, columns, {None: hidden}, bias=False, prefix=f"{prefix}.down_proj"
            )
