"""Command line flags and YAML keys, derived from the fields of configuration structs.

A field's name, type, default and ``Meta`` make its flag, so a new option is one new field. See
``executor/config.py`` for what ``Meta.extra`` may say.
"""

from __future__ import annotations

import argparse
import json
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

_BYTES = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)", re.IGNORECASE)


class ConfigError(Exception):
    """A flag or a key of a file has a bad value; the message names it."""


@dataclass(frozen=True)
class Option:
    """One field as an option."""

    path: tuple[str, ...]
    """Where the field lies, from the outermost struct."""
    hint: Any
    """Its type, with all annotations."""
    default: Any
    description: str
    extra: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def flags(self) -> list[str]:
        aliases = [alias for alias in self.extra.get("flags", ()) if alias != self.flag]
        return [*(alias for alias in aliases if not alias.startswith("--")), self.flag] + [
            alias for alias in aliases if alias.startswith("--")
        ]

    @property
    def base_type(self) -> Any:
        """The type without annotations and None."""
        return _strip(self.hint)

    def convert(self, value: Any) -> Any:
        """Turns a command line's string or a file's value into the field's type.

        Raises:
            ConfigError: It is not one.
        """
        try:
            parse = self.extra.get("parse")
            if "auto" in self.extra and value == "auto":
                return self.extra["auto"]
            if parse and isinstance(value, str):
                value = parse_size(value, binary=parse == "bytes")
                if value == self.extra.get("auto"):
                    return value
            base = self.base_type
            if isinstance(value, str) and (get_origin(base) is dict or _is_struct(base)):
                value = json.loads(value)
            return msgspec.convert(value, self.hint, strict=False)
        except (msgspec.ValidationError, ValueError) as error:
            raise ConfigError(f"{self.flag}: {_explain(error)}, got {value!r}") from None


def _explain(error: Exception) -> str:
    return str(error).replace("`", "").replace("Expected", "expected")


def options(struct: type[msgspec.Struct], path: tuple[str, ...] = ()) -> Iterator[Option]:
    """All options of a struct and of the structs it contains."""
    hints = get_type_hints(struct, include_extras=True)
    for field in msgspec.structs.fields(struct):
        hint = hints[field.name]
        here = (*path, field.name)
        if _is_struct(hint):
            yield from options(hint, here)
            continue
        description = ""
        extra: dict[str, Any] = {}
        if get_origin(hint) is Annotated:
            for meta in hint.__metadata__:
                description = meta.description or description
                extra = {**extra, **(meta.extra or {})}
        if extra.get("internal"):
            continue
        default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
        yield Option(here, hint, default, description, extra)


def add_arguments(parser: argparse.ArgumentParser, struct: type[msgspec.Struct]) -> None:
    """Adds a flag for each option; a flag that is not given leaves nothing in the namespace."""
    for option in options(struct):
        base = option.base_type
        text = option.description.replace("%", "%%")
        if option.default not in (None, "", [], {}) and not _is_struct(base):
            text += f" (default: {option.default})"
        common: dict[str, Any] = {"dest": option.name, "help": text, "default": argparse.SUPPRESS}
        if base is bool:
            parser.add_argument(*option.flags, action=argparse.BooleanOptionalAction, **common)
        elif get_origin(base) is list:
            parser.add_argument(*option.flags, nargs="+", metavar=_metavar(option), **common)
        elif get_origin(base) is Literal:
            parser.add_argument(*option.flags, choices=get_args(base), **common)
        else:
            parser.add_argument(*option.flags, metavar=_metavar(option), **common)


def _metavar(option: Option) -> str:
    base = option.base_type
    if option.extra.get("parse") == "bytes":
        return "SIZE"
    if _is_struct(base):
        return "JSON"
    return {int: "N", float: "X", dict: "JSON"}.get(get_origin(base) or base, "TEXT")


def build(struct: type[msgspec.Struct], values: Mapping[str, Any]) -> Any:
    """Makes the struct from option values by name.

    Raises:
        ConfigError: A name is unknown or a value does not suit its option.
    """
    known = {option.name: option for option in options(struct)}
    tree: dict[str, Any] = {}
    for key, value in values.items():
        option = known.get(key)
        if option is None:
            raise ConfigError(f"unknown option {key!r}")
        node = tree
        for part in option.path[:-1]:
            node = node.setdefault(part, {})
        node[option.name] = option.convert(value)
    return _make(struct, tree)


def _make(struct: type[msgspec.Struct], tree: Mapping[str, Any]) -> Any:
    hints = get_type_hints(struct)
    fields = {
        name: _make(hints[name], value) if isinstance(value, dict) and _is_struct(hints[name]) else value
        for name, value in tree.items()
    }
    return struct(**fields)


def parse_size(text: str, *, binary: bool) -> int:
    """``4GiB``, ``4G``, ``32k`` or ``1.5M`` as a number.

    Args:
        text: What the user wrote.
        binary: ``4G`` means 4 * 2**30 (memory). Otherwise ``k`` is 1000 in lower case and 1024 in upper case, as
            vLLM reads lengths.

    Raises:
        ValueError: It is no size.
    """
    if text == "-1":
        return -1
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError("expected a size such as 4096, 32k or 4GiB")
    number, unit, suffix = float(match[1]), match[2], match[3].lower()
    if not unit:
        factor = 1
    elif suffix.startswith("i") or (binary and suffix != "b") or (not binary and unit.isupper()):
        factor = _BINARY[unit.lower()]
    else:
        factor = _BYTES[unit.lower()]
    return int(number * factor)


def _is_struct(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, msgspec.Struct)


def _strip(hint: Any) -> Any:
    """Takes annotations and None off a type."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _strip(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        members = [arg for arg in get_args(hint) if arg is not type(None)]
        if len(members) == 1:
            return _strip(members[0])
    return hint
