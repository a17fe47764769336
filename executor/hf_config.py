"""A model's configuration, from config.json or a GGUF header.

Nothing is checked up front: the reader of a field says what it must be, and an error about a missing or invalid one
names the file and the field. Defaults come from the model's class (``Model.config_defaults``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from executor.base import ModelError
from executor.config import DTYPE_NAMES, GOOD_DTYPES
from executor.files import read_json, why
from executor.language_part import is_multimodal, language_fields, renamed_modules

T = TypeVar("T")

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
"""Names used by config.json and ``--dtype``."""

# Bounds far beyond any model. Larger numbers are mistakes, or meant to exhaust memory or time.
MAX_SIZE = 1 << 24
MAX_LAYERS = 1 << 10
MAX_LABELS = 1 << 14
MAX_POSITIONS = (1 << 31) - 1
"""Positions are int32."""

LOCAL_THETA = "rope_local_base_freq"
"""The base of layers with a window, in files without ``rope_parameters``."""


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number; ``1e999`` parses as infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 1023


def shorten(text: str, length: int = 100) -> str:
    """Truncates a text of unknown length for one-line messages."""
    return text if len(text) <= length else f"{text[:length]}..."


@dataclass(frozen=True)
class Fields:
    """A JSON object with typed access. A field that is null, or an empty object, counts as missing."""

    values: Mapping[str, Any]
    source: str
    """How error messages refer to the object: the file and the path in it."""

    def named(self, name: str) -> str:
        """The name that the object itself uses for a field."""
        return name

    def get(self, name: str) -> Any:
        """The value as it is; None if missing."""
        return self.values.get(self.named(name))

    def has(self, name: str) -> bool:
        return self.get(name) not in (None, {})

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer of at least 0. Here and below, a field without a default is required."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.bad(name, "an integer")
        return value

    def size(self, name: str, default: int | None = None, *, most: int = MAX_SIZE) -> int:
        """An integer from 1 to ``most``."""
        value = self.integer(name, default)
        if value == 0:
            self.bad(name, "at least 1")
        if value > most:
            self.bad(name, f"at most {most}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if not is_number(value):
            self.bad(name, "a number")
        number: float = value
        return number

    def positive(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.number(name, default)
        if value <= 0:
            self.bad(name, "above 0")
        return value

    def epsilon(self, name: str) -> float:
        """A number that is added to variances."""
        value = self.number(name)
        if value < 0:
            self.bad(name, "at least 0")
        return value

    def boolean(self, name: str, default: bool | None = None) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            self.bad(name, "true or false")
        return value

    def string(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            self.bad(name, "a string")
        return value

    def choice(self, name: str, choices: Mapping[str, T], default: str | None = None) -> T:
        """The value that the field's name stands for in ``choices``."""
        value = self.string(name, default)
        if value not in choices:
            self.bad(name, f"one of {', '.join(sorted(choices))}")
        return choices[value]

    def numbers(self, name: str) -> list[float]:
        value = self._value(name, None)
        if not isinstance(value, list) or not all(map(is_number, value)):
            self.bad(name, "a list of numbers")
        return value

    def strings(self, name: str) -> list[str]:
        value = self._value(name, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.bad(name, "a list of strings")
        return value

    def section(self, name: str) -> Fields:
        """A nested object; empty if missing."""
        value = self._value(name, {})
        if not isinstance(value, dict):
            self.bad(name, "an object")
        return Fields(value, f"{self.source}: {name}")

    def bad(self, name: str, expected: str) -> NoReturn:
        """Raises ``ModelError`` about a field's value."""
        own = self.named(name)
        raise ModelError(f"{self.source}: {own} must be {expected}, not {shorten(repr(self.values.get(own)))}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is not None:
            return value
        if default is None:
            raise ModelError(f"{self.source}: {self.named(name)} is missing")
        return default


@dataclass(frozen=True)
class HFConfig(Fields):
    """The configuration of a language model under Hugging Face's names."""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    """``--hf-overrides``, already part of ``values``."""
    spelling: Mapping[str, str] = field(default_factory=dict)
    """The file's own names of fields: ``{"hidden_size": "n_embd"}``."""
    is_part: bool = False
    """Whether it is the language model within a multimodal one."""
    whole: Mapping[str, Any] = field(default_factory=dict)
    """The fields of a multimodal one."""

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], overrides: Mapping[str, Any], source: str) -> HFConfig:
        """A configuration with the keys of ``overrides`` replaced.

        A multimodal model becomes the language model within it, whose fields are in ``text_config``.
        """
        values = language_fields(fields)
        values.update(overrides)
        if "rope_parameters" in overrides:
            values["rope_scaling"] = overrides.get("rope_scaling")
        if "rope_theta" in overrides and isinstance(values.get("rope_parameters"), dict):
            values["rope_parameters"] = {**values["rope_parameters"], "rope_theta": overrides["rope_theta"]}
        is_part = is_multimodal(fields)
        return cls(
            values, source, overrides, is_part=is_part, whole=fields if is_part or "vision_config" in fields else {}
        )

    @classmethod
    def from_folder(cls, folder: Path, overrides: Mapping[str, Any]) -> HFConfig:
        """Reads ``config.json``, and ``hf_quant_config.json`` if that alone says how the weights are quantised."""
        path = folder / "config.json"
        try:
            fields = read_json(path)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: {why(error)}") from error
        if not isinstance(fields, dict):
            raise ModelError(f"{path}: not a JSON object")
        if not fields.get("quantization_config"):
            fields = {**fields, **_separate_quantization(folder / "hf_quant_config.json")}
        return cls.from_fields(fields, overrides, str(path))

    def for_model(self, spelling: Mapping[str, str], defaults: Mapping[str, Any]) -> HFConfig:
        """The same configuration as a model's class reads it.

        Args:
            spelling: The class's own names of fields (``Model.attribute_map``). Files may use either.
            defaults: Values of missing fields, under the common names.

        Raises:
            ModelError: The file has a field under both names, with different values.
        """
        values = dict(self.values)
        for name, own in spelling.items():
            if name in self.overrides:
                values[own] = self.overrides[name]
            elif name in values and values.get(own, values[name]) != values[name]:
                shown = f"{own} ({shorten(repr(values[own]), 40)}) and {name} ({shorten(repr(values[name]), 40)})"
                raise ModelError(
                    f"{self.source}: {shown} are the same field; remove one, or set it with --hf-overrides"
                )
        missing = {
            name: value for name, value in defaults.items() if name not in values and spelling.get(name) not in values
        }
        return replace(self, values={**missing, **values}, spelling=spelling)

    def replaced(self, **values: Any) -> HFConfig:
        """The configuration with other values of fields, given under their common names."""
        own = {self.named(name): value for name, value in values.items()}
        return replace(self, values={**self.values, **own})

    def named(self, name: str) -> str:
        own = self.spelling.get(name)
        return name if own is None or (name in self.values and own not in self.values) else own

    # -- the model ----------------------------------------------------------------------------------------

    @property
    def architecture(self) -> str:
        names = self.strings("architectures")
        if not names:
            self.bad("architectures", "a list of at least one name")
        return names[0]

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """``quantization_config``."""
        if not self.has("quantization_config"):
            return None
        values = self.section("quantization_config").values
        return renamed_modules(values) if self.is_part else values

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype that the model was saved in, if the configuration says so."""
        name = "dtype" if self.has("dtype") else "torch_dtype"
        if not self.has(name):
            return None
        value = self.string(name).removeprefix("torch.")
        if value not in DTYPES:
            self.bad(name, GOOD_DTYPES)
        return DTYPES[value]

    @property
    def vocab_size(self) -> int:
        return self.size("vocab_size")

    @property
    def hidden_size(self) -> int:
        return self.size("hidden_size")

    @property
    def intermediate_size(self) -> int:
        return self.size("intermediate_size")

    @property
    def num_layers(self) -> int:
        return self.size("num_hidden_layers", most=MAX_LAYERS)

    @property
    def num_heads(self) -> int:
        return self.size("num_attention_heads")

    @property
    def num_kv_heads(self) -> int:
        number = self.size("num_key_value_heads", self.num_heads)
        if self.num_heads % number:
            self.bad("num_key_value_heads", f"a divisor of num_attention_heads ({self.num_heads})")
        return number

    @property
    def head_dim(self) -> int:
        if self.has("head_dim"):
            return self.size("head_dim")
        if self.hidden_size % self.num_heads:
            self.bad("hidden_size", f"a multiple of num_attention_heads ({self.num_heads}), as head_dim is missing")
        return self.hidden_size // self.num_heads

    @property
    def rms_norm_eps(self) -> float:
        return self.epsilon("rms_norm_eps")

    @property
    def tie_word_embeddings(self) -> bool:
        return self.boolean("tie_word_embeddings", False)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        value = self.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and 0 <= item <= MAX_POSITIONS for item in ids):
            self.bad("eos_token_id", "a token id or a list of them")
        return tuple(ids)

    @property
    def labels(self) -> list[str]:
        """Names of a classifier's outputs."""
        names = self.section("id2label").values
        if not names:
            return [f"LABEL_{index}" for index in range(self.size("num_labels", 2, most=MAX_LABELS))]
        if len(names) > MAX_LABELS or set(names) != {str(index) for index in range(len(names))}:
            self.bad("id2label", f"names for labels 0, 1, ..., at most {MAX_LABELS}")
        return [shorten(str(names[str(index)])) for index in range(len(names))]

    # -- layers -------------------------------------------------------------------------------------------

    def layer_types(self, *known: str, default: Callable[[int], str]) -> list[str]:
        """The type of each layer.

        Args:
            known: The types that the model has.
            default: The type of a layer, by its index, in files without ``layer_types``.
        """
        if not self.has("layer_types"):
            return [default(index) for index in range(self.num_layers)]
        types = self.strings("layer_types")
        if len(types) != self.num_layers or set(types) - set(known):
            self.bad("layer_types", f"{self.num_layers} times {' or '.join(known)}")
        if "sliding_attention" in types:
            if self.get("use_sliding_window") is False:
                self.bad("use_sliding_window", "true, since layer_types has sliding_attention")
            if not self.has("sliding_window"):
                self.bad("sliding_window", "a number of tokens, since layer_types has sliding_attention")
        return types

    # -- positions ----------------------------------------------------------------------------------------

    @property
    def rope(self) -> Fields:
        """Rotary parameters shared by all layers. Always has ``rope_type`` and ``rope_theta``.

        Read from ``rope_parameters``, or from ``rope_scaling`` and ``rope_theta`` in older files.
        """
        kinds = self._rope_kinds
        if kinds:
            self.bad(self._rope_name, f"one set of parameters for all layers (it has one for {kinds[0]!r})")
        return self._complete_rope(self.section(self._rope_name))

    def rope_for(self, layer_type: str, *, is_scaled: bool = True) -> Fields:
        """Rotary parameters of one type of layer, named as in ``layer_types``.

        Read from the type's set in ``rope_parameters``. Older files have one set for all types, or ``rope_theta`` and
        ``rope_scaling`` for full attention and ``rope_local_base_freq`` for layers with a window.

        Args:
            layer_type: The type.
            is_scaled: Whether ``rope_scaling`` of older files applies to this type.
        """
        kinds = self._rope_kinds
        is_local = layer_type == "sliding_attention" and self.has(LOCAL_THETA)
        theta = LOCAL_THETA if is_local else "rope_theta"
        if not kinds:
            section = self.section(self._rope_name)
            is_plain = is_local or not is_scaled
            return self._complete_rope(replace(section, values={}) if is_plain else section, theta)
        if layer_type not in kinds:
            self.bad(self._rope_name, f"a set of parameters for each layer type, {layer_type!r} included")
        return self._complete_rope(self.section(self._rope_name).section(layer_type), theta)

    @property
    def _rope_name(self) -> str:
        return "rope_scaling" if self.has("rope_scaling") else "rope_parameters"

    @property
    def _rope_kinds(self) -> list[str]:
        """Layer types that have their own rotary parameters."""
        return [key for key, value in self.section(self._rope_name).values.items() if isinstance(value, dict)]

    def _complete_rope(self, section: Fields, theta: str = "rope_theta") -> Fields:
        values = dict(section.values)
        values["rope_type"] = values.get("rope_type") or values.get("type") or "default"
        if values["rope_type"] == "mrope":  # positions on several axes, which are equal where there is only text
            values["rope_type"] = "default"
        for key, own, fallback in (
            ("rope_theta", theta, self.section("rope_parameters").values.get("rope_theta") or 10000.0),
            ("partial_rotary_factor", "partial_rotary_factor", 1.0),
        ):
            if values.get(key) is None:
                values[key] = self.number(own, fallback)
        if self.has("original_max_position_embeddings"):  # Phi-3 keeps it here, and it takes precedence
            values["original_max_position_embeddings"] = self.get("original_max_position_embeddings")
        return replace(section, values=values)

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence, in some models before rotary scaling, in others after it; see ``max_position``."""
        return self.size("max_position_embeddings", most=MAX_POSITIONS)

    @property
    def max_position(self) -> int:
        """The longest sequence that every layer supports."""
        return min(map(self._longest, self._ropes))

    @property
    def _ropes(self) -> list[Fields]:
        if not self._rope_kinds and self.has(LOCAL_THETA):
            return [self.rope, self.rope_for("sliding_attention")]
        return [self.rope_for(kind) for kind in self._rope_kinds] or [self.rope]

    def _longest(self, rope: Fields) -> int:
        scaled = rope.string("rope_type")
        if scaled == "yarn":
            length = rope.size("original_max_position_embeddings", self.max_position_embeddings, most=MAX_POSITIONS)
        else:
            length = self.max_position_embeddings
        if scaled not in ("yarn", "linear", "dynamic"):
            return length  # llama3 and the others give the length after scaling
        longest = length * rope.number("factor", 1.0)
        if not 1 <= longest <= MAX_POSITIONS:
            rope.bad("factor", f"a factor that scales {length} positions to between 1 and {MAX_POSITIONS}")
        return int(longest)

    @property
    def default_max_model_len(self) -> int:
        """The default for the longest sequence served.

        Dynamic scaling leaves the angles unchanged up to ``max_position_embeddings``.
        """
        is_dynamic = any(rope.string("rope_type") == "dynamic" for rope in self._ropes)
        return self.max_position_embeddings if is_dynamic else self.max_position


def _separate_quantization(path: Path) -> dict[str, Any]:
    """The ``quantization_config`` of Model Optimizer's own file; empty: there is none.

    Raises:
        ModelError: It cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        fields = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {why(error)}") from error
    section = fields.get("quantization") if isinstance(fields, dict) else None
    if not isinstance(section, dict):
        raise ModelError(f"{path}: has no object named quantization")
    return {"quantization_config": {"quant_method": "modelopt", **section}} if section.get("quant_algo") else {}
