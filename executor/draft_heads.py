"""Loads draft heads: modules trained for a model, which propose drafts from its hidden states."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import torch

from executor.base import ModelError
from executor.checkpoint import Checkpoint
from executor.config import ModelConfig
from executor.input_batch import InputBatch
from executor.layers.context import ModelContext
from executor.loader import (
    LoadedModel,
    Progress,
    build_model,
    choose_kv_dtype,
    load_weights,
    open_model,
    quantization_of,
)
from executor.models.decoder import CausalDecoder
from executor.models.draft_head import DraftHead
from executor.models.eagle3 import Eagle3Head
from executor.models.mtp import MTPHead
from executor.models.qwen3_mtp import QwenMTPHead
from executor.models.qwen3_next import HybridForCausalLM
from executor.packing import fill_with_random_numbers
from executor.weights_mapper import WeightsMapper

FLAG = "--speculative-config"
NUM_COMPARED = 64
"""Rows of a head's embedding that are compared with the model's: a head that was trained with it has a copy."""
MAX_DIFFERENCE = 0.1
"""Relative difference up to which the model's embedding takes the place of the head's: that of quantised copies."""


def load_head(
    method: str, target: LoadedModel, config: ModelConfig, attention_backend: str | None, progress: Progress
) -> LoadedModel:
    """Loads the head of a method, and lets the model return what it reads.

    Args:
        method: ``eagle3`` or ``mtp``.
        target: The model.
        config: The head's files; with ``mtp`` those of the model.
        attention_backend: Name of a backend; None: the first that supports each layer.
        progress: Called with the bytes read so far.

    Raises:
        ModelError: The head cannot be loaded, or is not for this model.
    """
    model, context = target.model, target.context
    assert context is not None
    if not isinstance(model, CausalDecoder) or model.lm_head is None:
        raise ModelError(f"{FLAG}: {target.hf_config.architecture} cannot have draft heads; use the method suffix")
    load = _load_mtp if method == "mtp" else _load_eagle3
    head, context = load(model, context, config, attention_backend, progress)
    model.set_aux_hidden_state_layers(head.aux_layers)
    head.loaded()
    num_bytes = sum(parameter.nbytes for parameter in head.parameters())
    return LoadedModel(head.eval(), context.config, num_bytes, context.dtype, context.max_model_len)


def _load_eagle3(
    target: CausalDecoder,
    context: ModelContext,
    config: ModelConfig,
    attention_backend: str | None,
    progress: Progress,
) -> tuple[DraftHead, ModelContext]:
    hf_config, checkpoint = open_model(config)
    hf_config = Eagle3Head.configure(hf_config)
    if hf_config.vocab_size != context.config.vocab_size:
        hf_config.bad("vocab_size", f"that of the model, {context.config.vocab_size}")
    context = replace(
        context,
        config=hf_config,
        quantization=quantization_of(config, hf_config, context.device, context.parallel),
        kv_dtype=choose_kv_dtype(config.kv_cache_dtype, context.dtype),
        max_adapters=0,
    )
    assert checkpoint is not None
    has_embedding = _has_embedding(checkpoint, target, context)

    def make(context: ModelContext) -> DraftHead:
        return Eagle3Head(context, target, has_embedding=has_embedding)

    head = build_model(make, context, attention_backend)
    load_weights(head, checkpoint, context, progress)
    return head, context


def _has_embedding(checkpoint: Checkpoint, target: CausalDecoder, context: ModelContext) -> bool:
    """Whether the head has another embedding than the model. Drafts may differ if rows that were not compared do."""
    stored = [
        tensor
        for tensor in checkpoint.tensors((), WeightsMapper())
        if tensor.name.removeprefix("model.") == "embed_tokens.weight"
    ]
    if not stored:
        return False
    table, shape = stored[0].read(context.dtype), target.model.embed_tokens.shape
    if list(table.shape) != [context.config.vocab_size, shape.hidden.size]:
        return True
    ids = torch.linspace(0, len(table) - 1, NUM_COMPARED, dtype=torch.float64).to(torch.int32)
    theirs = table[ids.long()].float()
    ids = ids.to(context.device)
    ours = target.model.embed_tokens(ids, InputBatch(ids, ids, [], ids.long())).float().cpu()
    return float((ours - theirs).norm()) > MAX_DIFFERENCE * float(theirs.norm())


def _load_mtp(
    target: CausalDecoder,
    context: ModelContext,
    config: ModelConfig,
    attention_backend: str | None,
    progress: Progress,
) -> tuple[DraftHead, ModelContext]:
    if config.gguf is not None:
        raise ModelError(f"{FLAG}: MTP layers of GGUF files are not supported; use the method suffix")
    plain = msgspec.structs.replace(config, calibration=(), imatrix="")
    context = replace(
        context, quantization=quantization_of(plain, context.config, context.device, context.parallel), max_adapters=0
    )

    def make(context: ModelContext) -> DraftHead:
        is_hybrid = isinstance(target, HybridForCausalLM)
        return QwenMTPHead(context, target) if is_hybrid else MTPHead(context, target)

    head = build_model(make, context, attention_backend)
    _, checkpoint = open_model(config)
    if checkpoint is None:
        fill_with_random_numbers(head)
    else:
        load_weights(head, checkpoint, context, progress)
    return head, context
