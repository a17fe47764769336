"""SigLIP (Zhai et al., arXiv:2303.15343): texts and images become vectors of one space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from executor.input_batch import InputBatch, ModelOutput
from executor.layers.context import ModelContext
from executor.layers.linear import ReplicatedLinear
from executor.layers.mlp import MLP
from executor.layers.norm import LayerNorm
from executor.models.base import WeightsMapper
from executor.models.encoder import Encoder
from executor.models.vision.llava import SIGLIP_DEFAULTS
from executor.models.vision.tower import (
    LAYER_NAMES,
    TEXT_NAMES,
    MakeBatch,
    PatchEncoder,
    VisionTower,
    parameter,
    part_context,
    text_parts,
)


class SiglipModel(Encoder):
    """The text encoder: a vector is the projected state of the last token. Prompts are filled up to their full length,
    as in training."""

    pooling_type = "LAST"
    config_defaults = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "vocab_size": 32000,
    }
    mapper = WeightsMapper(
        renames=[
            *TEXT_NAMES,
            (r"^text_model\.head\.", "model.projection."),
            *LAYER_NAMES,
        ],
        ignored=[r"^model\.(vision_model|logit_)", r"\.position_ids$"],
    )

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        super().__init__(context, text_parts(context, is_bidirectional=True), None)
        self.hidden_size = config.size("projection_size", config.hidden_size)
        self.model.projection = ReplicatedLinear(
            context, config.hidden_size, self.hidden_size, bias=True, prefix="model.projection"
        )

    def forward(self, batch: InputBatch, hidden: Tensor | None = None) -> ModelOutput:
        return ModelOutput(self.model.get_submodule("projection")(self.model(batch, hidden), batch))


class AttentionPool(nn.Module):
    """A learned query attends to all patches; an MLP follows."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        config = context.config
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.probe = parameter(context, 1, 1, width)
        self.in_proj = ReplicatedLinear(context, width, 3 * width, bias=True, prefix="pool.in_proj")
        self.out_proj = ReplicatedLinear(context, width, width, bias=True, prefix="pool.out_proj")
        self.layernorm = LayerNorm(context, width, config.epsilon("layer_norm_eps"))
        self.mlp = MLP(context, bias=True, prefix="pool.mlp")

    def forward(self, hidden: Tensor, make_batch: MakeBatch) -> Tensor:
        """``hidden`` [patches, width] -> [1, width]."""
        one = make_batch([1])
        query = self.in_proj(self.probe.data[0], one).chunk(3, dim=-1)[0]
        _, keys, values = self.in_proj(hidden, make_batch([len(hidden)])).chunk(3, dim=-1)
        q, k, v = (each.float().unflatten(1, (self.num_heads, -1)).transpose(0, 1) for each in (query, keys, values))
        weights = torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=-1)
        found = (weights @ v).transpose(0, 1).flatten(1).to(hidden.dtype)
        out: Tensor = self.out_proj(found, one)
        more: Tensor = self.mlp(self.layernorm(out), one)
        return out + more


class SiglipTower(VisionTower):
    is_pooled = True
    image_token_id = 0
    max_image_tokens = 1
    mapper = WeightsMapper(
        renames=[
            (r"^vision_model\.head\.attention\.in_proj_", "pool.in_proj."),
            (r"^vision_model\.head\.(attention\.)?", "pool."),
            (r"^vision_model\.(embeddings\.|encoder\.)?", "encoder."),
            *LAYER_NAMES,
        ],
        ignored=[r"^text_model\.", r"^logit_", r"\.position_ids$"],
        transforms={r"\.patch_embedding\.weight$": lambda tensor: tensor.flatten(1)},
    )

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        vision = part_context(context, "vision_config", SIGLIP_DEFAULTS)
        self.encoder = PatchEncoder(vision, has_class_token=False, patch_bias=True, prefix="encoder")
        self.pool = AttentionPool(vision)
        self.max_rows = max(self.max_rows, self.encoder.rows_per_tile)
        self.row_bytes = self.encoder.row_bytes

    def encode(self, pixels: Tensor, grid: Sequence[Sequence[int]], make_batch: MakeBatch) -> Tensor:
        places = torch.arange(self.encoder.side**2)
        (states,) = self.encoder(pixels, [places], make_batch)
        vector: Tensor = self.pool(states, make_batch)
        return vector
