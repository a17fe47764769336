"""A decoder, assembled from parts.

A model lists its parts (``DecoderParts``). The defaults are Llama's: pre-norm attention and a pre-norm gated MLP, each
with a residual connection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

import ops
from executor.base import ModelError
from executor.checkpoint import Checkpoint
from executor.input_batch import InputBatch, ModelOutput
from executor.layers.attention import Attention
from executor.layers.context import ModelContext
from executor.layers.embedding import VocabParallelEmbedding, output_layer
from executor.layers.linear import ReplicatedLinear
from executor.layers.mlp import GatedMLP
from executor.layers.norm import RMSNorm
from executor.layers.pooler_head import PoolingHead
from executor.layers.positions import DistanceBiases, LearnedPositions, TokenTypes
from executor.models.answers import AnswerRows, answer_ids
from executor.models.base import Model, WeightsMapper

MakeBlock = Callable[[int, str], nn.Module]
"""Creates the attention or the MLP of a layer: takes the layer's index and the block's name in the model.

A block takes hidden states [num_tokens, hidden_size] and the batch, and returns what is added to them.
"""
MakeNorm = Callable[[int], nn.Module]
"""Creates a norm over this many columns."""


@dataclass(frozen=True)
class Norms:
    """Checkpoint names of a layer's norms, by position; None: no norm there."""

    before_attention: str | None = None
    after_attention: str | None = None
    before_mlp: str | None = None
    after_mlp: str | None = None


PRE_NORMS = Norms(before_attention="input_layernorm", before_mlp="post_attention_layernorm")


ONE_NORM = Norms(before_attention="input_layernorm")
"""Of ``OneBlockLayer``."""


class DecoderLayer(nn.Module):
    """Two residual branches in sequence: ``h += post(attention(pre(h)))``, then the same with the MLP.

    Norms before the blocks (pre-norm), after them (OLMo 2), or both (the sandwich of Gemma 2).
    """

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        norms: Norms,
        make_norm: Callable[[], nn.Module],
        residual_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self._names = norms
        self._residual_scale = residual_scale
        for name in (norms.before_attention, norms.after_attention, norms.before_mlp, norms.after_mlp):
            if name is not None:
                self.add_module(name, make_norm())

    def norm(self, name: str | None, x: Tensor) -> Tensor:
        """Applies the norm of that name; returns ``x`` unchanged if there is none."""
        if name is None:
            return x
        out: Tensor = self.get_submodule(name)(x)
        return out

    def add(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Adds a block's output, times the residual factor if there is one."""
        return hidden + (out if self._residual_scale is None else ops.scale(out, self._residual_scale))

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        names = self._names
        out = self.self_attn(self.norm(names.before_attention, hidden), batch)
        hidden = self.add(hidden, self.norm(names.after_attention, out))
        out = self.mlp(self.norm(names.before_mlp, hidden), batch)
        return self.add(hidden, self.norm(names.after_mlp, out))


class OneBlockLayer(DecoderLayer):
    """One residual branch, whatever its block computes: ``h += block(norm(h))`` (Mamba-2)."""

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        return self.add(hidden, self.self_attn(self.norm(self._names.before_attention, hidden), batch))


class ParallelDecoderLayer(DecoderLayer):
    """Both blocks read the same hidden states: ``h += attention(n1(h)) + mlp(n2(h))`` (GPT-NeoX), or one norm for both
    (Cohere)."""

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        names = self._names
        normed = self.norm(names.before_attention, hidden)
        mlp_input = normed if names.before_mlp is None else self.norm(names.before_mlp, hidden)
        return self.add(self.add(hidden, self.self_attn(normed, batch)), self.mlp(mlp_input, batch))


class PostNormDecoderLayer(DecoderLayer):
    """Norms follow the residual sums: ``h = n1(h + attention(h))``, ``h = n2(h + mlp(h))`` (original Transformer,
    BERT)."""

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        hidden = self.norm(self._names.after_attention, self.add(hidden, self.self_attn(hidden, batch)))
        return self.norm(self._names.after_mlp, self.add(hidden, self.mlp(hidden, batch)))


def no_mlp(index: int, prefix: str) -> nn.Module:
    """The MLP of ``OneBlockLayer``."""
    return nn.Identity()


@dataclass(frozen=True)
class DecoderParts:
    """The parts of a decoder."""

    attention: MakeBlock
    mlp: MakeBlock | None = None
    """None: a gated MLP without biases."""
    norm: MakeNorm | None = None
    """None: RMS norm with ``rms_norm_eps``."""
    layer: type[DecoderLayer] = DecoderLayer
    """How a layer combines its blocks and norms."""
    norms: Norms | Callable[[int], Norms] = Norms(
        before_attention="input_layernorm", before_mlp="post_attention_layernorm"
    )
    """Of all layers, or by the layer's index."""
    has_embedding_norm: bool = False
    """Whether a norm follows the embedding."""
    has_final_norm: bool = True
    embedding_dim: int | None = None
    """Columns of the embedding and of the output layer, if they differ from the hidden size: then there are projections
    from and to them (OPT-350m)."""
    embedding_scale: float | None = None
    """Factor of the token embeddings."""
    positions: LearnedPositions | None = None
    """Added to the token embeddings."""
    token_types: TokenTypes | None = None
    """Added to them before the positions are."""
    position_biases: DistanceBiases | None = None
    """Biases of the scores, which the attention layers share."""
    residual_scale: float | None = None
    """Factor of what the blocks add to the hidden states."""
    logit_bias: bool = False
    """Whether the output layer has a bias."""
    logit_scale: float | None = None
    """Factor of the logits."""
    logit_softcap: float | None = None
    """Logits are soft-capped to plus and minus this, after the factor."""


class Decoder(nn.Module):
    """From token ids to hidden states."""

    def __init__(self, context: ModelContext, parts: DecoderParts, *, prefix: str) -> None:
        super().__init__()
        config = context.config
        make_mlp = parts.mlp or (lambda index, prefix: GatedMLP(context, prefix=prefix))
        make_norm = parts.norm or (lambda size: RMSNorm(context, size, config.rms_norm_eps))
        size, hidden_size = parts.embedding_dim or config.hidden_size, config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(context, size, prefix=f"{prefix}.embed_tokens")
        self.project_in = self.project_out = None
        if size != hidden_size:
            self.project_in = ReplicatedLinear(context, size, hidden_size, prefix=f"{prefix}.project_in")
            self.project_out = ReplicatedLinear(context, hidden_size, size, prefix=f"{prefix}.project_out")
        self.embedding_norm = make_norm(hidden_size) if parts.has_embedding_norm else None
        self.embedding_scale = parts.embedding_scale
        self.embed_positions = parts.positions
        self.embed_types = parts.token_types
        self.position_biases = parts.position_biases
        self.layers = nn.ModuleList()
        for index in range(config.num_layers):
            name = f"{prefix}.layers.{index}"
            attention = parts.attention(index, f"{name}.self_attn")
            mlp = make_mlp(index, f"{name}.mlp")
            norms = parts.norms(index) if callable(parts.norms) else parts.norms
            self.layers.append(
                parts.layer(attention, mlp, norms, lambda: make_norm(config.hidden_size), parts.residual_scale)
            )
        self.norm = make_norm(config.hidden_size) if parts.has_final_norm else None
        self.aux_layers: tuple[int, ...] = ()
        """After how many layers ``forward`` notes the hidden states."""

    def keep_layers(self, first: int, end: int) -> None:
        """Drops all other layers, and what they alone need. Layers keep their names."""
        layers = list(self.layers)
        self.layers = nn.ModuleList()
        for index in range(first, end):
            self.layers.add_module(str(index), layers[index])
        if first > 0:
            self.project_in = self.embedding_norm = self.embed_positions = self.embed_types = None
        if end < len(layers):
            self.norm = self.project_out = None

    def forward(self, batch: InputBatch, hidden: Tensor | None, noted: dict[int, Tensor] | None = None) -> Tensor:
        """Hidden states [num_tokens, hidden_size].

        Args:
            batch: The tokens.
            hidden: Input of the first layer; None: the embeddings.
            noted: Takes the hidden states of ``aux_layers``.
        """
        if hidden is None:
            hidden = self.embed(batch)
        self.note(hidden, 0, noted)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, batch)
            if batch.deepstack is not None:
                hidden = batch.deepstack.add(hidden, index)
            self.note(hidden, index + 1, noted)
        if self.norm is not None:
            hidden = self.norm(hidden)
        return hidden if self.project_out is None else self.project_out(hidden, batch)

    def note(self, hidden: Tensor, num_layers: int, noted: dict[int, Tensor] | None) -> None:
        """Notes the hidden states after so many layers, if they are wanted."""
        if noted is not None and num_layers in self.aux_layers:
            noted[num_layers] = hidden

    def embed(self, batch: InputBatch) -> Tensor:
        """[num_tokens, hidden_size]: input of the first layer."""
        hidden: Tensor = self.embed_tokens(batch.input_ids, batch)
        if self.embedding_scale is not None:
            hidden = ops.scale(hidden, self.embedding_scale)
        if self.project_in is not None:
            hidden = self.project_in(hidden, batch)
        if self.embed_types is not None:
            assert batch.token_types is not None
            hidden = hidden + self.embed_types(batch.token_types)
        if self.embed_positions is not None:
            hidden = hidden + self.embed_positions(batch.positions)
        return hidden if self.embedding_norm is None else self.embedding_norm(hidden)


ROTARY_BUFFERS = r"rotary_emb\.inv_freq$"
"""Names of the angles, which old checkpoints hold."""


class CausalDecoder(Model):
    """A decoder with an output layer; or, if the architecture names another one, with a head for pooled states."""

    decoder: ClassVar[type[Decoder]] = Decoder
    reward_activation: ClassVar[str | None] = "relu"
    """Between the two layers that compute a reward; None: there is one layer, without bias."""
    tied_modules = {"lm_head": "model.embed_tokens"}
    mapper = WeightsMapper(ignored=[ROTARY_BUFFERS])

    def __init__(self, context: ModelContext, parts: DecoderParts) -> None:
        super().__init__()
        self.hidden_size = parts.embedding_dim
        self.layer_size = context.config.hidden_size
        """Columns of the hidden states between layers."""
        self.parts = parts
        self.model = self.decoder(context, parts, prefix="model")
        self._answers = answer_ids(context.config, context.head)
        self._compares = context.head == "sequence"
        self.lm_head = None
        if context.head == "lm":
            self.lm_head = output_layer(context, self.model.embed_tokens, bias=parts.logit_bias, prefix="lm_head")
        elif context.head in ("sequence", "token"):
            is_of_tokens = context.head == "token"
            self.head = PoolingHead(context, "ALL" if is_of_tokens else "LAST", bias=is_of_tokens and not self._answers)
        elif context.head in ("reward", "process"):
            pooling, hidden = "ALL" if context.head == "process" else "LAST", self.reward_activation
            self.head = PoolingHead(context, pooling, activation=hidden, bias=hidden is not None)
        self.logit_scale, self.logit_softcap = parts.logit_scale, parts.logit_softcap

    def stored_as(self, checkpoint: Checkpoint) -> Checkpoint:
        if not self._answers:
            return checkpoint
        return AnswerRows(checkpoint, self._answers, compares=self._compares)

    def forward(self, batch: InputBatch, hidden: Tensor | None = None) -> ModelOutput:
        noted: dict[int, Tensor] = {}
        result = self.model(batch, hidden, noted)
        return ModelOutput(result, tuple(noted[index] for index in self.model.aux_layers))

    def set_aux_hidden_state_layers(self, layers: Sequence[int]) -> None:
        most = len(self.model.layers)
        if not all(0 <= index <= most for index in layers):
            raise ModelError(f"--speculative-config: the head reads layers {list(layers)}, and the model has {most}")
        self.model.aux_layers = tuple(layers)

    def embed(self, batch: InputBatch) -> Tensor:
        return self.model.embed(batch)

    def compute_logits(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        if self.lm_head is None:
            return hidden
        logits = self.lm_head.logits(hidden, batch)
        if self.logit_scale is not None:
            logits = ops.scale(logits, self.logit_scale)
        return logits if self.logit_softcap is None else ops.softcap(logits, self.logit_softcap)

    def attention_layers(self) -> list[Attention]:
        return [module for module in self.model.modules() if isinstance(module, Attention)]

    def layer_bytes(self) -> tuple[list[int], int]:
        sizes = [num_bytes(layer) for layer in self.model.layers]
        return sizes, sum(map(num_bytes, (self.model.norm, self.model.project_out, self.lm_head, self.pooling_head)))

    def keep_layers(self, first: int, end: int) -> None:
        is_last = end == len(self.model.layers)
        self.model.keep_layers(first, end)
        if first > 0 and (self.lm_head is not self.model.embed_tokens or not is_last):
            del self.model.embed_tokens
        if not is_last:
            self.lm_head = None
            self._modules.pop("head", None)


def num_bytes(module: nn.Module | None) -> int:
    """Bytes of the parameters."""
    return 0 if module is None else sum(parameter.nbytes for parameter in module.parameters())
