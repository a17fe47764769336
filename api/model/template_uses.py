"""Detects from the source of a chat template which message format it expects.

Clients write the same history in several ways, and each template understands only one of them: content as a string or
a list of parts, the arguments of a call as an object or JSON text, instructions from ``system`` or ``developer``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Final, Literal, TypeAlias

from jinja2 import nodes

ContentFormat: TypeAlias = Literal["string", "openai"]
ArgumentsFormat: TypeAlias = Literal["object", "text"]

_TYPE_TESTS: Final = ("string", "iterable", "sequence", "mapping")
_SAME_VALUE_FILTERS: Final = ("d", "default", "safe", "string", "trim")
"""Filters whose result still counts as the field itself in the enclosing expression."""
_TEXT_FILTERS: Final = ("e", "escape", "indent", "lower", "replace", "string", "trim", "upper")
_OBJECT_FILTERS: Final = ("dictsort", "items", "tojson", "xmlattr")
_LENGTH_FILTERS: Final = ("count", "length")

_MAX_PASSES: Final = 4
"""Passes over the assignments. Longer chains of names assigned against the order of the source are not followed."""


@dataclass(frozen=True)
class TemplateUses:
    """The message format that a template expects.

    Attributes:
        content_format: ``openai`` if it loops over content, else ``string``.
        needs_parts: It loops over content without testing for a string, so it would loop over a string's characters.
        tool_content_format: Like ``content_format``, for tool results: a template may loop over user content but print
            results. ``string`` if it accepts both, since some templates expect their own kind of parts there.
        arguments_format: ``text`` if it concatenates or prints the arguments of calls. ``object`` if it writes them as
            JSON, accesses their items, tests their type, or does none of these.
        knows_developer: It names the role ``developer``.
        reads_is_error: It reads ``is_error`` of a tool result.
        refuses_both: It rejects calls with content as well as thinking before them, as gpt-oss's does.
        has_one_call: It writes only the first call of a message, as those of gpt-oss and Llama 3 do.
    """

    content_format: ContentFormat = "string"
    needs_parts: bool = False
    tool_content_format: ContentFormat = "string"
    arguments_format: ArgumentsFormat = "object"
    knows_developer: bool = False
    reads_is_error: bool = False
    refuses_both: bool = False
    has_one_call: bool = False


def find_uses(tree: nodes.Template) -> TemplateUses:
    """Analyses a parsed template."""
    content = _Uses(tree, "content", follows_filter=lambda _: True)
    loops = content.are_looped_over(tree)
    needs_parts = loops and not content.are_tested(tree)
    arguments = _Uses(tree, "arguments", follows_filter=lambda name: name in _SAME_VALUE_FILTERS)
    calls = _Uses(tree, "tool_calls", follows_filter=lambda _: True)
    constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return TemplateUses(
        content_format="openai" if loops else "string",
        needs_parts=needs_parts,
        tool_content_format="openai" if needs_parts and not _prints_results(tree, content) else "string",
        arguments_format=_arguments_format(tree, arguments),
        knows_developer="developer" in constants,
        reads_is_error="is_error" in constants or any(node.attr == "is_error" for node in tree.find_all(nodes.Getattr)),
        refuses_both=any("both content and thinking" in text for text in constants),
        has_one_call=calls.are_first_alone(tree),
    )


def _arguments_format(tree: nodes.Template, arguments: _Uses) -> ArgumentsFormat:
    if arguments.are_tested(tree) or arguments.are_objects(tree):
        return "object"
    return "text" if arguments.are_texts(tree) else "object"


def _prints_results(tree: nodes.Template, content: _Uses) -> bool:
    """Whether the branches for the role ``tool`` treat content as a string."""
    branches = [branch.body for branch in tree.find_all(nodes.If) if _asks_for_role(branch.test, "tool")]
    body = nodes.Template([node for branch in branches for node in branch])
    return content.are_texts(body) and not content.are_looped_over(body)


def _asks_for_role(test: nodes.Node, role: str) -> bool:
    compares = ([test] if isinstance(test, nodes.Compare) else []) + list(test.find_all(nodes.Compare))
    for compare in compares:
        operands = [operand.expr for operand in compare.ops if operand.op in ("eq", "in")]
        named = [node for expr in operands for node in (expr, *expr.find_all(nodes.Const))] + [compare.expr]
        if any(isinstance(node, nodes.Const) and node.value == role for node in named):
            return True
    return False


class _Uses:
    """What a template does with one field of messages or calls, under any of the names it is assigned to."""

    def __init__(self, tree: nodes.Template, field: str, follows_filter: Callable[[str], bool]) -> None:
        self._field = field
        self._follows_filter = follows_filter
        self._names: set[str] = set()
        self._follow(tree)

    def _follow(self, tree: nodes.Template) -> None:
        """Collects the names of the field: {% set text = message.content %}, {{ show(message.content) }}."""
        macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
        assignments = [(node.target, node.node) for node in tree.find_all(nodes.Assign)]
        for call in tree.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            if macro is not None:
                assignments += zip(macro.args, call.args, strict=False)
                named = {keyword.key: keyword.value for keyword in call.kwargs}
                assignments += [(arg, named[arg.name]) for arg in macro.args if arg.name in named]
        for _ in range(_MAX_PASSES):
            for target, value in assignments:
                if not self.holds(value):
                    continue
                if isinstance(target, nodes.Name):
                    self._names.add(target.name)
                elif isinstance(target, nodes.NSRef):
                    self._names.add(f"{target.name}.{target.attr}")

    def holds(self, node: nodes.Node | None) -> bool:
        """Whether an expression is the field, possibly filtered or sliced."""
        if isinstance(node, nodes.Filter):
            return self._follows_filter(node.name) and self.holds(node.node)
        if isinstance(node, nodes.Getattr):
            is_named = isinstance(node.node, nodes.Name) and f"{node.node.name}.{node.attr}" in self._names
            return node.attr == self._field or is_named
        if isinstance(node, nodes.Getitem):
            if isinstance(node.arg, nodes.Slice):
                return self.holds(node.node)
            return isinstance(node.arg, nodes.Const) and node.arg.value == self._field
        if isinstance(node, nodes.CondExpr):
            return self.holds(node.expr1) or self.holds(node.expr2)
        if isinstance(node, nodes.Or):
            return self.holds(node.left)
        return isinstance(node, nodes.Name) and node.name in self._names

    def are_looped_over(self, tree: nodes.Node) -> bool:
        return any(self.holds(loop.iter) for loop in tree.find_all(nodes.For))

    def are_first_alone(self, tree: nodes.Node) -> bool:
        """Whether the template reads the first item, and the others in no way."""
        items = [node.arg for node in tree.find_all(nodes.Getitem) if self.holds(node.node)]
        filters = (node.name for node in tree.find_all(nodes.Filter) if self.holds(node.node))
        return (
            len(items) > 0
            and all(isinstance(item, nodes.Const) and item.value == 0 for item in items)
            and all(name in _LENGTH_FILTERS for name in filters)
            and not self.are_looped_over(tree)
            and not self.are_texts(tree)
        )

    def are_tested(self, tree: nodes.Node) -> bool:
        """Whether the template tests the field's type."""
        return any(test.name in _TYPE_TESTS and self.holds(test.node) for test in tree.find_all(nodes.Test))

    def are_objects(self, tree: nodes.Node) -> bool:
        """Whether the template uses the field in a way that only an object supports."""
        return (
            self.are_looped_over(tree)
            or any(node.name in _OBJECT_FILTERS and self.holds(node.node) for node in tree.find_all(nodes.Filter))
            or any(self.holds(node.node) and not hasattr(str, node.attr) for node in tree.find_all(nodes.Getattr))
            or any(
                self.holds(node.node) and not isinstance(node.arg, nodes.Slice) for node in tree.find_all(nodes.Getitem)
            )
        )

    def are_texts(self, tree: nodes.Node) -> bool:
        """Whether the template prints the field, or uses it in a way that only a string supports."""
        pieces = chain(
            (side for node in tree.find_all(nodes.Add) for side in (node.left, node.right)),
            (part for node in tree.find_all(nodes.Concat) for part in node.nodes),
            (part for node in tree.find_all(nodes.Output) for part in node.nodes),
            (node.node for node in tree.find_all(nodes.Filter) if node.name in _TEXT_FILTERS),
            (node.node for node in tree.find_all(nodes.Getattr) if hasattr(str, node.attr)),
        )
        return any(map(self.holds, pieces))
