"""Adapters as requests name them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

MAX_SCALE = 1e4
"""Largest factor of what an adapter adds; the smallest is its opposite."""

# The range only appears in the OpenAPI document; the server checks it elsewhere, with a better error message.
Scale = Annotated[float, Meta(extra_json_schema={"minimum": -MAX_SCALE, "maximum": MAX_SCALE})]


class LoRARequest(msgspec.Struct, frozen=True):
    """A LoRA adapter, for ``LLM.generate``."""

    lora_name: str
    """Its name."""
    lora_int_id: int
    """A number from 1 on. Another one than before loads the folder again."""
    lora_path: str
    """Folder with PEFT's files, a GGUF file, or a hub id."""
    lora_scale: float = 1.0
    """Factor of what the adapter adds."""


class LoRAScale(msgspec.Struct, kw_only=True):
    """An adapter and its scale, as in llama.cpp's API."""

    id: Annotated[int, Meta(ge=0)]
    """Number of the adapter: ``lora_id`` in the list of models."""
    scale: Scale
    """Factor of what it adds."""


class AdapterFields(msgspec.Struct, kw_only=True):
    """Fields by which a request changes the adapter that it has as its model."""

    lora_scale: Scale | None = None
    """Factor of what the adapter adds, in place of the one with which it was loaded; 0: the model without it."""
    lora: list[LoRAScale] | None = None
    """llama.cpp's form of ``model`` and ``lora_scale``; adapters that are not in the list have the scale 0."""
