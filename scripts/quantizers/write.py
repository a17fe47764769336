"""Writes a tiny model in the schemes of a package: ``write.py PACKAGE FOLDER [SCHEME ...]``.

Runs in the environment of ``check_quantized.py``. Each scheme gets a folder with ``quantized``, what the package wrote,
``plain``, the same model with the numbers that the package dequantises it to, and ``logits.safetensors``: tokens, and
the package's own logits where it rounds activations.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from executor import compress

VOCAB_SIZE = 512


def base(folder: Path) -> Path:
    """The unquantised model, in bfloat16."""
    path = folder / "base"
    if not (path / "model.safetensors").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.08,
            tie_word_embeddings=False,
        )
        LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    return path


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(1))


def save_plain(model: torch.nn.Module, folder: Path, source: Path) -> None:
    """The weights of a dequantised model, in float32, under the names of the unquantised one."""
    state = model.state_dict()
    names = load_file(source / "model.safetensors").keys()
    (folder / "plain").mkdir(parents=True)
    save_file({name: state[name].float().contiguous() for name in names}, folder / "plain" / "model.safetensors")
    fields = json.loads((source / "config.json").read_text())
    fields["dtype"] = "float32"
    (folder / "plain" / "config.json").write_text(json.dumps(fields))


def save_logits(folder: Path, model: torch.nn.Module | None = None) -> None:
    content = {"tokens": tokens()}
    if model is not None:
        with torch.inference_mode():
            content["logits"] = model.float()(tokens()[None]).logits[0].float().contiguous()
    save_file(content, folder / "logits.safetensors")


# ---------------------------------------------------------------------------------------------------------
# bitsandbytes

BNB: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "bnb_int8": {"load_in_8bit": True},
}


def bitsandbytes(scheme: str, folder: Path, source: Path) -> None:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**BNB[scheme])
    options = {"quantization_config": config, "device_map": "cpu", "dtype": torch.float16}
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    model.save_pretrained(folder / "quantized")
    save_plain(model.dequantize(dtype=torch.float32), folder, source)
    save_logits(folder)


# ---------------------------------------------------------------------------------------------------------
# llmcompressor

ROUNDED = ("W8A8", "GPTQ_W8A8")
"""Schemes whose activations Octavo rounds, too."""
PRESETS = (
    *("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4A16", "MXFP4", "NVFP4A16"),
    *("NVFP4", "INT8", "W4A8", "W3A16", "W4AFP8"),
)
OTHERS = ("W4A16_G32", "W4A16_ACTORDER", "GPTQ_W4A16", "GPTQ_W8A8", "AWQ_W4A16", "AWQ_FP8", "FP8_KV", "MIXED", "W2A16")
"""Those of AWQ are written as ``octavo quantize`` does."""


def dataset() -> Any:
    from datasets import Dataset

    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(0, VOCAB_SIZE, (16, 64), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 64] * 16})


def tokenizer() -> Any:
    """Never used, but asked for: the dataset has tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {str(index): index for index in range(VOCAB_SIZE)}
    backend = Tokenizer(WordLevel(words, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0", unk_token="0")


def recipe(scheme: str, model: Any) -> Any:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    common: dict[str, Any] = {"targets": ["Linear"], "ignore": ["lm_head"]}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}

    def group(**changes: Any) -> dict[str, Any]:
        return {"group_0": {"targets": ["Linear"], "weights": {**weights, **changes}}}

    match scheme:
        case "W4A16_G32":
            return QuantizationModifier(config_groups=group(), ignore=["lm_head"])
        case "W2A16":
            return QuantizationModifier(config_groups=group(num_bits=2), ignore=["lm_head"])
        case "W4A16_ACTORDER":
            return GPTQModifier(config_groups=group(actorder="static"), ignore=["lm_head"])
        case "GPTQ_W4A16":
            return GPTQModifier(scheme="W4A16", **common)
        case "GPTQ_W8A8":
            return GPTQModifier(scheme="W8A8", **common)
        case "AWQ_W4A16" | "AWQ_FP8":
            return compress.modifiers(compress.scheme_for(model, scheme.removeprefix("AWQ_")), "awq")
        case "FP8_KV":
            cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
            return QuantizationModifier(scheme="FP8", kv_cache_scheme=cache, **common)
        case "MIXED":
            groups = {
                "group_0": {"targets": ["re:.*(q|k|v)_proj$"], "weights": {**weights, "num_bits": 8}},
                "group_1": {"targets": ["re:.*(o|gate|up|down)_proj$"], "weights": weights},
            }
            return QuantizationModifier(config_groups=groups, ignore=["lm_head"])
    return QuantizationModifier(scheme=scheme, **common)


def llmcompressor(scheme: str, folder: Path, source: Path) -> None:
    from llmcompressor import oneshot

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    calibration: dict[str, Any] = {"dataset": dataset(), "max_seq_length": 64, "num_calibration_samples": 16}
    compress.leave_memory_pageable()
    oneshot(model=model, processor=tokenizer(), recipe=recipe(scheme, model), **calibration)
    model.save_pretrained(folder / "quantized", save_compressed=True)
    from transformers.utils.quantization_config import CompressedTensorsConfig

    config = CompressedTensorsConfig(run_compressed=False)
    options = {"quantization_config": config, "dtype": torch.float16}
    loaded = AutoModelForCausalLM.from_pretrained(folder / "quantized", **options)
    save_plain(loaded, folder, source)
    save_logits(folder, loaded if scheme in ROUNDED else None)


# ---------------------------------------------------------------------------------------------------------
# auto-round

AUTO_ROUND: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq_sym": ("auto_gptq", {"bits": 4, "group_size": 32, "sym": True}),
    "gptq_asym": ("auto_gptq", {"bits": 4, "group_size": 32, "sym": False}),
    "gptq_w2": ("auto_gptq", {"bits": 2, "group_size": 32, "sym": True}),
    "gptq_w3": ("auto_gptq", {"bits": 3, "group_size": 32, "sym": True}),
    "gptq_w8": ("auto_gptq", {"bits": 8, "group_size": 128, "sym": True}),
    "awq": ("auto_awq", {"bits": 4, "group_size": 32, "sym": False}),
    "awq_sym": ("auto_awq", {"bits": 4, "group_size": 128, "sym": True}),
    "round": ("auto_round", {"bits": 4, "group_size": 128, "sym": True}),
}


def auto_round(scheme: str, folder: Path, source: Path) -> None:
    from auto_round import AutoRound

    form, options = AUTO_ROUND[scheme]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    quantizer = AutoRound(model, tokenizer=tokenizer(), iters=0, disable_opt_rtn=True, device_map="cpu", **options)
    quantized, _ = quantizer.quantize()
    save_plain(quantized, folder, source)
    quantizer.save_quantized(folder / "quantized", format=form, inplace=True)
    save_logits(folder)


# ---------------------------------------------------------------------------------------------------------
# Model Optimizer

MODELOPT = {
    "modelopt_fp8": "FP8_DEFAULT_CFG",
    "modelopt_nvfp4": "NVFP4_DEFAULT_CFG",
    "modelopt_fp8_kv": "FP8_DEFAULT_CFG",
}


def modelopt(scheme: str, folder: Path, source: Path) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant

    config = getattr(mtq, MODELOPT[scheme])
    if scheme.endswith("kv"):
        config = update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with torch.inference_mode():
        model = mtq.quantize(model, config, forward_loop=lambda each: each(tokens()[None]))
        export_hf_checkpoint(model, export_dir=folder / "quantized")
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    stored = load_file(folder / "quantized" / "model.safetensors")
    for name, module in plain.named_modules():
        scale = stored.get(f"{name}.weight_scale")
        if scale is not None:
            codes, whole = stored[f"{name}.weight"], stored.get(f"{name}.weight_scale_2")
            module.weight.data = modelopt_numbers(module.weight, codes, scale, whole)
    save_plain(plain, folder, source)
    save_logits(folder)


def modelopt_numbers(
    weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, whole: torch.Tensor | None
) -> torch.Tensor:
    """A dequantised weight."""
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    if whole is None:
        tensor = FP8QTensor(weight.shape, torch.float32, codes)
        result: torch.Tensor = tensor.dequantize(torch.float32, scale=scale)
        return result
    tensor = NVFP4QTensor(weight.shape, torch.float32, codes)
    numbers: torch.Tensor = tensor.dequantize(torch.float32, scale=scale, double_scale=whole, block_sizes={-1: 16})
    return numbers


# ---------------------------------------------------------------------------------------------------------
# gptqmodel

GPTQMODEL: dict[str, dict[str, Any]] = {
    "gptqmodel": {"bits": 4, "sym": True},
    "gptqmodel_asym": {"bits": 4, "sym": False},
    "gptqmodel_desc_act": {"bits": 4, "sym": True, "desc_act": True, "act_group_aware": False},
    "gptqmodel_v2": {"bits": 4, "sym": False, "format": "gptq_v2"},
    "gptqmodel_w2": {"bits": 2, "sym": True},
    "gptqmodel_w3": {"bits": 3, "sym": True},
    "gptqmodel_w8": {"bits": 8, "sym": True},
    "gptqmodel_awq": {"bits": 4, "sym": False, "method": "awq", "format": "gemm"},
}


def gptqmodel(scheme: str, folder: Path, source: Path) -> None:
    os.cpu_count = lambda: 4  # its pools of threads want more than two
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    tokenizer().save_pretrained(source)
    model = GPTQModel.load(str(source), QuantizeConfig(group_size=32, **GPTQMODEL[scheme]))
    backend = BACKEND.AWQ_TORCH if scheme == "gptqmodel_awq" else BACKEND.TORCH  # AWQ's usual one is for GPUs alone
    model.quantize(list(dataset()), batch_size=1, tokenizer=tokenizer(), backend=backend)
    model.save(str(folder / "quantized"))
    exact: dict[str, Any] = {"backend": backend, "device": "cpu", "dtype": torch.float16}
    loaded = GPTQModel.load(str(folder / "quantized"), **exact)  # in bfloat16, scales would be rounded first
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    layers: dict[str, Any] = dict(loaded.model.named_modules())
    for name, module in plain.named_modules():
        layer = layers[name]
        if isinstance(module, torch.nn.Linear) and not isinstance(layer, torch.nn.Linear):
            with torch.inference_mode():
                product = layer(torch.eye(module.in_features, dtype=layer.scales.dtype))
            module.weight.data = product.T.float()
        elif name.endswith("norm"):  # AWQ moves factors of columns there
            module.weight.data = layer.weight.data.float()
    save_plain(plain, folder, source)
    save_logits(folder)


# ---------------------------------------------------------------------------------------------------------

WRITERS: dict[str, tuple[Callable[[str, Path, Path], None], tuple[str, ...]]] = {
    "llmcompressor": (llmcompressor, (*PRESETS, *OTHERS)),
    "bitsandbytes": (bitsandbytes, tuple(BNB)),
    "auto_round": (auto_round, tuple(AUTO_ROUND)),
    "modelopt": (modelopt, tuple(MODELOPT)),
    "gptqmodel": (gptqmodel, tuple(GPTQMODEL)),
}


def main() -> None:
    writer, folder = sys.argv[1], Path(sys.argv[2])
    write, known = WRITERS[writer]
    source = base(folder)
    reasons = {}
    for scheme in [name for name in known if not sys.argv[3:] or name in sys.argv[3:]]:
        target = folder / scheme
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        try:
            write(scheme, target, source)
            reasons[scheme] = ""
        except Exception as error:
            traceback.print_exc()
            reasons[scheme] = f"{type(error).__name__}: {str(error)[:200]}"
        (folder / f"{writer}.json").write_text(json.dumps(reasons))


if __name__ == "__main__":
    main()
