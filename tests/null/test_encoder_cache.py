"""Which images are encoded when, and which are kept: no token is computed without its image, and memory is bounded."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import msgspec
import numpy as np
import pytest

from engine_core.cache_shape import CacheShape, GroupShape
from engine_core.config import CacheConfig, SchedulerConfig
from engine_core.encoder_cache_manager import feature_problem
from engine_core.messages import EngineCoreRequest, MultiModalFeature, MultiModalSupport, ResolvedParams, i32, to_tensor
from engine_core.request import Request
from engine_core.scheduler import Scheduler
from executor.messages import SchedulerOutput
from tests.fake_device import FakeDevice

VOCAB, STOP, IMAGE = 50, 7, 49
DATA = (("patches", to_tensor(np.zeros(1, np.uint8))),)
BLOCK_SIZE = 4


class Worker:
    """Has what plans say, and checks that it suffices."""

    def __init__(self, shape: CacheShape, support: MultiModalSupport) -> None:
        self.device = FakeDevice(list(shape.groups), VOCAB, STOP)
        self.support = support
        self.features: dict[int, tuple[MultiModalFeature, ...]] = {}
        self.computed: dict[int, int] = {}
        self.kept: dict[str, int] = {}
        self.num_encoded = 0

    def execute(self, plan: SchedulerOutput) -> Any:
        for name in plan.freed_features:
            del self.kept[name]
        for new in plan.new_reqs:
            self.features[new.slot], self.computed[new.slot] = new.mm_features, new.num_computed_tokens
        for slot, index in plan.encoder_inputs:
            feature = self.features[slot][index]
            assert feature.data and feature.identifier not in self.kept
            self.kept[feature.identifier] = feature.num_embeds
            self.num_encoded += 1
        assert sum(self.kept.values()) <= self.support.cache_tokens
        for slot, count in zip(i32(plan.slots).tolist(), i32(plan.num_scheduled_tokens).tolist(), strict=True):
            begin, end = self.computed[slot], self.computed[slot] + count
            self.computed[slot] = end
            for feature in self.features[slot]:
                last = feature.offset + feature.length
                if feature.offset < end and begin < last:
                    assert feature.identifier in self.kept
                    assert not self.support.whole_images or end >= last
        return self.device.execute(plan)


def request(index: int, rng: random.Random) -> Request:
    tokens: list[int] = []
    features = []
    for _ in range(rng.randint(0, 3)):
        tokens += [8 + token % 40 for token in rng.sample(range(40), rng.randint(0, 9))]
        number = rng.randint(1, 6)
        length = 2 + number
        features.append(MultiModalFeature(f"image {number}", len(tokens), length, length, 4 * number, data=DATA))
        tokens += [IMAGE] * length
    tokens += [8, index % 40]
    message = EngineCoreRequest(
        request_id=str(index),
        index=index,
        prompt_token_ids=np.array(tokens, np.int32).tobytes(),
        sampling_params=ResolvedParams(max_tokens=rng.randint(1, 12)),
        mm_features=tuple(features),
    )
    return Request(message)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_no_token_is_computed_without_its_image(seed: int, whole: bool) -> None:
    """Random prompts with few images, little room for blocks and embeddings, aborts and restarts."""
    rng = random.Random(seed)
    support = MultiModalSupport(IMAGE, 8, rng.choice([8, 12, 30]), whole)
    shape = CacheShape((GroupShape(rng.choice([24, 60]), BLOCK_SIZE, None),))
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=rng.choice([8, 11, 40])),
        CacheConfig(enable_prefix_caching=rng.random() < 0.5),
        shape,
        80,
        multimodal=support,
    )
    worker = Worker(shape, support)
    in_flight: deque[Any] = deque()
    for index in range(25):
        scheduler.add_request(request(index, rng))
    for _ in range(3000):
        if not scheduler.has_unfinished and not in_flight:
            break
        planned = scheduler.schedule() if len(in_flight) < 2 else None
        if planned is not None:
            in_flight.append(planned)
            continue
        assert in_flight, "nothing goes on"
        plan, step = in_flight.popleft()
        scheduler.update_from_output(step, worker.execute(plan))
        scheduler.check_integrity()
        if rng.random() < 0.02 and scheduler.requests:
            scheduler.abort_request(rng.choice(list(scheduler.requests)))
        if rng.random() < 0.01:
            in_flight.clear()
            scheduler.restart()
            worker = Worker(shape, support)
    assert not scheduler.has_unfinished
    assert scheduler.images.is_idle


def with_parts(index: int, count: int) -> Request:
    """A request with an image in parts."""
    features = [
        MultiModalFeature(f"{index}.{part}", 2 + 5 * part, 4, 4, num_patches=100, data=DATA) for part in range(count)
    ]
    tokens = [8, 9, *[*[IMAGE] * 4, 10] * count]
    params = ResolvedParams(max_tokens=20)
    message = EngineCoreRequest("", index, np.array(tokens, np.int32).tobytes(), params, mm_features=tuple(features))
    return Request(message)


def test_an_image_in_parts_holds_up_nobody() -> None:
    """A step encodes a part of one image at a time, and has a token of each answer; more if there is no answer."""
    support = MultiModalSupport(IMAGE, 8, 100)
    shape = CacheShape((GroupShape(200, BLOCK_SIZE, None),))
    scheduler = Scheduler(SchedulerConfig(max_num_batched_tokens=32), CacheConfig(), shape, 80, multimodal=support)
    worker = Worker(shape, support)

    def step() -> SchedulerOutput:
        plan, step = scheduler.schedule() or pytest.fail()
        scheduler.update_from_output(step, worker.execute(plan))
        return plan

    scheduler.add_request(with_parts(0, 6))
    assert len(step().encoder_inputs) == 6, "nobody else is there"
    while not scheduler.images.is_idle:
        step()
    scheduler.add_request(with_parts(1, 6))
    scheduler.add_request(with_parts(2, 6))
    plans = [step()]
    while not scheduler.images.is_idle and len(plans) < 30:
        plans.append(step())
    assert sum(len(plan.encoder_inputs) for plan in plans) == 12
    assert all(len(plan.encoder_inputs) <= 1 and 0 in i32(plan.slots) for plan in plans[:6])


def test_an_image_is_encoded_once() -> None:
    support = MultiModalSupport(IMAGE, 8, 8)
    shape = CacheShape((GroupShape(100, BLOCK_SIZE, None),))
    scheduler = Scheduler(SchedulerConfig(max_num_batched_tokens=16), CacheConfig(), shape, 80, multimodal=support)
    worker = Worker(shape, support)
    for index in range(5):
        feature = MultiModalFeature("a", 2 + index, 4, 4, data=DATA)
        tokens = [*range(10, 12 + index), *[IMAGE] * 4, 9]
        message = EngineCoreRequest(
            request_id="",
            index=index,
            prompt_token_ids=np.array(tokens, np.int32).tobytes(),
            sampling_params=ResolvedParams(max_tokens=2),
            mm_features=(feature,),
        )
        scheduler.add_request(Request(message))
    while (planned := scheduler.schedule()) is not None:
        plan, step = planned
        scheduler.update_from_output(step, worker.execute(plan))
        if any(feature.data for new in plan.new_reqs for feature in new.mm_features):
            assert plan.encoder_inputs, "pixels are sent to be encoded"
    assert worker.num_encoded == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_embeds": 3}, "3 embeddings for 4 placeholders"),
        ({"offset": 3}, "4 embeddings for 3 placeholders"),
        ({"offset": 9}, "not inside the prompt"),
        ({"length": 0}, "not inside the prompt"),
        ({"data": ()}, "4 embeddings"),
    ],
)
def test_wrong_places(fields: dict[str, Any], message: str) -> None:
    feature = MultiModalFeature("a", 2, 4, 4, data=DATA)
    tokens = np.array([1, 2, *[IMAGE] * 4, 3, 4], np.int32)
    support = MultiModalSupport(IMAGE, 8, 8)
    assert feature_problem([feature], tokens, support) is None
    wrong = msgspec.structs.replace(feature, **fields)
    assert message in str(feature_problem([wrong], tokens, support))
    assert feature_problem([feature], tokens, None) == "the model takes no images"
    assert "overlap" in str(feature_problem([feature, feature], tokens, support))
