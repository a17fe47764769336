"""Reads what a model's files say about its vectors: sentence-transformers' modules, or a key of a GGUF file.

Understood are a transformer, then one pooling, then optionally dense layers, LayerNorm and normalisation; for late
interaction, a transformer and PyLate's dense layers, or the modules of a ``MultiVectorEncoder``. Anything else is
ignored as a whole, with a note that names the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from msgspec.structs import replace

from api.config import PoolerConfig
from api.model.gguf_file import GGUFFile
from api.model.late_interaction import LateInteraction, from_metadata, from_multi_vector, from_pylate
from api.model.similarity import SIMILARITIES
from engine_core.launch import read_json, why

MODULES = "modules.json"
POOLING = "1_Pooling/config.json"
"""The usual path of the pooling module's configuration."""
SETTINGS = "config_sentence_transformers.json"
TRANSFORMERS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names of the file with the transformer's settings, old ones last; the first that exists counts."""
TOKENIZER = "tokenizer_config.json"
METADATA = "artifact.metadata"
"""The settings of models of ColBERT's authors."""
SPARSE, MULTI_VECTOR = "sparse_linear.pt", "colbert_linear.pt"
"""BGE-M3's layers that weigh tokens, and that make vectors of them."""
MAX_DOCUMENT, MAX_TOKENIZER = 1 << 20, 1 << 24
MAX_PROMPTS, MAX_PROMPT_CHARS = 256, 1 << 14
MASK = "MultiVectorMask"
LAYERS = {"Dense", "LayerNorm"}
"""Modules that may follow pooling."""
MAX_DENSE = 8
MAX_MODES = 8
CAUSAL = "ForCausalLM"
STEP_FIELDS = ("architectures", "classifier_token_ids", "id2label")
"""Fields of config.json that make a generative model a judge of steps."""

_MODES = {
    "cls": "CLS",
    "max": "MAX",
    "mean": "MEAN",
    "mean_sqrt_len_tokens": "MEAN_SQRT_LEN",
    "weightedmean": "WEIGHTED_MEAN",
    "lasttoken": "LAST",
}
"""Pooling types by ``pooling_mode``."""
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The same, as older files have them, in the order in which vectors are joined."""
_GGUF_TYPES = {1: "MEAN", 2: "CLS", 3: "LAST"}
"""Pooling types by llama.cpp's numbers."""


class SentenceConfig(NamedTuple):
    """What sentence-transformers' files say beside pooling."""

    dense: tuple[str, ...] = ()
    """Folders of layers after pooling."""
    prompts: Mapping[str, str] = {}
    """Texts that precede a text, by name."""
    default_prompt: str | None = None
    """Name of the one that precedes texts for which none is named."""
    pools_prompts: bool = True
    """Whether the tokens of prompts are pooled, too."""
    max_length: int | None = None
    """Maximum tokens of a text."""
    dimensions: int | None = None
    """Length to which vectors are truncated where a request does not say; None: they are not."""
    similarity: str = "cosine"
    """How two vectors are compared: a name in ``SIMILARITIES``."""
    lowers: bool = False
    """Whether texts are converted to lower case; never those of a model that is served for generation."""
    activation: str | None = None
    """Of a cross-encoder's scores: the name of a class of torch."""
    late: LateInteraction | None = None
    """How texts are compared token by token; None: by their vectors."""


class ModelPooler(NamedTuple):
    """The pooling configuration of a model's files, and notes on what was ignored."""

    config: PoolerConfig = PoolerConfig()
    notes: tuple[str, ...] = ()
    """A line for each ignored file that would have changed vectors."""
    sentences: SentenceConfig = SentenceConfig()


class _UnclearError(Exception):
    """A file cannot be expressed as a ``PoolerConfig``; the message names it and says why."""


def is_colbert(fields: Mapping[str, Any]) -> bool:
    """Whether config.json says that a model compares texts token by token."""
    names = fields.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    return name == "HF_ColBERT" or name.startswith("ColBERT")


def find_pooler(path: Path, gguf: GGUFFile | None, fields: Mapping[str, Any] | None = None) -> ModelPooler:
    """Reads a model's pooling configuration, as far as it is supported. Never rejects a model.

    Args:
        path: The model's folder or file.
        gguf: Its header, if it is a GGUF file.
        fields: Contents of config.json.
    """
    if gguf is not None:
        return _from_gguf(gguf)
    notes = []
    config, sentences = PoolerConfig(), SentenceConfig()
    try:
        if (path / MODULES).exists():
            config, sentences = _from_modules(path)
        elif (path / POOLING).exists():
            raise _UnclearError(f"{POOLING} belongs to {MODULES}, which is missing")
    except _UnclearError as unclear:
        notes.append(f"{path}: {unclear}; ignored, so vectors differ from those that the model was trained for")
    try:
        if sentences.late is None and is_colbert(fields or {}):
            sentences = sentences._replace(dense=(".",), late=_from_metadata(path))
        sentences = _with_settings(path, sentences)
    except _UnclearError as unclear:
        notes.append(f"{path}: {unclear}; ignored")
    return ModelPooler(config, tuple(notes), sentences)


def _with_settings(path: Path, sentences: SentenceConfig) -> SentenceConfig:
    """Adds prompts, the default prompt, what vectors and scores become, and the maximum length."""
    if (path / SETTINGS).exists():
        settings = _read(path, SETTINGS)
        found = settings.get("prompts") if isinstance(settings, dict) else None
        prompts: dict[str, str] = found or {}
        texts = [*prompts, *prompts.values()] if isinstance(settings, dict) and isinstance(prompts, dict) else [None]
        if len(texts) > 2 * MAX_PROMPTS or not all(isinstance(x, str) and len(x) <= MAX_PROMPT_CHARS for x in texts):
            raise _UnclearError(f"{SETTINGS}: prompts must be at most {MAX_PROMPTS} texts by name")
        default, activation = settings.get("default_prompt_name"), settings.get("activation_fn")
        if default is not None and default not in prompts:
            raise _UnclearError(f"{SETTINGS}: default_prompt_name {str(default)[:40]!r} is not one of its prompts")
        dimensions, similarity = settings.get("truncate_dim"), settings.get("similarity_fn_name")
        if dimensions is not None and not _is_count(dimensions):
            raise _UnclearError(f"{SETTINGS}: truncate_dim must be a number of dimensions")
        sentences = sentences._replace(
            prompts=prompts,
            default_prompt=default,
            activation=activation if isinstance(activation, str) else None,
            dimensions=dimensions,
            similarity=similarity if isinstance(similarity, str) and similarity in SIMILARITIES else "cosine",
        )
        if sentences.late is not None and "query_prefix" in settings:
            sentences = sentences._replace(late=_late(from_pylate, settings, SETTINGS))
    for name in [name for name in TRANSFORMERS if (path / name).exists()][:1]:
        settings = _read(path, name)
        length = settings.get("max_seq_length") if isinstance(settings, dict) else None
        if length is not None and not _is_count(length):
            raise _UnclearError(f"{name}: max_seq_length must be a number of tokens")
        lowers = isinstance(settings, dict) and settings.get("do_lower_case") is True
        sentences = sentences._replace(max_length=length, lowers=lowers)
    if sentences.max_length is None and (path / MODULES).exists():
        sentences = sentences._replace(max_length=_tokenizer_length(path))
    return sentences


def _tokenizer_length(path: Path) -> int | None:
    """The maximum tokens of a text where sentence-transformers 6 saves it; None: not there."""
    try:
        settings = read_json(path / TOKENIZER, MAX_TOKENIZER)
    except (OSError, ValueError):  # whatever reads the tokenizer says what is wrong
        return None
    length = settings.get("model_max_length") if isinstance(settings, dict) else None
    return length if _is_count(length) else None


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _from_metadata(path: Path) -> LateInteraction:
    settings = _read(path, METADATA) if (path / METADATA).exists() else {}
    return _late(from_metadata, settings if isinstance(settings, dict) else {}, METADATA)


def _late(
    read: Callable[[Mapping[str, Any]], LateInteraction], settings: Mapping[str, Any], name: str
) -> LateInteraction:
    try:
        return read(settings)
    except ValueError as error:
        raise _UnclearError(f"{name}: {error}") from error


def merge_pooler(wanted: PoolerConfig, own: PoolerConfig) -> PoolerConfig:
    """Merges the pooling configurations: the server's options take precedence over the model's files."""
    return replace(
        wanted,
        pooling_type=wanted.pooling_type or own.pooling_type,
        use_activation=own.use_activation if wanted.use_activation is None else wanted.use_activation,
    )


def step_overrides(pooler: PoolerConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json by which a generative model judges the steps of solutions; empty: it does not.

    Args:
        pooler: The server's option.
        fields: Contents of config.json.

    Raises:
        ValueError: The model has no output layer, or options do not go together.
    """
    ids = pooler.returned_token_ids
    if pooler.pooling_type != "STEP":
        if ids or pooler.step_tag_id is not None:
            raise ValueError('step_tag_id and returned_token_ids need "pooling_type": "STEP"')
        return {}
    if not ids:
        return {}
    names = fields.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    if not name.endswith(CAUSAL):
        raise ValueError(
            f"returned_token_ids needs a folder with a model ...{CAUSAL}, not {name or 'another'}; omit it"
        )
    labels = {str(index): str(token) for index, token in enumerate(ids)}
    architecture = name.removesuffix(CAUSAL) + "ForTokenClassification"
    return dict(zip(STEP_FIELDS, ([architecture], list(ids), labels), strict=True))


def encoder_overrides(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json by which a decoder is an encoder, whose tokens attend to those after them (GTE-Qwen2);
    empty: it is not."""
    names = fields.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    if fields.get("is_causal") is not False or not name.endswith(CAUSAL):
        return {}
    return {"architectures": [f"{name.removesuffix(CAUSAL)}Model"]}


def _from_gguf(gguf: GGUFFile) -> ModelPooler:
    architecture = gguf.metadata.get("general.architecture")
    number = gguf.metadata.get(f"{architecture}.pooling_type")
    if not isinstance(number, int) or number == 0:
        return ModelPooler()
    if number not in _GGUF_TYPES:
        return ModelPooler(notes=(f"{gguf.path}: {architecture}.pooling_type {number} is not supported; ignored",))
    return ModelPooler(PoolerConfig(pooling_type=_GGUF_TYPES[number]))


def _from_modules(folder: Path) -> tuple[PoolerConfig, SentenceConfig]:
    modules = _read(folder, MODULES)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise _UnclearError(f"{MODULES} is not a list of modules")
    modules = [module for module in modules if _kind(module) != "Dropout"]  # which only training needs
    kinds = [_kind(module) for module in modules]
    if kinds == ["Transformer"]:
        return PoolerConfig(), SentenceConfig()
    if kinds[:1] == ["Transformer"] and set(kinds[1:]) == {"Dense"} and len(kinds) <= 1 + MAX_DENSE:
        names = _folders(folder, modules[1:])
        return PoolerConfig(), SentenceConfig(dense=tuple(names), late=LateInteraction())
    if kinds[:1] == ["Transformer"] and kinds.count(MASK) == 1:
        return _from_multi_vector(folder, modules[1:], kinds[1:])
    normalizes = kinds[-1:] == ["Normalize"]
    dense = kinds[2 : len(kinds) - normalizes]
    if kinds[:2] != ["Transformer", "Pooling"] or set(dense) - LAYERS or len(dense) > MAX_DENSE:
        raise _UnclearError(
            f"{MODULES} has the modules {', '.join(kind[:40] for kind in kinds[:8])}, not all of which are supported"
        )
    names = [*_folders(folder, modules[1:2], has_weights=False), *_folders(folder, modules[2 : 2 + len(dense)])]
    name = f"{names[0]}/config.json"
    fields = _read(folder, name)
    if not isinstance(fields, dict):
        raise _UnclearError(f"{name} is not a JSON object")
    config = PoolerConfig(pooling_type=_pooling_type(fields, name), use_activation=normalizes)
    return config, SentenceConfig(dense=tuple(names[1:]), pools_prompts=fields.get("include_prompt") is not False)


def _from_multi_vector(
    folder: Path, modules: list[dict[str, Any]], kinds: list[str]
) -> tuple[PoolerConfig, SentenceConfig]:
    """What sentence-transformers saves of a ``MultiVectorEncoder``: layers for tokens, the module that says which of
    them count, and normalisation, in any order in which the latter follows the layers."""
    dense = [module for module, kind in zip(modules, kinds, strict=True) if kind == "Dense"]
    layers = [kind for kind in kinds if kind != MASK]
    normalizes = layers[-1:] == ["Normalize"]
    if layers != ["Dense"] * len(dense) + ["Normalize"] * normalizes or len(dense) > MAX_DENSE:
        raise _UnclearError(f"{MODULES} has the modules {', '.join(kind[:40] for kind in kinds[:8])} in this order")
    names = _folders(folder, dense)
    name = f"{_folders(folder, [modules[kinds.index(MASK)]], has_weights=False)[0]}/config.json"
    mask = _read(folder, name)
    found = [file for file in TRANSFORMERS if (folder / file).exists()][:1]
    transformer = _read(folder, found[0]) if found else {}
    settings = _read(folder, SETTINGS) if (folder / SETTINGS).exists() else {}
    for file, fields in ((name, mask), (SETTINGS, settings), (found[0] if found else "", transformer)):
        if not isinstance(fields, dict):
            raise _UnclearError(f"{file} is not a JSON object")
    if not isinstance(settings.get("prompts") or {}, dict):
        raise _UnclearError(f"{SETTINGS}: prompts must be texts by name")
    try:
        late = from_multi_vector(transformer, mask, settings)
    except ValueError as error:
        raise _UnclearError(f"{MODULES}: {error}") from error
    return PoolerConfig(use_activation=normalizes), SentenceConfig(dense=tuple(names), late=late)


def _kind(module: Mapping[str, Any]) -> str:
    """The name of a module's class, without where it is."""
    return str(module.get("type")).rpartition(".")[2]


def _folders(folder: Path, modules: list[dict[str, Any]], *, has_weights: bool = True) -> list[str]:
    """The names of modules' folders."""
    names = [module.get("path") for module in modules]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise _UnclearError(f"{MODULES} has a module outside the model's folder")
    for name in names:
        if has_weights and not (folder / str(name) / "model.safetensors").is_file():
            raise _UnclearError(f"{name} has no model.safetensors")
    return [str(name) for name in names]


def _pooling_type(fields: dict[str, Any], name: str) -> str:
    modes = fields.get("pooling_mode")
    flags = [key for key, value in fields.items() if key.startswith("pooling_mode_") and value is True]
    if modes is None:
        known = [mode for flag, mode in _FLAGS.items() if flag in flags]
        modes = [*known, *(flag for flag in flags if flag not in _FLAGS)] or ["mean"]
    elif isinstance(modes, str):
        modes = [modes]
    if isinstance(modes, list) and 0 < len(modes) <= MAX_MODES and all(str(mode) in _MODES for mode in modes):
        return "+".join(_MODES[mode] for mode in modes)
    raise _UnclearError(f"{name} asks for {str(modes)[:200]}, but the modes are {', '.join(_MODES)}")


def _read(folder: Path, name: str) -> Any:
    try:
        return read_json(folder / name, MAX_DOCUMENT)
    except (OSError, ValueError) as error:
        raise _UnclearError(f"{name} cannot be read: {why(error)}") from error
