"""Peephole fusion: what surrounds a kernel becomes part of it. No fusion changes a bit.

linear, act_and_mul           -> one product that stores the gated activation
linear, activation            -> one product that stores the activation
linear, add                   -> one product that adds the other operand, after an activation if there is one
add, rms_norm                 -> one norm that stores the sum as well
rms_norm, rotary, attention   -> one launch that normalises and rotates the heads of q and k and writes K and V,
                                 and attention that only reads them
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ops.dispatch import Node, Ref
from ops.metadata import AttentionMetadata
from ops.packed import QuantizedWeight, Weight
from ops.triton import linear, norm, pointwise, rope
from ops.triton.gemm import PLAIN, Epilogue
from ops.triton.rope import HeadNorm


def product(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    is_gated: bool,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``linear`` and what follows it; see ``gemm.Epilogue``."""
    return linear.matmul(x, weight, Epilogue(bias, activation, is_gated, residual), out=out)


def heads_into_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    tables: tuple[Tensor, Tensor],
    kv_cache: tuple[Tensor, Tensor],
    meta: AttentionMetadata,
    norms: tuple[HeadNorm | None, HeadNorm | None],
    interleaved: bool,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``rope.rope_kv`` for the rows of a step. ``tables`` and ``norms`` are those of q and of k."""
    return rope.rope_kv(
        q, k, v, positions, *tables, meta.slot_mapping, kv_cache,
        q_norm=norms[0], k_norm=norms[1], interleaved=interleaved, out=out,
    )  # fmt: skip


FUSED: dict[str, Callable[..., Any]] = {
    "product": product,
    "add_rms_norm": norm.add_rms_norm,
    "heads_into_cache": heads_into_cache,
}
"""Launchers of fused nodes by name, beside those of ops."""


def fused(nodes: Sequence[Node], outputs: Iterable[int]) -> list[Node]:
    """The nodes of a program with fewer launches.

    Args:
        nodes: As recorded.
        outputs: Values that the program returns.
    """
    fusion = Fusion(nodes, outputs)
    return fusion.run()


@dataclass
class _Heads:
    """Where the heads of q or of k come from, before their norm and rotation."""

    source: Ref
    positions: Any
    table: Tensor
    head_dim: int
    interleaved: bool
    norm: HeadNorm | None
    made_by: list[Node]


class Fusion:
    """One pass over the nodes of a program, in order."""

    def __init__(self, nodes: Sequence[Node], outputs: Iterable[int]) -> None:
        self._nodes = nodes
        self._uses = Counter(ref.index for node in nodes for ref in node.references())
        self._uses.update(outputs)
        self._made_by: dict[int, Node] = {}
        self._result: list[Node] = []

    def run(self) -> list[Node]:
        """The nodes that remain."""
        for node in self._nodes:
            for new in self._taken(node):
                self._result.append(new)
                self._made_by.update({out.index: new for out in new.outs})
        return self._result

    def _taken(self, node: Node) -> list[Node]:
        """The node, with its operands' producers folded into it; they leave the result."""
        if node.name in ("act_and_mul", "activation"):
            return [self._activated(node) or node]
        if node.name == "add":
            return [self._added(node) or node]
        if node.name == "rms_norm":
            return self._normed(node)
        if node.name == "paged_attention":
            return self._attention(node)
        return [node]

    def _maker(self, ref: Any, *names: str) -> Node | None:
        """The producer of a value, if it has one of these names and the value has no other reader."""
        if type(ref) is not Ref or self._uses[ref.index] != 1:
            return None
        node = self._made_by.get(ref.index)
        return node if node is not None and node.name in names else None

    def _drop(self, node: Node) -> None:
        self._result = [other for other in self._result if other is not node]

    # -- products ------------------------------------------------------------------------------------------

    def _product(self, ref: Any, *, is_plain: bool) -> dict[str, Any] | None:
        """The arguments of ``product`` for the product that makes a value. ``is_plain``: nothing follows it yet."""
        node = self._maker(ref, "linear", "product")
        if node is None or node.function not in (linear.linear, product):
            return None
        if node.name == "linear":
            given = arguments(node)
            extra = {"residual": None, "activation": PLAIN.activation, "is_gated": False}
            return {"x": given["x"], "weight": given["weight"], "bias": given["bias"]} | extra
        given = arguments(node)
        return None if is_plain or given["residual"] is not None else given

    def _activated(self, node: Node) -> Node | None:
        given = arguments(node)
        found = self._product(given["x"], is_plain=True)
        is_gated = node.name == "act_and_mul"
        if found is None or (is_gated and not _can_be_gated(found["weight"])):
            return None
        kind = pointwise.kernel_name(given["activation"]) if is_gated else given["kind"]
        self._drop(self._made_by[given["x"].index])
        return _node(product, found | {"activation": kind, "is_gated": is_gated}, node.out)

    def _added(self, node: Node) -> Node | None:
        given = arguments(node)
        for name, other in (("y", "x"), ("x", "y")):
            found = self._product(given[name], is_plain=False)
            if found is not None and type(given[other]) is Ref and given[other].index != given[name].index:
                self._drop(self._made_by[given[name].index])
                return _node(product, found | {"residual": given[other]}, node.out)
        return None

    # -- norms ---------------------------------------------------------------------------------------------

    def _normed(self, node: Node) -> list[Node]:
        given = arguments(node)
        add = self._made_by.get(given["x"].index)
        if add is None or add.name != "add" or type(add.out) is not Ref:
            return [node]
        operands = arguments(add)
        if type(operands["y"]) is not Ref:
            return [node]
        rest = {name: value for name, value in given.items() if name != "x"}
        both = _node(norm.add_rms_norm, {"x": operands["x"], "residual": operands["y"]} | rest, (add.out, *node.outs))
        self._result = [both if other is add else other for other in self._result]
        self._made_by.update({out.index: both for out in both.outs})
        return []

    # -- heads ---------------------------------------------------------------------------------------------

    def _attention(self, node: Node) -> list[Node]:
        given = arguments(node)
        keys, values = given["kv_cache"]
        if given["k"] is None or given["layout"] != "heads":
            return [node]
        q, k = self._heads(given["q"]), self._heads(given["k"])
        if q is None or k is None or not _turn_alike(q, k):
            return [node]
        if q.head_dim != keys.shape[3] or keys.dtype != k.source.dtype:
            return [node]
        for made_by in (*q.made_by, *k.made_by):
            self._drop(made_by)
        write = _node(
            heads_into_cache,
            {
                "q": q.source,
                "k": k.source,
                "v": given["v"],
                "positions": q.positions,
                "tables": (q.table, k.table),
                "kv_cache": (keys, values),
                "meta": given["meta"],
                "norms": (q.norm, k.norm),
                "interleaved": q.interleaved,
            },
            given["q"],
        )
        return [write, replace(node, args=(), kwargs=given | {"k": None, "v": None})]

    def _heads(self, ref: Any) -> _Heads | None:
        """The rotation that makes q or k, and the norm of heads before it."""
        rotary = self._maker(ref, "rotary_embedding")
        if rotary is None:
            return None
        turn = arguments(rotary)
        heads = _Heads(
            turn["x"], turn["positions"], turn["cos_sin"], turn["head_dim"], turn["interleaved"], None, [rotary]
        )
        normed = self._maker(heads.source, "rms_norm")
        if normed is not None:
            given = arguments(normed)
            is_shared = given["weight"] is None or len(given["weight"]) == heads.head_dim
            if is_shared and (given["size"] or given["x"].width) == heads.head_dim:
                heads.norm = HeadNorm(given["weight"], given["eps"], given["offset"], given["round_first"])
                heads.source = given["x"]
                heads.made_by.append(normed)
        return heads


def _turn_alike(q: _Heads, k: _Heads) -> bool:
    """Whether one kernel can turn both."""
    same = (q.head_dim, q.interleaved, q.table.shape[1]) == (k.head_dim, k.interleaved, k.table.shape[1])
    return same and q.positions == k.positions


def _can_be_gated(weight: Weight) -> bool:
    """Whether a product holds a tile of gates and one of the others at once."""
    return not isinstance(weight, QuantizedWeight) or len(weight.segments) == 1


def _node(function: Callable[..., Any], given: Mapping[str, Any], out: Any) -> Node:
    return Node(function.__name__, function, (), dict(given), out)


def arguments(node: Node) -> dict[str, Any]:
    """A node's arguments by the names of its launcher's parameters, defaults included."""
    bound = inspect.signature(node.function).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "out"}
