"""Models with vision parts in GGUF files answer as the checkpoints that they come from."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from api.errors import ModelFileError
from api.model.gguf_file import GGUFFile, read_gguf
from api.model.mmproj import TOKENS, vision_part
from engine_core.config import VisionFile
from engine_core.messages import f32
from executor.config import ModelConfig
from executor.language_part import RENAMES, language_fields
from tests import tiny
from tests.models.test_vision import Engine, alone, new_runner, requests
from tests.vision_families import IMAGE_TOKEN, VISION, checkpoint, spec_of, with_images

KINDS = {
    "gemma3": "gemma3",
    "idefics3": "idefics3",
    "llava": "mlp",
    "llava_next": "mlp",
    "mistral3": "pixtral",
    "pixtral": "pixtral",
    "qwen2_vl": "qwen2vl_merger",
    "qwen2_5_vl": "qwen2.5vl_merger",
    "qwen3_vl": "qwen3vl_merger",
}
"""``clip.projector_type`` of families."""
PARTS = r"^(model\.)?(visual|vision_model|vision_tower|connector|multi_modal_projector|image_newline)"
OWN_NAMES = [
    (r"^model\.(?=visual|multi_modal_projector)", ""),
    (r"^vision_tower\.(?=embeddings|encoder|p)(?!patch)", "vision_tower.vision_model."),
    (r"^image_newline$", "model.image_newline"),
    (r"\.mm_input_projection_weight$", ".mm_input_projection.weight"),
    (r"^visual\.merger\.norm\.", "v.post_ln."),
    (r"^visual\.merger\.linear_fc1\.", "mm.0."),
    (r"^visual\.merger\.linear_fc2\.", "mm.2."),
    (r"^visual\.deepstack_merger_list\.0\.(linear_)?", "v.deepstack.2."),
    (r"^visual\.deepstack_merger_list\.1\.(linear_)?", "v.deepstack.0."),
]
"""What converters rename before they ask the ``gguf`` package. The tiny Qwen3-VL takes states after layers 2 and 0."""
SUFFIXES = (".weight", ".bias")


def parts_of(name: str, tensor: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """A tensor as converters cut it."""
    if kind in ("qwen2_vl", "qwen2_5_vl") and ".qkv." in name:
        return {name.replace("qkv", which): part for which, part in zip("qkv", tensor.chunk(3), strict=True)}
    if KINDS[kind] == "pixtral" and re.search(r"\.[qk]_proj\.weight$", name):
        return {name: tensor.unflatten(0, (2, 2, -1)).transpose(1, 2).reshape(tensor.shape)}
    if kind.startswith("qwen") and name.endswith("patch_embed.proj.weight"):
        return {name: tensor[:, :, 0], f"{name}.1": tensor[:, :, 1]}
    return {name: tensor}


def vision_tensors(kind: str, *, is_old: bool) -> dict[str, torch.Tensor]:
    """The vision part of a checkpoint as llama.cpp's converters write it."""
    found = {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 3)
    for stored, whole in load_file(checkpoint(kind) / "model.safetensors").items():
        if not re.match(PARTS, stored):
            continue
        for name, tensor in parts_of(stored, whole.float(), kind).items():
            for pattern, replacement in OWN_NAMES:
                name = re.sub(pattern, replacement, name)
            if kind.startswith("llava"):
                name = re.sub(r"^multi_modal_projector\.linear_1\.", "mm.0.", name)
            end = ".1" * name.endswith(".weight.1")
            name = names.get_name(name.removesuffix(end), try_suffixes=SUFFIXES) or name.removesuffix(end)
            other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"} if is_old else {}
            name = re.sub(r"ffn_(up|down)", lambda match: other.get(match.group(), match.group()), name) + end  # noqa: B023
            if kind.startswith("llava") and re.match(r"v\.(blk\.2|post_ln)\.", name):
                continue  # LLaVA takes states before the last layer
            found[name] = tensor + 1 if name == "mm.soft_emb_norm.weight" else tensor
    return found


def write(kind: str, path: Path, *, is_old: bool = False, projector: str | None = None) -> None:
    """Writes the vision part of a checkpoint as llama.cpp's converters do."""
    config = VISION[kind].config
    vision = {**config["vision_config"]}
    if kind == "qwen2_vl":  # as its converter has it
        vision |= {"intermediate_size": vision["hidden_size"], "hidden_size": vision["embed_dim"]}
    width = config["text_config"].get("hidden_size", 64)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_clip_projector_type(projector or KINDS[kind])
    is_llava = kind.startswith("llava")
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(2 if is_llava else 3)
    writer.add_vision_head_count(2)
    writer.add_vision_image_size(vision.get("image_size", 560))
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_projection_dim(512 if is_llava else width)
    writer.add_vision_projector_scale_factor(2)
    writer.add_vision_preproc_image_size(64)
    writer.add_vision_attention_layernorm_eps(1e-5 if is_llava else 1e-6)
    for name in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{name}", VISION[kind].processor.get(name, [0.5, 0.5, 0.5]))
    if kind == "llava_next":
        writer.add_array("clip.vision.image_grid_pinpoints", sum(config["image_grid_pinpoints"], []))
    if kind == "qwen2_5_vl":
        writer.add_vision_use_silu(True)
        writer.add_vision_n_wa_pattern(2)
        writer.add_uint32("clip.vision.window_size", vision["window_size"])
    if kind == "qwen3_vl":
        writer.add_vision_use_gelu(True)
    if KINDS[kind] == "pixtral":
        writer.add_vision_use_silu(True)
        writer.add_vision_spatial_merge_size(2)
    for name, tensor in vision_tensors(kind, is_old=is_old).items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def text_header(kind: str) -> GGUFFile:
    tokens = [str(index) for index in range(tiny.VOCAB_SIZE)]
    tokens[IMAGE_TOKEN] = TOKENS[KINDS[kind]]
    return GGUFFile("text.gguf", {"tokenizer.ggml.tokens": tokens}, [])


@functools.cache
def language_model(kind: str) -> Path:
    """The language model of a checkpoint as a GGUF file."""
    source = checkpoint(kind)
    fields = json.loads((source / "config.json").read_text())
    folder = source / "language"
    folder.mkdir()
    text = {**language_fields(fields), "model_type": LANGUAGE[kind]}
    for name in ("vision_config", "text_config"):
        text.pop(name, None)
    (folder / "config.json").write_text(json.dumps(text))
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if not re.match(PARTS, name):
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    tiny.write_tokenizer(folder)
    arch = {"qwen2": "qwen2vl", "qwen3": "qwen3vl"}.get(LANGUAGE[kind])
    return tiny.gguf_file(folder, gguf.GGMLQuantizationType.F32, arch=arch).path


LANGUAGE = {
    "gemma3": "gemma3_text",
    "idefics3": "llama",
    "llava": "llama",
    "llava_next": "llama",
    "mistral3": "llama",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers(tmp_path: Path, kind: str) -> None:
    """Embeddings of images, tokens and log probabilities are those of the checkpoint."""
    path = tmp_path / "mmproj.gguf"
    write(kind, path, is_old=kind in ("llava", "gemma3"))
    file = read_gguf(path)
    fields, spec = vision_part(file, text_header(kind))
    own = spec_of(kind)
    for name in ("family", "size", "tile", "merge_size", "patch_size", "resample", "shapes", "num_extra"):
        if not (name == "size" and kind.startswith("qwen")):  # files do not say what the model was given
            assert getattr(spec, name) == getattr(own, name)
    assert spec.pads_square == (kind == "llava")
    if kind == "pixtral":
        fields["vision_config"]["rope_theta"] = 300.0  # all models that there are have 10,000
    vision = VisionFile(path=str(path), header=file.header(), fields=fields)
    text = language_model(kind)
    config = ModelConfig(model=str(text), gguf=read_gguf(text).header(), vision=vision, dtype="float32")
    engine, other = Engine(kind, made=new_runner(kind, 256, config=config)), Engine(kind)
    for feature in with_images(kind, *requests(kind)[2])[1]:
        with torch.inference_mode():
            found, known = (each.images.encode(feature) for each in (engine, other))
        np.testing.assert_allclose(found, known, rtol=0, atol=1e-5)
    if kind in ("gemma3", "mistral3", "pixtral"):
        return  # GGUF files cannot say what windows their tiny language models have
    expected = alone(kind)
    for index in (2, 3):
        engine.add(index, *requests(kind)[index])
    for index, answer in engine.run().items():
        assert answer.tokens == expected[index].tokens
        for own_bytes, known_bytes in zip(answer.logprobs, expected[index].logprobs, strict=True):
            np.testing.assert_allclose(f32(own_bytes[:16]), f32(known_bytes[:16]), rtol=0, atol=1e-4)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mmproj.gguf"
    write("idefics3", path, projector="ldp")
    with pytest.raises(ModelFileError, match="projector type 'ldp' is not supported"):
        vision_part(read_gguf(path), text_header("idefics3"))
    no_clip: Any = GGUFFile("a.gguf", {"general.architecture": "llama"}, [])
    with pytest.raises(ModelFileError, match="not an mmproj file"):
        vision_part(no_clip, text_header("idefics3"))
    write("idefics3", path)
    with pytest.raises(ModelFileError, match="has no token '<image>'"):
        vision_part(read_gguf(path), GGUFFile("text.gguf", {}, []))
    other = GGUFFile("text.gguf", {"general.architecture": "llama", "llama.embedding_length": 65}, [])
    with pytest.raises(ModelFileError, match=r"its embeddings have 64 numbers, text\.gguf's do not"):
        vision_part(read_gguf(path), other)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        ("qwen2_5_vl", {"clip.vision.n_wa_pattern": 2.5}, "n_wa_pattern must be an integer"),
        ("qwen2_vl", {"clip.vision.block_count": 1 << 30}, "block_count must be an integer from 1 to"),
        ("qwen3_vl", {"clip.vision.patch_size": "8"}, "patch_size is missing, or not a positive number"),
        ("llava", {"clip.vision.feature_layer": [0.5]}, "feature_layer is no list of integers"),
        ("llava_next", {"clip.vision.image_grid_pinpoints": [28, 29]}, "image_grid_pinpoints must be a list"),
        ("mistral3", {"clip.vision.image_size": 1}, "size must be an object with a longest_edge"),
    ],
)
def test_headers_that_lie(tmp_path: Path, kind: str, wrong: dict[str, Any], message: str) -> None:
    path = tmp_path / "mmproj.gguf"
    write(kind, path)
    file = read_gguf(path)
    with pytest.raises(ModelFileError, match=message):
        vision_part(replace(file, metadata={**file.metadata, **wrong}), text_header(kind))


def test_llava_without_image_token(tmp_path: Path) -> None:
    path = tmp_path / "mmproj.gguf"
    write("llava", path)
    fields, spec = vision_part(read_gguf(path), GGUFFile("text.gguf", {"tokenizer.ggml.tokens": ["<unk>", "a"]}, []))
    assert (fields["image_token_id"], spec.image_token_id) == (0, 0)


def test_gemma3_without_image_token(tmp_path: Path) -> None:
    path = tmp_path / "mmproj.gguf"
    write("gemma3", path)
    tokens = [*map(str, range(255999)), "<start_of_image>", "<end_of_image>", "<unused99>"]
    fields, spec = vision_part(read_gguf(path), GGUFFile("text.gguf", {"tokenizer.ggml.tokens": tokens}, []))
    assert (fields["image_token_id"], spec.image_token_id, spec.placeholder_id) == (256001, 256001, 255999)
