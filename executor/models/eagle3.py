"""EAGLE-3 (Li et al., arXiv:2503.01840): one decoder layer that reads hidden states of three layers of the model. Its
vocabulary may be a part of the model's.

Files as EAGLE's authors, SGLang and vLLM know them, and those of the library speculators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import ops
from executor.base import ModelError
from executor.hf_config import HFConfig
from executor.input_batch import InputBatch
from executor.layers.context import ModelContext
from executor.layers.embedding import LMHead, VocabParallelEmbedding
from executor.layers.linear import ReplicatedLinear
from executor.layers.mlp import GatedMLP
from executor.layers.norm import RMSNorm
from executor.layers.parameter import Part, WeightParameter, single
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import CausalDecoder
from executor.models.draft_head import DraftHead

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


class Eagle3Layer(nn.Module):
    """A decoder layer whose attention reads a token's embedding and what the head goes on from, side by side."""

    def __init__(self, context: ModelContext, *, norm_before_residual: bool, prefix: str) -> None:
        super().__init__()
        config = context.config
        size, bias = config.hidden_size, config.boolean("attention_bias")
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = (
            RMSNorm(context, size, config.rms_norm_eps) for _ in range(3)
        )
        self.self_attn = SelfAttention(
            context,
            RotaryEmbedding(context),
            qkv_bias=bias,
            out_bias=bias,
            input_size=2 * size,
            prefix=f"{prefix}.self_attn",
        )
        self.mlp = GatedMLP(context, bias=config.boolean("mlp_bias"), prefix=f"{prefix}.mlp")
        self.norm_before_residual = norm_before_residual

    def forward(self, embeds: Tensor, previous: Tensor, batch: InputBatch) -> Tensor:
        """Both [num_tokens, hidden_size] -> the same."""
        normed = self.hidden_norm(previous)
        residual = normed if self.norm_before_residual else previous
        attended = self.self_attn(ops.concat(self.input_layernorm(embeds), normed), batch)
        hidden: Tensor = residual + attended
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden), batch)
        return out


class Eagle3Head(DraftHead):
    config_defaults = {
        "attention_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "rms_norm_eps": 1e-6,
    }

    def __init__(self, context: ModelContext, target: CausalDecoder, *, has_embedding: bool) -> None:
        """Creates the head.

        Args:
            context: The head's construction context.
            target: The model that it belongs to.
            has_embedding: It has an embedding of its own; else the model's is used.
        """
        super().__init__(context, target)
        config = context.config
        size, target_size = config.hidden_size, target.layer_size
        self.aux_layers = aux_layers(config, len(target.model.layers))
        count = len(self.aux_layers)
        if config.integer("num_hidden_layers", 1) != 1:
            config.bad("num_hidden_layers", "1: heads of several layers are not supported")
        if not has_embedding and size != target.model.embed_tokens.shape.hidden.size:
            raise ModelError(f"{config.source}: the head has no embed_tokens.weight, and the model's has another size")
        given = config.size("target_hidden_size", target_size)
        if given != target_size:
            config.bad("target_hidden_size", f"that of the model, {target_size}")
        self.embed_tokens = VocabParallelEmbedding(context, prefix="embed_tokens") if has_embedding else None

        def norm(width: int) -> RMSNorm:
            return RMSNorm(context, width, config.rms_norm_eps)

        self.input_norm = norm(count * target_size) if config.boolean("norm_before_fc", False) else None
        has_norms = config.boolean("fc_norm", False)
        self.fc_norm = nn.ModuleList(norm(target_size) for _ in range(count)) if has_norms else None
        self.fc = ReplicatedLinear(context, count * target_size, size, prefix="fc")
        before = config.boolean("norm_before_residual", False)
        self.midlayer = Eagle3Layer(context, norm_before_residual=before, prefix="midlayer")
        self.norm = norm(size)
        self.norm_output = config.boolean("norm_output", False)
        num_tokens = config.size("draft_vocab_size", config.vocab_size)
        self.lm_head = LMHead(replace(context, config=config.replaced(vocab_size=num_tokens)), prefix="lm_head")
        self.d2t = WeightParameter.empty(single(Part.whole(num_tokens)), dtype=torch.int64, device=context.device)
        self.d2t.is_optional = True
        self.d2t.data.zero_()
        self._vocab_size = config.vocab_size
        names = [r"^t2d$", r"^verifier_", r"(^|\.)rotary_emb\."]
        self.mapper = WeightsMapper(
            renames=[(r"^model\.", ""), (r"^layers\.0\.", "midlayer."), (r"^draft_id_to_target_id$", "d2t")],
            ignored=names if has_embedding else [*names, r"^embed_tokens\."],
        )

    @classmethod
    def configure(cls, config: HFConfig) -> HFConfig:
        """The configuration of the layer, with the other fields of the head, whichever library wrote it."""
        inner = config.get("transformer_layer_config")
        if isinstance(inner, Mapping):
            own = {name: value for name, value in config.values.items() if name != "transformer_layer_config"}
            config = replace(config, values={**inner, **own})
        return super().configure(config)

    def loaded(self) -> None:
        ids = self.target_ids(torch.arange(len(self.d2t), device=self.d2t.device))
        if int(ids.min()) < 0 or int(ids.max()) >= self._vocab_size:
            raise ModelError(f"--speculative-config: d2t names tokens beyond the vocabulary of {self._vocab_size}")

    def combine_hidden_states(self, hidden_states: Sequence[Tensor], batch: InputBatch) -> Tensor:
        parts = list(hidden_states[1:])
        if self.fc_norm is not None:
            parts = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
        joined = torch.cat(parts, -1)
        if self.input_norm is not None:
            joined = self.input_norm(joined)
        out: Tensor = self.fc(joined, batch)
        return out

    def target_ids(self, token_ids: Tensor) -> Tensor:
        """Files hold the distance of each token to its number in the model's vocabulary."""
        return token_ids + self.d2t.data[token_ids]

    def predict(self, batch: InputBatch, previous: Tensor) -> Tensor:
        table = self.target.model.embed_tokens if self.embed_tokens is None else self.embed_tokens
        hidden: Tensor = self.midlayer(table(batch.input_ids, batch), previous, batch)
        return self.norm(hidden) if self.norm_output else hidden

    def compute_logits(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        return self.lm_head.logits(hidden if self.norm_output else self.norm(hidden), batch)


def aux_layers(config: HFConfig, num_layers: int) -> tuple[int, ...]:
    """After how many of the model's layers the hidden states are that a head reads.

    Without a list, those that EAGLE-3 heads are trained with: an early, a middle and a late one. In ``eagle_config``,
    numbers are those of the layers themselves, from 0.
    """
    given: Any = config.get(LAYER_IDS)
    shift = 0
    if not given:
        given, shift = config.section("eagle_config").get(LAYER_IDS), 1
    if not given:
        return tuple(max(0, index) for index in (2, num_layers // 2, num_layers - 3))
    if not isinstance(given, list) or not 1 <= len(given) <= num_layers or not all(type(i) is int for i in given):
        config.bad(LAYER_IDS, f"a list of layers of the model, which has {num_layers}")
    found = tuple(index + shift for index in given)
    if not all(0 <= index <= num_layers for index in found):
        config.bad(LAYER_IDS, f"a list of layers of the model, which has {num_layers}")
    return found
