"""Multi-token prediction (arXiv:2412.19437, section 2.2): the layer behind the last one of DeepSeek V3, GLM-4.5 to 4.7
and GLM-4.7-Flash. It has the parts of the model's layers, and shares embedding and output layer with it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

import ops
from executor.base import ModelError
from executor.input_batch import InputBatch
from executor.layers.context import ModelContext
from executor.layers.linear import ReplicatedLinear
from executor.layers.norm import RMSNorm
from executor.models.base import WeightsMapper
from executor.models.decoder import PRE_NORMS, ROTARY_BUFFERS, CausalDecoder, DecoderLayer
from executor.models.draft_head import DraftHead

SUPPORTED = ("DeepseekV3ForCausalLM", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM")
"""Architectures whose checkpoints hold such a layer."""
NUM_LAYERS = "num_nextn_predict_layers"


class SharedHead(nn.Module):
    """The norm before the model's output layer."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm


class MTPLayer(DecoderLayer):
    """A decoder layer that reads a token's embedding and what the head goes on from, each after a norm of its own."""

    def __init__(
        self,
        context: ModelContext,
        attention: nn.Module,
        mlp: nn.Module,
        make_norm: Callable[[], nn.Module],
        *,
        prefix: str,
    ) -> None:
        super().__init__(attention, mlp, PRE_NORMS, make_norm)
        size = context.config.hidden_size
        self.enorm, self.hnorm = make_norm(), make_norm()
        self.eh_proj = ReplicatedLinear(context, 2 * size, size, prefix=f"{prefix}.eh_proj")
        self.shared_head = SharedHead(make_norm())

    def join(self, embeds: Tensor, previous: Tensor, batch: InputBatch) -> Tensor:
        """The input of the decoder layer. Both [num_tokens, hidden_size] -> the same."""
        out: Tensor = self.eh_proj(ops.concat(self.enorm(embeds), self.hnorm(previous)), batch)
        return out


class MTPHead(DraftHead):
    """The first such layer. It goes on from the model's normed hidden states, then from its own."""

    def __init__(self, context: ModelContext, target: CausalDecoder) -> None:
        super().__init__(context, target)
        config = context.config
        if config.architecture not in SUPPORTED:
            raise ModelError(
                f"--speculative-config: method mtp: MTP layers of {config.architecture} are not supported, only "
                f"those of {', '.join(SUPPORTED)}, Qwen3-Next and Qwen3.5; use the method suffix"
            )
        if config.get(NUM_LAYERS) == 0:
            raise ModelError(
                f"--speculative-config: method mtp: {config.source} says that the model has no MTP layers "
                f"({NUM_LAYERS}); use the method suffix"
            )

        def make_norm() -> RMSNorm:
            return RMSNorm(context, config.hidden_size, config.rms_norm_eps)

        index = config.num_layers
        prefix = f"model.layers.{index}"
        assert target.parts.mlp is not None
        layer = MTPLayer(
            context,
            target.parts.attention(index, f"{prefix}.self_attn"),
            target.parts.mlp(index, f"{prefix}.mlp"),
            make_norm,
            prefix=prefix,
        )
        self.model = nn.ModuleDict({"layers": nn.ModuleDict({str(index): layer})})
        self.layer = (layer,)  # under its name in the checkpoint it is a submodule already
        others = [rf"^(?!model\.layers\.{index}\.)", r"\.embed_tokens\.", r"\.shared_head\.head\."]
        mapper = type(target).mapper
        self.mapper = WeightsMapper(mapper.renames, [ROTARY_BUFFERS, *others], mapper.transforms, mapper.stacks)

    def predict(self, batch: InputBatch, previous: Tensor) -> Tensor:
        (layer,) = self.layer
        embeds = self.target.model.embed_tokens(batch.input_ids, batch)
        hidden: Tensor = layer(layer.join(embeds, previous, batch), batch)
        return hidden

    def compute_logits(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        (layer,) = self.layer
        return self.target.compute_logits(layer.shared_head.norm(hidden), batch)
