"""A Jinja environment with bounded cost: every loop, call and built text is charged to a budget.

A rendering that would exceed its budget ends with ``BeyondBoundsError``; render it in a process that can be killed.
Templates need no analysis beforehand, and the result is the same as that of the unbounded environment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import GeneratorType
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_COST: Final = 256 << 10
"""Budget of a rendering, in characters built; loops and calls count as characters too. About 20 ms at most."""
MAX_SOURCE_CHARS: Final = 64 << 10
_NODE_COST: Final = 10
_ITEM_COST: Final = 4
_MAX_INDENT: Final = 16
_MAX_INT: Final = 1 << 64

_LINEAR = (
    *("abs", "attr", "bool", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float"),
    *("forceescape", "groupby", "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject"),
    *("rejectattr", "reverse", "round", "safe", "select", "selectattr", "sort", "title", "trim", "unique", "upper"),
)
"""Filters whose result is no longer than their input, and whose time is linear in it."""
_UNBOUNDED_METHODS = ("center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill")

_left: ContextVar[list[int]] = ContextVar("budget of a rendering")


class BeyondBoundsError(Exception):
    """A rendering would exceed its budget; it needs a process of its own."""


def start_budget() -> None:
    """Sets the budget of the next rendering in this context."""
    _left.set([MAX_COST])


def _spend(amount: int) -> None:
    left = _left.get()
    left[0] -= amount
    if left[0] < 0:
        raise BeyondBoundsError


def _weigh(value: Any) -> Any:
    """Charges for a value that is about to become text, including everything nested in it."""
    if isinstance(value, str):
        _spend(len(value))
        return value
    if value is None or isinstance(value, (bool, float, Undefined)):
        return value
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            _spend(_ITEM_COST + len(item))
        elif isinstance(item, int):
            if abs(item) > _MAX_INT:
                raise BeyondBoundsError
            _spend(_ITEM_COST)
        elif isinstance(item, dict):
            _spend(_ITEM_COST + len(item))
            pending += item.keys()
            pending += item.values()
        elif isinstance(item, (list, tuple)):
            _spend(_ITEM_COST + len(item))
            pending += item
        elif item is None or isinstance(item, float):
            _spend(_ITEM_COST)
        elif item is value:
            return value  # a macro or a generator: its text is short, or charged when it is built
        else:
            raise BeyondBoundsError
    return value


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 0


@jinja2.pass_context
def _loop(context: Context, iterable: Any, cost: int) -> Any:
    """Charges for the iterations of a loop."""
    if isinstance(iterable, (str, list, tuple, dict, range, Undefined)):
        _spend(cost * len(iterable))
        return iterable
    return _paid(iterable, cost)


def _paid(iterable: Iterable[Any], cost: int) -> Iterator[Any]:
    for item in iterable:
        _spend(cost)
        yield item


@jinja2.pass_context
def _enter(context: Context, value: str, cost: int) -> str:
    """Charges for the call of a macro."""
    _spend(cost)
    return value


@jinja2.pass_context
def _concat(context: Context, parts: list[Any]) -> str:
    """Charged version of ``a ~ b``."""
    return "".join(str(_weigh(part)) for part in parts)


@jinja2.pass_context
def _weighed(context: Context, value: Any) -> Any:
    """Charges for a list, tuple or dict literal, which may contain the same value many times."""
    return _weigh(value)


@jinja2.pass_context
def _touched(context: Context, value: Any) -> Any:
    """Charges for a value that is about to be sliced."""
    _spend(_size(value))
    return value


class _Metered(NodeTransformer):
    """Inserts the charges into the syntax tree of a template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        if node.recursive:
            raise BeyondBoundsError
        cost = _cost(node.body) + (_cost([node.test]) if node.test is not None else 0)
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_loop", cost)
        return node

    def _visit_body(self, node: nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
        cost = _cost(node.body)
        self.generic_visit(node)
        node.body.insert(0, nodes.Output([_filter(nodes.Const(""), "_enter", cost)]))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _visit_body  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), "_concat")

    def _visit_literal(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load" or not (items := node.items):
            return node
        return node if all(isinstance(item, nodes.Const) for item in items) else _filter(node, "_weighed")

    visit_List = visit_Tuple = visit_Dict = _visit_literal  # noqa: N815

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter(node.node, "_touched")
        return node


def _filter(node: Any, name: str, *args: int) -> nodes.Filter:
    return nodes.Filter(node, name, [nodes.Const(arg) for arg in args], [], None, None)


def _cost(body: list[Any]) -> int:
    """Minimum cost of one pass through a body."""
    cost = _NODE_COST
    pending: list[nodes.Node] = list(body)
    while pending:
        node = pending.pop()
        cost += _NODE_COST + (len(node.data) if isinstance(node, nodes.TemplateData) else 0)
        pending += node.iter_child_nodes()
    return cost


def make_bounded(base: type[ImmutableSandboxedEnvironment], **options: Any) -> type[ImmutableSandboxedEnvironment]:
    """Creates the class of a bounded environment.

    Args:
        base: The unbounded environment. ``bound_filters`` bounds its filters.
    """

    class BoundedEnvironment(base):  # type: ignore[misc, valid-type]
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            if len(source) > MAX_SOURCE_CHARS:
                raise BeyondBoundsError
            tree: nodes.Template = _Metered().visit(super()._parse(source, name, filename))
            tree.set_environment(self)
            for node in tree.find_all(nodes.Node):
                node.lineno = getattr(node, "lineno", None) or 1
            return tree

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "+" and type(left) is str and type(right) is str:  # the most common operation in templates
                _spend(len(left) + len(right))
                return left + right
            if operator == "%" and isinstance(left, str):
                raise BeyondBoundsError
            if operator in ("*", "**"):
                if _size(left) or _size(right) or (operator == "**" and (abs(left) > 1 << 16 or abs(right) > 16)):
                    raise BeyondBoundsError
            elif operator == "+":
                _spend(_size(left) + _size(right))
            result = super().call_binop(context, operator, left, right)
            if isinstance(result, int) and abs(result) > _MAX_INT:
                raise BeyondBoundsError
            return result

        def wrap_str_format(self, value: Any) -> Any:
            if getattr(value, "__name__", "") in ("format", "format_map") and isinstance(
                getattr(value, "__self__", None), str
            ):
                raise BeyondBoundsError
            return super().wrap_str_format(value)

        def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            owner = getattr(obj, "__self__", None)
            if isinstance(owner, str):
                if obj.__name__ in _UNBOUNDED_METHODS:
                    raise BeyondBoundsError
                _spend(len(owner) // 8)
                if obj.__name__ == "join":
                    args = tuple(list(_paid(arg, 1 + len(owner))) if _is_iterator(arg) else arg for arg in args)
                    _spend(sum(len(owner) * _size(arg) for arg in args))
                if obj.__name__ == "replace" and len(args) > 1:
                    _spend(_replaced_size(owner, *args[:2]))
            result = super().call(context, obj, *args, **kwargs)
            if isinstance(result, (str, dict)):
                _weigh(result)
            return result

    return BoundedEnvironment


def _is_iterator(value: Any) -> bool:
    return not isinstance(value, (str, list, tuple, dict))


def _replaced_size(text: Any, old: Any, new: Any) -> int:
    """Upper bound on the length of a text after a replacement."""
    if not all(isinstance(value, str) for value in (text, old, new)):
        raise BeyondBoundsError
    return len(text) + int(text.count(old)) * len(new)


def bound_filters(environment: jinja2.Environment, unbounded: jinja2.Environment) -> None:
    """Makes filters charge the budget; those whose cost cannot be bounded raise ``BeyondBoundsError``."""
    for name in list(environment.filters):
        environment.filters[name] = _metered_filter(name, unbounded)
    for function in (_loop, _enter, _concat, _weighed, _touched):
        environment.filters[function.__name__] = function
    environment.finalize = _weigh


def _metered_filter(name: str, unbounded: jinja2.Environment) -> Callable[..., Any]:
    @jinja2.pass_context
    def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        if name in _LINEAR:
            _spend(1 + _size(value) // 8)
            if isinstance(value, range):
                _spend(len(value))
            elif isinstance(value, GeneratorType):
                value = _paid(value, 1)
        elif name == "replace" and len(args) == 2 and not kwargs:
            _spend(_replaced_size(value, *args))
        elif name == "join":
            value = list(_paid(value, 1)) if _is_iterator(value) else value
            _weigh(value)
            _spend(_size(value) * sum(map(_size, (*args[:1], kwargs.get("d")))))
        elif name == "tojson":
            indent = args[1] if len(args) > 1 else kwargs.get("indent")
            if not (indent is None or (isinstance(indent, int) and indent <= _MAX_INDENT)) or len(args) > 2:
                raise BeyondBoundsError
            if "separators" in kwargs:
                raise BeyondBoundsError
            _weigh(value)
        elif name == "string":
            _weigh(value)
        elif name in ("indent", "truncate") and isinstance(value, str):
            width = args[0] if args else kwargs.get("width", kwargs.get("length", 4))
            if not isinstance(width, int) or (name == "indent" and width > _MAX_INDENT):
                raise BeyondBoundsError
            _spend(_MAX_INDENT * len(value))
        else:
            raise BeyondBoundsError
        return unbounded.call_filter(name, value, args, kwargs, context=context)

    return metered
