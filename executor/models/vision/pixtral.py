"""Pixtral (Agrawal et al., arXiv:2410.07073) and Mistral Small 3's images: any size, with rotary positions in two
directions; in Mistral 3, squares of patches are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from executor.hf_config import HFConfig
from executor.layers.context import ModelContext
from executor.layers.linear import ReplicatedLinear
from executor.layers.mlp import GatedMLP
from executor.layers.norm import RMSNorm
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import DecoderLayer, Norms
from executor.models.vision.layer_stack import LayerStack
from executor.models.vision.llava import Projector, image_token
from executor.models.vision.qwen2_vl import GridRotary
from executor.models.vision.tower import MAX_IMAGE_SIZE, MakeBatch, VisionTower

EPS = 1e-5
NORMS = Norms(before_attention="attention_norm", before_mlp="ffn_norm")
DEFAULTS = {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "image_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 16,
}


class PatchMerger(nn.Module):
    """Projects the patches of a square, with the numbers of each column side by side."""

    def __init__(self, context: ModelContext, width: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.merging_layer = ReplicatedLinear(context, width * size**2, width, prefix="projector.patch_merger")

    def forward(self, hidden: Tensor, rows: int, columns: int, make_batch: MakeBatch) -> Tensor:
        """``hidden`` [rows * columns, width] -> [squares, width]."""
        size = self.size
        squares = hidden.view(rows // size, size, columns // size, size, -1).permute(0, 2, 4, 1, 3)
        joined = squares.reshape(rows * columns // size**2, -1)
        out: Tensor = self.merging_layer(joined, make_batch([len(joined)]))
        return out


class PixtralTower(VisionTower):
    mapper = WeightsMapper(
        renames=[
            (r"^model\.(?=vision_tower|multi_modal_projector|language_model)", ""),
            (r"^vision_tower\.(transformer\.)?", "encoder."),
            (r"^multi_modal_projector\.", "projector."),
            (r"\.attention\.", ".self_attn."),
            (r"\.feed_forward\.", ".mlp."),
        ],
        ignored=[r"^language_model\.", r"^lm_head\."],
        transforms={r"\.patch_conv\.weight$": lambda tensor: tensor.flatten(1)},
    )

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        config = context.config
        self.image_token_id = image_token(config, default=10)
        section = config.section("vision_config")
        known = {name: value for name, value in section.values.items() if value is not None}
        theta = section.section("rope_parameters").number("rope_theta", section.number("rope_theta", 10000.0))
        own = HFConfig({**DEFAULTS, **known, "head_dim": None}, section.source)
        if config.get("vision_feature_layer") not in (None, -1):
            config.bad("vision_feature_layer", "-1")
        vision = replace(context, config=own)
        width, patch_size = own.hidden_size, own.size("patch_size")
        side = own.size("image_size", most=MAX_IMAGE_SIZE) // patch_size
        columns = own.size("num_channels", 3) * patch_size**2
        if own.head_dim % 4:
            own.bad("num_attention_heads", "a number of heads whose size is a multiple of 4")
        frequencies = 1.0 / (theta ** (torch.arange(0, own.head_dim, 2, dtype=torch.float32) / own.head_dim))
        self.rotary = GridRotary(side**2, own.head_dim, frequencies[0::2], frequencies[1::2], context.device)
        self.encoder = nn.Module()
        self.encoder.patch_conv = ReplicatedLinear(vision, columns, width, prefix="encoder.patch_conv")
        self.encoder.ln_pre = RMSNorm(vision, width, EPS)
        self.encoder.layers = nn.ModuleList()
        for index in range(own.num_layers):
            prefix = f"encoder.layers.{index}"
            attention = SelfAttention(vision, self.rotary, is_bidirectional=True, prefix=f"{prefix}.self_attn")
            mlp = GatedMLP(vision, prefix=f"{prefix}.mlp")
            self.encoder.layers.append(DecoderLayer(attention, mlp, NORMS, lambda: RMSNorm(vision, width, EPS)))
        self._run_layers = LayerStack(self.encoder.layers)
        self.projector = self.make_projector(context, width)
        self.max_rows = side**2
        self.max_image_tokens = side**2 // self.merge**2
        self.row_bytes = context.dtype.itemsize * (10 * width + 3 * own.intermediate_size + columns) + 4 * columns

    merge: int = 1
    """Patches in each direction that become one embedding."""

    def make_projector(self, context: ModelContext, width: int) -> Projector:
        """The projector, from patches of this width."""
        return Projector(context, width, "projector")

    def encode(self, pixels: Tensor, grid: Sequence[Sequence[int]], make_batch: MakeBatch) -> Tensor:
        ((height, width),) = grid
        batch = make_batch([len(pixels)])
        encoder = self.encoder
        hidden: Tensor = encoder.get_submodule("ln_pre")(encoder.get_submodule("patch_conv")(pixels, batch))
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        self.rotary.place(rows.flatten(), columns.flatten(), make_batch)
        (states,) = self._run_layers(hidden, batch)
        embeddings: Tensor = self.projector(self.merged(states, height, width, make_batch), make_batch)
        return embeddings

    def merged(self, hidden: Tensor, rows: int, columns: int, make_batch: MakeBatch) -> Tensor:
        """What the projector reads."""
        return hidden


class Mistral3Tower(PixtralTower):
    def make_projector(self, context: ModelContext, width: int) -> Projector:
        config = context.config
        self.merge = config.size("spatial_merge_size", 2, most=16)
        projector = Projector(context, width, "projector", bias=False)
        text = config.section("text_config")
        projector.norm = RMSNorm(context, width, text.number("rms_norm_eps", 1e-5))
        projector.patch_merger = PatchMerger(context, width, self.merge)
        return projector

    def merged(self, hidden: Tensor, rows: int, columns: int, make_batch: MakeBatch) -> Tensor:
        normed = self.projector.get_submodule("norm")(hidden)
        merged: Tensor = self.projector.get_submodule("patch_merger")(normed, rows, columns, make_batch)
        return merged
