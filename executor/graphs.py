"""Program capture: a model's forward pass as a list of nodes that is replayed every step.

The model's Python forward runs once with symbolic values; each op appends a node. Replaying the program calls the
nodes one after another with the step's inputs; one program serves every batch size. A node is a Python call of the
op's implementation. Eager mode calls the same
ops one by one and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ops.dispatch import Op, Spec, StepInput, Value


@dataclass(frozen=True)
class Ref:
    """An argument that is the result of an earlier node, or an input of the program."""

    index: int


@dataclass
class Node:
    """One call: ``values[out] = function(*args, **kwargs)`` with references and step inputs filled in."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: int
    dead: tuple[int, ...] = ()
    """Values that no later node reads."""


@dataclass
class Program:
    """A captured sequence of ops. ``replay`` takes the inputs by the names given at capture."""

    device_type: str
    nodes: list[Node] = field(default_factory=list)
    specs: list[Spec] = field(default_factory=list)
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: list[int] = field(default_factory=list)

    # -- capture -------------------------------------------------------------------------------------------

    def input(self, name: str, spec: Spec) -> Value:
        """Declares a tensor that each step brings."""
        value = self._new_value(spec)
        self.inputs[name] = value.index
        return value

    def record(self, op: Op[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        value = self._new_value(op.infer(*args, **kwargs))
        self.nodes.append(
            Node(
                name=op.name,
                function=op.implementation(self.device_type),
                args=tuple(_reference(arg) for arg in args),
                kwargs={name: _reference(arg) for name, arg in kwargs.items()},
                out=value.index,
            )
        )
        return value

    def slice_columns(self, value: Value, start: int, width: int) -> Value:
        part = self._new_value(Spec(value.spec.rows, width, value.spec.dtype))
        self.nodes.append(Node("slice", torch.narrow, (Ref(value.index), 1, start, width), {}, part.index))
        return part

    def _new_value(self, spec: Spec) -> Value:
        self.specs.append(spec)
        return Value(self, len(self.specs) - 1, spec)

    def finish(self, *outputs: Any) -> None:
        """Ends the capture with the values that ``replay`` returns; what no node reads any more is dropped then."""
        self.outputs = [value.index for value in outputs]
        seen = set(self.outputs)
        for node in reversed(self.nodes):
            used = {arg.index for arg in (*node.args, *node.kwargs.values()) if type(arg) is Ref} | {node.out}
            node.dead = tuple(used - seen)
            seen |= used

    # -- replay --------------------------------------------------------------------------------------------

    def replay(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """Runs the nodes in order.

        Args:
            inputs: The tensors declared with ``input`` and everything that nodes take as ``StepInput``.

        Returns:
            The tensors of ``outputs``.
        """
        values: list[Any] = [None] * len(self.specs)
        for name, index in self.inputs.items():
            values[index] = inputs[name]
        for node in self.nodes:
            args = [_resolve(arg, values, inputs) for arg in node.args]
            kwargs = {name: _resolve(arg, values, inputs) for name, arg in node.kwargs.items()}
            values[node.out] = node.function(*args, **kwargs)
            for index in node.dead:
                values[index] = None
        return [values[index] for index in self.outputs]


def _reference(arg: Any) -> Any:
    return Ref(arg.index) if type(arg) is Value else arg


def _resolve(arg: Any, values: list[Any], inputs: dict[str, Any]) -> Any:
    kind = type(arg)
    if kind is Ref:
        return values[arg.index]
    if kind is StepInput:
        return inputs[arg.name]
    return arg
