"""Which images a step encodes, and which encoded images the workers keep.

Workers hold encoder outputs by content hash, up to a number of embeddings. An entry is referenced by the running
requests that have yet to compute tokens of that image; entries that no request references stay until others need the
room, the least recently used first. A prompt is cut before an image that can be neither found nor encoded in this step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from engine_core.in_flight import I64
from engine_core.messages import I32, MultiModalFeature, MultiModalSupport
from engine_core.request import Request

ENCODER_PAIRS = 1 << 14
"""Pairs of tokens that attend to each other in the time of an embedding: with small language models, or large images,
an encoder takes longer than the model."""
ALONE_PATCHES = 4096
"""Patches that a step encodes if no answer waits for it, which saves steps. New requests still wait."""


class EncoderCacheManager:
    """Plans the work of the encoder, and mirrors what the workers have."""

    def __init__(self, support: MultiModalSupport | None, step_tokens: int) -> None:
        """Starts with empty workers.

        Args:
            support: What the model does with images; None: it takes none.
            step_tokens: Most tokens of a step.
        """
        self.support = support
        self._step_tokens = step_tokens
        self._capacity = 0 if support is None else support.cache_tokens
        self.restart()

    def restart(self) -> None:
        """Forgets everything: the workers are new, and no request runs."""
        self._sizes: dict[str, int] = {}
        """Embeddings of each entry."""
        self._users: dict[str, set[int]] = {}
        """Indices of the requests that reference an entry."""
        self._unused: OrderedDict[str, None] = OrderedDict()
        """Entries without references, the least recently used first."""
        self._held: dict[int, dict[int, str]] = {}
        """By request, the features whose entries it references."""
        self._requests: dict[int, Request] = {}
        """Running requests with images that are not computed, by slot."""
        self._freed: list[str] = []
        self._chosen: list[tuple[Request, int]] = []
        self._left = self._step_tokens
        """Patches that the step may still encode. It encodes one image, whatever its size."""
        self._num_embeds = 0
        """Embeddings that the step encodes."""
        self.num_pairs = 0
        """Pairs of tokens that could attend to each other in the time of the last plan's images."""

    @property
    def is_idle(self) -> bool:
        """Whether no running request has tokens of images to compute."""
        return not self._requests

    @property
    def num_cached(self) -> int:
        """Embeddings that the workers hold."""
        return sum(self._sizes.values())

    def begin(self, num_running: int) -> None:
        """Begins a step, which encodes as many patches as it computes tokens at most: an encoder must not hold up the
        answers of others for long. More if nobody has one yet.

        Args:
            num_running: Running requests.
        """
        if not self._chosen:
            is_alone = num_running == len(self._requests)
            self._left = max(self._step_tokens, ALONE_PATCHES) if is_alone else self._step_tokens

    def limit(self, slots: I32, counts: I64, scheduled: I64, budget: int) -> I64:
        """Cuts the tokens of running rows: to those that a step has room for, and before images that it cannot have.

        Args:
            slots: int32 [rows].
            counts: int64 [rows]: tokens that each row may compute.
            scheduled: int64 [rows]: tokens computed before.
            budget: Tokens of the step. What a row cannot use is left for those after it.
        """
        counts = counts.copy()
        for row, slot in enumerate(slots.tolist()):
            count = min(int(counts[row]), budget)
            if slot in self._requests:
                count = self.fit(self._requests[slot], int(scheduled[row]), count)
            counts[row] = count
            budget -= count
        return counts

    def fit(self, request: Request, begin: int, count: int) -> int:
        """How many of ``count`` tokens from ``begin`` on can be computed; makes sure of the images among them."""
        assert self.support is not None
        for index, feature in enumerate(request.message.mm_features):
            start, end = feature.offset, feature.offset + feature.length
            if end <= begin or start >= begin + count:
                continue
            if self.support.whole_images and begin + count < end:
                return max(0, start - begin)
            if not self._get(request, index, feature):
                return max(0, start - begin)
        return count

    def admit(self, request: Request, begin: int, count: int, *, whole: bool) -> int:
        """``fit`` for a request that has no slot yet. 0: it cannot start in this step.

        Args:
            request: The request.
            begin: Tokens that it finds in the prefix cache.
            count: Tokens to compute.
            whole: Fewer are not enough.
        """
        if not request.message.mm_features:
            return count
        fitting = self.fit(request, begin, count)
        if not fitting or (whole and fitting < count):
            self.stopped(request)
            return 0
        return fitting

    def _get(self, request: Request, index: int, feature: MultiModalFeature) -> bool:
        """Whether an image's embeddings are there for this step; chooses it for encoding if there is room."""
        held = self._held.setdefault(request.index, {})
        if index in held:
            return True
        name = feature.identifier
        if name not in self._sizes:
            is_too_much = self._chosen and feature.num_patches > self._left
            if is_too_much or not self._make_room(feature.num_embeds):
                return False
            self._left -= feature.num_patches
            self._num_embeds += feature.num_embeds
            self._sizes[name] = feature.num_embeds
            self._users[name] = set()
            self._chosen.append((request, index))
        self._unused.pop(name, None)
        self._users[name].add(request.index)
        held[index] = name
        return True

    def _make_room(self, size: int) -> bool:
        unused = sum(self._sizes[name] for name in self._unused)
        if self.num_cached - unused + size > self._capacity:
            return False
        while self.num_cached + size > self._capacity:
            name, _ = self._unused.popitem(last=False)
            del self._sizes[name], self._users[name]
            self._freed.append(name)
        return True

    def features_for(self, request: Request, num_computed: int) -> tuple[MultiModalFeature, ...]:
        """The features of a request that starts, with data only for those that its workers may have to encode."""
        features = request.message.mm_features
        if not features:
            return features
        chosen = {index for other, index in self._chosen if other is request}
        held = self._held.get(request.index, {})
        result = []
        for index, feature in enumerate(features):
            is_over = feature.offset + feature.length <= num_computed
            is_there = index in held and index not in chosen
            result.append(msgspec.structs.replace(feature, data=()) if is_over or is_there else feature)
        return tuple(result)

    def started(self, request: Request) -> None:
        """Records that a request has a slot."""
        if request.message.mm_features:
            self._requests[request.slot] = request

    def _advance(self, slots: I32, scheduled: I64) -> None:
        """Drops the references of images that are planned to be computed: plans are executed in order."""
        for slot, count in zip(slots.tolist(), scheduled.tolist(), strict=True):
            request = self._requests.get(slot)
            if request is None:
                continue
            features = request.message.mm_features
            held = self._held.get(request.index, {})
            for index in [each for each in held if features[each].offset + features[each].length <= count]:
                self._drop(request, held.pop(index))
            if features[-1].offset + features[-1].length <= count:
                del self._requests[slot]
                self._held.pop(request.index, None)

    def stopped(self, request: Request) -> None:
        """Drops all references of a request that loses its slot, and what this step was to encode for it alone."""
        if not request.message.mm_features:
            return
        self._requests.pop(request.slot, None)
        for name in set(self._held.pop(request.index, {}).values()):
            self._drop(request, name)
        for choice in [choice for choice in self._chosen if choice[0] is request]:
            self._chosen.remove(choice)
            self._choose_again(request.message.mm_features[choice[1]])

    def _choose_again(self, feature: MultiModalFeature) -> None:
        """Another request of the step may need what was chosen for one that was preempted."""
        name = feature.identifier
        for request in self._requests.values():
            for index, held in self._held.get(request.index, {}).items():
                if held == name:
                    self._chosen.append((request, index))
                    return
        self._left += feature.num_patches
        self._num_embeds -= self._sizes.pop(name)
        del self._users[name], self._unused[name]

    def _drop(self, request: Request, name: str) -> None:
        if any(held == name for held in self._held.get(request.index, {}).values()):
            return
        users = self._users[name]
        users.discard(request.index)
        if not users:
            self._unused[name] = None

    def take(self, slots: I32, scheduled: I64) -> dict[str, Any]:
        """What a plan says about images: fields of a ``SchedulerOutput``. Ends the step.

        Args:
            slots: int32 [rows] of the plan.
            scheduled: int64 [rows]: tokens computed after it.
        """
        if self._requests:
            self._advance(slots, scheduled)
        chosen = tuple((request.slot, index) for request, index in self._chosen)
        fields = {"freed_features": tuple(self._freed), "encoder_inputs": chosen}
        self.num_pairs, self._num_embeds = self._num_embeds * ENCODER_PAIRS, 0
        self._freed, self._chosen = [], []
        return fields

    def check_integrity(self, running: Iterable[Request]) -> None:
        """Asserts that references are those of running requests."""
        indices = {request.index for request in running}
        assert set(self._held) <= indices and {each.index for each in self._requests.values()} <= indices
        assert self._sizes.keys() == self._users.keys()
        assert all(not self._users[name] for name in self._unused)


def feature_problem(
    features: Sequence[MultiModalFeature], tokens: I32, support: MultiModalSupport | None
) -> str | None:
    """The problem with a prompt's images, or None."""
    if not features:
        return None
    if support is None:
        return "the model takes no images"
    place = 0
    for feature in features:
        if feature.offset < place or feature.length < 1 or feature.offset + feature.length > len(tokens):
            return "images overlap, or are not inside the prompt"
        place = feature.offset + feature.length
        count = int((tokens[feature.offset : place] == support.image_token_id).sum())
        if not 1 <= count == feature.num_embeds <= support.max_image_tokens or not feature.data:
            return f"an image has {feature.num_embeds} embeddings for {count} placeholders"
    return None
