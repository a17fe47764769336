"""A small model in the worker of a large one, which proposes drafts for it: a model of its own, or a head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec

from executor.attention.base import RECURRENT_KINDS, AttentionGroup
from executor.base import ModelError
from executor.device.base import Device
from executor.device.steps import StepChannel
from executor.forward import REGISTRY as FORWARDS
from executor.forward import Forward, ForwardSetup, UploadedForward, run_model
from executor.graphs import Program
from executor.input_batch import InputBatch
from executor.kv_memory import KVMemory, allocate_group
from executor.loader import LoadedModel
from executor.messages import KVCacheGroupSpec
from executor.models.draft_head import DraftHead
from executor.registry import resolve
from executor.request_states import RequestStates
from ops.dispatch import Spec

FLAG = "--speculative-config"


@dataclass
class DraftModel:
    """A small model, or a head, in the worker of a large one."""

    loaded: LoadedModel
    device: Device
    groups: tuple[AttentionGroup, ...]
    max_num_seqs: int
    max_tokens: int
    """Most tokens of a step of the large model."""
    program: Program | None = None

    @property
    def specs(self) -> tuple[KVCacheGroupSpec, ...]:
        """Its KV cache groups, for the engine core."""
        return tuple(msgspec.structs.replace(group.spec, kind="draft") for group in self.groups)

    @property
    def head(self) -> DraftHead:
        """The head, of methods that use one."""
        assert isinstance(self.loaded.model, DraftHead)
        return self.loaded.model

    @property
    def has_head(self) -> bool:
        """Whether it is a head."""
        return isinstance(self.loaded.model, DraftHead)

    def _capture(self) -> Program:
        """The program of a step, for the KV cache that is allocated."""
        model = self.loaded.model
        # A step adds a token to each row that samples.
        program = Program(
            self.device.torch_device.type,
            max_tokens=self.max_tokens + self.max_num_seqs,
            max_samples=self.max_num_seqs,
        )
        previous = None
        if isinstance(model, DraftHead):
            previous = Spec("tokens", model.num_features, self.loaded.dtype)
        program.finish(*run_model(model, InputBatch.symbolic(program, len(self.groups), hidden=previous)))
        return program

    def allocate(self, num_blocks: Sequence[int], max_model_len: int, memory: KVMemory | None = None) -> None:
        """Allocates KV cache and tables, and captures the program.

        Args:
            num_blocks: Blocks of each group.
            max_model_len: Longest sequence served.
            memory: Where to put the KV cache; None: the device decides.
        """
        self._allocate_kv(num_blocks, memory)
        self.loaded.model.reserve_positions(min(max_model_len, self.loaded.max_model_len))
        self.program = self._capture()

    def memory(self) -> tuple[int, int]:
        """Bytes of the largest step, and bytes per token of the longest sequence. Called before the KV cache exists."""
        self._allocate_kv([1] * len(self.groups))
        table_bytes = sum(-(-self.max_num_seqs * 4 // group.block_size) for group in self.groups)
        self.program = self._capture()
        step_bytes = self.program.num_bytes
        if self.channel.graphs is not None:
            step_bytes += self._forward_class().step_bytes(self.setup())
        if isinstance(self.loaded.model, DraftHead):  # hidden states that it reads, in rows and side by side
            width = self.loaded.model.num_features * (2 + 2 * len(self.loaded.model.aux_layers))
            step_bytes += self.max_tokens * width * self.loaded.dtype.itemsize
        return step_bytes, self.loaded.model.position_bytes() + table_bytes

    def _allocate_kv(self, num_blocks: Sequence[int], memory: KVMemory | None = None) -> None:
        layers = self.loaded.model.attention_layers()
        for group, count in zip(self.groups, num_blocks, strict=True):
            allocate_group(group, count, layers, self.device, memory)

    @cached_property
    def channel(self) -> StepChannel:
        """Its way to the device."""
        return self.device.steps()

    @property
    def runs_late(self) -> bool:
        """Whether it can compute tokens that the host does not know."""
        return not any(group.backend.needs_rows or not group.is_cached for group in self.groups)

    def forward(self, states: RequestStates) -> Forward:
        """The forward pass over the requests of ``states``, of which the host has all tokens."""
        return self._forward_class()(self.setup(), states)

    def _forward_class(self) -> type[UploadedForward]:
        """Its steps are of any size, and rarely alike."""
        name = "uploaded" if self.channel.graphs is None else "launched"
        chosen: type[UploadedForward] = resolve(FORWARDS, name, "forward")
        return chosen

    def setup(self, channel: StepChannel | None = None) -> ForwardSetup:
        """That of its forward passes, whose inputs go through this channel; None: its own."""
        return ForwardSetup(
            self.loaded.model,
            self.program,
            self.channel if channel is None else channel,
            self.groups,
            max_num_seqs=self.max_num_seqs,
            max_tokens=self.max_tokens + self.max_num_seqs,
            max_samples=self.max_num_seqs,
        )


def check_place(target: LoadedModel, world_size: int) -> None:
    """Checks that a second model, or a head, can run beside another.

    Raises:
        ModelError: It cannot.
    """
    if world_size > 1:
        raise ModelError(
            f"{FLAG}: draft models run with one rank; omit --tensor-parallel-size and --pipeline-parallel-size, or the "
            "draft model"
        )
    if target.tower is not None and target.tower.merge_size:
        raise ModelError(
            f"{FLAG}: draft models do not know positions on several axes, as {target.hf_config.source} has for images; "
            "use the method suffix, or --language-model-only"
        )


def check_draft_model(target: LoadedModel, draft: LoadedModel) -> None:
    """Checks that a model can propose drafts for another.

    Raises:
        ModelError: It cannot.
    """
    name = draft.hf_config.source
    if not draft.model.can_be_captured:
        raise ModelError(f"{FLAG}: {name} runs through transformers, which draft models must not; choose another")
    if any(layer.shape.kind in RECURRENT_KINDS for layer in draft.model.attention_layers()):
        raise ModelError(
            f"{FLAG}: model: layers of {name} keep a state, from which its own drafts cannot be taken away; choose a "
            "draft model with attention alone"
        )
    ours, theirs = target.hf_config.vocab_size, draft.hf_config.vocab_size
    if ours != theirs:
        raise ModelError(
            f"{FLAG}: model: {name} has a vocabulary of {theirs} tokens, and {target.hf_config.source} one of {ours}; "
            "choose a draft model of the same family"
        )
