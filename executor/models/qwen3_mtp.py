"""Multi-token prediction of Qwen3-Next and Qwen3.5: one layer with gated attention, whose files are beside those of the
model (``mtp.``). It shares embedding and output layer with it."""

from __future__ import annotations

from torch import Tensor, nn

import ops
from executor.base import ModelError
from executor.input_batch import InputBatch
from executor.layers.context import ModelContext
from executor.layers.linear import ReplicatedLinear
from executor.layers.mlp import GatedMLP
from executor.models.base import WeightsMapper
from executor.models.decoder import PRE_NORMS, ROTARY_BUFFERS, CausalDecoder, DecoderLayer
from executor.models.draft_head import DraftHead
from executor.models.qwen3_next import HybridForCausalLM, zero_centred_norm

NUM_LAYERS = "mtp_num_hidden_layers"


class MTPModule(nn.Module):
    """What the files call ``mtp``."""

    def __init__(self, context: ModelContext, layer: nn.Module) -> None:
        super().__init__()
        size = context.config.hidden_size
        self.pre_fc_norm_embedding = zero_centred_norm(context, size)
        self.pre_fc_norm_hidden = zero_centred_norm(context, size)
        self.fc = ReplicatedLinear(context, 2 * size, size, prefix="mtp.fc")
        self.layers = nn.ModuleList([layer])
        self.norm = zero_centred_norm(context, size)

    def forward(self, embeds: Tensor, previous: Tensor, batch: InputBatch) -> Tensor:
        """A token's embedding and what the head goes on from, [num_tokens, hidden_size] each -> the same."""
        joined = ops.concat(self.pre_fc_norm_embedding(embeds), self.pre_fc_norm_hidden(previous))
        hidden = self.fc(joined, batch)
        for layer in self.layers:
            hidden = layer(hidden, batch)
        out: Tensor = self.norm(hidden)
        return out


class QwenMTPHead(DraftHead):
    """It goes on from the model's normed hidden states, then from its own, which are normed as well."""

    def __init__(self, context: ModelContext, target: CausalDecoder) -> None:
        super().__init__(context, target)
        assert isinstance(target, HybridForCausalLM)
        config = context.config
        if config.get(NUM_LAYERS) == 0:
            raise ModelError(
                f"--speculative-config: method mtp: {config.source} says that the model has no MTP layers "
                f"({NUM_LAYERS}); use the method suffix"
            )
        if config.boolean("mtp_use_dedicated_embeddings", False):
            config.bad("mtp_use_dedicated_embeddings", "false: the layer for further tokens uses the model's embedding")
        prefix = "mtp.layers.0"
        make_mlp = target.parts.mlp or (lambda index, prefix: GatedMLP(context, prefix=prefix))
        layer = DecoderLayer(
            target.full_attention(f"{prefix}.self_attn"),
            make_mlp(0, f"{prefix}.mlp"),
            PRE_NORMS,
            lambda: zero_centred_norm(context, config.hidden_size),
        )
        self.mtp = MTPModule(context, layer)
        mapper = type(target).mapper
        renames = [*mapper.renames, (r"^model\.mtp\.", "mtp.")]
        ignored = [ROTARY_BUFFERS, r"^(?!mtp\.)", r"^mtp\.(embed_tokens|lm_head|shared_head)\."]
        self.mapper = WeightsMapper(renames, ignored, mapper.transforms, mapper.stacks)

    def predict(self, batch: InputBatch, previous: Tensor) -> Tensor:
        hidden: Tensor = self.mtp(self.target.model.embed_tokens(batch.input_ids, batch), previous, batch)
        return hidden

    def compute_logits(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        return self.target.compute_logits(hidden, batch)
