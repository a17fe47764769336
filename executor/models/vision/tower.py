"""The seam of vision towers.

A tower is the part of a multimodal checkpoint that is no language model: an encoder of patches and a projector. Its
layers are those of language models, with attention in both directions. It runs one image at a time, so the bits of an
image depend on nothing else in the step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from executor.hf_config import HFConfig
from executor.input_batch import InputBatch, ModelOutput
from executor.layers.attention import Attention
from executor.layers.context import ModelContext
from executor.layers.linear import ReplicatedLinear
from executor.layers.mlp import MLP
from executor.layers.norm import LayerNorm
from executor.layers.parameter import Part, WeightParameter, single
from executor.layers.positions import LearnedPositions
from executor.layers.self_attention import SelfAttention
from executor.models.base import Model
from executor.models.decoder import DecoderLayer, DecoderParts, Norms
from executor.models.vision.layer_stack import LayerStack

MAX_ROWS = 4608
"""Rows that an encoder computes at a time, unless a single sequence is longer."""
MAX_IMAGE_SIZE = 1 << 13
"""Larger images, in pixels, are an error of the configuration."""
LAYER_NORMS = Norms(before_attention="layer_norm1", before_mlp="layer_norm2")
LAYER_NAMES = [
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    (r"\.mlp\.fc1\.", ".mlp.up_proj."),
    (r"\.mlp\.fc2\.", ".mlp.down_proj."),
]
"""Names of CLIP's and SigLIP's layers."""


TEXT_NAMES = [
    (r"^text_model\.embeddings\.token_embedding\.", "model.embed_tokens."),
    (r"^text_model\.embeddings\.position_embedding\.", "model.embed_positions."),
    (r"^text_model\.encoder\.layers\.", "model.layers."),
    (r"^text_model\.final_layer_norm\.", "model.norm."),
]
"""Names of their text encoders."""


def text_parts(context: ModelContext, *, is_bidirectional: bool) -> DecoderParts:
    """CLIP's or SigLIP's text encoder: a transformer of the tower's kind, on tokens with learned positions."""
    eps = context.config.epsilon("layer_norm_eps")

    def attention(index: int, prefix: str) -> SelfAttention:
        return SelfAttention(
            context, None, qkv_bias=True, out_bias=True, is_bidirectional=is_bidirectional, prefix=prefix
        )

    return DecoderParts(
        attention,
        lambda index, prefix: MLP(context, bias=True, prefix=prefix),
        lambda size: LayerNorm(context, size, eps),
        norms=LAYER_NORMS,
        positions=LearnedPositions(context),
    )


class MakeBatch(Protocol):
    """Brings to the device what an encoder computes with."""

    def __call__(self, lengths: Sequence[int]) -> InputBatch:
        """The batch of sequences with these numbers of rows, one after another, each of which attends within itself."""

    def on_device(self, numbers: Tensor) -> Tensor:
        """Numbers of the host, on the device for the rest of the step."""


class VisionTower(Model):
    """An encoder of images with its projector. The configuration is that of the whole checkpoint."""

    whole_images: ClassVar[bool] = False
    """The language model's tokens of an image attend to each other in both directions."""
    is_pooled: ClassVar[bool] = False
    """An image is a request of its own, and its embedding the result."""
    merge_size: int = 0
    """Positions of an image's tokens have three axes (M-RoPE), and this many patches in each direction become a token.
    0: positions have one axis."""
    num_levels: int = 1
    """What the language model gets for each token of an image: the input of its first layer, and what is added after
    each of its next ones (DeepStack)."""
    image_token_id: int
    max_image_tokens: int
    """Most embeddings of an image."""
    max_rows: int = MAX_ROWS
    """Most rows that the encoder computes at a time."""
    row_bytes: int
    """Bytes of activations per row."""

    @abstractmethod
    def encode(self, pixels: Tensor, grid: Sequence[Sequence[int]], make_batch: MakeBatch) -> Tensor:
        """The embeddings of an image.

        Args:
            pixels: [patches, channels * height * width of a patch], normalised, tile by tile.
            grid: For each tile its rows and columns of patches; some families have more to say.
            make_batch: Makes batches of up to ``max_rows`` rows.

        Returns:
            [embeddings, num_levels * hidden_size of the language model].
        """

    def forward(self, batch: InputBatch, hidden: Tensor | None = None) -> ModelOutput:
        raise NotImplementedError("a tower encodes images")

    def compute_logits(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        raise NotImplementedError("a tower has no logits")

    def attention_layers(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]


def part_context(context: ModelContext, name: str, defaults: Mapping[str, Any]) -> ModelContext:
    """The context of a part of the checkpoint, configured by a section of config.json."""
    section = context.config.section(name)
    known = {field: value for field, value in section.values.items() if value is not None}
    return replace(context, config=HFConfig({**defaults, **known}, section.source))


def parameter(context: ModelContext, *sizes: int) -> WeightParameter:
    """A tensor of the model's dtype, uninitialised."""
    return WeightParameter.empty(single(*map(Part.whole, sizes)), dtype=context.dtype, device=context.device)


class PatchEncoder(nn.Module):
    """CLIP's vision encoder (Radford et al., arXiv:2103.00020), and SigLIP's (Zhai et al., arXiv:2303.15343): a
    transformer with norms before its blocks, on patches with learned positions."""

    def __init__(
        self,
        context: ModelContext,
        *,
        has_class_token: bool,
        patch_bias: bool,
        has_pre_norm: bool = False,
        kept: Sequence[int] = (-1,),
        has_post_norm: bool = True,
        prefix: str,
    ) -> None:
        """Creates the encoder.

        Args:
            context: That of the encoder's own configuration.
            has_class_token: Whether a learned token precedes the patches of each tile.
            patch_bias: Whether the embedding of patches has a bias.
            has_pre_norm: Whether a norm follows the embedding.
            kept: Layers after which hidden states are returned; those after the last of them are left out. -1: the end,
                after the last norm.
            has_post_norm: Whether a norm follows the layers.
            prefix: The encoder's name in the model.
        """
        super().__init__()
        config = context.config
        width = config.hidden_size
        eps = config.epsilon("layer_norm_eps")
        self.patch_size = config.size("patch_size")
        self.side = config.size("image_size", most=MAX_IMAGE_SIZE) // self.patch_size
        """Patches in each direction that have positions."""
        if not self.side:
            config.bad("image_size", "at least patch_size")
        columns = config.size("num_channels", 3) * self.patch_size**2
        self.patch_embedding = ReplicatedLinear(
            context, columns, width, bias=patch_bias, prefix=f"{prefix}.patch_embedding"
        )
        self.class_embedding = parameter(context, width) if has_class_token else None
        self.position_embedding = nn.Module()
        self.position_embedding.weight = parameter(context, self.side**2 + has_class_token, width)
        self.pre_layrnorm = LayerNorm(context, width, eps) if has_pre_norm else None
        self.post_layernorm = LayerNorm(context, width, eps) if has_post_norm else None
        self.num_layers = max(config.num_layers if each < 0 else each for each in kept)
        self.layers = nn.ModuleList()
        for index in range(self.num_layers):
            name = f"{prefix}.layers.{index}"
            attention = SelfAttention(
                context, None, qkv_bias=True, out_bias=True, is_bidirectional=True, prefix=f"{name}.self_attn"
            )
            mlp = MLP(context, bias=True, prefix=f"{name}.mlp")
            self.layers.append(DecoderLayer(attention, mlp, LAYER_NORMS, lambda: LayerNorm(context, width, eps)))
        self._run_layers = LayerStack(self.layers, kept=kept)
        self.width = width
        self.row_bytes = context.dtype.itemsize * (8 * width + 2 * config.intermediate_size + columns) + 4 * columns

    @property
    def rows_per_tile(self) -> int:
        """Rows of a tile with as many patches as there are positions."""
        return self.side**2 + (self.class_embedding is not None)

    def forward(self, pixels: Tensor, positions: Sequence[Tensor], make_batch: MakeBatch) -> list[Tensor]:
        """Encodes tiles.

        Args:
            pixels: [patches, columns of a patch].
            positions: For each tile, int64 [patches] on the host: the place of each patch in the table of positions,
                without the class token.
            make_batch: Makes the batch.

        Returns:
            Hidden states [rows, width] of each of ``kept``.
        """
        hidden: Tensor = self.patch_embedding(pixels, make_batch([len(pixels)]))
        table = self.position_embedding.get_parameter("weight").data
        if self.class_embedding is not None:
            first = (self.class_embedding.data + table[0]).unsqueeze(0)
            tiles = hidden.split([len(each) for each in positions])
            places = [make_batch.on_device(each) for each in positions]
            parts = [part for tile, at in zip(tiles, places, strict=True) for part in (first, tile + table[1:][at])]
            hidden = torch.cat(parts)
        else:
            hidden = hidden + table[make_batch.on_device(torch.cat(list(positions)))]
        batch = make_batch([len(each) + (self.class_embedding is not None) for each in positions])
        if self.pre_layrnorm is not None:
            hidden = self.pre_layrnorm(hidden)
        states = self._run_layers(hidden, batch)
        return states if self.post_layernorm is None else [self.post_layernorm(each) for each in states]


def pieces_of(sizes: Sequence[int], most: int) -> list[slice]:
    """Consecutive tiles that are encoded together: slices of the tiles, each of at most ``most`` rows if it can be."""
    result, begin, rows = [], 0, 0
    for index, size in enumerate(sizes):
        if rows and rows + size > most:
            result.append(slice(begin, index))
            begin, rows = index, 0
        rows += size
    return [*result, slice(begin, len(sizes))]
