"""Images of a worker's requests: encoded once, kept by content, and put where prompts have placeholders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from executor.attention.base import HostRows
from executor.captured_layers import capture_layers
from executor.device.base import Device
from executor.device.steps import ImmediateSteps, StepChannel
from executor.forward import Forward, step_blocks
from executor.input_batch import Deepstack, InputBatch, Spans
from executor.layers.attention import form_groups
from executor.loader import LoadedModel
from executor.messages import I32, I64, MultiModalFeature, MultiModalSupport, SchedulerOutput, i32, to_array
from executor.models.vision.tower import VisionTower
from executor.request_states import RequestStates
from ops import AttentionMetadata

CACHE_TOKENS = 8192
"""Embeddings that are kept, unless an image or a step has more."""


@dataclass(frozen=True)
class Placed:
    """An image of a running request."""

    feature: MultiModalFeature
    places: I64
    """int64 [embeddings]: positions of its placeholders in the prompt, ascending."""
    grid: Sequence[int]
    """Time, height and width in patches, of an image with positions on three axes."""


class ImageInputs:
    """Encodes images and keeps the results, as the scheduler's ``EncoderCacheManager`` plans."""

    def __init__(
        self,
        tower: VisionTower,
        hidden_size: int,
        dtype: torch.dtype,
        device: Device,
        max_tokens: int,
        *,
        captures: bool = True,
        channel: StepChannel | None = None,
    ) -> None:
        """Starts without images.

        Args:
            tower: Its attention layers have backends.
            hidden_size: Columns of the language model's embeddings.
            dtype: Their dtype.
            device: Where the tower runs.
            max_tokens: Most tokens of a step.
            captures: Whether layers run as programs; the bits are the same.
            channel: The model's way to the device; None: it is the host's memory.
        """
        self.tower = tower
        self.dtype = dtype
        self._hidden_size = hidden_size
        self._device = device
        self._channel = channel or ImmediateSteps()
        (self._group,) = form_groups(tower.attention_layers(), None)
        if captures:
            capture_layers(tower)
        self._outputs: dict[str, Tensor] = {}
        """By identifier: [embeddings, levels * hidden_size]."""
        self._requests: dict[int, tuple[Placed, ...]] = {}
        """Images of running requests, by slot."""
        self.support = MultiModalSupport(
            image_token_id=tower.image_token_id,
            max_image_tokens=tower.max_image_tokens,
            cache_tokens=max(CACHE_TOKENS, tower.max_image_tokens, max_tokens),
            whole_images=tower.whole_images,
        )
        self._states: RequestStates
        self._num_reserved = 0
        """Blocks that the memory for K and V has."""

    def num_bytes(self) -> int:
        """Memory for encoding an image, and for the embeddings that are kept."""
        tower, group = self.tower, self._group
        shapes = group.backend.kv_shape(self._num_blocks(tower.max_rows), group.block_size, group.shape, group.kv_dtype)
        kv = sum(torch.Size(shape).numel() for shape in shapes) * group.kv_dtype.itemsize
        kept = self.support.cache_tokens * tower.num_levels * self._hidden_size * self.dtype.itemsize
        return kv + kept + tower.max_rows * tower.row_bytes

    def _num_blocks(self, num_rows: int) -> int:
        """Blocks for any number of sequences: short ones waste the most."""
        return -(-num_rows // self._group.block_size) + num_rows // 16

    def apply(self, plan: SchedulerOutput, states: RequestStates) -> None:
        """Takes over a plan's changes and encodes its images. ``states`` has the plan's requests already."""
        self._states = states
        for slot in i32(plan.finished_slots).tolist():
            self._requests.pop(slot, None)
        for name in plan.freed_features:
            self._outputs.pop(name, None)
        for request in plan.new_reqs:
            self._requests.pop(request.slot, None)
            if request.mm_features:
                tokens = i32(request.token_ids)
                placed = tuple(self._placed(each, tokens) for each in request.mm_features)
                self._requests[request.slot] = placed
                if self.tower.merge_size:
                    table = axes_of(placed, request.num_prompt_tokens, self.tower.merge_size)
                    states.set_axes(request.slot, table)
        for slot, index in plan.encoder_inputs:
            feature = self._requests[slot][index].feature
            self._outputs[feature.identifier] = self.encode(feature)

    def _placed(self, feature: MultiModalFeature, tokens: I32) -> Placed:
        own = tokens[feature.offset : feature.offset + feature.length]
        places = feature.offset + np.flatnonzero(own == self.tower.image_token_id)
        return Placed(feature, places, feature.axes)

    def encode(self, feature: MultiModalFeature) -> Tensor:
        """The embeddings of an image: [num_embeds, levels * hidden_size]."""
        data = dict(feature.data)
        patches, levels = to_array(data["patches"]), to_array(data["levels"])
        by_channel = patches.reshape(len(patches), len(levels), -1)
        values = np.empty(by_channel.shape, np.float32)
        for channel, level in enumerate(levels):
            values[:, channel] = level[by_channel[:, channel]]
        pixels = self.on_device(torch.from_numpy(values.reshape(patches.shape))).to(self.dtype)
        grid = to_array(data["grid"]).tolist()
        result = self.tower.encode(pixels, grid, self)
        if result.shape != (feature.num_embeds, self.tower.num_levels * self._hidden_size):
            raise ValueError(f"an image has {feature.num_embeds} placeholders and {list(result.shape)} embeddings")
        return result

    def on_device(self, numbers: Tensor) -> Tensor:
        """See ``MakeBatch``."""
        return self._channel.upload({"": numbers.numpy()})[""]

    def __call__(self, lengths: Sequence[int]) -> InputBatch:
        """See ``MakeBatch``."""
        group = self._group
        counts = np.array(lengths, np.int32)
        rows = np.arange(len(counts)).repeat(counts)
        starts = np.zeros(len(counts) + 1, np.int32)
        starts[1:] = np.cumsum(counts)
        positions = np.arange(len(rows)) - starts[rows]
        table = step_blocks(counts, group.block_size)
        self._reserve(int(table[-1].max()) + 1)
        mapping = table[rows, positions // group.block_size].astype(np.int64) * group.block_size
        mapping += positions % group.block_size
        columns = {"starts": starts, "lengths": counts, "table": table, "mapping": mapping}
        views = self._channel.upload({**columns, "positions": positions.astype(np.int32)})
        step = AttentionMetadata(views["starts"], views["lengths"], views["table"], views["mapping"], group.block_size)
        meta = group.plan(step, HostRows(counts, counts, table) if group.backend.needs_rows else None)
        return InputBatch(views["positions"], views["positions"], [meta], views["positions"].long())

    def _reserve(self, num_blocks: int) -> None:
        """Makes the memory for K and V large enough. All layers share it, since they are computed one by one."""
        if self._num_reserved >= num_blocks:
            return
        self._num_reserved = max(num_blocks, self._num_blocks(self.tower.max_rows))
        group = self._group
        shapes = group.backend.kv_shape(self._num_reserved, group.block_size, group.shape, group.kv_dtype)
        shared = tuple(self._device.allocate_kv(shape, group.kv_dtype) for shape in shapes)
        for layer in self.tower.attention_layers():
            layer.kv_cache = shared

    def run(
        self, forward: Forward, embed: Callable[[InputBatch], Tensor], batch: InputBatch, slots: I32, counts: I32
    ) -> Sequence[Tensor]:
        """Computes a step, whether it has tokens of images or not.

        Args:
            forward: The model's passes.
            embed: Looks up the embeddings of a batch's tokens.
            batch: The step, as ``forward`` prepared it.
            slots: int32 [rows].
            counts: int32 [rows]: tokens of each row.

        Returns:
            What ``forward.run`` returns.
        """
        rows, found, ends = self._images_of(slots, counts) if self._requests else ([], [], [])
        if not rows:
            return forward.run(batch)
        places, outputs = self.on_device(torch.from_numpy(np.concatenate(rows))), torch.cat(found)
        if self.tower.is_pooled:
            hidden, *others = forward.run(batch)
            return hidden.index_copy(0, places, outputs), *others
        embeddings, *levels = outputs.split(self._hidden_size, dim=1)
        change = partial(self._with_images, rows=rows, ends=ends, places=places, levels=levels)
        return forward.run_eagerly(batch, change, lambda batch: embed(batch).index_copy(0, places, embeddings))

    def _with_images(
        self,
        batch: InputBatch,
        rows: Sequence[I64],
        ends: Sequence[tuple[int, int]],
        places: Tensor,
        levels: Sequence[Tensor],
    ) -> InputBatch:
        """A batch whose inputs are on the device, with what layers must know of its images; see ``_images_of``."""
        return replace(
            batch,
            spans=self._spans(batch, rows, ends) if self.tower.whole_images else None,
            deepstack=Deepstack(places, levels) if levels else None,
        )

    def _images_of(self, slots: I32, counts: I32) -> tuple[list[I64], list[Tensor], list[tuple[int, int]]]:
        """The images of which a step computes tokens.

        Returns:
            For each image the rows of its tokens in the step, int64 [tokens]; what ``encode`` gave for them;
            its request's row and the position behind its last token.
        """
        rows: list[I64] = []
        found: list[Tensor] = []
        ends: list[tuple[int, int]] = []
        firsts = (np.cumsum(counts) - counts).tolist()
        for row, (first, slot, count) in enumerate(zip(firsts, slots.tolist(), counts.tolist(), strict=True)):
            images = self._requests.get(slot)
            if images is None:
                continue
            begin = int(self._states.num_computed[slot])
            if begin > int(images[-1].places[-1]):
                del self._requests[slot]  # all are computed, so that later steps cost nothing
                continue
            for placed in images:
                low, high = np.searchsorted(placed.places, (begin, begin + count)).tolist()
                if high > low:
                    rows.append(placed.places[low:high] - begin + first)
                    found.append(self._outputs[placed.feature.identifier][low:high])
                    ends.append((row, int(placed.places[-1]) + 1))
        return rows, found, ends

    def _spans(self, batch: InputBatch, tokens: Sequence[I64], spans: Sequence[tuple[int, int]]) -> Spans:
        """The images of a step, whose tokens attend to each other.

        Args:
            batch: The step.
            tokens: For each image, the rows of its tokens in the step, int64 [tokens].
            spans: For each image, its request's row and the position behind its last token.
        """
        columns = {
            "starts": np.cumsum([0, *map(len, tokens)]).astype(np.int32),
            "requests": np.array([row for row, _ in spans]),
            "lengths": np.array([end for _, end in spans], np.int32),
            "tokens": np.concatenate(tokens),
        }
        views = self._channel.upload(columns)
        attention = [
            AttentionMetadata(  # not that of a planned step: its plan is for other rows
                views["starts"],
                views["lengths"],
                meta.block_table[views["requests"]],
                meta.slot_mapping,
                meta.block_size,
            )
            for meta in batch.attention
        ]
        return Spans(views["tokens"], attention)


def axes_of(images: Sequence[Placed], num_prompt: int, merge_size: int) -> I32:
    """Positions on three axes, time, height and width (M-RoPE; Wang et al., arXiv:2409.12191): int32 [3, num_prompt].

    The axes of text are equal. An image's tokens share a time, and the text after it goes on after the largest of its
    positions.
    """
    table = np.empty((3, num_prompt), np.int32)
    done = start = 0
    for image in images:
        first, count = int(image.places[0]), len(image.places)
        text = np.arange(first - done) + start
        table[:, done:first] = text
        start += len(text)
        _, height, width = image.grid
        height, width = height // merge_size, width // merge_size
        rows, columns = np.divmod(np.arange(count), width)
        table[:, first : first + count] = start + np.stack((np.zeros_like(rows), rows, columns))
        done, start = first + count, start + max(height, width)
    table[:, done:] = np.arange(num_prompt - done) + start
    return table


def create_image_inputs(
    loaded: LoadedModel,
    device: Device,
    max_tokens: int,
    *,
    captures: bool = True,
    channel: StepChannel | None = None,
) -> ImageInputs | None:
    """The images of a model's requests; None: it takes none. See ``ImageInputs``."""
    if loaded.tower is None:
        return None
    size = loaded.hf_config.hidden_size
    if loaded.tower.is_pooled:
        size = loaded.model.hidden_size or size
    return ImageInputs(loaded.tower, size, loaded.dtype, device, max_tokens, captures=captures, channel=channel)
