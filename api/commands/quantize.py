"""``octavo quantize``: writes a quantised model, as a GGUF file or for Octavo, vLLM and transformers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from tqdm import tqdm

from api.commands.eval_quant import read_texts, windows
from api.config import make_config
from api.flags import ConfigError, Parser
from api.model.files import ModelFiles, find_model
from engine_core.launch import child_command, child_environment

DESCRIPTION = "Write a quantised model: a GGUF file, or a folder that Octavo, vLLM and transformers load."
GGUF_TYPES = {
    name: gguf.LlamaFileType[f"MOSTLY_{name}"] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0")
} | {"MXFP4": gguf.LlamaFileType.MOSTLY_MXFP4_MOE}
"""Those that the package can write, and what a file says that it holds."""
COMPRESSED = ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC", "NVFP4A16")
"""Schemes of compressed-tensors."""
METHODS = ("rtn", "gptq", "awq")
NEEDS_TEXT = ("W8A8", "FP8")
"""Schemes that measure activations, whatever the method."""
TABLES = ("token_embd.weight", "output.weight")
"""They have 8 bits at least: about a third of the loss of 4 bits would be theirs."""
SPARE = "Q8_0"
"""The type of tables, and of matrices whose rows are no whole blocks of the wanted type."""
PLAIN = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
ROWS = 1 << 22
"""Numbers quantised at a time."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to write."""

    output: str
    scheme: str
    method: str = "rtn"
    calibration: str | None = None
    """Text that the model is measured on."""
    max_tokens: int = 65536
    """Of the calibration text; 0: all."""
    window: int = 512
    """Tokens that the model sees at once."""
    evaluate: str | None = None
    """Text on which the result is compared with the model."""


def create_parser() -> Parser:
    """The flags: the model, and one for each field of ``Settings``."""
    parser = Parser("octavo quantize", DESCRIPTION, usage="[MODEL] --output PATH --scheme SCHEME [flags]")
    add = parser.add_argument
    add("model_tag", nargs="?", metavar="MODEL", help="Hub id, folder or GGUF file, not quantised.")
    add("-o", "--output", required=True, metavar="PATH", help="The folder or GGUF file to write.")
    add("--scheme", required=True, choices=(*GGUF_TYPES, *COMPRESSED),
        help="Q4_0 to Q8_0, MXFP4, and for ternary models TQ1_0 and TQ2_0: a GGUF file, from one. Others: a folder of "
        "compressed-tensors.")  # fmt: skip
    add("--method", choices=METHODS, default=Settings.method,
        help="rtn rounds to the nearest; gptq and awq need --calibration (default: rtn).")  # fmt: skip
    add("--calibration", metavar="FILE", help="Text, or JSONL, like what the model will see.")
    add("--max-tokens", type=int, metavar="N", default=Settings.max_tokens,
        help="Tokens of the calibration text to use, 0 for all (default: 65536).")  # fmt: skip
    add("--window", type=int, metavar="N", default=Settings.window,
        help="Tokens that the model sees at once while it is measured (default: 512).")  # fmt: skip
    add("--evaluate", metavar="FILE", help="Compare the result with the model on this text, as octavo eval-quant does.")
    return parser


def main(arguments: Sequence[str], compare: Callable[[str, str, str], int]) -> int:
    """Writes the model.

    Args:
        arguments: The command line.
        compare: Compares a model with another on a text, and returns the exit code.

    Raises:
        ConfigError: A setting is invalid, or the model cannot be quantised.
        ModelFileError: The model's files are missing or damaged.
    """
    given: Mapping[str, Any] = create_parser().parse(arguments, intermixed=True)
    settings = Settings(**{name: given[name] for name in Settings.__dataclass_fields__})
    output = Path(settings.output)
    check(settings)
    config, _ = make_config({"model": given["model_tag"] or ""})
    files = find_model(config)
    if settings.scheme in GGUF_TYPES:
        if files.gguf is None:
            raise ConfigError(
                f"--scheme {settings.scheme} quantises a GGUF file; convert the model with llama.cpp's "
                "convert_hf_to_gguf.py first"
            )
        write_gguf(files.path, output, settings.scheme)
    else:
        compress(files, output, settings)
    if settings.evaluate is None:
        print(f"octavo eval-quant {files.root} TEXTFILE --formats bf16,{output} measures what was lost")
        return 0
    return compare(files.root, str(output), settings.evaluate)


def check(settings: Settings) -> None:
    """Refuses what cannot be done before anything is loaded.

    Raises:
        ConfigError: A setting is invalid.
    """
    is_gguf = settings.scheme in GGUF_TYPES
    if Path(settings.output).exists():
        raise ConfigError(f"--output {settings.output} exists already")
    if is_gguf != settings.output.endswith(".gguf"):
        raise ConfigError(f"--output of --scheme {settings.scheme} is {'a .gguf file' if is_gguf else 'a folder'}")
    if is_gguf and settings.method != "rtn":
        raise ConfigError(f"--method {settings.method} does not write GGUF files; use rtn")
    if settings.calibration is None and (settings.method != "rtn" or settings.scheme in NEEDS_TEXT):
        wanting = f"--method {settings.method}" if settings.method != "rtn" else f"--scheme {settings.scheme}"
        raise ConfigError(f"{wanting} needs --calibration FILE")
    if not is_gguf and find_spec("llmcompressor") is None:
        raise ConfigError(f"--scheme {settings.scheme} needs llmcompressor: pip install llmcompressor")
    for file in (settings.calibration, settings.evaluate):
        if file is not None:
            read_texts(file)


# ---------------------------------------------------------------------------------------------------------
# GGUF


def write_gguf(source: Path, target: Path, scheme: str, tables: str = SPARE) -> None:
    """Quantises the matrices of a GGUF file, rounding to the nearest; the rest is copied.

    Args:
        source: A file that is not quantised.
        target: The file to write.
        scheme: Type of the matrices.
        tables: Type of ``TABLES``.

    Raises:
        ConfigError: The file is quantised already.
    """
    reader = GGUFReader(source)
    quantized = [tensor for tensor in reader.tensors if tensor.tensor_type not in PLAIN]
    if quantized:
        raise ConfigError(f"{source} is quantised already ({quantized[0].tensor_type.name}); give an F16 or BF16 file")
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    unfinished = target.with_suffix(".part")
    writer = GGUFWriter(unfinished, architecture)
    copy_fields(reader, writer)
    writer.add_file_type(GGUF_TYPES[scheme])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    types = [type_of(tensor, tables if tensor.name in TABLES else scheme) for tensor in reader.tensors]
    for tensor, kind in zip(reader.tensors, types, strict=True):
        shape = tuple(int(size) for size in reversed(tensor.shape))
        block, size = gguf.GGML_QUANT_SIZES[kind]
        num_bytes = tensor.n_elements // block * size
        # Of numbers that are no bytes, the writer takes the shape as it is.
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    total = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    with tqdm(total=total, desc=f"Writing {scheme}", unit="B", unit_scale=True) as bar:
        for tensor, kind in zip(reader.tensors, types, strict=True):
            writer.write_tensor_data(converted(tensor, kind))
            bar.update(int(tensor.n_bytes))
    writer.close()
    unfinished.rename(target)


def copy_fields(reader: GGUFReader, writer: GGUFWriter) -> None:
    """Copies all fields but those that describe the file's format."""
    for name, each in reader.fields.items():
        if name.startswith("GGUF.") or name in (
            gguf.Keys.General.ARCHITECTURE,
            gguf.Keys.General.FILE_TYPE,
            gguf.Keys.General.QUANTIZATION_VERSION,
        ):
            continue
        is_array = each.types[0] == GGUFValueType.ARRAY
        writer.add_key_value(name, each.contents(), each.types[0], each.types[-1] if is_array else None)


def type_of(tensor: Any, wanted: str) -> GGMLQuantizationType:
    """The type in which a tensor is written: matrices as wanted if their rows are whole blocks, or else in 8 bits."""
    if len(tensor.shape) > 1 and "norm" not in tensor.name:
        for name in (wanted, SPARE):
            kind = GGMLQuantizationType[name]
            if int(tensor.shape[0]) % gguf.GGML_QUANT_SIZES[kind][0] == 0:
                return kind
    kept: GGMLQuantizationType = tensor.tensor_type
    return kept


def converted(tensor: Any, kind: GGMLQuantizationType) -> npt.NDArray[Any]:
    """A tensor's data in another type."""
    if kind == tensor.tensor_type:
        data: npt.NDArray[Any] = tensor.data
        return data
    return np.concatenate(
        [gguf.quantize(gguf.dequantize(rows, tensor.tensor_type), kind) for rows in _pieces(tensor.data)]
    )


def _pieces(data: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    rows = data.reshape(-1, data.shape[-1])
    step = max(1, ROWS // rows.shape[1])
    return (rows[first : first + step] for first in range(0, len(rows), step))


# ---------------------------------------------------------------------------------------------------------
# compressed-tensors


def compress(files: ModelFiles, output: Path, settings: Settings) -> None:
    """Runs llmcompressor in a process of its own.

    Raises:
        ConfigError: It failed, or the model is a GGUF file.
    """
    if files.gguf is not None:
        raise ConfigError(f"--scheme {settings.scheme} quantises a folder with safetensors, not a GGUF file")
    pieces: list[list[int]] = []
    if settings.calibration is not None:
        pieces = windows(read_texts(settings.calibration), files.tokenizer, settings.max_tokens, settings.window)
    done = subprocess.run(
        child_command(
            "executor.compress",
            str(files.path.absolute()),
            str(output.absolute()),
            settings.scheme,
            settings.method,
            str(settings.window),
        ),
        env=child_environment(),
        input=json.dumps(pieces),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = done.stdout.strip() or f"exit code {done.returncode}"
        way = f"--scheme {settings.scheme} --method {settings.method}"
        raise ConfigError(f"{files.name} could not be quantised with {way}: llmcompressor failed: {reason}")
