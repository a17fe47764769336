"""Qwen3-VL (Bai et al., arXiv:2511.21631): Qwen2-VL's images with learned positions beside the rotation. States within
the tower enter the language model after its first layers (DeepStack; Meng et al., arXiv:2406.04334)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from executor.layers.context import ModelContext
from executor.models.vision.layer_stack import LayerStack
from executor.models.vision.qwen2_vl import MAX_POSITIONS, Merger, Qwen2VLTower, qwen_mapper
from executor.models.vision.tower import MakeBatch, parameter


class Qwen3VLTower(Qwen2VLTower):
    mapper = qwen_mapper(
        (r"\.linear_fc1\.", ".fc1."),
        (r"\.linear_fc2\.", ".fc2."),
        (r"\.mlp\.fc1\.", ".mlp.up_proj."),
        (r"\.mlp\.fc2\.", ".mlp.down_proj."),
        (r"^deepstack_merger_list\.", "deepstack."),
        (r"^(merger|deepstack\.\d+)\.norm\.", r"\1.ln_q."),
    )
    vision_defaults = {
        "deepstack_visual_indexes": [8, 16, 24],
        "depth": 27,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 3584,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    has_patch_bias = True

    def __init__(self, context: ModelContext) -> None:
        super().__init__(context)
        own = self.vision.config
        width = own.hidden_size
        count = own.size("num_position_embeddings", most=MAX_POSITIONS)
        self.side = int(count**0.5)
        if self.side**2 != count:
            own.bad("num_position_embeddings", "a square")
        self.pos_embed = nn.Module()
        self.pos_embed.weight = parameter(self.vision, count, width)
        indexes = self.deepstack_layers
        inner, out = width * self.merge_size**2, own.size("out_hidden_size")
        self.deepstack = nn.ModuleList(
            Merger(self.vision, self.make_norm(inner), inner, out, norms_squares=True, prefix=f"deepstack.{level}")
            for level in range(len(indexes))
        )
        self.num_levels = 1 + len(indexes)
        self.row_bytes += 2 * len(indexes) * width * context.dtype.itemsize

    def captured(self) -> LayerStack:
        own = self.vision.config
        indexes: Any = own.get("deepstack_visual_indexes")
        num_text = self.whole.section("text_config").integer("num_hidden_layers", own.num_layers)
        layers = range(own.num_layers)
        is_list = isinstance(indexes, list) and all(type(each) is int and each in layers for each in indexes)
        if not is_list or len(set(indexes)) != len(indexes) or len(indexes) > num_text:
            own.bad("deepstack_visual_indexes", "a list of the tower's layers, at most as many as the model has")
        self.deepstack_layers: list[int] = indexes
        return LayerStack(self.layers, kept=[-1, *(each + 1 for each in indexes)])

    def common_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {**fields, "num_attention_heads": fields["num_heads"], "num_hidden_layers": fields["depth"]}

    def _computed(self, hidden: Tensor, rows: Tensor, columns: Tensor, make_batch: MakeBatch) -> Tensor:
        hidden = hidden + self._positions(rows.flatten(), columns.flatten(), make_batch).to(hidden.dtype)
        batch = make_batch([len(hidden)])
        self.rotary.place(rows.flatten(), columns.flatten(), make_batch)
        last, *inner = self.run_layers(hidden, batch)
        levels = [merger(each, make_batch) for merger, each in zip(self.deepstack, inner, strict=True)]
        levels = [levels[index] for index in np.argsort(self.deepstack_layers)]
        return torch.cat((self.merger(last, make_batch), *levels), dim=-1)

    def _positions(self, rows: Tensor, columns: Tensor, make_batch: MakeBatch) -> Tensor:
        """Learned positions [patches, width]: the table's corners are those of the image, and places between its
        entries get a mean of the four around them."""
        table = self.pos_embed.get_parameter("weight").data.float()
        total: Tensor | None = None
        down, across = self._taps(rows), self._taps(columns)
        for row, row_weight in down:
            for column, column_weight in across:
                places = make_batch.on_device(row * self.side + column)
                part = table[places] * make_batch.on_device((row_weight * column_weight)[:, None])
                total = part if total is None else total + part
        assert total is not None
        return total

    def _taps(self, places: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The entries of the table around places, int64 [patches], along one axis; each with its weight."""
        exact = places.float() * (self.side - 1) / max(int(places.max()), 1)
        low = exact.floor()
        share = exact - low
        first = low.long()
        return [(first, 1 - share), ((first + 1).clamp(max=self.side - 1), share)]


class Qwen35Tower(Qwen3VLTower):
    """Qwen3.5's: nothing is added within the language model."""

    vision_defaults = {**Qwen3VLTower.vision_defaults, "deepstack_visual_indexes": []}
