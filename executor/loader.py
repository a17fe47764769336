"""Loads a model from files and makes it ready to run.

A model is built with uninitialised parameters, each of which knows where checkpoint tensors go in it
(``layers/parameter.py``). The loader matches names, reports missing and unexpected tensors before it reads any data,
then copies tensor by tensor. Each layer is packed once it is complete (``packing.py``).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from executor import language_part
from executor.attention.base import AttentionBackend, choose_backends
from executor.base import Head, ModelError
from executor.calibration import Sources, calibrate
from executor.checkpoint import FLOATS, Checkpoint, SafetensorsCheckpoint, StoredTensor
from executor.config import KV_CODE_NAMES, ModelConfig
from executor.dense import LayerModule, TokenWeights, load_dense, load_linear
from executor.gguf import GGUFCheckpoint
from executor.heap import returning_blocks
from executor.hf_config import DTYPES, HFConfig
from executor.layers.attention import Attention
from executor.layers.context import ModelContext
from executor.layers.moe import MoE
from executor.layers.parameter import MISFIT, Part, ShardId, WeightParameter, named_weights, stored_module
from executor.layers.pooler_head import PoolingHead, with_labels
from executor.messages import PoolingSupport
from executor.mmproj import VisionCheckpoint
from executor.models.base import Model
from executor.models.registry import resolve_model, split_architecture, tower_of
from executor.models.vision.tower import VisionTower
from executor.packing import Packing, fill_with_random_numbers, in_threads
from executor.parallel import ParallelState, split_layers
from executor.quantization import Options, QuantizationConfig, choose_quantization
from executor.quantization.at_load import QuantizingParameter, read_imatrix
from executor.quantization.fp8 import CACHE_SCALES
from executor.quantization.packed import describe
from executor.registry import resolve
from executor.spilled import spill_if_needed
from executor.streamed import STREAMS, StreamedCheckpoint, TensorizerCheckpoint
from executor.weights_mapper import WeightsMapper
from ops import Communicator, NotConnected, SingleRank, op_set

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Model)

Progress = Callable[[str, int, int], None]
"""Takes a stage, the amount done and the total."""

LARGE_MODEL = 256 << 20
"""Bytes of weights from which the memory that loading leaves behind is worth a system call per block."""


@dataclass
class LoadedModel:
    """A model that can run once its attention layers have KV caches."""

    model: Model
    hf_config: HFConfig
    weight_bytes: int
    dtype: torch.dtype
    max_model_len: int
    """Longest sequence: as configured, else the model's maximum."""
    num_pooled: int = 1
    """See ``ModelConfig``."""
    dense: tuple[LayerModule, ...] = ()
    """Layers that follow pooling."""
    token_dense: tuple[LayerModule, ...] = ()
    """Those that make vectors of tokens instead."""
    token_weights: TokenWeights | None = None
    """What weighs tokens for sparse vectors."""
    tower: VisionTower | None = None
    """Encodes images; None: the model is served for text alone."""
    context: ModelContext | None = None
    """What the model was built with."""

    @property
    def vector_size(self) -> int:
        """Size of pooled vectors."""
        if self.dense:
            return self.dense[-1].out_features
        return (self.model.hidden_size or self.hf_config.hidden_size) * self.num_pooled

    @property
    def token_size(self) -> int:
        """Size of the vectors of tokens."""
        if self.token_dense:
            return self.token_dense[-1].out_features
        return self.model.hidden_size or self.hf_config.hidden_size

    @property
    def pooling_head(self) -> PoolingHead | TokenWeights | None:
        """What classifies pooled states."""
        return self.token_weights or self.model.pooling_head

    @property
    def pooling(self) -> PoolingSupport:
        """What the model does with pooled states."""
        head, layers = self.pooling_head, self.model.attention_layers()
        labels = head.labels if isinstance(head, TokenWeights) else () if head is None else self.hf_config.labels
        return PoolingSupport(
            generates=split_architecture(self.hf_config.architecture)[1] == "lm",
            pooling_type=self.model.pooling_type,
            head_pooling="" if head is None else head.pooling_type,
            labels=tuple(labels),
            needs_whole_prompts=any(not layer.shape.is_cached for layer in layers),
            token_size=self.token_size,
        )


@dataclass(frozen=True)
class Target:
    """Destination of one checkpoint tensor."""

    parameter: WeightParameter
    shard_id: ShardId


def _dense_layers(
    config: ModelConfig, size: int
) -> tuple[tuple[LayerModule, ...], tuple[LayerModule, ...], TokenWeights | None]:
    """The layers behind pooling, those that make vectors of tokens, and the one that weighs them.

    Args:
        config: Says which there are.
        size: Size of hidden states.

    Raises:
        ModelError: See ``load_dense``.
    """
    folder = Path(config.model)
    dense = load_dense(folder, config.dense, size * config.num_pooled, Path(config.weights or folder))
    own = dense if config.num_pooled == 1 else ()
    token_dense = (load_linear(Path(config.token_dense), size),) if config.token_dense else own
    weights = TokenWeights(load_linear(Path(config.token_weights), size)) if config.token_weights else None
    return dense, token_dense, weights


def load_model(
    config: ModelConfig,
    parallel: ParallelState,
    device: torch.device,
    attention_backend: str | None,
    progress: Progress,
    memory_bytes: int | None = None,
    communicator: Communicator | None = None,
    max_adapters: int = 0,
    free_bytes: int | None = None,
) -> LoadedModel:
    """Builds a model and loads its weights.

    Args:
        config: ``model`` is a local folder, or a GGUF file whose header is in ``gguf``.
        parallel: This worker's rank and group sizes.
        device: Device to load the weights to.
        attention_backend: Name of a backend; None: the first that supports each layer.
        progress: Called with the bytes read so far.
        memory_bytes: Total device memory; a model whose weights need more is rejected before they are read.
        communicator: Connects the ranks that share the layers. None: with several ranks the model cannot run.
        max_adapters: Most low-rank adapters in memory; 0: it is computed without.
        free_bytes: Free memory of a CPU: weights that need more lie in files (``spilled.py``). None: in memory.

    Raises:
        ModelError: The model cannot be loaded; one line that names the file and the problem.
    """
    model, context, checkpoint = prepare_model(config, parallel, device, attention_backend, communicator, max_adapters)
    hf_config = context.config
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    _check_memory(weight_bytes, memory_bytes, free_bytes, context)
    if checkpoint is None:
        fill_with_random_numbers(model)
    else:
        is_alone = tower_name(config, hf_config) is None
        load_weights(model, checkpoint, context, progress, is_tied_by_file=is_tied_by_file(config), is_alone=is_alone)
    _log_formats(model)
    model.loaded()
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    dense, token_dense, token_weights = _dense_layers(config, model.hidden_size or hf_config.hidden_size)
    tower = load_tower(config, context, attention_backend, progress)
    if tower is not None:
        weight_bytes += sum(parameter.nbytes for parameter in tower.parameters())
    return LoadedModel(
        model.eval(),
        hf_config,
        weight_bytes,
        context.dtype,
        context.max_model_len,
        config.num_pooled,
        dense,
        token_dense,
        token_weights,
        tower,
        context,
    )


def prepare_model(
    config: ModelConfig,
    parallel: ParallelState,
    device: torch.device,
    attention_backend: str | None,
    communicator: Communicator | None = None,
    max_adapters: int = 0,
) -> tuple[Model, ModelContext, Checkpoint | None]:
    """Builds a model with uninitialised weights, and opens its checkpoint. See ``load_model``.

    Returns:
        The model, the context it was built with, and the checkpoint; None with ``load_format`` dummy.

    Raises:
        ModelError: The configuration does not describe a model that can be served.
    """
    hf_config, checkpoint = open_model(config)
    model_class = resolve_model(hf_config.architecture, hf_config.values, config.model_impl)
    head = split_architecture(hf_config.architecture)[1]
    hf_config = with_labels(model_class.configure(hf_config), head)
    if parallel.pp_size > 1 and tower_name(config, hf_config) is not None:
        raise ModelError(
            f"--pipeline-parallel-size {parallel.pp_size}: stages take no images yet; add --language-model-only, or "
            "use 1"
        )
    dtype = choose_dtype(config, hf_config, keeps_float32=model_class.keeps_float32)
    context = ModelContext(
        config=hf_config,
        parallel=parallel,
        dtype=dtype,
        device=device,
        quantization=quantization_of(config, hf_config, device, parallel),
        max_model_len=choose_max_model_len(config, hf_config),
        communicator=communicator or _unconnected(parallel),
        kv_dtype=choose_kv_dtype(config.kv_cache_dtype, dtype),
        head=head,
        max_adapters=max_adapters,
        stored_modules=stored_modules(config, hf_config, checkpoint, model_class.mapper, head),
    )
    model = build_model(model_class, context, attention_backend)
    if not hf_config.boolean("is_causal", True) and any(layer.shape.causal for layer in model.attention_layers()):
        hf_config.bad("is_causal", f"true for {hf_config.architecture}, whose tokens attend to earlier ones only")
    return model, context, checkpoint


def stored_modules(
    config: ModelConfig, hf_config: HFConfig, checkpoint: Checkpoint | None, mapper: WeightsMapper, head: Head
) -> dict[str, str]:
    """Names of modules that a quantisation looks up, by those in the model, where they differ.

    They are those in the checkpoint, or in the file of ``--imatrix``. Of a model that is a part of others, they are
    those of the part alone, as in ``HFConfig.quantization``.
    """
    if config.imatrix:
        names = [f"{module}.weight" for module in read_imatrix(config.imatrix)]
    elif hf_config.quantization is not None and isinstance(checkpoint, SafetensorsCheckpoint):
        names = [tensor.name for tensor in checkpoint.tensors((), WeightsMapper())]
    else:
        return {}
    mapper = mapper if head == "lm" else mapper.without_logits()
    if not mapper.renames:
        return {}
    found = {}
    for stored in language_part.renamed_modules(names) if hf_config.is_part else names:
        found[mapper.name(stored).rpartition(".")[0]] = stored.rpartition(".")[0]
    return {name: stored for name, stored in found.items() if name != stored}


def quantization_of(
    config: ModelConfig, hf_config: HFConfig, device: torch.device, parallel: ParallelState
) -> QuantizationConfig:
    """The method of the weights.

    Raises:
        ModelError: There is none such, or ranks cannot share a model that uses it.
    """
    if config.quantized_activations == "fp8" and not op_set(device.type).multiplies_fp8:
        raise ModelError(
            "--quantized-activations fp8: needs an NVIDIA GPU of compute capability 8.9 or higher; use auto"
        )
    options = Options(config.quantized_activations, device.type, config.imatrix, config.calibration)
    chosen = choose_quantization(config.quantization, hf_config.quantization, options)
    flag, size = ("tensor", parallel.tp_size) if parallel.tp_size > 1 else ("pipeline", parallel.pp_size)
    if size > 1 and chosen.calibration:
        raise ModelError(
            f"--{flag}-parallel-size {size}: ranks cannot measure a model together, as --quantization "
            f"{config.quantization} does; use int8, or --{flag}-parallel-size 1"
        )
    return chosen


def tower_name(config: ModelConfig, hf_config: HFConfig) -> str | None:
    """The class of a model's vision tower; None: there is none, or none that is used."""
    return None if config.language_model_only else tower_of(hf_config.whole)


def load_tower(
    config: ModelConfig, context: ModelContext, attention_backend: str | None, progress: Progress
) -> VisionTower | None:
    """Loads the vision tower of a multimodal model. Every rank has all of it.

    Raises:
        ModelError: The checkpoint does not hold the tower that its configuration describes.
    """
    whole = context.config
    name = tower_name(config, whole)
    if name is None:
        return None
    own = replace(
        context,
        config=replace(whole, values=dict(whole.whole), spelling={}, is_part=False),
        parallel=ParallelState(),
        communicator=SingleRank(),
        quantization=choose_quantization(None, None),
        kv_dtype=None,
        head="lm",
        max_adapters=0,
    )
    tower_class: type[VisionTower] = resolve({"tower": name}, "tower", "architecture")
    tower = build_model(tower_class, own, attention_backend)
    assert isinstance(tower, VisionTower)
    if tower.image_token_id >= whole.vocab_size:
        own.config.bad("image_token_id", f"a token of the vocabulary of {whole.vocab_size}")
    if tower.merge_size and not whole.rope.has("mrope_section"):
        whole.rope.bad("mrope_section", "the angles of each axis of a position")
    vision = config.vision
    checkpoint = _open_folder(config, Path(config.model)) if vision is None else VisionCheckpoint(vision)
    if checkpoint is None or config.load_format == "dummy":
        fill_with_random_numbers(tower)
        return tower.eval()
    try:
        load_weights(tower, checkpoint, own, progress)
    except ModelError as error:
        if whole.quantization is None:
            raise
        logger.warning("the vision tower is quantised, which is not supported (%s): serving text alone", error)
        return None
    return tower.eval()


def _check_memory(weight_bytes: int, memory_bytes: int | None, free_bytes: int | None, context: ModelContext) -> None:
    """Rejects a model that memory cannot hold, or lets its weights lie in files."""
    device, source = context.device.type, context.config.source
    if free_bytes is not None and device == "cpu":
        spill_if_needed(weight_bytes, free_bytes, source)
    elif memory_bytes is not None and weight_bytes > memory_bytes:
        raise ModelError(
            f"{source}: the weights take {weight_bytes / 2**30:.4g} GiB as {context.dtype}, and the {device} has "
            f"{memory_bytes / 2**30:.4g} GiB"
        )


def _log_formats(model: Model) -> None:
    quantized = describe(model)
    if quantized is not None:
        logger.info("quantised weights: %s", quantized)


def _unconnected(parallel: ParallelState) -> Communicator:
    return SingleRank() if parallel.tp_size == 1 else NotConnected(parallel.tp_rank, parallel.tp_size)


def build_model(model_class: Callable[[ModelContext], M], context: ModelContext, attention_backend: str | None) -> M:
    """The model with uninitialised weights; its attention layers have backends.

    Args:
        model_class: Its class, or what makes it.
        context: The model's construction context.
        attention_backend: Name of a backend; None: the first that supports each layer.

    Raises:
        ModelError: The configuration does not describe a valid model.
    """
    try:
        model = model_class(context)
        keep_stage(model, context.parallel)
        keep_experts(model)
        layers = model.attention_of_stages or model.attention_layers()
        shapes = [layer.shape for layer in layers]
        backends = choose_backends(context.device.type, shapes, context.dtype, attention_backend)
        check_caches(layers, backends, context.config.source)
    except ValueError as error:
        raise ModelError(str(error)) from error
    except (ArithmeticError, MemoryError, RuntimeError) as error:
        # Sizes beyond memory, or formulas without a result: the cause is always the configuration.
        logger.debug("cannot build the model", exc_info=error)
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise ModelError(f"{context.config.source}: cannot build a model from this configuration: {reason}") from error
    for layer, backend in zip(layers, backends, strict=True):
        layer.backend = backend
    return model


def check_caches(layers: Sequence[Attention], backends: Sequence[AttentionBackend], source: str) -> None:
    """Checks that attention layers can have the caches that are asked for.

    Raises:
        ValueError: One cannot; the message begins with ``source``, as there may be a draft model.
    """
    for layer, backend in zip(layers, backends, strict=True):
        try:
            backend.kv_shape(1, backend.block_size, layer.shape, layer.kv_dtype)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None


# ---------------------------------------------------------------------------------------------------------
# configuration


def open_model(config: ModelConfig) -> tuple[HFConfig, Checkpoint | None]:
    """Opens a model's configuration and weights; no weights with ``load_format`` dummy."""
    path = Path(config.model)
    if config.gguf is not None:
        gguf = GGUFCheckpoint(path, config.gguf)
        hf_config = HFConfig.from_fields(gguf.config, config.hf_overrides, str(path))
        if config.vision is not None:
            hf_config = replace(hf_config, whole=config.vision.fields)
        return hf_config, None if config.load_format == "dummy" else gguf
    if config.load_format == "gguf" or path.suffix == ".gguf":
        raise ModelError(f"{path}: not a GGUF file")
    return HFConfig.from_folder(path, config.hf_overrides), _open_folder(config, path)


def _open_folder(config: ModelConfig, path: Path) -> Checkpoint | None:
    if config.load_format == "dummy":
        return None
    if config.load_format == "tensorizer":
        return TensorizerCheckpoint(path)
    if config.load_format in STREAMS:
        return StreamedCheckpoint(path, config.load_format)
    return SafetensorsCheckpoint(Path(config.weights or path))


def choose_dtype(config: ModelConfig, hf_config: HFConfig, *, keeps_float32: bool = False) -> torch.dtype:
    """The requested dtype; by default the one the model was saved in, with bfloat16 instead of float32.

    Encoders keep float32 (``keeps_float32``): they are small, and vectors are compared with those of other programs.
    """
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    saved = hf_config.torch_dtype
    if saved is not None and saved != torch.float32:
        return saved
    return torch.float32 if keeps_float32 else torch.bfloat16


def choose_kv_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of cached K and V.

    Args:
        name: The value of ``--kv-cache-dtype``.
        dtype: That of the activations.

    Raises:
        ModelError: The cache would have another type of 16 or 32 bits than the activations.
    """
    if name in KV_CODE_NAMES:
        logger.info("K and V are cached in codes: %s", name)
        chosen: torch.dtype = getattr(torch, KV_CODE_NAMES[name])
        return chosen
    if name != "auto" and DTYPES[name] != dtype:
        ours = str(dtype).removeprefix("torch.")
        raise ModelError(
            f"--kv-cache-dtype {name}: activations are {ours}, and K and V are cached as such or in 8 bits; use auto, "
            f"int8 or fp8, or --dtype {name}"
        )
    return dtype


def choose_max_model_len(config: ModelConfig, hf_config: HFConfig) -> int:
    """The requested length, which must not exceed the model's maximum."""
    if config.max_model_len is None or config.max_model_len < 0:
        return hf_config.default_max_model_len
    longest = hf_config.max_position
    if config.max_model_len > longest:
        raise ModelError(
            f"--max-model-len {config.max_model_len} exceeds the model's maximum of {longest} tokens "
            f"({hf_config.source})"
        )
    return config.max_model_len


# ---------------------------------------------------------------------------------------------------------
# weights


def is_tied_by_file(config: ModelConfig) -> bool:
    """Whether the model's files say which tensors are tied. An override of that is deliberate."""
    return "tie_word_embeddings" not in config.hf_overrides


def load_weights(
    model: Model,
    checkpoint: Checkpoint,
    context: ModelContext,
    progress: Progress,
    *,
    is_tied_by_file: bool = True,
    is_alone: bool = True,
) -> None:
    """Fills every parameter from a checkpoint that holds exactly the model's tensors, and packs the layers.

    Args:
        model: The model to fill.
        checkpoint: The weights.
        context: The context the model was built with.
        progress: Called with the bytes read so far.
        is_tied_by_file: The model's own configuration ties tensors; warn about a tied tensor stored twice with
            different values.
        is_alone: Of a multimodal checkpoint, this is the only part that is loaded.
    """
    checkpoint, targets, found = match_weights(
        model, checkpoint, context, is_tied_by_file=is_tied_by_file, is_alone=is_alone
    )
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    with returning_blocks() if num_bytes >= LARGE_MODEL else nullcontext():
        _fill(model, checkpoint, targets, found, context, progress)
    for layer in model.attention_layers():
        layer.loaded()


def match_weights(
    model: Model,
    checkpoint: Checkpoint,
    context: ModelContext,
    *,
    is_tied_by_file: bool = True,
    is_alone: bool = True,
) -> tuple[Checkpoint, dict[str, Target], dict[str, StoredTensor]]:
    """Finds the checkpoint's tensor of every parameter, without reading it. See ``load_weights``.

    Returns:
        The checkpoint as the model reads it, the places of all tensors, and the tensors, both by name.

    Raises:
        ModelError: A tensor is missing or not part of the model.
    """
    targets = find_targets(model)
    tied = find_ties(targets, model.tied_modules) if context.config.tie_word_embeddings else {}
    is_part, mapper = context.config.is_part, mapper_of(model, context.config, context.head)
    ignored = [*context.quantization.ignored, *model.ignored]
    if all(layer.scales is None for layer in model.attention_layers()):
        ignored.append(CACHE_SCALES)
    mapper = mapper.quantized(context.quantization.renames, ignored)
    checkpoint = model.stored_as(checkpoint)
    elsewhere = set(model.names_of_stages)
    if context.config.tie_word_embeddings:
        elsewhere |= find_ties(elsewhere, model.tied_modules).keys()
    stored = checkpoint.tensors(targets.keys() | tied.keys() | elsewhere, mapper)
    stored = [tensor for tensor in stored if tensor.name in targets or tensor.name not in elsewhere]
    found, doubles = match_names(stored, targets, mapper, tied)
    if is_part and is_alone:
        _report_other_parts(stored)
    for name, double in doubles.items():
        if name not in found:
            found[name] = double
        elif is_tied_by_file and _differ(double, found[name], targets[name].parameter.stored_dtype):
            logger.warning(
                "ignoring %s: it differs from %r, which the model's configuration uses in its place "
                "(tie_word_embeddings; --hf-overrides '{\"tie_word_embeddings\": false}' uses both)",
                double.origin,
                name,
            )
    for name in targets:
        if name not in found and not targets[name].parameter.is_optional:
            raise ModelError(f"{checkpoint.origin(name)} is missing{_advice(name, model)}")
    return checkpoint, targets, found


def mapper_of(model: Model, config: HFConfig, head: Head) -> WeightsMapper:
    """The names of a model's tensors in Hugging Face's files."""
    mapper = model.mapper
    if config.is_part:
        mapper = mapper.within(language_part.RENAMES, language_part.OTHER_PARTS)
    return mapper if head == "lm" else mapper.without_logits()


def _fill(
    model: Model,
    checkpoint: Checkpoint,
    targets: dict[str, Target],
    found: Mapping[str, StoredTensor],
    context: ModelContext,
    progress: Progress,
) -> None:
    """Loads all tensors that were found, and packs the layers."""
    packing = Packing(model)
    for name in [name for name in targets if name not in found]:
        packing.loaded(targets.pop(name).parameter)
    order = sorted(found, key=lambda name: not packing.is_large(targets[name].parameter))
    late = []
    if _can_measure(model, checkpoint, context):
        late = [name for name in order if isinstance(targets[name].parameter, QuantizingParameter)]
        order = [name for name in order if name not in set(late)]

    def load(name: str) -> int:
        stored, target = found[name], targets.pop(name)  # unpacked weights are freed once nothing refers to them
        packing.stage(target.parameter)
        try:
            tensor = stored.read(target.parameter.stored_dtype)
            if target.parameter.keeps_tensors and _is_streamed(checkpoint):
                tensor = tensor.clone()  # the package may use its memory again
            target.parameter.load(tensor, target.shard_id)
        except ValueError as error:
            raise ModelError(f"{stored.origin} {error}") from error
        packing.loaded(target.parameter)
        return stored.num_bytes

    total = sum(stored.num_bytes for stored in found.values())
    done = 0
    progress("weights", done, total)
    for names in (order, late):
        if late and names is late:
            calibrate(model, _sources(found, targets), context.quantization.calibration)
        for num_bytes in _loads(checkpoint, load, names, found, targets):
            done += num_bytes
            progress("weights", done, total)
    if targets:
        raise ModelError(f"{checkpoint.origin(next(iter(targets)))} was not read by the package of --load-format")
    packing.finish()


def _can_measure(model: Model, checkpoint: Checkpoint, context: ModelContext) -> bool:
    """Whether the model can run once before its weights are quantised, and the method has a use for that."""
    is_whole = context.parallel.tp_size == context.parallel.pp_size == 1 and model.can_be_captured
    is_here = context.device.type == "cpu" and not _is_streamed(checkpoint)
    has_experts = any(isinstance(module, MoE) for module in model.modules())  # whose products are not those of layers
    return bool(context.quantization.calibration) and is_whole and is_here and not has_experts


def _sources(found: Mapping[str, StoredTensor], targets: Mapping[str, Target]) -> Sources:
    sources: dict[WeightParameter, list[tuple[StoredTensor, ShardId]]] = {}
    for name, stored in found.items():
        if name in targets:
            sources.setdefault(targets[name].parameter, []).append((stored, targets[name].shard_id))
    return sources


def _advice(missing: str, model: Model) -> str:
    """What to do about a missing tensor."""
    if not any(missing.startswith(f"{module}.") for module in model.tied_modules):
        return MISFIT
    return (
        "; if the model has no output layer of its own, --hf-overrides '{\"tie_word_embeddings\": true}' uses the "
        "embedding"
    )


def _prefetched(
    found: Mapping[str, StoredTensor], order: Iterable[str], targets: Mapping[str, Target]
) -> Iterator[str]:
    """The names, each once what this rank needs of its tensor has been read from the disk.

    One thread reads from end to end, which disks and the system's read-ahead serve best, while others copy and pack.
    """
    for name in order:
        target = targets[name]
        rows = next(iter(target.parameter.parts[target.shard_id]), Part.whole(1))
        for each in rows.ranges:
            found[name].prefetch(each.start, each.start + each.size, rows.full)
        yield name


def _loads(
    checkpoint: Checkpoint,
    load: Callable[[str], int],
    order: list[str],
    found: Mapping[str, StoredTensor],
    targets: Mapping[str, Target],
) -> Iterator[int]:
    """The results of ``load`` for all names, in the order in which the checkpoint has the tensors."""
    if not _is_streamed(checkpoint):
        return in_threads(load, _prefetched(found, order, targets))
    assert isinstance(checkpoint, StreamedCheckpoint | TensorizerCheckpoint)
    return map(load, filter(set(order).__contains__, checkpoint.arrivals()))


def _is_streamed(checkpoint: Checkpoint) -> bool:
    """Whether tensors can be read but once."""
    return isinstance(checkpoint, StreamedCheckpoint | TensorizerCheckpoint)


def _report_other_parts(stored: Iterable[StoredTensor]) -> None:
    rest = [tensor.num_bytes for tensor in stored if re.search(language_part.OTHER_PARTS, tensor.name)]
    logger.info(
        "a multimodal model: its language model is served, for text alone; skipping %d tensors (%.3g GB) of others",
        len(rest),
        sum(rest) / 1e9,
    )


def keep_stage(model: Model, parallel: ParallelState) -> None:
    """Reduces a model to the layers of one pipeline stage.

    Raises:
        ModelError: The model cannot be cut.
        ValueError: It has too few layers.
    """
    if parallel.pp_size == 1:
        return
    sizes, last = model.layer_bytes()
    own = split_layers(sizes, parallel.pp_size, last)[parallel.pp_rank]
    model.attention_of_stages = model.attention_layers()
    names = find_targets(model).keys()
    model.keep_layers(own.start, own.end)
    model.names_of_stages = names - find_targets(model).keys()


def keep_experts(model: Model) -> None:
    """Reduces a model to the experts of one rank."""
    mixtures = [module for module in model.modules() if isinstance(module, MoE) and module.own_experts is not None]
    if not mixtures:
        return
    names = find_targets(model).keys()
    for each in mixtures:
        each.keep_own()
    model.names_of_stages = {*model.names_of_stages, *(names - find_targets(model).keys())}


def find_targets(model: Model) -> dict[str, Target]:
    """Destinations of all tensors that the model needs, by checkpoint name."""
    targets: dict[str, Target] = {}
    for name, parameter in named_weights(model):
        assert isinstance(parameter, WeightParameter), name
        module, dot, leaf = name.rpartition(".")
        for shard_id in parameter.parts:
            stored = f"{stored_module(module, shard_id)}{dot}{leaf}"
            assert stored not in targets, f"{stored} would go to two places"
            targets[stored] = Target(parameter, shard_id)
    return targets


def find_ties(names: Iterable[str], tied_modules: Mapping[str, str]) -> dict[str, str]:
    """Alternative checkpoint names of tensors of tied modules -> the names that the model uses."""
    return {
        f"{other}.{name.removeprefix(f'{module}.')}": name
        for other, module in tied_modules.items()
        for name in names
        if name.startswith(f"{module}.")
    }


def _differ(one: StoredTensor, other: StoredTensor, dtype: torch.dtype) -> bool:
    """Whether two tensors differ. Reads them up to the first difference."""
    try:
        first, second = one.read(dtype), other.read(dtype)
    except ValueError:
        return True
    if dtype not in FLOATS:  # same dtype; torch cannot compare all of them
        first, second = first.view(torch.uint8), second.view(torch.uint8)
    return first.shape != second.shape or not torch.equal(first.to(second.dtype), second)


def match_names(
    stored: Iterable[StoredTensor], targets: dict[str, Target], mapper: WeightsMapper, tied: Mapping[str, str]
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The tensors that the model needs, by name, and duplicates stored under the other name of a tied one.

    Raises:
        ModelError: A tensor is not part of the model, or two would fill the same place.
    """
    found: dict[str, StoredTensor] = {}
    doubles: dict[str, StoredTensor] = {}
    for tensor in stored:
        if tensor.name in targets:
            if tensor.name in found:
                raise ModelError(f"{tensor.origin} and {found[tensor.name].origin} are the same tensor of the model")
            found[tensor.name] = tensor
        elif tensor.name in tied:
            doubles[tied[tensor.name]] = tensor
        elif not mapper.ignores(tensor.name):
            raise ModelError(f"{tensor.origin} is not part of this model{MISFIT}")
    return found, doubles  # a tied tensor may be stored under either name, or both
