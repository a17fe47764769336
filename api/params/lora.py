"""The adapter of an offline request."""

from __future__ import annotations

import msgspec


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
