"""Gemma 4, its text models (E2B, E4B, 26B-A4B, 31B).

Two kinds of layers, with heads of two sizes; the last layers read K and V of earlier ones; each layer gets an embedding
of the token of its own, or experts beside its MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ops
from executor.hf_config import HFConfig
from executor.input_batch import InputBatch
from executor.layers.attention import Attention, SharedAttention
from executor.layers.context import ModelContext
from executor.layers.embedding import VocabParallelEmbedding
from executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    head_columns,
)
from executor.layers.mlp import GATED_ACTIVATIONS, GatedMLP
from executor.layers.moe import MoE, Router
from executor.layers.norm import RMSNorm
from executor.layers.parameter import Part, WeightParameter, single
from executor.layers.rotary import RotaryEmbedding
from executor.models.base import Model, WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, Decoder, DecoderLayer, DecoderParts
from executor.models.gemma2 import FULL, SANDWICH, SLIDING, embedding_scale, optional
from executor.weights_mapper import STACKS
from ops import AttentionShape, Routing


def gemma4_norm(context: ModelContext, size: int, *, weight: bool = True) -> RMSNorm:
    """``x / rms(x) * weight``, rounded once."""
    return RMSNorm(context, size, context.config.rms_norm_eps, weight=weight, round_first=False)


def layer_sizes(config: HFConfig, index: int, kind: str) -> tuple[int, int]:
    """Head size and KV heads of a layer: those of global layers differ."""
    own = config.section("per_layer_config").section(str(index))
    if config.has("per_layer_config") or kind == SLIDING:
        return own.size("head_dim", config.head_dim), own.size("num_key_value_heads", config.num_kv_heads)
    kv_heads = config.num_kv_heads
    if config.boolean("attention_k_eq_v"):
        kv_heads = config.size("num_global_key_value_heads", kv_heads)
    return config.size("global_head_dim"), kv_heads


class Gemma4Attention(nn.Module):
    """Attention without a factor of the scores, and with norms of q, k and v."""

    def __init__(
        self,
        context: ModelContext,
        rotary: RotaryEmbedding,
        index: int,
        kind: str,
        source: Attention | None,
        prefix: str,
    ) -> None:
        """Creates the layer.

        Args:
            context: The model's construction context.
            rotary: Of this type of layer.
            index: The layer's.
            kind: Its type.
            source: An earlier layer of this type, whose K and V are read; None: the layer has its own.
            prefix: The layer's name in the model.
        """
        super().__init__()
        config = context.config
        hidden, heads, bias = config.hidden_size, config.num_heads, config.boolean("attention_bias")
        head_dim, kv_heads = layer_sizes(config, index, kind)
        columns = head_columns(heads, kv_heads, head_dim, context.parallel.tp_size)
        window = config.size("sliding_window") if kind == SLIDING else None
        self.rotary = rotary
        self.q_norm = gemma4_norm(context, head_dim)
        self.attn: Attention | SharedAttention
        if source is not None:
            self.q_proj = ColumnParallelLinear(
                context, hidden, heads * head_dim, bias=bias, shares=columns, prefix=f"{prefix}.q_proj"
            )
            self.attn = SharedAttention(source)
        else:
            k_is_v = config.boolean("attention_k_eq_v") and kind == FULL
            names = ("q_proj", "k_proj") if k_is_v else ("q_proj", "k_proj", "v_proj")
            self.qkv_proj = QKVParallelLinear(
                context, hidden, head_dim, heads, kv_heads, bias=bias, names=names, prefix=f"{prefix}.qkv_proj"
            )
            self.k_norm, self.v_norm = gemma4_norm(context, head_dim), gemma4_norm(context, head_dim, weight=False)
            shape = AttentionShape(heads, kv_heads, head_dim, scale=1.0, sliding_window=window)
            self.attn = Attention(context, shape)
        self.o_proj = RowParallelLinear(
            context, heads * head_dim, hidden, bias=bias, input_shares=columns, prefix=f"{prefix}.o_proj"
        )

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        """``hidden`` [num_tokens, hidden_size] -> the same."""
        if isinstance(self.attn, SharedAttention):
            q = self.rotary.rotate(batch.positions, self.q_norm(self.q_proj(hidden, batch)))
            attended = self.attn(q, batch=batch)
        else:
            q, k, *others = self.qkv_proj(hidden, batch).split(self.qkv_proj.output_sizes, dim=-1)
            v = self.v_norm(others[0] if others else k)
            q, k = self.rotary(batch.positions, self.q_norm(q), self.k_norm(k))
            attended = self.attn(q, k, v, batch=batch)
        out: Tensor = self.o_proj(attended, batch)
        return out


class Gemma4Router(Router):
    """A router that normalises what it reads."""

    def __init__(self, context: ModelContext, routing: Routing, num_experts: int) -> None:
        super().__init__(context, routing, num_experts, has_factors=True)
        self.norm = gemma4_norm(context, context.config.hidden_size)
        self.factor = context.config.hidden_size**-0.5

    def forward(self, x: Tensor, batch: InputBatch) -> Tensor:
        return super().forward(ops.scale(self.norm(x), self.factor), batch)


class Gemma4Layer(DecoderLayer):
    """The sandwich, maybe with experts beside its MLP; then the token's embedding for this layer, gated by the hidden
    states; a factor of the sum."""

    def complete(self, context: ModelContext, prefix: str) -> None:
        """Adds the modules of the last two."""
        config = context.config
        hidden, inner = config.hidden_size, config.integer("hidden_size_per_layer_input")
        self.layer_scalar = WeightParameter.empty(single(Part.whole(1)), dtype=context.dtype, device=context.device)
        self.has_input = inner > 0
        if self.has_input:
            self.activation = config.choice("hidden_act", GATED_ACTIVATIONS)
            gate, projection = f"{prefix}.per_layer_input_gate", f"{prefix}.per_layer_projection"
            self.per_layer_input_gate = ReplicatedLinear(context, hidden, inner, prefix=gate)
            self.per_layer_projection = ReplicatedLinear(context, inner, hidden, prefix=projection)
            self.post_per_layer_input_norm = gemma4_norm(context, hidden)
        self.moe: MoE | None = None
        if config.boolean("enable_moe_block"):
            routing, experts = Routing(config.size("top_k_experts"), normalize=True), config.size("num_experts")
            self.moe = MoE(context, routing, experts, config.size("moe_intermediate_size"), prefix=f"{prefix}.moe")
            self.moe.gate = Gemma4Router(context, self.moe.routing, experts)
            self.pre_feedforward_layernorm_2 = gemma4_norm(context, hidden)
            self.post_feedforward_layernorm_1 = gemma4_norm(context, hidden)
            self.post_feedforward_layernorm_2 = gemma4_norm(context, hidden)

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        if self.moe is None:
            return super().forward(hidden, batch)
        names = self._names
        out = self.self_attn(self.norm(names.before_attention, hidden), batch)
        hidden = self.add(hidden, self.norm(names.after_attention, out))
        out = self.post_feedforward_layernorm_1(self.mlp(self.norm(names.before_mlp, hidden), batch))
        others = self.moe(self.pre_feedforward_layernorm_2(hidden), batch, self.moe.gate(hidden, batch))
        return self.add(hidden, self.norm(names.after_mlp, out + self.post_feedforward_layernorm_2(others)))

    def finish(self, hidden: Tensor, batch: InputBatch, layer_input: Tensor | None) -> Tensor:
        """Both, after ``forward``. ``layer_input`` [num_tokens, hidden_size_per_layer_input]."""
        if layer_input is not None:
            gate = ops.activation(self.per_layer_input_gate(hidden, batch), self.activation)
            out = self.per_layer_projection(ops.multiply(gate, layer_input), batch)
            hidden = hidden + self.post_per_layer_input_norm(out)
        return ops.scale(hidden, self.layer_scalar.item())


class Gemma4Decoder(Decoder):
    """Embeds each token once for all layers, and once for each."""

    def __init__(self, context: ModelContext, parts: DecoderParts, *, prefix: str) -> None:
        super().__init__(context, parts, prefix=prefix)
        config = context.config
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Gemma4Layer)
            layer.complete(context, f"{prefix}.layers.{index}")
        self.inner = config.integer("hidden_size_per_layer_input")
        if self.inner:
            width = self.inner * config.num_layers
            if config.size("vocab_size_per_layer_input", config.vocab_size) != config.vocab_size:
                config.bad("vocab_size_per_layer_input", f"vocab_size ({config.vocab_size})")
            table, projection = f"{prefix}.embed_tokens_per_layer", f"{prefix}.per_layer_model_projection"
            self.embed_tokens_per_layer = VocabParallelEmbedding(context, width, prefix=table)
            self.per_layer_model_projection = ReplicatedLinear(context, config.hidden_size, width, prefix=projection)
            self.per_layer_projection_norm = gemma4_norm(context, self.inner)
            self.factors = (torch.tensor(self.inner**0.5).to(context.dtype).item(), config.hidden_size**-0.5)

    def forward(self, batch: InputBatch, hidden: Tensor | None, noted: dict[int, Tensor] | None = None) -> Tensor:
        assert hidden is None and self.norm is not None
        hidden = self.embed(batch)
        self.note(hidden, 0, noted)
        inputs = self.layer_inputs(batch, hidden)
        for index, (layer, layer_input) in enumerate(zip(self.layers, inputs, strict=True)):
            assert isinstance(layer, Gemma4Layer)
            hidden = layer.finish(layer(hidden, batch), batch, layer_input)
            self.note(hidden, index + 1, noted)
        out: Tensor = self.norm(hidden)
        return out

    def layer_inputs(self, batch: InputBatch, hidden: Tensor) -> list[Tensor | None]:
        """[num_tokens, hidden_size_per_layer_input] for each layer: from the token and its embedding."""
        if not self.inner:
            return [None] * len(self.layers)
        of_token, of_embedding = self.factors
        tokens = ops.scale(self.embed_tokens_per_layer(batch.input_ids, batch), of_token)
        context = ops.scale(self.per_layer_model_projection(hidden, batch), of_embedding)
        inputs = ops.scale(self.per_layer_projection_norm(context) + tokens, 2**-0.5)
        return list(inputs.split([self.inner] * len(self.layers), dim=-1))


class Gemma4ForCausalLM(CausalDecoder):
    layer_bytes = Model.layer_bytes  # layers read K and V of earlier ones, and an embedding of the token
    decoder = Gemma4Decoder
    attribute_map = {"hidden_act": "hidden_activation"}
    mapper = WeightsMapper(
        renames=[
            (r"(\.layers\.\d+)\.experts\.", r"\1.moe.experts."),
            (r"\.router\.proj\.", ".moe.gate."),
            (r"\.router\.scale$", ".moe.gate.norm.weight"),
            (r"\.router\.", ".moe.gate."),
        ],
        ignored=[ROTARY_BUFFERS, r"self_attn\.[kv]_(proj|norm)\.weight$"],
        stacks=STACKS,
    )
    config_defaults = {
        "attention_bias": False,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "eos_token_id": 1,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 256,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "num_kv_shared_layers": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        },
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "use_double_wide_mlp": False,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        if config.get("use_bidirectional_attention") == "all":
            config.bad("use_bidirectional_attention", "null or 'vision': an encoder cannot generate text")
        last = config.num_layers - 1
        types = config.layer_types(FULL, SLIDING, default=lambda i: SLIDING if (i + 1) % 6 and i < last else FULL)
        num_own = config.num_layers - config.integer("num_kv_shared_layers")
        if num_own < 1 or set(types[:num_own]) != set(types):
            config.bad("num_kv_shared_layers", "a number that leaves a layer of each type with K and V of its own")
        ropes = {kind: config.rope_for(kind) for kind in set(types)}
        rotary = {
            kind: RotaryEmbedding(context, rope, head_dim=layer_sizes(config, types.index(kind), kind)[0])
            for kind, rope in ropes.items()
        }
        own: dict[str, Attention] = {}

        def attention(index: int, prefix: str) -> Gemma4Attention:
            kind = types[index]
            source = own[kind] if index >= num_own else None
            layer = Gemma4Attention(context, rotary[kind], index, kind, source, prefix)
            if isinstance(layer.attn, Attention):
                own[kind] = layer.attn
            return layer

        def mlp(index: int, prefix: str) -> GatedMLP:
            is_wide = config.boolean("use_double_wide_mlp") and index >= num_own
            return GatedMLP(context, (2 if is_wide else 1) * config.intermediate_size, prefix=prefix)

        parts = DecoderParts(
            attention,
            mlp,
            norm=lambda size: gemma4_norm(context, size),
            layer=Gemma4Layer,
            norms=SANDWICH,
            embedding_scale=embedding_scale(context),
            logit_softcap=optional(config, "final_logit_softcapping"),
        )
        super().__init__(context, parts)
