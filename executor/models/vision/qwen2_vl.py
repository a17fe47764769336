"""Qwen2-VL (Wang et al., arXiv:2409.12191) and Qwen2.5-VL (Bai et al., arXiv:2502.13923): images of any size, with
rotary positions in two directions; squares of patches are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import ops
from executor.hf_config import HFConfig
from executor.layers.context import ModelContext
from executor.layers.linear import ReplicatedLinear
from executor.layers.mlp import MLP, GatedMLP
from executor.layers.norm import LayerNorm, RMSNorm
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import DecoderLayer, Norms
from executor.models.vision.layer_stack import LayerStack
from executor.models.vision.llava import image_token
from executor.models.vision.tower import MakeBatch, VisionTower

MAX_TOKENS = 4096
"""Embeddings of an image; the processor makes larger images smaller."""
MAX_POSITIONS = 1 << 16
"""Learned positions of patches."""
EPS = 1e-6
NORMS = Norms(before_attention="norm1", before_mlp="norm2")
ROPE_BASE = 10000.0


class GridRotary(nn.Module):
    """Rotates the heads of q and k by the row and the column of their patches: half of the angles by the row."""

    table: Tensor
    """float32 [rows, head_dim]: cosines, then sines, of an image's patches in the first rows."""

    def __init__(self, num_rows: int, head_dim: int, by_row: Tensor, by_column: Tensor, device: torch.device) -> None:
        """Creates the rotation.

        Args:
            num_rows: Most patches.
            head_dim: Size of a head.
            by_row: Angles per row, float32 [head_dim / 4].
            by_column: Angles per column, likewise.
            device: Where heads are rotated.
        """
        super().__init__()
        self.head_dim = head_dim
        self._frequencies = by_row, by_column
        self.table = torch.empty(num_rows, head_dim, device=device)

    def place(self, rows: Tensor, columns: Tensor, make_batch: MakeBatch) -> None:
        """Sets the places of the patches to rotate next, int64 [patches] on the host."""
        places = zip((rows, columns), self._frequencies, strict=True)
        angles = torch.cat([place.float()[:, None] * frequencies for place, frequencies in places], dim=-1)
        self.table[: len(angles)] = make_batch.on_device(torch.cat((angles.cos(), angles.sin()), dim=-1))

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """``positions`` int32 [patches]: rows of the table; q and k [patches, heads * head_dim], rotated."""
        return (
            ops.rotary_embedding(q, positions, self.table, self.head_dim),
            ops.rotary_embedding(k, positions, self.table, self.head_dim),
        )


class Merger(nn.Module):
    """Normalises patches, puts those of a square side by side, and projects them."""

    def __init__(
        self,
        context: ModelContext,
        norm: nn.Module,
        width: int,
        out_features: int,
        *,
        norms_squares: bool = False,
        prefix: str = "merger",
    ) -> None:
        """Creates the merger.

        Args:
            context: The model's construction context.
            norm: Of patches.
            width: Numbers of the patches of a square.
            out_features: Numbers of an embedding.
            norms_squares: Whether the norm is of squares instead.
            prefix: The merger's name in the model.
        """
        super().__init__()
        self.width, self.norms_squares = width, norms_squares
        self.ln_q = norm
        self.fc1 = ReplicatedLinear(context, width, width, bias=True, prefix=f"{prefix}.fc1")
        self.fc2 = ReplicatedLinear(context, width, out_features, bias=True, prefix=f"{prefix}.fc2")

    def forward(self, hidden: Tensor, make_batch: MakeBatch) -> Tensor:
        """``hidden`` [patches, numbers of a patch] -> [squares, out_features]."""
        if self.norms_squares:
            squares = self.ln_q(hidden.view(-1, self.width))
        else:
            squares = self.ln_q(hidden).view(-1, self.width)
        batch = make_batch([len(squares)])
        out: Tensor = self.fc2(ops.activation(self.fc1(squares, batch), "gelu"), batch)
        return out


def qwen_mapper(*renames: tuple[str, str]) -> WeightsMapper:
    """The names of the towers' tensors."""
    return WeightsMapper(
        renames=[
            (r"^(model\.)?visual\.", ""),
            (r"^blocks\.", "layers."),
            (r"\.attn\.qkv\.", ".self_attn.qkv_proj."),
            (r"\.attn\.proj\.", ".self_attn.o_proj."),
            (r"^merger\.mlp\.0\.", "merger.fc1."),
            (r"^merger\.mlp\.2\.", "merger.fc2."),
            *renames,
        ],
        ignored=[r"^(model|language_model|lm_head)\."],
        transforms={r"^patch_embed\.proj\.weight$": lambda tensor: tensor.flatten(1)},
    )


class Qwen2VLTower(VisionTower):
    mapper = qwen_mapper((r"\.mlp\.fc1\.", ".mlp.up_proj."), (r"\.mlp\.fc2\.", ".mlp.down_proj."))
    vision_defaults: ClassVar[Mapping[str, Any]] = {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_act": "quick_gelu",
        "hidden_size": 3584,
        "mlp_ratio": 4,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    norm: ClassVar[type[LayerNorm | RMSNorm]] = LayerNorm
    has_patch_bias: ClassVar[bool] = False

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        self.whole = context.config
        self.image_token_id = image_token(self.whole, default=151655)
        section = context.config.section("vision_config")
        fields = {
            **self.vision_defaults,
            **{name: value for name, value in section.values.items() if value is not None},
        }
        own = HFConfig(self.common_fields(fields), section.source)
        self.vision = vision = replace(context, config=own)
        width, self.merge_size = own.hidden_size, own.size("spatial_merge_size", most=16)
        self.patch_size = own.size("patch_size")
        self.num_frames = own.size("temporal_patch_size", most=16)
        columns = own.size("in_channels", 3) * self.num_frames * self.patch_size**2
        self.patch_embed = nn.Module()
        self.patch_embed.proj = ReplicatedLinear(
            vision, columns, width, bias=self.has_patch_bias, prefix="patch_embed.proj"
        )
        if own.head_dim % 4:
            own.bad("num_attention_heads", "a number of heads whose size is a multiple of 4")
        half = own.head_dim // 2
        frequencies = 1.0 / (ROPE_BASE ** (torch.arange(0, half, 2, dtype=torch.float32) / half))
        self.max_image_tokens = MAX_TOKENS
        self.max_rows = MAX_TOKENS * self.merge_size**2
        self.rotary = GridRotary(self.max_rows, own.head_dim, frequencies, frequencies, context.device)
        self.layers = nn.ModuleList()
        for index in range(own.num_layers):
            prefix = f"layers.{index}"
            attention = SelfAttention(
                vision,
                self.rotary,
                qkv_bias=True,
                out_bias=True,
                is_fused=True,
                is_bidirectional=True,
                prefix=f"{prefix}.self_attn",
            )
            mlp = self.make_mlp(vision, f"{prefix}.mlp")
            self.layers.append(DecoderLayer(attention, mlp, NORMS, lambda: self.make_norm(width)))
        self.run_layers = self.captured()
        out_features = own.size("out_hidden_size")
        self.merger = Merger(vision, self.make_norm(width), width * self.merge_size**2, out_features)
        self.row_bytes = context.dtype.itemsize * (10 * width + 3 * own.intermediate_size + columns) + 4 * columns

    def _fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.vision_defaults, **{name: value for name, value in values.items() if value is not None}}

    def common_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of ``vision_config`` under the names of language models."""
        width, ratio = fields["embed_dim"], fields["mlp_ratio"]
        is_number = all(isinstance(each, int | float) for each in (width, ratio))
        return {
            **fields,
            "hidden_size": width,
            "intermediate_size": int(width * ratio) if is_number else ratio,
            "num_attention_heads": fields["num_heads"],
            "num_hidden_layers": fields["depth"],
            "out_hidden_size": fields["hidden_size"],
        }

    def captured(self) -> LayerStack:
        """What computes the layers."""
        return LayerStack(self.layers)

    def make_norm(self, size: int) -> nn.Module:
        """A norm of ``size`` numbers."""
        return self.norm(self.vision, size, EPS)

    def make_mlp(self, context: ModelContext, prefix: str) -> nn.Module:
        """The MLP of a layer."""
        return MLP(context, bias=True, prefix=prefix)

    def encode(self, pixels: Tensor, grid: Sequence[Sequence[int]], make_batch: MakeBatch) -> Tensor:
        ((height, width),) = grid
        # An image is a film of equal frames.
        frames = pixels.unflatten(1, (-1, 1, self.patch_size**2)).expand(-1, -1, self.num_frames, -1).flatten(1)
        proj = self.patch_embed.get_submodule("proj")
        hidden: Tensor = proj(frames.contiguous(), make_batch([len(frames)]))
        merge = self.merge_size
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        rows, columns = (
            each.reshape(height // merge, merge, width // merge, merge).transpose(1, 2).reshape(-1, merge**2)
            for each in (rows, columns)
        )
        return self._computed(hidden, rows, columns, make_batch)

    def _computed(self, hidden: Tensor, rows: Tensor, columns: Tensor, make_batch: MakeBatch) -> Tensor:
        """The embeddings of patches.

        Args:
            hidden: [patches, width], square by square.
            rows: int64 [squares, patches of a square], on the host.
            columns: Likewise.
            make_batch: Makes the batch.
        """
        batch = make_batch([len(hidden)])
        self.rotary.place(rows.flatten(), columns.flatten(), make_batch)
        (states,) = self.run_layers(hidden, batch)
        embeddings: Tensor = self.merger(states, make_batch)
        return embeddings


class Qwen25VLTower(Qwen2VLTower):
    """Most layers attend within windows; gated MLPs and RMS norms."""

    mapper = qwen_mapper()
    vision_defaults = {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
    }
    norm = RMSNorm

    def __init__(self, context: ModelContext) -> None:
        super().__init__(context)
        section = context.config.section("vision_config")
        size = self._fields(section.values)["window_size"]
        self.window = size // self.merge_size // self.patch_size if type(size) is int else 0
        if not self.window:
            section.bad("window_size", "at least the pixels of an embedding")

    def captured(self) -> LayerStack:
        whole = {int(index) for index in self.vision.config.get("fullatt_block_indexes")}
        kinds = [int(index in whole) for index in range(len(self.layers))]
        return LayerStack(self.layers, kinds=kinds)

    def common_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {**fields, "num_attention_heads": fields["num_heads"], "num_hidden_layers": fields["depth"]}

    def make_mlp(self, context: ModelContext, prefix: str) -> nn.Module:
        return GatedMLP(context, bias=True, prefix=prefix)

    def _computed(self, hidden: Tensor, rows: Tensor, columns: Tensor, make_batch: MakeBatch) -> Tensor:
        merge = self.merge_size
        down, across = rows[:, 0] // merge // self.window, columns[:, 0] // merge // self.window
        windows = down * (int(across.max()) + 1) + across
        order = torch.sort(windows, stable=True).indices
        squares = merge**2
        lengths = (torch.bincount(windows) * squares).tolist()
        hidden = hidden.unflatten(0, (-1, squares))[make_batch.on_device(order)].flatten(0, 1)
        self.rotary.place(rows[order].flatten(), columns[order].flatten(), make_batch)
        whole = make_batch([sum(lengths)])  # its positions are rows of the table, one for each patch
        (states,) = self.run_layers(hidden, replace(make_batch(lengths), positions=whole.positions), whole)
        embeddings: Tensor = self.merger(states, make_batch)
        return embeddings[make_batch.on_device(torch.argsort(order))]
