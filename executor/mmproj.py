"""Vision parts of GGUF models: llama.cpp's mmproj files, under the names of our towers."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from executor.base import ModelError
from executor.checkpoint import FLOATS, MappedFile, StoredTensor, mapped
from executor.config import GGUFTensor, VisionFile
from executor.gguf import PLAIN_TYPES, check_size, dequantize_to
from executor.weights_mapper import WeightsMapper

RENAMES = [
    (r"^v\.patch_embd\.", "encoder.patch_embedding."),
    (r"^v\.position_embd\.", "encoder.position_embedding."),
    (r"^v\.post_ln\.", "encoder.post_layernorm."),
    (r"^v\.blk\.", "encoder.layers."),
    (r"\.ln([12])\.", r".layer_norm\1."),
    (r"\.attn_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.attn_out\.", ".self_attn.o_proj."),
    (r"\.ffn_up\.", ".mlp.up_proj."),
    (r"\.ffn_down\.", ".mlp.down_proj."),
    (r"^mm\.model\.fc\.", "connector.proj."),
    (r"^mm\.input_projection\.", "projection."),
    (r"^mm\.soft_emb_norm\.", "soft_emb_norm."),
]
OFFSET_NORM = "soft_emb_norm.weight"
"""A norm to whose weight the converter adds 1, which the model does itself."""


class VisionCheckpoint:
    """The tensors of an mmproj file. See ``Checkpoint``."""

    def __init__(self, file: VisionFile) -> None:
        """Opens the file.

        Raises:
            ModelError: It cannot be read, or its table of tensors is wrong.
        """
        self.path = file.path
        self._file = MappedFile(file.as_path)
        self._tensors = file.header.tensors
        for tensor in self._tensors:
            origin = self._origin(tensor.name)
            check_size(tensor, origin)
            missing = tensor.offset + tensor.num_bytes - len(self._file.data)
            if missing > 0:
                raise ModelError(f"{origin}: truncated: the file ends {missing} bytes before the tensor does")
        # Older converters called the first product of an MLP ffn_down.
        shapes = {tensor.name: tensor.shape for tensor in self._tensors}
        up, norm = shapes.get("v.blk.0.ffn_up.weight"), shapes.get("v.blk.0.ln1.weight")
        self._is_swapped = bool(up and norm and up[0] == norm[0] != up[-1])

    def tensors(self, wanted: Collection[str], mapper: WeightsMapper) -> list[StoredTensor]:
        stored = [
            StoredTensor(
                name=self._name(tensor.name),
                origin=self._origin(tensor.name),
                num_bytes=tensor.num_bytes,
                read=partial(self._read, tensor),
                prefetch=partial(self._file.prefetch, tensor.offset, tensor.num_bytes),
            )
            for tensor in self._tensors
        ]
        return [part for tensor in stored for part in mapped(tensor, mapper, wanted)]

    def origin(self, name: str) -> str:
        return f"{self.path}: tensor {name!r}"

    def _origin(self, gguf_name: str) -> str:
        return f"{self.path}: tensor {gguf_name!r}"

    def _name(self, gguf_name: str) -> str:
        name = gguf_name
        if self._is_swapped:
            other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
            name = re.sub(r"ffn_(up|down)", lambda match: other[match.group()], name)
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        return name

    def _read(self, tensor: GGUFTensor, dtype: torch.dtype) -> Tensor:
        kind = GGMLQuantizationType(tensor.ggml_type)
        if dtype not in FLOATS:
            raise ValueError(f"has type {kind.name}; the model needs {dtype}")
        raw = np.frombuffer(self._file.data, np.uint8, tensor.num_bytes, tensor.offset)
        if kind not in PLAIN_TYPES:
            return dequantize_to(raw, kind, dtype).view(tensor.shape)
        plain = torch.from_numpy(raw).view(PLAIN_TYPES[kind]).view(tensor.shape)
        return plain.float() - 1 if self._name(tensor.name) == OFFSET_NORM else plain
