"""Command line flags and YAML keys, derived from the fields of configuration structs.

A field's name, type, default and ``Meta`` make its flag, so a new option is one new field. See
``executor/config.py`` for what ``Meta.extra`` may say.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import msgspec

from engine_core.config import Config

_BYTES = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)", re.IGNORECASE)


_FLAG = re.compile(r"(--[A-Za-z][\w-]*)((?:\.[\w+-]+)*)(?:=(.*))?", re.DOTALL)


class ConfigError(Exception):
    """A flag or a key of a configuration file has an invalid value; the message names it."""


@dataclass(frozen=True)
class Option:
    """One field as an option."""

    path: tuple[str, ...]
    """Path to the field, from the outermost struct."""
    hint: Any
    """Its type, with all annotations."""
    default: Any
    description: str
    extra: Mapping[str, Any]
    group: str
    """Its heading in ``--help``."""

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
    def names(self) -> list[str]:
        """Names in files and keyword arguments: the long flags with underscores."""
        return [flag[2:].replace("-", "_") for flag in self.flags if flag.startswith("--")]

    @property
    def base_type(self) -> Any:
        """The type without annotations and None."""
        return _strip(self.hint)

    def convert(self, value: Any) -> Any:
        """Converts a string from the command line or a value from a file to the field's type.

        Raises:
            ConfigError: The value is invalid.
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
            if get_origin(base) is list:
                value = _as_list(value)
            return msgspec.convert(value, self.hint, strict=False)
        except (msgspec.ValidationError, ValueError) as error:
            raise ConfigError(f"{self.flag}: {_explain(error)}, got {value!r}") from None


def _as_list(value: Any) -> Any:
    """Accepts a single name, or a list as JSON (as some vLLM flags expect), as a list."""
    words = [value] if isinstance(value, str) else value
    if isinstance(words, list | tuple) and len(words) == 1 and isinstance(words[0], str) and words[0][:1] == "[":
        return json.loads(words[0])
    return words


def _explain(error: Exception) -> str:
    return str(error).replace("`", "").replace("Expected", "expected")


@functools.cache
def options(struct: type[Config]) -> tuple[Option, ...]:
    """All options of a struct and of the structs it contains."""
    return tuple(_options(struct, ()))


def _options(struct: type[Config], path: tuple[str, ...]) -> Iterator[Option]:
    hints = get_type_hints(struct, include_extras=True)
    for field in msgspec.structs.fields(struct):
        hint = hints[field.name]
        here = (*path, field.name)
        if isinstance(hint, type) and issubclass(hint, Config):
            yield from _options(hint, here)
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
        yield Option(here, hint, default, description, extra, extra.get("group", struct.group))


def add_arguments(parser: argparse.ArgumentParser, struct: type[Config], groups: Sequence[str] = ()) -> None:
    """Adds a flag for each option; flags that are not given stay out of the namespace.

    Args:
        parser: The parser to add to.
        struct: The options.
        groups: Headings in ``--help`` order; others follow.
    """
    headings = {name: parser.add_argument_group(name) for name in groups}
    for option in options(struct):
        if option.group not in headings:
            headings[option.group] = parser.add_argument_group(option.group)
        base = option.base_type
        text = option.description.replace("%", "%%")
        if base is bool:
            text += " (default: on)" if option.default else ""
        elif option.default not in (None, "", [], {}) and not _is_struct(base):
            text += f" (default: {_spell(option)})"
        common: dict[str, Any] = {"dest": option.name, "help": text, "default": argparse.SUPPRESS}
        add = headings[option.group].add_argument
        if base is bool:
            add(*option.flags, action=argparse.BooleanOptionalAction, **common)
        elif get_origin(base) is list:
            add(*option.flags, nargs="+", metavar=_metavar(option), **common)
        elif get_origin(base) is Literal:
            add(*option.flags, choices=get_args(base), **common)
        else:
            add(*option.flags, metavar=_metavar(option), **common)


class _HelpFormatter(argparse.HelpFormatter):
    """Shows a flag's metavar once, not after each alias."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        metavar = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {metavar}"


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and vLLM's flag syntax.

    ``--max_model_len`` is ``--max-model-len``. ``--pooler-config.pooling_type MEAN`` sets a key of a JSON object, and a
    ``+`` after the key appends to a list.
    """

    def __init__(self, prog: str, description: str, usage: str = "[flags]") -> None:
        super().__init__(
            prog=prog,
            usage=f"{prog} {usage}",
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: _HelpFormatter(prog, max_help_position=32, width=110),
        )

    def parse(self, arguments: Sequence[str], *, intermixed: bool = False) -> dict[str, Any]:
        """Values by name. Exits with a one-line message on errors.

        Args:
            arguments: The command line.
            intermixed: Whether flags may stand between positional arguments of one list.
        """
        parse = self.parse_known_intermixed_args if intermixed else self.parse_known_args
        known, unknown = parse(_spelt(arguments))
        flag = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
        if flag is not None:
            self.error(f"unknown option {flag}{did_you_mean(flag, self._visible_flags())}")
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        return vars(known)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"octavo: {message.removeprefix('argument ')} (see {self.prog} --help)\n")

    def _visible_flags(self) -> list[str]:
        return [flag for action in self._actions if action.help != argparse.SUPPRESS for flag in action.option_strings]


def _spelt(arguments: Sequence[str]) -> list[str]:
    """Spells flags with dashes, and collects keys of JSON objects into one value per flag."""
    result: list[str] = []
    objects: dict[str, dict[str, Any]] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*result, *_as_flags(objects), word, *rest]
        match = _FLAG.fullmatch(word)
        if match is None:
            result.append(word)
            continue
        flag, keys, value = match[1].replace("_", "-"), match[2], match[3]
        if not keys:
            result.append(flag if value is None else f"{flag}={value}")
            continue
        if value is None:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        _put(objects.setdefault(flag, {}), keys[1:].split("."), value)
    return [*result, *_as_flags(objects)]


def _as_flags(objects: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    return (f"{flag}={json.dumps(value)}" for flag, value in objects.items())


def _put(target: dict[str, Any], keys: Sequence[str], text: str) -> None:
    """Sets a value at a path of keys; text that is not JSON is a string."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    *outer, last = keys
    for key in outer:
        if not isinstance(target.get(key), dict):
            target[key] = {}
        target = target[key]
    if last.endswith("+"):
        known = target.setdefault(last[:-1], [])
        target[last[:-1]] = [*known, *(value if isinstance(value, list) else [value])]
    else:
        target[last] = value


def _spell(option: Option) -> str:
    """The default as written on the command line."""
    value = option.default
    if option.extra.get("parse") == "bytes":
        return _spell_size(value)
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _spell_size(count: int) -> str:
    """33554432 -> 32MiB, in the largest unit that leaves a whole number."""
    for unit in ("", "KiB", "MiB"):
        if not count or count % 1024:
            return f"{count}{unit}"
        count //= 1024
    return f"{count}GiB"


def _metavar(option: Option) -> str:
    base = option.base_type
    if option.extra.get("parse") == "bytes":
        return "SIZE"
    if _is_struct(base):
        return "JSON"
    return {int: "N", float: "X", dict: "JSON"}.get(get_origin(base) or base, "TEXT")


def build(struct: type[Config], values: Mapping[str, Any]) -> Any:
    """Makes the struct from option values by name.

    Raises:
        ConfigError: A name is unknown or a value is invalid.
    """
    known = {name: option for option in options(struct) for name in option.names}
    tree: dict[str, Any] = {}
    for key, value in values.items():
        option = known.get(key)
        if option is None:
            raise ConfigError(f"unknown option {key!r}{did_you_mean(key, known)}")
        node = tree
        for part in option.path[:-1]:
            node = node.setdefault(part, {})
        node[option.name] = option.convert(value)
    return _make(struct, tree)


def _make(struct: type[msgspec.Struct], tree: Mapping[str, Any]) -> Any:
    hints = _hints(struct)
    fields = {
        name: _make(hints[name], value) if isinstance(value, dict) and _is_struct(hints[name]) else value
        for name, value in tree.items()
    }
    return struct(**fields)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean X?``, or nothing if no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


@functools.cache
def _hints(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return get_type_hints(struct)


def parse_size(text: str, *, binary: bool) -> int:
    """``4GiB``, ``4G``, ``32k`` or ``1.5M`` as a number.

    Args:
        text: The user's input.
        binary: ``4G`` means 4 * 2**30 (memory). Otherwise ``k`` is 1000 in lower case and 1024 in upper case, as in
            vLLM's lengths.

    Raises:
        ValueError: The text is not a size.
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
    """Strips annotations and None from a type."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _strip(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        members = [arg for arg in get_args(hint) if arg is not type(None)]
        if len(members) == 1:
            return _strip(members[0])
    return hint
