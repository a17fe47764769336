"""Captured programs on GPUs: lists of launches on memory that never moves.

Each value has a place in an arena that is planned before the first step, with room for the largest one. For a size of
step, each node's launcher is called once, with the places of its arguments and results, and its launches are kept. They
can be run again, or captured as one graph: they read the same addresses each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ops.arena import Arena
from ops.dispatch import SLICE, Node, Ref, Spec, StepInput, UnsupportedOpError
from ops.triton.launch import Launch, recorded, submit

UNIT = 256
"""Rows that an arena's capacity is a multiple of: then each value begins at a multiple of as many bytes."""


@dataclass(frozen=True)
class Bound:
    """A program for steps of one size, on given inputs."""

    launches: Sequence[Launch]
    outputs: Sequence[Tensor]
    """In the arena: they hold until any launches of the program run again."""

    def run(self) -> None:
        """Launches all."""
        for each in self.launches:
            submit(each)


@dataclass(frozen=True)
class _Place:
    """Where a value lies: in the rows of value ``base``, starting at a column."""

    base: int
    column: int


class TritonProgram:
    """A recorded program, as a ``ops.dispatch.ProgramRunner``."""

    python_ops = 0

    def __init__(
        self,
        kernels: Mapping[str, Any],
        nodes: Sequence[Node],
        specs: list[Spec],
        inputs: Mapping[str, int],
        outputs: Sequence[int],
        capacity: Mapping[str, int],
    ) -> None:
        """Plans the arena; ``bind`` allocates it.

        Args:
            kernels: Launchers by op name.
            nodes: The calls, in recording order.
            specs: Of all values.
            inputs: Values that a step brings, by name.
            outputs: Values that ``replay`` returns.
            capacity: The most rows (``tokens`` and ``samples``) of a step.

        Raises:
            UnsupportedOpError: An op has no launcher.
        """
        self._specs = specs
        self._inputs = inputs
        self._outputs = outputs
        self._capacity = capacity
        self._places = {index: _Place(index, 0) for index in range(len(specs))}
        self._nodes = self._without_slices(nodes)
        for node in self._nodes:
            if node.name not in kernels:
                raise UnsupportedOpError(node.name)
        self.native_ops = len(self._nodes)
        self._arena = Arena(specs, _row_bytes, self._allocate, UNIT)
        self._like: Tensor | None = None
        """A tensor on the program's device."""
        self._plan()
        self.num_bytes = self._arena.num_bytes(capacity)

    def _without_slices(self, nodes: Sequence[Node]) -> list[Node]:
        rest = []
        for node in nodes:
            if node.name == SLICE:
                value, _, start, _ = node.args
                source = self._places[value.index]
                self._places[node.outs[0].index] = _Place(source.base, source.column + start)
            else:
                rest.append(node)
        return rest

    def _plan(self) -> None:
        """Finds a place for each value, for its lifetime."""
        brought = set(self._inputs.values())
        used = [
            {self._places[ref.index].base for ref in (*node.references(), *node.outs)} - brought for node in self._nodes
        ]
        last_use = {index: number for number, values in enumerate(used) for index in values}
        kept = {self._places[index].base for index in self._outputs}
        for number, node in enumerate(self._nodes):
            for ref in node.outs:
                self._arena.allocate(ref.index)
            for index in sorted(used[number] - kept):
                if last_use[index] == number:
                    self._arena.release(index)

    def _allocate(self, num_bytes: int) -> Tensor:
        assert self._like is not None
        return self._like.new_empty(num_bytes, dtype=torch.uint8)

    # -- replay --------------------------------------------------------------------------------------------

    def bind(self, inputs: Mapping[str, Any]) -> Bound:
        """The launches that compute these inputs, again and again, whatever they hold by then.

        Args:
            inputs: As of ``executor.graphs.Program.replay``.
        """
        self._like = inputs["input_ids"]
        return self._bound(inputs, self._arena)

    def rehearse(self, inputs: Mapping[str, Any]) -> None:
        """Calls the launchers on inputs without data, on the device ``meta``, and forgets their launches.

        What they take of ``launch.scratch`` says how much a step will.
        """
        self._bound(inputs, self._arena.elsewhere(lambda size: torch.empty(size, dtype=torch.uint8, device="meta")))

    def _bound(self, inputs: Mapping[str, Any], arena: Arena) -> Bound:
        rows = {spec.rows: 0 for spec in self._specs}
        values: dict[int, Tensor] = {}
        for name, index in self._inputs.items():
            values[index] = inputs[name]
            rows[self._specs[index].rows] = inputs[name].shape[self._specs[index].rows_dim]
        rows["samples"] = inputs["logits_rows"].shape[0]
        assert all(count <= self._capacity[kind] for kind, count in rows.items()), "larger than the largest step"
        arena.reserve(self._capacity)

        def tensor(ref: Ref) -> Tensor:
            place, spec = self._places[ref.index], self._specs[ref.index]
            if place.base in values:
                return values[place.base]
            whole = arena.tensor(place.base)[: rows[spec.rows]]
            if spec.width == 1 and not spec.dtype.is_floating_point:
                return whole[:, place.column]  # ids have one dimension
            return whole[:, place.column : place.column + spec.width]

        def argument(arg: Any) -> Any:
            if type(arg) is Ref:
                return tensor(arg)
            return inputs[arg.name] if type(arg) is StepInput else arg

        with recorded() as launches:
            for node in self._nodes:
                out = tensor(node.out) if isinstance(node.out, Ref) else tuple(map(tensor, node.out))
                kwargs = {name: argument(arg) for name, arg in node.kwargs.items()}
                node.function(*map(argument, node.args), **kwargs, out=out)
        return Bound(launches, [tensor(Ref(index, self._specs[index])) for index in self._outputs])

    def replay(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Runs the program; see ``executor.graphs.Program.replay``."""
        bound = self.bind(inputs)
        bound.run()
        return list(bound.outputs)


def _row_bytes(spec: Spec) -> int:
    return spec.width * spec.dtype.itemsize
