"""Vision parts in GGUF files give the embeddings of the checkpoints that they come from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from api.errors import ModelFileError
from api.model.gguf_file import GGUFFile, read_gguf
from api.model.mmproj import TOKENS, vision_part
from engine_core.config import VisionFile
from engine_core.messages import MultiModalFeature
from executor.device.cpu import CpuDevice
from executor.image_inputs import create_image_inputs
from executor.loader import LoadedModel
from tests import tiny
from tests.models.harness import load
from tests.vision_families import IMAGE_TOKEN, SIGLIP, checkpoint, picture, spec_of, with_images

NAMES = [
    (r"^(model\.)?(vision_model|vision_tower(\.vision_model)?)\.", ""),
    (r"^embeddings\.patch_embedding\.", "v.patch_embd."),
    (r"^embeddings\.position_embedding\.", "v.position_embd."),
    (r"^post_layernorm\.", "v.post_ln."),
    (r"^encoder\.layers\.", "v.blk."),
    (r"\.layer_norm(.)\.", r".ln\1."),
    (r"\.self_attn\.(.)_proj\.", r".attn_\1."),
    (r"\.self_attn\.out_proj\.", ".attn_out."),
    (r"^model\.connector\.modality_projection\.proj\.", "mm.model.fc."),
    (r"^(model\.)?multi_modal_projector\.mm_input_projection_weight", "mm.input_projection.weight"),
    (r"^(model\.)?multi_modal_projector\.mm_soft_emb_norm\.", "mm.soft_emb_norm."),
]


def write(folder: Path, kind: str, path: Path, *, is_old: bool = False, projector: str | None = None) -> None:
    """Writes the vision part of a checkpoint as llama.cpp's converter does."""
    vision = {**SIGLIP, "image_size": 32, "patch_size": 8} if kind == "idefics3" else {**SIGLIP, "image_size": 28}
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_string("clip.projector_type", projector or kind)
    numbers = {
        "embedding_length": vision["hidden_size"],
        "feed_forward_length": vision["intermediate_size"],
        "block_count": vision["num_hidden_layers"],
        "attention.head_count": vision["num_attention_heads"],
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "projection_dim": 64 if kind == "idefics3" else 72,
        "projector.scale_factor": 2,
        "preproc_image_size": 64,
    }
    for name, number in numbers.items():
        writer.add_uint32(f"clip.vision.{name}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    order = ("ffn_down", "ffn_up") if is_old else ("ffn_up", "ffn_down")
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not re.search("vision|connector|multi_modal", name):
            continue
        for pattern, replacement in [*NAMES, (r"\.mlp\.fc1\.", f".{order[0]}."), (r"\.mlp\.fc2\.", f".{order[1]}.")]:
            name = re.sub(pattern, replacement, name)
        array = tensor.float().numpy()
        writer.add_tensor(name, array + 1 if name == "mm.soft_emb_norm.weight" else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def text_header(kind: str) -> GGUFFile:
    tokens = [str(index) for index in range(tiny.VOCAB_SIZE)]
    tokens[IMAGE_TOKEN] = TOKENS[kind]
    return GGUFFile("text.gguf", {"tokenizer.ggml.tokens": tokens}, [])


def embeddings(loaded: LoadedModel, feature: MultiModalFeature) -> torch.Tensor:
    images = create_image_inputs(loaded, CpuDevice(), 64)
    assert images is not None
    with torch.inference_mode():
        return images.encode(feature)


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("kind", ["gemma3", "idefics3"])
def test_embeddings(tmp_path: Path, kind: str, is_old: bool) -> None:
    folder, path = checkpoint(kind), tmp_path / "mmproj.gguf"
    write(folder, kind, path, is_old=is_old)
    file = read_gguf(path)
    fields, spec = vision_part(file, text_header(kind))
    own = spec_of(kind)
    assert (spec.size, spec.tile, spec.merge_size, spec.resample) == (own.size, own.tile, own.merge_size, own.resample)
    vision = VisionFile(path=str(path), header=file.header(), fields=fields)
    language = tiny.checkpoint("llama" if kind == "idefics3" else "gemma3", dtype="float32")
    text = tiny.gguf_file(language, gguf.GGMLQuantizationType.F32).path
    _, (feature,) = with_images(kind, [own.placeholder_id or IMAGE_TOKEN], [picture(kind, (57, 40))])
    found = embeddings(load(text, vision=vision), feature)
    np.testing.assert_allclose(found, embeddings(load(folder), feature), rtol=0, atol=1e-6)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mmproj.gguf"
    write(checkpoint("idefics3"), "idefics3", path, projector="ldp")
    with pytest.raises(ModelFileError, match="projector type 'ldp' is not supported"):
        vision_part(read_gguf(path), text_header("idefics3"))
    no_clip: Any = GGUFFile("a.gguf", {"general.architecture": "llama"}, [])
    with pytest.raises(ModelFileError, match="not an mmproj file"):
        vision_part(no_clip, text_header("idefics3"))
    write(checkpoint("idefics3"), "idefics3", path)
    with pytest.raises(ModelFileError, match="has no token '<image>'"):
        vision_part(read_gguf(path), GGUFFile("text.gguf", {}, []))
    other = GGUFFile("text.gguf", {"general.architecture": "llama", "llama.embedding_length": 65}, [])
    with pytest.raises(ModelFileError, match=r"its embeddings have 64 numbers, text\.gguf's do not"):
        vision_part(read_gguf(path), other)


def test_gemma3_without_image_token(tmp_path: Path) -> None:
    path = tmp_path / "mmproj.gguf"
    write(checkpoint("gemma3"), "gemma3", path)
    tokens = [*map(str, range(255999)), "<start_of_image>", "<end_of_image>", "<unused99>"]
    fields, spec = vision_part(read_gguf(path), GGUFFile("text.gguf", {"tokenizer.ggml.tokens": tokens}, []))
    assert (fields["image_token_id"], spec.image_token_id, spec.placeholder_id) == (256001, 256001, 255999)
