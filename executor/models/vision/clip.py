"""CLIP (Radford et al., arXiv:2103.00020): texts and images become vectors of one space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from executor.input_batch import InputBatch, ModelOutput
from executor.layers.context import ModelContext
from executor.layers.linear import ReplicatedLinear
from executor.models.base import WeightsMapper
from executor.models.decoder import CausalDecoder
from executor.models.vision.llava import CLIP_DEFAULTS
from executor.models.vision.tower import (
    LAYER_NAMES,
    TEXT_NAMES,
    MakeBatch,
    PatchEncoder,
    VisionTower,
    part_context,
    text_parts,
)


class CLIPModel(CausalDecoder):
    """The text encoder: a vector is the projected state of the end token, which is the last one."""

    keeps_float32 = True
    config_defaults = {
        "hidden_act": "quick_gelu",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 77,
        "num_attention_heads": 8,
        "num_hidden_layers": 12,
        "projection_dim": 512,
        "tie_word_embeddings": False,
        "vocab_size": 49408,
    }
    mapper = WeightsMapper(
        renames=[
            *TEXT_NAMES,
            *LAYER_NAMES,
        ],
        ignored=[r"^model\.(vision_model|visual_projection|logit_scale)", r"\.position_ids$"],
    )

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        super().__init__(context, text_parts(context, is_bidirectional=False))
        self.hidden_size = projection_size(context)
        self.model.text_projection = ReplicatedLinear(
            context, config.hidden_size, self.hidden_size, prefix="model.text_projection"
        )

    def forward(self, batch: InputBatch, hidden: Tensor | None = None) -> ModelOutput:
        return ModelOutput(self.model.get_submodule("text_projection")(self.model(batch, hidden), batch))


class CLIPTower(VisionTower):
    """The image encoder: a vector is the projected state of the class token."""

    is_pooled = True
    image_token_id = 0
    max_image_tokens = 1
    mapper = WeightsMapper(
        renames=[
            (r"^vision_model\.(embeddings\.|encoder\.)?", "encoder."),
            (r"^visual_projection\.", "projection."),
            *LAYER_NAMES,
        ],
        ignored=[r"^text_model\.", r"^text_projection\.", r"^logit_scale$", r"\.position_ids$"],
        transforms={r"\.patch_embedding\.weight$": lambda tensor: tensor.flatten(1)},
    )

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        vision = part_context(context, "vision_config", CLIP_DEFAULTS)
        self.encoder = PatchEncoder(vision, has_class_token=True, patch_bias=False, has_pre_norm=True, prefix="encoder")
        self.projection = ReplicatedLinear(context, self.encoder.width, projection_size(context), prefix="projection")
        self.max_rows = max(self.max_rows, self.encoder.rows_per_tile)
        self.row_bytes = self.encoder.row_bytes

    def encode(self, pixels: Tensor, grid: Sequence[Sequence[int]], make_batch: MakeBatch) -> Tensor:
        places = torch.arange(self.encoder.side**2)
        (states,) = self.encoder(pixels, [places], make_batch)
        vector: Tensor = self.projection(states[:1], make_batch([1]))
        return vector


def projection_size(context: ModelContext) -> int:
    """Size of the vectors. Parts of the configuration repeat it, with values that do not count."""
    whole = context.config.whole.get("projection_dim")
    return whole if type(whole) is int and 0 < whole <= 1 << 16 else 512
