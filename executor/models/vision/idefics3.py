"""Idefics3 (Laurençon et al., arXiv:2408.12637) and SmolVLM (Marafioti et al., arXiv:2504.05299): tiles of an image and
the whole image, each encoded alone; neighbouring patches are joined before the projection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from executor.layers.context import ModelContext
from executor.layers.linear import ReplicatedLinear
from executor.models.base import WeightsMapper
from executor.models.vision.llava import image_token
from executor.models.vision.tower import (
    LAYER_NAMES,
    MakeBatch,
    PatchEncoder,
    VisionTower,
    part_context,
)

MAX_TILES = 37
"""Tokenizers know tiles in up to six rows and columns; the whole image is one more."""
DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "image_size": 224,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-6,
    "num_attention_heads": 16,
    "num_hidden_layers": 12,
    "patch_size": 32,
}


class Idefics3Tower(VisionTower):
    mapper = WeightsMapper(
        renames=[
            (r"^model\.vision_model\.(embeddings\.|encoder\.)?", "encoder."),
            (r"^model\.connector\.modality_projection\.", "connector."),
            *LAYER_NAMES,
        ],
        ignored=[r"^model\.text_model\.", r"^lm_head\.", r"\.position_ids$"],
        transforms={r"\.patch_embedding\.weight$": lambda tensor: tensor.flatten(1)},
    )

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        config = context.config
        self.image_token_id = image_token(config, default=128257)
        vision = part_context(context, "vision_config", DEFAULTS)
        self.encoder = PatchEncoder(vision, has_class_token=False, patch_bias=True, prefix="encoder")
        self.scale_factor = config.size("scale_factor", 2)
        if self.encoder.side % self.scale_factor:
            config.bad("scale_factor", f"a divisor of the patches in a row ({self.encoder.side})")
        self.connector = torch.nn.Module()
        self.connector.proj = ReplicatedLinear(
            context,
            self.encoder.width * self.scale_factor**2,
            config.section("text_config").size("hidden_size", 4096),
            prefix="connector.proj",
        )
        self.max_image_tokens = MAX_TILES * (self.encoder.side // self.scale_factor) ** 2
        self.max_rows = self.encoder.rows_per_tile
        self.row_bytes = self.encoder.row_bytes

    def encode(self, pixels: Tensor, grid: Sequence[Sequence[int]], make_batch: MakeBatch) -> Tensor:
        ((rows, columns),) = grid
        (states,) = self.encoder(pixels, [self._places(rows, columns)], make_batch)
        joined = self._joined(states, rows, columns)
        embeddings: Tensor = self.connector.get_submodule("proj")(joined, make_batch([len(joined)]))
        return embeddings

    def _places(self, rows: int, columns: int) -> Tensor:
        """The place of each patch in the table of positions, int64 [rows * columns]: that of the same part of an image
        with as many patches as the table."""
        side = self.encoder.side
        boundaries = torch.arange(1 / side, 1.0, 1 / side)

        def buckets(count: int) -> Tensor:
            step = 1.0 / torch.tensor(count)
            parts = torch.clamp(torch.arange(count, dtype=torch.float32) * step, max=1.0 - 1e-6)
            return torch.bucketize(parts, boundaries, right=True)

        return (buckets(rows)[:, None] * side + buckets(columns)).flatten()

    def _joined(self, tile: Tensor, rows: int, columns: int) -> Tensor:
        """Squares of patches side by side: [rows * columns, width] -> [tokens, width * scale_factor ** 2]."""
        scale = self.scale_factor
        squares = tile.view(rows // scale, scale, columns // scale, scale, -1).permute(0, 2, 1, 3, 4)
        return squares.reshape(rows * columns // scale**2, -1)
