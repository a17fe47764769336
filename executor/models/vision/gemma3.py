"""Gemma 3's images (arXiv:2503.19786): averages of SigLIP's patches, whose tokens attend to each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from executor.layers.context import ModelContext
from executor.layers.linear import ReplicatedLinear
from executor.layers.norm import RMSNorm
from executor.models.base import WeightsMapper
from executor.models.vision.llava import SIGLIP_DEFAULTS, TOWER_NAMES, image_token
from executor.models.vision.tower import MakeBatch, PatchEncoder, VisionTower, part_context


class Gemma3Tower(VisionTower):
    whole_images = True
    mapper = WeightsMapper(
        renames=[
            *TOWER_NAMES,
            (r"^projector\.mm_input_projection_weight$", "projection.weight"),
            (r"^projector\.mm_soft_emb_norm\.", "soft_emb_norm."),
        ],
        ignored=[r"^language_model\.", r"^lm_head\.", r"\.position_ids$", r"^encoder\.head\."],
        transforms={
            r"\.patch_embedding\.weight$": lambda tensor: tensor.flatten(1),
            r"^projection\.weight$": lambda tensor: tensor.t(),
        },
    )

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        config = context.config
        self.image_token_id = image_token(config, default=262144)
        vision = part_context(context, "vision_config", SIGLIP_DEFAULTS)
        self.encoder = PatchEncoder(vision, has_class_token=False, patch_bias=True, prefix="encoder")
        self.max_image_tokens = config.size("mm_tokens_per_image", 256)
        self.side = math.isqrt(self.max_image_tokens)
        if self.side**2 != self.max_image_tokens or self.encoder.side % self.side:
            config.bad("mm_tokens_per_image", "a square that divides the patches of an image")
        text = config.section("text_config")
        window = text.get("sliding_window")
        if isinstance(window, int) and window < self.max_image_tokens:
            text.bad("sliding_window", f"at least the tokens of an image ({self.max_image_tokens})")
        eps = vision.config.epsilon("layer_norm_eps")
        self.soft_emb_norm = RMSNorm(context, self.encoder.width, eps, offset=1.0, round_first=False)
        self.projection = ReplicatedLinear(
            context, self.encoder.width, text.size("hidden_size", 2304), prefix="projection"
        )
        self.max_rows = max(self.max_rows, self.encoder.rows_per_tile)
        self.row_bytes = self.encoder.row_bytes

    def encode(self, pixels: Tensor, grid: Sequence[Sequence[int]], make_batch: MakeBatch) -> Tensor:
        places = torch.arange(self.encoder.side**2)
        (states,) = self.encoder(pixels, [places], make_batch)
        size = self.encoder.side // self.side
        squares = states.float().view(self.side, size, self.side, size, -1)
        pooled = squares.mean(dim=(1, 3)).flatten(0, 1).to(states.dtype)
        out: Tensor = self.projection(self.soft_emb_norm(pooled), make_batch([len(pooled)]))
        return out
