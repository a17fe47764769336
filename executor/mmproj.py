"""Vision parts of GGUF models: llama.cpp's mmproj files, under the names of our towers."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from executor.base import ModelError
from executor.checkpoint import FLOATS, MappedFile, StoredTensor, mapped
from executor.config import GGUFTensor, VisionFile
from executor.gguf import PLAIN_TYPES, check_size, dequantize_to
from executor.weights_mapper import WeightsMapper

LAYER = [
    (r"\.attn_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.attn_qkv\.", ".self_attn.qkv_proj."),
    (r"\.attn_out\.", ".self_attn.o_proj."),
    (r"\.ffn_gate\.", ".mlp.gate_proj."),
    (r"\.ffn_up\.", ".mlp.up_proj."),
    (r"\.ffn_down\.", ".mlp.down_proj."),
]
PATCH_ENCODER = [
    (r"^v\.class_embd(\.weight)?$", "encoder.class_embedding"),
    (r"^v\.patch_embd\.", "encoder.patch_embedding."),
    (r"^v\.position_embd\.", "encoder.position_embedding."),
    (r"^v\.pre_ln\.", "encoder.pre_layrnorm."),
    (r"^v\.post_ln\.", "encoder.post_layernorm."),
    (r"^v\.blk\.", "encoder.layers."),
    (r"\.ln([12])\.", r".layer_norm\1."),
    *LAYER,
]
LLAVA = [
    *PATCH_ENCODER,
    (r"^mm\.0\.", "projector.linear_1."),
    (r"^mm\.2\.", "projector.linear_2."),
    (r"^(v|model)\.image_newline$", "image_newline"),
]
QWEN = [
    (r"^v\.patch_embd\.", "patch_embed.proj."),
    (r"^v\.position_embd\.", "pos_embed."),
    (r"^v\.post_ln\.", "merger.ln_q."),
    (r"^v\.blk\.", "layers."),
    (r"\.ln([12])\.", r".norm\1."),
    *LAYER,
    (r"^mm\.0\.", "merger.fc1."),
    (r"^mm\.2\.", "merger.fc2."),
    (r"^v\.deepstack\.(\d+)\.norm\.", r"deepstack.\1.ln_q."),
    (r"^v\.deepstack\.", "deepstack."),
]
PIXTRAL = [
    (r"^v\.patch_embd\.", "encoder.patch_conv."),
    (r"^v\.pre_ln\.", "encoder.ln_pre."),
    (r"^v\.blk\.", "encoder.layers."),
    (r"\.ln1\.", ".attention_norm."),
    (r"\.ln2\.", ".ffn_norm."),
    *LAYER,
    (r"^mm\.([12])\.", r"projector.linear_\1."),
    (r"^mm\.input_norm\.", "projector.norm."),
    (r"^mm\.patch_merger\.", "projector.patch_merger.merging_layer."),
]
RENAMES: Mapping[str, Sequence[tuple[str, str]]] = {
    "gemma3": [
        *PATCH_ENCODER,
        (r"^mm\.input_projection\.", "projection."),
        (r"^mm\.soft_emb_norm\.", "soft_emb_norm."),
    ],
    "idefics3": [*PATCH_ENCODER, (r"^mm\.model\.fc\.", "connector.proj.")],
    "mlp": LLAVA,
    "pixtral": PIXTRAL,
    "qwen2.5vl_merger": QWEN,
    "qwen2vl_merger": QWEN,
    "qwen3vl_merger": QWEN,
}
"""Regular expressions from the names of tensors to ours, by kind."""
UNUSED = "v.token_embd.img_break"
"""A row of the language model's embedding, in Pixtral's files."""
OFFSET_NORM = "soft_emb_norm.weight"
"""A norm to whose weight the converter adds 1, which the model does itself."""
SECOND_FRAME = "v.patch_embd.weight.1"
"""What patches of an image's second frame are multiplied with, in files of models that also see films."""
DEEPSTACK = re.compile(r"^v\.deepstack\.(\d{1,6})\.(.*)$")
ROTATED = re.compile(r"\.attn_[qk]\.weight$")
Q_PROJECTION = re.compile(r"\.attn_q\.(weight|bias)$")


class VisionCheckpoint:
    """The tensors of an mmproj file. See ``Checkpoint``."""

    def __init__(self, file: VisionFile) -> None:
        """Opens the file.

        Raises:
            ModelError: It cannot be read, or its table of tensors is wrong.
        """
        self.path = file.path
        self._file = MappedFile(file.as_path)
        self._tensors = [tensor for tensor in file.header.tensors if tensor.name != UNUSED]
        for tensor in self._tensors:
            origin = self._origin(tensor.name)
            check_size(tensor, origin)
            missing = tensor.offset + tensor.num_bytes - len(self._file.data)
            if missing > 0:
                raise ModelError(f"{origin}: truncated: the file ends {missing} bytes before the tensor does")
        self._by_name = {tensor.name: tensor for tensor in self._tensors}
        self._kind = file.kind
        self._num_heads = file.header.metadata.get("clip.vision.attention.head_count", 1)
        self._renames = RENAMES[self._kind]
        layers = (int(found[1]) for found in map(DEEPSTACK.match, self._by_name) if found)
        self._deepstack = sorted(set(layers))
        """Layers whose states enter the language model."""
        # Older converters called the first product of an MLP ffn_down.
        up, norm = self._by_name.get("v.blk.0.ffn_up.weight"), self._by_name.get("v.blk.0.ln1.weight")
        self._is_swapped = bool(up and norm and up.shape[0] == norm.shape[0] != up.shape[-1])

    def tensors(self, wanted: Collection[str], mapper: WeightsMapper) -> list[StoredTensor]:
        merged = {other.name for tensor in self._tensors for other in self._others(tensor, wanted)}
        stored = [
            self._stored([tensor, *self._others(tensor, wanted)])
            for tensor in self._tensors
            if tensor.name not in merged
        ]
        return [part for tensor in stored for part in mapped(tensor, mapper, wanted)]

    def _others(self, tensor: GGUFTensor, wanted: Collection[str]) -> list[GGUFTensor]:
        """The tensors that the model has in one with this, and the file apart."""
        if tensor.name == "v.patch_embd.weight" and SECOND_FRAME in self._by_name:
            return [self._by_name[SECOND_FRAME]]
        found = Q_PROJECTION.search(tensor.name)
        if found is None or self._name(tensor.name.replace("attn_q", "attn_qkv")) not in wanted:
            return []
        names = [tensor.name.replace("attn_q", f"attn_{which}") for which in "kv"]
        return [self._by_name[name] for name in names if name in self._by_name]

    def _stored(self, tensors: Sequence[GGUFTensor]) -> StoredTensor:
        """One tensor of the model."""
        name = self._name(tensors[0].name)
        if len(tensors) == 3:
            name = name.replace("q_proj", "qkv_proj")

        def read(dtype: torch.dtype) -> Tensor:
            try:
                parts = [self._read(each, dtype) for each in tensors]
                if len(parts) == 1:
                    return parts[0]
                return torch.cat(parts) if len(parts) == 3 else torch.stack(parts, dim=2)  # frames follow channels
            except RuntimeError as error:
                raise ValueError(f"does not fit the file's other tensors: {error}") from error

        def prefetch(first: int = 0, end: int = 1, of: int = 1) -> None:
            part = (first, end, of) if len(tensors) == 1 else ()  # rows of several are elsewhere
            for each in tensors:
                self._file.prefetch(each.offset, each.num_bytes, *part)

        return StoredTensor(
            name=name,
            origin=self._origin(tensors[0].name),
            num_bytes=sum(each.num_bytes for each in tensors),
            read=read,
            prefetch=prefetch,
        )

    def origin(self, name: str) -> str:
        return f"{self.path}: tensor {name!r}"

    def _origin(self, gguf_name: str) -> str:
        return f"{self.path}: tensor {gguf_name!r}"

    def _name(self, gguf_name: str) -> str:
        name = gguf_name
        if self._is_swapped:
            other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
            name = re.sub(r"ffn_(up|down)", lambda match: other[match.group()], name)
        found = DEEPSTACK.match(name)
        if found:
            name = f"v.deepstack.{self._deepstack.index(int(found[1]))}.{found[2]}"
        for pattern, replacement in self._renames:
            name = re.sub(pattern, replacement, name)
        return name

    def _read(self, tensor: GGUFTensor, dtype: torch.dtype) -> Tensor:
        kind = GGMLQuantizationType(tensor.ggml_type)
        if dtype not in FLOATS:
            raise ValueError(f"has type {kind.name}; the model needs {dtype}")
        raw = np.frombuffer(self._file.data, np.uint8, tensor.num_bytes, tensor.offset)
        if kind not in PLAIN_TYPES:
            plain = dequantize_to(raw, kind, dtype).view(tensor.shape)
        else:
            plain = torch.from_numpy(raw).view(PLAIN_TYPES[kind]).view(tensor.shape)
        if self._kind == "pixtral" and ROTATED.search(tensor.name):  # pairs to rotate are neighbours in the file
            plain = plain.unflatten(0, (self._num_heads, -1, 2)).transpose(1, 2).reshape(plain.shape)
        return plain.float() - 1 if self._name(tensor.name) == OFFSET_NORM else plain
