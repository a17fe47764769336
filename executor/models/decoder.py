"""The pre-norm decoder that Llama and its many relatives share. What differs is how a layer attends."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from executor.input_batch import InputBatch, ModelOutput
from executor.layers.attention import Attention, assign_groups
from executor.layers.context import ModelContext
from executor.layers.embedding import VocabParallelEmbedding, output_layer
from executor.layers.mlp import GatedMLP
from executor.layers.norm import RMSNorm
from executor.layers.rotary import RotaryEmbedding
from executor.models.base import Model


class SelfAttention(nn.Module):
    """What a decoder layer needs of its attention."""

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        raise NotImplementedError


MakeAttention = Callable[[RotaryEmbedding, int, str], SelfAttention]
"""The attention of a layer: takes the rotary embedding, the layer's number and its name in the model."""


class DecoderLayer(nn.Module):
    def __init__(self, context: ModelContext, self_attn: SelfAttention, *, mlp_bias: bool, prefix: str) -> None:
        super().__init__()
        config = context.config
        self.input_layernorm = RMSNorm(context, config.hidden_size, config.rms_norm_eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(context, config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(context, bias=mlp_bias, prefix=f"{prefix}.mlp")

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), batch)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class Decoder(nn.Module):
    def __init__(self, context: ModelContext, make_attention: MakeAttention, *, mlp_bias: bool, prefix: str) -> None:
        super().__init__()
        config = context.config
        rotary = RotaryEmbedding(context)
        self.embed_tokens = VocabParallelEmbedding(context, prefix=f"{prefix}.embed_tokens")
        self.layers = nn.ModuleList()
        for index in range(config.num_layers):
            name = f"{prefix}.layers.{index}"
            self_attn = make_attention(rotary, index, f"{name}.self_attn")
            self.layers.append(DecoderLayer(context, self_attn, mlp_bias=mlp_bias, prefix=name))
        self.norm = RMSNorm(context, config.hidden_size, config.rms_norm_eps)

    def forward(self, batch: InputBatch, hidden: Tensor | None) -> Tensor:
        if hidden is None:
            hidden = self.embed_tokens(batch.input_ids)
        for layer in self.layers:
            hidden = layer(hidden, batch)
        out: Tensor = self.norm(hidden)
        return out


class CausalDecoder(Model):
    """A decoder with an output layer. A model is this with the attention it makes."""

    tied_weights = {"lm_head.weight": "model.embed_tokens.weight"}
    ignored_weights = ("rotary_emb.inv_freq",)

    def __init__(self, context: ModelContext, make_attention: MakeAttention, *, mlp_bias: bool = False) -> None:
        super().__init__()
        self.model = Decoder(context, make_attention, mlp_bias=mlp_bias, prefix="model")
        self.lm_head = output_layer(context, self.model.embed_tokens, prefix="lm_head")
        assign_groups(self.attention_layers())

    def forward(self, batch: InputBatch, hidden: Tensor | None = None) -> ModelOutput:
        return ModelOutput(self.model(batch, hidden))

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head.logits(hidden)

    def attention_layers(self) -> list[Attention]:
        return [module for module in self.model.modules() if isinstance(module, Attention)]
