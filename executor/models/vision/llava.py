"""LLaVA-1.5 (Liu et al., arXiv:2310.03744): CLIP's patches, projected by an MLP. LLaVA-NeXT: tiles of larger images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import ops
from executor.hf_config import HFConfig
from executor.layers.context import ModelContext
from executor.layers.linear import ReplicatedLinear
from executor.layers.mlp import ACTIVATIONS
from executor.models.base import WeightsMapper
from executor.models.vision.tower import (
    LAYER_NAMES,
    MAX_IMAGE_SIZE,
    MakeBatch,
    PatchEncoder,
    VisionTower,
    parameter,
    part_context,
    pieces_of,
)

CLIP_DEFAULTS = {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "image_size": 224,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-5,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "patch_size": 32,
}
LLAVA_DEFAULTS = {
    **CLIP_DEFAULTS,
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}
"""The tower of a configuration without ``vision_config``."""
SIGLIP_DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 768,
    "image_size": 224,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-6,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "patch_size": 16,
}
NEXT_SHAPES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
TOWER_NAMES = [
    (r"^model\.(?=vision_tower|multi_modal_projector|image_newline|language_model)", ""),
    (r"^vision_tower\.(vision_model\.)?(embeddings\.|encoder\.)?", "encoder."),
    (r"^multi_modal_projector\.", "projector."),
    *LAYER_NAMES,
]


class Projector(nn.Module):
    """``linear_2(act(linear_1(x)))``."""

    def __init__(self, context: ModelContext, in_features: int, prefix: str, *, bias: bool = True) -> None:
        super().__init__()
        config = context.config
        out_features = config.section("text_config").size("hidden_size", 4096)
        bias = config.boolean("multimodal_projector_bias", bias)
        self.activation = config.choice("projector_hidden_act", ACTIVATIONS, "gelu")
        self.linear_1 = ReplicatedLinear(context, in_features, out_features, bias=bias, prefix=f"{prefix}.linear_1")
        self.linear_2 = ReplicatedLinear(context, out_features, out_features, bias=bias, prefix=f"{prefix}.linear_2")

    def forward(self, x: Tensor, make_batch: MakeBatch) -> Tensor:
        """``x`` [rows, in_features] -> [rows, hidden_size of the language model]."""
        batch = make_batch([len(x)])
        out: Tensor = self.linear_2(ops.activation(self.linear_1(x, batch), self.activation), batch)
        return out


class LlavaTower(VisionTower):
    mapper = WeightsMapper(
        renames=TOWER_NAMES,
        ignored=[r"^language_model\.", r"^lm_head\.", r"\.position_ids$", r"\.head\."],
        transforms={r"\.patch_embedding\.weight$": lambda tensor: tensor.flatten(1)},
    )

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        config = context.config
        self.image_token_id = image_token(config)
        self.drops_class = config.string("vision_feature_select_strategy", "default") == "default"
        section = config.section("vision_config")
        is_clip = section.string("model_type", "clip_vision_model") == "clip_vision_model"
        if not is_clip and section.string("model_type") != "siglip_vision_model":
            section.bad("model_type", "clip_vision_model or siglip_vision_model")
        defaults = CLIP_DEFAULTS if is_clip else SIGLIP_DEFAULTS
        vision = part_context(context, "vision_config", defaults if section.values else LLAVA_DEFAULTS)
        total = vision.config.num_layers
        chosen = config.get("vision_feature_layer")
        chosen = -2 if chosen is None else chosen
        layers = chosen if isinstance(chosen, list) else [chosen]
        if not layers or not all(type(layer) is int and -total - 1 <= layer <= total for layer in layers):
            config.bad("vision_feature_layer", f"a layer from {-total - 1} to {total}, or a list of them")
        self.kept = [layer % (total + 1) for layer in layers]
        self.encoder = PatchEncoder(
            vision,
            has_class_token=is_clip,
            patch_bias=not is_clip,
            has_pre_norm=is_clip,
            kept=self.kept,
            has_post_norm=False,
            prefix="encoder",
        )
        self.ignored = [
            r"^encoder\.post_layernorm\.",
            *(rf"^encoder\.layers\.{index}\." for index in range(max(self.kept), total)),
        ]
        self.projector = Projector(context, self.encoder.width * len(self.kept), "projector")
        self.has_class = is_clip
        self.max_image_tokens = self.encoder.rows_per_tile - (is_clip and self.drops_class)
        self.max_rows = max(self.max_rows, self.encoder.rows_per_tile)
        self.row_bytes = self.encoder.row_bytes

    def encode(self, pixels: Tensor, grid: Sequence[Sequence[int]], make_batch: MakeBatch) -> Tensor:
        features = self.tile_features(pixels, len(grid), make_batch)
        embeddings: Tensor = self.projector(features, make_batch)
        return embeddings

    def tile_features(self, pixels: Tensor, num_tiles: int, make_batch: MakeBatch) -> Tensor:
        """Hidden states of the patches of tiles of the encoder's own size, [rows, columns of the projector]."""
        encoder = self.encoder
        places = torch.arange(encoder.side**2)
        results = []
        for piece in pieces_of([encoder.rows_per_tile] * num_tiles, self.max_rows):
            count = piece.stop - piece.start
            own = pixels[piece.start * len(places) : piece.stop * len(places)]
            kept = encoder(own, [places] * count, make_batch)
            states = torch.cat(kept, dim=-1) if len(kept) > 1 else kept[0]
            if self.has_class and self.drops_class:
                states = states.unflatten(0, (count, -1))[:, 1:].flatten(0, 1)
            results.append(states.contiguous())
        return torch.cat(results)


class LlavaNextTower(LlavaTower):
    """The whole image, then its tiles as one picture, without what was filled up, and with an embedding at the end of
    each row. It is encoded in parts: the whole image, and each row of tiles."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__(context)
        config = context.config
        if self.has_class and not self.drops_class:
            config.bad("vision_feature_select_strategy", "default")
        self.image_newline = parameter(context, config.section("text_config").size("hidden_size", 4096))
        size, side = self.encoder.side * self.encoder.patch_size, self.encoder.side
        shapes = grid_pinpoints(config)
        largest = max(down // size * side * (across // size * side + 1) for down, across in shapes)
        self.max_image_tokens = side**2 + largest

    def encode(self, pixels: Tensor, grid: Sequence[Sequence[int]], make_batch: MakeBatch) -> Tensor:
        side, _, across, first, last, left = grid[0]
        features = super().encode(pixels, grid, make_batch)
        if not across:
            return features[: side**2]
        picture = features.view(across, side, side, -1).transpose(0, 1).reshape(side, across * side, -1)
        picture = picture[first:last, left : across * side - left]
        ends = self.image_newline.data.expand(len(picture), 1, -1)
        return torch.cat((picture, ends), dim=1).flatten(0, 1)


def grid_pinpoints(config: HFConfig) -> list[tuple[int, int]]:
    """Heights and widths to which images are brought."""
    value = config.get("image_grid_pinpoints")
    value = NEXT_SHAPES if value is None else value
    name = "image_grid_pinpoints"
    if not isinstance(value, list) or not 0 < len(value) <= 1024:
        config.bad(name, "a list of pairs")
    for pair in value:
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(each) is int for each in pair)
        if not is_pair or not all(0 < each <= MAX_IMAGE_SIZE for each in pair):
            config.bad(name, "a list of pairs of pixels")
    return [(pair[0], pair[1]) for pair in value]


def image_token(config: HFConfig, name: str = "image_token_id", default: int | None = None) -> int:
    """The token that stands for an image in prompts."""
    old = "image_token_index"
    return config.integer(old if config.has(old) and not config.has(name) else name, default)
