"""Whether a worker verifies drafts."""

from __future__ import annotations

import msgspec

from executor.attention.base import RECURRENT_KINDS
from executor.base import ModelError
from executor.config import SpeculativeConfig
from executor.device.base import Device
from executor.layers.attention import make_room_for_drafts
from executor.loader import LoadedModel


def speculation_of(
    config: SpeculativeConfig | None, loaded: LoadedModel, device: Device, world_size: int
) -> SpeculativeConfig | None:
    """How drafts are proposed; None: not at all. Layers that keep a state make room for them.

    Args:
        config: As configured.
        loaded: The model.
        device: The device.
        world_size: Number of ranks. Those that compute the same step must propose the same.

    Raises:
        ModelError: The model cannot verify drafts.
    """
    if config is None or config.is_default and not _is_cheap(loaded, device):
        return None
    check_drafts(loaded, device)
    layers = [*loaded.model.attention_layers(), *loaded.model.attention_of_stages]
    make_room_for_drafts(layers, config.num_speculative_tokens)
    if world_size == 1:
        return config
    return msgspec.structs.replace(config, is_adaptive=False, max_cached_requests=0)


def _has_states(loaded: LoadedModel) -> bool:
    return any(layer.shape.kind in RECURRENT_KINDS for layer in loaded.model.attention_layers())


def _is_cheap(loaded: LoadedModel, device: Device) -> bool:
    """Whether drafts cost neither memory nor steps that overlap."""
    return loaded.model.can_be_captured and device.steps().fileno() is None and not _has_states(loaded)


def check_drafts(loaded: LoadedModel, device: Device) -> None:
    """Checks that a model can verify drafts.

    Raises:
        ModelError: Drafts may change tokens.
    """
    name = loaded.hf_config.architecture
    if not loaded.model.can_be_captured:
        raise ModelError(
            f"--speculative-config: {name} runs through transformers, where drafts may change tokens; omit it"
        )
    if _has_states(loaded) and device.steps().graphs is not None:
        raise ModelError(
            f"--speculative-config: layers of {name} keep a state, which leaves out rejected drafts on CPUs alone so "
            f"far; omit it on {device.name}"
        )
