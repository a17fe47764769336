"""CLIP and SigLIP: vectors of texts and of images are those of transformers, alone and beside others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from api.media.pixels import process
from api.media.prompt import place_images
from api.media.reader import Picture
from api.model.image_spec import read_image_spec
from engine_core.cache_shape import CacheShape, GroupShape
from engine_core.config import CacheConfig, SchedulerConfig
from engine_core.messages import EngineCoreRequest, MultiModalFeature, ResolvedPoolingParams, to_array
from engine_core.request import Request
from engine_core.scheduler import Scheduler
from engine_core.validation import request_problem
from executor.config import StepSize
from executor.device.cpu import CpuDevice
from executor.image_inputs import create_image_inputs
from executor.layers.attention import form_groups
from executor.messages import InitKVCache
from executor.model_runner import ModelRunner
from tests import tiny
from tests.models.harness import load, random_tokens
from tests.vision_families import CLIP, SIGLIP, tiles

MAX_LEN, SIZE = 40, 24
TEXT: dict[str, Any] = {
    "vocab_size": tiny.VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": MAX_LEN,
    "eos_token_id": 380,
}


@pytest.fixture(scope="module", params=["CLIP", "Siglip"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp(kind)
    vision = {**(CLIP if kind == "CLIP" else SIGLIP)}
    if kind == "Siglip":
        vision |= {"hidden_size": SIZE, "num_attention_heads": 2}
    text = {**TEXT, "projection_size": SIZE} if kind == "Siglip" else TEXT
    sizes = {"projection_dim": SIZE} if kind == "CLIP" else {}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **sizes)
    network = getattr(transformers, f"{kind}Model")(config).eval()
    tiny.randomize(network)
    network.save_pretrained(folder)
    processor: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    if kind == "Siglip":
        processor = {"size": {"height": 28, "width": 28}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_texts_and_images(kind: str, folder: Path) -> None:
    import transformers

    network = getattr(transformers, f"{kind}Model").from_pretrained(folder).eval()
    spec = read_image_spec(folder, json.loads((folder / "config.json").read_text()))
    assert spec is not None and spec.is_pooled
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    images = [process(spec, Image.fromarray(each)) for each in noise]
    texts = [[*(token % 300 for token in random_tokens(count, count)), 380] for count in (7, 20)]
    if kind == "Siglip":
        assert (spec.text_length, spec.pad_token_id) == (MAX_LEN, 1)
        texts = [[*text, *[1] * (MAX_LEN - len(text))] for text in texts]

    loaded = load(folder)
    device = CpuDevice()
    groups = form_groups(loaded.model.attention_layers(), 32)
    size = StepSize(max_num_seqs=8, max_num_batched_tokens=16)
    runner = ModelRunner(loaded, device, groups, step_size=size, enforce_eager=False)
    runner.images = create_image_inputs(loaded, device, 16)
    assert runner.images is not None and not loaded.pooling.generates and loaded.vector_size == SIZE
    is_cached = any(group.is_cached for group in groups)
    runner.initialize(InitKVCache((64,) * is_cached, MAX_LEN))
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=8, max_num_batched_tokens=16 if is_cached else 50, enable_chunked_prefill=is_cached
        ),
        CacheConfig(),
        CacheShape((GroupShape(64, 32, None),) * is_cached),
        MAX_LEN,
        multimodal=runner.images.support,
    )
    prompts: list[tuple[list[int], tuple[MultiModalFeature, ...]]] = [(text, ()) for text in texts]
    prompts += [
        place_images(spec, [spec.image_token_id], [Picture(str(number), image)], lambda text: [], "input")
        for number, image in enumerate(images)
    ]
    for index, (tokens, features) in enumerate(prompts):
        message = EngineCoreRequest(
            request_id="",
            index=index,
            prompt_token_ids=np.array(tokens, np.int32).tobytes(),
            pooling_params=ResolvedPoolingParams(),
            mm_features=features,
        )
        support, pooling = runner.images.support, loaded.pooling
        assert request_problem(message, runner.vocab_size, MAX_LEN, SIZE, pooling, multimodal=support) is None
        scheduler.add_request(Request(message))
    vectors: dict[int, torch.Tensor] = {}
    while (planned := scheduler.schedule()) is not None:
        plan, step = planned
        with torch.inference_mode():
            result = runner.execute(plan)
        for output in scheduler.update_from_output(step, result).outputs:
            assert output.pooling_output is not None
            vectors[output.index] = torch.from_numpy(to_array(output.pooling_output).copy())
    with torch.inference_mode():
        expected = [network.get_text_features(torch.tensor([text])) for text in texts]
        expected += [network.get_image_features(tiles(spec, image)) for image in images]
    for index, theirs in enumerate(expected):
        found = theirs if isinstance(theirs, torch.Tensor) else theirs.pooler_output
        torch.testing.assert_close(vectors[index], torch.nn.functional.normalize(found[0], dim=0), rtol=0, atol=1e-5)
