"""What a model would take on this machine, found out without loading it.

The model is built as for serving, and its parameters are matched with the checkpoint. Layers with the same shapes and
stored types take the same memory, so one of each kind is read and packed, and stands in for the others: all numbers are
those of the real code, and most of the weights stay on the disk. The step is captured like that of a worker.

``python -m executor.plan`` takes an ``ExecutorConfig`` on standard input. It writes the ``ModelSurvey`` of each rank,
or a ``WorkerFailed``.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping

import msgspec
import torch
from torch import nn

import ops
from executor.attention.base import cached_specs
from executor.base import ModelError
from executor.checkpoint import StoredTensor
from executor.config import ExecutorConfig
from executor.device.base import Device, Memory, create_device
from executor.layers.attention import form_groups
from executor.layers.embedding import VocabParallelEmbedding
from executor.layers.linear import LinearLayer
from executor.layers.moe import MoE
from executor.layers.parameter import WeightParameter, Weights
from executor.loader import LoadedModel, Target, is_tied_by_file, match_weights, prepare_model
from executor.messages import EXIT_MODEL, ModelSurvey, WorkerFailed, WorkerReady
from executor.model_runner import ModelRunner
from executor.parallel import ParallelState, places
from executor.quantization.packed import PackedWeights
from ops.cpu import library, memory

BANDWIDTH_BYTES = 256 << 20
"""Memory that is read to measure the bandwidth: more than caches hold."""
_KINDS = (("experts", "experts"), ("attn", "attention"), ("mlp", "mlp"))


def survey(config: ExecutorConfig, parallel: ParallelState, *, measures: bool = True) -> ModelSurvey:
    """Surveys the share of a rank.

    Args:
        config: Configuration of the workers.
        parallel: The rank.
        measures: Measure what this machine can do, which takes half a second.

    Raises:
        ModelError: The model cannot be served as configured.
    """
    torch.set_grad_enabled(False)
    device = create_device(config.device.device)
    if device.name != "cpu":
        raise ModelError(f"--device {device.name}: only CPUs can be planned for; use --device cpu")
    device.initialize(config.device, parallel.rank)
    before = device.memory()
    model, context, checkpoint = prepare_model(
        config.model, parallel, device.torch_device, config.device.attention_backend, None
    )
    stored: Mapping[str, StoredTensor] = {}
    targets: Mapping[str, Target] = {}
    if checkpoint is not None:
        _, targets, stored = match_weights(model, checkpoint, context, is_tied_by_file=is_tied_by_file(config.model))
    weights = _pack_one_of_each(model, targets, stored)
    loaded = LoadedModel(model.eval(), context.config, sum(weights.values()), context.dtype, context.max_model_len)
    ready = _report(config, loaded, device, before, parallel.rank)
    found = _count_work(ready, before.free_bytes, model, weights)
    return measure_rates(found) if measures else found


def _report(config: ExecutorConfig, loaded: LoadedModel, device: Device, before: Memory, rank: int) -> WorkerReady:
    """What a worker with the model would report. ``before`` is the memory without its weights."""
    groups = form_groups(loaded.model.attention_layers(), config.device.block_size)
    runner = ModelRunner(
        loaded,
        device,
        groups,
        step_size=config.step_size,
        enforce_eager=config.model.enforce_eager or not loaded.model.can_be_captured,
        speculative=None,
        draft=None,
        forced_outputs="",
        rank=rank,
    )
    step_bytes, position_bytes = runner.step_memory()
    free_bytes = max(0, before.free_bytes - loaded.weight_bytes)
    return WorkerReady(
        rank=rank,
        free_bytes=free_bytes,
        total_bytes=before.total_bytes,
        weight_bytes=loaded.weight_bytes,
        default_kv_bytes=min(device.default_kv_bytes(), free_bytes // 4),
        kv_cache_groups=cached_specs(groups),
        max_model_len=loaded.max_model_len,
        vocab_size=loaded.hf_config.vocab_size,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=device.name,
        architecture=loaded.hf_config.architecture,
        hidden_size=loaded.vector_size,
        step_bytes=step_bytes,
        position_bytes=position_bytes,
        memory_utilization=device.memory_utilization or 0.0,
        max_num_batched_tokens=runner.max_tokens,
        pooling=loaded.pooling,
    )


def _pack_one_of_each(
    model: nn.Module, targets: Mapping[str, Target], found: Mapping[str, StoredTensor]
) -> dict[str, int]:
    """Loads and packs one of each kind of layer, and puts it in the place of the others.

    Returns:
        Bytes of the weights of all layers, by kind.

    Raises:
        ModelError: A layer's tensors do not fit together.
    """
    stored: dict[WeightParameter, list[tuple[StoredTensor, Target]]] = {}
    for name, target in targets.items():
        if name in found:
            stored.setdefault(target.parameter, []).append((found[name], target))
    sizes = {"attention": 0, "mlp": 0, "experts": 0, "tables": 0, "others": 0}
    packed: dict[object, tuple[Weights, int]] = {}
    for parent, attribute, name, module in _outermost(model):
        signature = _signature(parent, module, stored)
        if signature not in packed:
            _load(module, name, stored)
            packed[signature] = module, sum(parameter.nbytes for parameter in module.parameters())
        module, num_bytes = packed[signature]
        setattr(parent, attribute, module)
        is_table = isinstance(parent, VocabParallelEmbedding)
        kind = next((kind for word, kind in _KINDS if word in name), "others")
        sizes["tables" if is_table else kind] += num_bytes
    inner = {id(parameter) for module, _ in packed.values() for parameter in module.parameters()}
    sizes["others"] += sum(each.nbytes for each in model.parameters() if id(each) not in inner)
    return sizes


def _outermost(model: nn.Module) -> list[tuple[nn.Module, str, str, Weights]]:
    """Weights that are not part of others: parent, attribute, full name and module of each."""
    modules = dict(model.named_modules(remove_duplicate=False))
    inner: set[nn.Module] = set()
    found = []
    for name, module in modules.items():  # outer modules first
        if isinstance(module, Weights) and module not in inner:
            inner.update(module.modules())
            parent, _, attribute = name.rpartition(".")
            found.append((modules[parent], attribute, name, module))
    return found


def _signature(
    parent: nn.Module, module: Weights, stored: Mapping[WeightParameter, list[tuple[StoredTensor, Target]]]
) -> object:
    """What the form of packed weights depends on."""
    facts: list[object] = [type(module)]
    if isinstance(parent, LinearLayer | VocabParallelEmbedding):
        facts.append(repr(parent.shape))
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, WeightParameter)
        sizes = tuple(tensor.num_bytes for tensor, _ in stored.get(parameter, ()))
        facts.append((name, tuple(parameter.shape), parameter.dtype, sizes))
    return tuple(facts)


def _load(module: Weights, name: str, stored: Mapping[WeightParameter, list[tuple[StoredTensor, Target]]]) -> None:
    """Reads the tensors of a layer, or makes them up if there is no checkpoint, and packs it."""
    try:
        for parameter in list(module.parameters()):
            assert isinstance(parameter, WeightParameter)
            for tensor, target in stored.get(parameter, ()):
                parameter.load(tensor.read(parameter.stored_dtype), target.shard_id)
            if not stored and not parameter.is_optional:
                parameter.fill_randomly(torch.Generator().manual_seed(0))
        for inner in module.modules():  # one that packs may drop those inside it
            if isinstance(inner, Weights):
                inner.pack()
    except ValueError as error:
        raise ModelError(f"{name.removesuffix('.weights')}: {error}") from error


def _count_work(ready: WorkerReady, free_bytes: int, model: nn.Module, weights: dict[str, int]) -> ModelSurvey:
    """Adds what a step reads and multiplies."""
    modules = list(model.modules())
    tables = [module for module in modules if isinstance(module, VocabParallelEmbedding)]
    heads = [table.shape for table in tables if table.shape.makes_logits]
    mixtures = [module for module in modules if isinstance(module, MoE)]
    layers = [module for module in modules if isinstance(module, LinearLayer)]
    in_experts = {id(layer) for each in mixtures for layer in each.experts.modules()}
    share = mixtures[0].routing.top_k / len(mixtures[0].experts) if mixtures else 1.0
    every = {id(layer): layer.shape.input.size * sum(layer.output_sizes) for layer in layers}
    of_experts = sum(size for layer, size in every.items() if layer in in_experts)
    only_looked_up = sum(
        parameter.nbytes for table in tables if not table.shape.makes_logits for parameter in table.parameters()
    )
    packed = [module.packed for module in modules if isinstance(module, PackedWeights)]
    return ModelSurvey(
        ready=ready,
        free_bytes=free_bytes,
        weights=weights,
        read_bytes=sum(weights.values()) - weights["experts"] - only_looked_up,
        expert_bytes=weights["experts"],
        expert_share=share,
        layer_parameters=int(sum(every.values()) - of_experts + share * of_experts),
        head_parameters=sum(shape.vocab.size * shape.hidden.size for shape in heads),
        multiplies_int8=any(isinstance(each, ops.QuantizedWeight) and each.activations == "int8" for each in packed),
    )


def measure_rates(survey: ModelSurvey) -> ModelSurvey:
    """Adds what this machine can do right now, with the loops that measure its limits; nothing without kernels."""
    kernels, num_threads = library.chosen(), torch.get_num_threads()
    if kernels is None:
        return msgspec.structs.replace(survey, num_threads=num_threads)
    buffer = memory.map_zeros(BANDWIDTH_BYTES).fill_(1)
    data, size = buffer.data_ptr(), len(buffer)
    bandwidth = statistics.median(kernels.measure_bandwidth(data, size, num_threads) for _ in range(5))
    numbers = library.INT8 if survey.multiplies_int8 else library.TYPES[getattr(torch, survey.ready.dtype)]
    return msgspec.structs.replace(
        survey,
        num_threads=num_threads,
        capability=kernels.capability,
        bytes_per_s=bandwidth,
        operations_per_s=2 * max(kernels.measure_peak(numbers, num_threads) for _ in range(5)),
    )


def main() -> int:
    """Answers the message on standard input. Returns the exit code."""
    config = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=ExecutorConfig)
    answer: list[ModelSurvey | WorkerFailed]
    try:
        answer = [survey(config, parallel) for parallel in places(config.parallel)]
    except ModelError as error:
        answer = [WorkerFailed(rank=0, message=str(error), exit_code=EXIT_MODEL)]
    sys.stdout.buffer.write(msgspec.msgpack.encode(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
