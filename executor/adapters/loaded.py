"""The adapters in a worker's memory, and the layers of its model that they change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

import ops
from executor.adapter_files import read_adapter_files, with_scale
from executor.adapters.experts import of_each_expert
from executor.adapters.gguf import read_gguf_adapter
from executor.adapters.layers import Change, LinearTarget, TableTarget, linear_change, logits_change, table_change
from executor.adapters.peft import ModuleTensors, PeftConfig, read_config, read_modules
from executor.base import ModelError
from executor.config import LoRAConfig
from executor.hf_config import DTYPES, shorten
from executor.layers.embedding import VocabParallelEmbedding
from executor.layers.latent_attention import UpProjection
from executor.layers.linear import LinearLayer
from executor.layers.moe import MoE, SmallLinear
from executor.layers.parameter import stored_module
from executor.loader import LoadedModel, mapper_of
from executor.messages import LoRARequest
from executor.models.registry import split_architecture
from ops.cpu import memory

KERNELS = ("cpu", "reference", "triton")
"""Op sets that compute with adapters."""


def check_adapters(config: LoRAConfig, loaded: LoadedModel, world_size: int, op_set: str) -> None:
    """Checks that a model can have adapters as configured.

    Args:
        config: What is asked for.
        loaded: The model.
        world_size: Number of ranks.
        op_set: Name of the device's op set.

    Raises:
        ModelError: It cannot.
    """
    if not config.enable_lora:
        return
    if op_set not in KERNELS:
        raise ModelError(
            f"--enable-lora: kernels of the device ({op_set}) do not compute with adapters; use --device cpu, or merge "
            "the adapter into the model"
        )
    if world_size > 1:
        raise ModelError("--enable-lora: adapters on several ranks are not supported yet; use one")
    if config.lora_dtype != "auto" and DTYPES[config.lora_dtype] != loaded.dtype:
        ours = str(loaded.dtype).removeprefix("torch.")
        raise ModelError(
            f"--lora-dtype {config.lora_dtype}: activations are {ours}, and adapters are multiplied with them as such; "
            f"use auto, or --dtype {config.lora_dtype}"
        )


class LoadedAdapters:
    """Loads adapters by number into the tables of a model's layers."""

    def __init__(self, loaded: LoadedModel, config: LoRAConfig) -> None:
        self._config = config
        self._model = loaded.model
        self._hf_config = loaded.hf_config
        self._mapper = mapper_of(loaded.model, loaded.hf_config, split_architecture(loaded.hf_config.architecture)[1])
        self._linears: dict[str, LinearTarget] = {}
        """Projections by their names in checkpoints, which have the model's names."""
        self._tables: dict[str, TableTarget] = {}
        self._experts: list[str] = []
        """Prefixes of experts, which keep their weights."""
        self._absorbed: set[str] = set()
        """Matrices between latents and heads."""
        self._loaded: dict[int, list[Change]] = {}
        for name, module in loaded.model.named_modules():
            self._find(name, module)
        for other, name in loaded.model.tied_modules.items():
            if name in self._tables and other not in self._tables:
                self._tables[other] = self._tables[name]

    def _find(self, name: str, module: nn.Module) -> None:
        if isinstance(module, UpProjection):
            self._absorbed.add(name)
        if isinstance(module, MoE):
            self._experts.append(f"{name}.experts.")
        if isinstance(module, LinearLayer | SmallLinear) and module.weights.adapters is not None:
            for shard_id in module.shape.outputs:
                self._linears[stored_module(name, shard_id)] = LinearTarget(name, module, shard_id)
        elif isinstance(module, VocabParallelEmbedding) and module.weights.table_adapters is not None:
            self._tables[name] = TableTarget(name, module)

    # -- memory --------------------------------------------------------------------------------------------

    def num_bytes(self, max_tokens: int) -> int:
        """Memory of as many adapters as there may be, of the largest rank in all linear layers, and of a step's rows.

        Modules that an adapter replaces as a whole come on top.
        """
        rank = self._config.max_lora_rank
        each, widest = 0, 0
        for target in self._linears.values():
            shape = target.layer.shape
            each += rank * (shape.input.size + shape.outputs[target.shard_id].size) * shape.dtype.itemsize
            widest = max(widest, rank * len(shape.outputs))
        return each * self._config.max_loaded + max_tokens * widest * 4

    # -- loading -------------------------------------------------------------------------------------------

    def load(self, number: int, adapter: LoRARequest) -> None:
        """Reads an adapter and gives it a number, in place of an earlier one.

        Args:
            number: From 1 on; 0: the adapter is only tried.
            adapter: Its files must be those that the hash was made of.

        Raises:
            ModelError: The adapter cannot be used; one line. An earlier one of that number is gone.
        """
        self.unload(number)
        files = read_adapter_files(Path(adapter.path))
        if with_scale(files.content_hash, adapter.scale) != adapter.content_hash:
            raise ModelError(f"{adapter.path}: the adapter's files have changed; load it again")
        if files.config:
            config = read_config(files.config, files.path)
            modules = self._with_model_names(config, read_modules(files))
        else:
            known = [*self._linears, *self._tables]
            config, modules = read_gguf_adapter(files, self._hf_config, known)
        if adapter.scale != 1.0:
            config = _scaled(config, adapter.scale, modules)
        memory.adapters.renew()
        try:
            changes = self._changes(config, modules)
        except NotImplementedError as error:
            raise ModelError(f"{config.source}: {error}") from error
        if number:
            for change in changes:
                change.put(number)
            self._loaded[number] = [change.without_content() for change in changes]

    def unload(self, number: int) -> None:
        """Forgets an adapter."""
        for change in self._loaded.pop(number, ()):
            change.put(number)

    def _with_model_names(self, config: PeftConfig, stored: dict[str, ModuleTensors]) -> dict[str, ModuleTensors]:
        """An adapter's modules by the model's names, those of stacked experts one by one.

        Raises:
            ModelError: The model does not have one of them, or the adapter has one twice.
        """
        modules: dict[str, ModuleTensors] = {}
        wanted = {f"{name}.weight" for name in self._linears}
        for tensors in stored.values():
            name = self._mapper.name(f"{tensors.name}.weight").removesuffix(".weight")
            is_stack = name not in self._linears and name not in self._tables
            experts = of_each_expert(tensors, self._mapper, self._linears, wanted) if is_stack else {}
            if is_stack and not experts:  # at once: patterns and stacks are looked for with known names only
                raise ModelError(f"{config.source}: {self._why_unknown(name, tensors)}")
            found = experts or {name: tensors}
            if twice := modules.keys() & found.keys():
                raise ModelError(f"{config.source}: two adapters of {min(twice)}; the other one is {tensors.name}")
            modules |= found
        return modules

    def _changes(self, config: PeftConfig, modules: dict[str, ModuleTensors]) -> list[Change]:
        """What an adapter changes, layer by layer. ``modules`` have the model's names."""
        merged: dict[int, list[tuple[LinearTarget, ModuleTensors]]] = defaultdict(list)
        outputs: dict[int, tuple[TableTarget, list[ModuleTensors]]] = {}
        changes = []
        for name, tensors in modules.items():
            table, target = self._tables.get(name), self._linears.get(name)
            self._check_rank(config, tensors)
            if target is not None:
                if "weight" in tensors.stored and any(name.startswith(prefix) for prefix in self._experts):
                    raise ModelError(f"{config.source}: weights of experts ({shorten(name)}) cannot be replaced yet")
                merged[id(target.layer)].append((target, tensors))
            elif table is not None:
                is_output = table.layer.is_output or name in self._model.tied_modules
                has_tied = "vectors" in tensors.stored and table.layer.weights.adapters is not None
                if is_output or has_tied:
                    outputs.setdefault(id(table.layer), (table, []))[1].append(tensors)
                if not is_output and ops.op_set(table.layer.shape.device.type).name == "triton":
                    raise ModelError(f"{config.source}: GPUs do not look tokens up ({shorten(name)}) with adapters yet")
                if not is_output:
                    changes.append(table_change(table, tensors, config))
        changes += [linear_change(parts, config) for parts in merged.values()]
        changes += [logits_change(table, parts, config) for table, parts in outputs.values()]
        return changes

    def _check_rank(self, config: PeftConfig, tensors: ModuleTensors) -> None:
        rank = config.rank_of(tensors.name)
        if rank > self._config.max_lora_rank and tensors.stored.keys() & {"a", "table_a"}:
            raise ModelError(
                f"{config.source}: the rank of {shorten(tensors.name)} is {rank}, and the server was started with "
                f"--max-lora-rank {self._config.max_lora_rank}"
            )

    def _why_unknown(self, name: str, tensors: ModuleTensors) -> str:
        if name in self._absorbed:
            return (
                f"{shorten(tensors.name)}, which attention multiplies with its queries and results, can have no "
                "adapter yet; merge the adapter into the model"
            )
        return (
            f"the model has no layer {shorten(tensors.name)} that an adapter can change{_closest(name, self._linears)}"
        )


def _scaled(config: PeftConfig, scale: float, modules: dict[str, ModuleTensors]) -> PeftConfig:
    """The configuration with a scale.

    Raises:
        ModelError: The adapter is more than products, so that it has no scale.
    """
    for module in modules.values():
        for kind in module.stored.keys() & {"magnitude", "bias", "weight", "vectors"}:
            raise ModelError(f"{config.source}: the adapter has a {kind} ({shorten(module.name)}); use a scale of 1")
    return replace(config, scale=scale)


def _closest(name: str, known: Sequence[str] | dict[str, LinearTarget]) -> str:
    """Names with the same end, for messages."""
    leaf = name.rpartition(".")[2]
    same = [each for each in known if each.endswith(f".{leaf}")]
    return f"; it has {same[0]}" if same else "; is it an adapter of another model?"
