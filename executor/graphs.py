"""Program capture: a model's forward pass as a list of nodes that is replayed every step.

The model's Python forward runs once with symbolic values; each op appends a node. Replaying the program runs the nodes
in order with the step's inputs; one program serves every batch size. If the device's op set can compile programs
(``ops.OpSet.compile``), its runner replays the nodes; otherwise each node is a Python call of the op's implementation.
Eager mode calls the same ops one by one and gives the same bits.
"""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch

import ops
from ops.dispatch import SLICE, Node, Op, ProgramRunner, Ref, Spec, StepInput, Value

COLLECTIVES = {"all_gather", "all_reduce", "select_rows"}
"""Ops in which ranks meet."""


class Program:
    """A captured sequence of ops. ``replay`` takes the inputs by the names given at capture."""

    def __init__(self, device_type: str, *, max_tokens: int = 0, max_samples: int = 0) -> None:
        """Starts the capture.

        Args:
            device_type: Where the program will run.
            max_tokens: Rows of ``tokens`` to make room for. More are possible, but the first such step stalls.
            max_samples: Likewise for ``samples``.
        """
        self.op_set = ops.op_set(device_type)
        self.nodes: list[Node] = []
        self.specs: list[Spec] = []
        self.inputs: dict[str, int] = {}
        self.outputs: list[int] = []
        self._capacity = {"tokens": max_tokens, "samples": max_samples}
        self._dead: list[tuple[int, ...]] = []
        """For each node, the values that no later node reads."""
        self._runner: ProgramRunner | None = None

    # -- capture -------------------------------------------------------------------------------------------

    def input(self, name: str, spec: Spec) -> Value:
        """Declares an input tensor of each step."""
        value = self._new_value(spec)
        self.inputs[name] = value.index
        return value

    def record(self, op: Op[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value | tuple[Value, ...]:
        specs = op.infer(*args, **kwargs)
        out = self._new_value(specs) if isinstance(specs, Spec) else tuple(map(self._new_value, specs))
        self._append(op.name, op.implementation(self.op_set), args, kwargs, out)
        return out

    def slice_columns(self, value: Value, start: int, width: int) -> Value:
        part = self._new_value(Spec(value.spec.rows, width, value.spec.dtype))
        self._append(SLICE, torch.narrow, (value, 1, start, width), {}, part)
        return part

    def add(self, value: Value, other: Value) -> Value:
        return ops.add(value, other)  # type: ignore[arg-type, return-value]

    def _new_value(self, spec: Spec) -> Value:
        self.specs.append(spec)
        return Value(self, len(self.specs) - 1, spec)

    def _append(
        self, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Value | tuple[Value, ...]
    ) -> None:
        refs = tuple(_reference(arg) for arg in args)
        named = {key: _reference(arg) for key, arg in kwargs.items()}
        outs = tuple(map(_reference, out)) if isinstance(out, tuple) else _reference(out)
        self.nodes.append(Node(name, function, refs, named, outs))

    def finish(self, *outputs: Any) -> None:
        """Ends the capture. ``replay`` returns these outputs and drops each other value after its last reader."""
        self.outputs = [value.index for value in outputs]
        self._runner = self.op_set.compile(self.nodes, self.specs, self.inputs, self.outputs, self._capacity)
        seen = set(self.outputs)
        for node in reversed(self.nodes):
            used = {ref.index for ref in (*node.references(), *node.outs)}
            self._dead.append(tuple(used - seen))
            seen |= used
        self._dead.reverse()

    def meetings(self) -> int:
        """A number that is the same for all ranks that communicate alike."""
        met = [
            (node.name, [(out.spec.rows, out.spec.width, str(out.dtype)) for out in node.outs])
            for node in self.nodes
            if node.name in COLLECTIVES
        ]
        return crc32(repr(met).encode())

    @property
    def runner(self) -> ProgramRunner | None:
        """What the op set made of the program; None: it calls the nodes one by one."""
        return self._runner

    @property
    def native_ops(self) -> int:
        """Recorded ops that a replay runs in compiled kernels, without Python."""
        return 0 if self._runner is None else self._runner.native_ops

    @property
    def python_ops(self) -> int:
        """Recorded ops that a replay calls from Python."""
        if self._runner is not None:
            return self._runner.python_ops
        return sum(node.name != SLICE for node in self.nodes)

    @property
    def num_bytes(self) -> int:
        """Memory for the values of a step that fills the initial capacity."""
        return self._peak_bytes() if self._runner is None else self._runner.num_bytes

    def _peak_bytes(self) -> int:
        """Peak size of live values over all nodes. A slice keeps the whole value alive."""
        whole = list(range(len(self.specs)))
        for node in self.nodes:
            if node.name == SLICE:
                whole[node.outs[0].index] = whole[node.args[0].index]
        last_use = {whole[index]: len(self.nodes) for index in self.outputs}
        for i, node in reversed(list(enumerate(self.nodes))):
            for ref in (*node.references(), *node.outs):
                last_use.setdefault(whole[ref.index], i)
        sizes = [spec.num_bytes(self._capacity) for spec in self.specs]
        alive = peak = sum(sizes[index] for index in self.inputs.values())
        for i, node in enumerate(self.nodes):
            alive += sum(sizes[ref.index] for ref in node.outs if whole[ref.index] == ref.index)
            peak = max(peak, alive)
            ends = {whole[ref.index] for ref in (*node.references(), *node.outs)}
            alive -= sum(sizes[index] for index in ends if last_use[index] == i)
        return peak

    # -- replay --------------------------------------------------------------------------------------------

    def replay(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """Runs the program.

        Args:
            inputs: The tensors declared with ``input``, and all ``StepInput`` arguments of nodes.

        Returns:
            The tensors of the outputs. The next replay may overwrite them.
        """
        if self._runner is not None:
            return self._runner.replay(inputs)
        values: list[Any] = [None] * len(self.specs)
        for name, index in self.inputs.items():
            values[index] = inputs[name]
        for node, dead in zip(self.nodes, self._dead, strict=True):
            args = [_resolve(arg, values, inputs) for arg in node.args]
            kwargs = {name: _resolve(arg, values, inputs) for name, arg in node.kwargs.items()}
            for index, tensor in node.results(node.function(*args, **kwargs)):
                values[index] = tensor
            for index in dead:
                values[index] = None
        return [values[index] for index in self.outputs]


def _reference(arg: Any) -> Any:
    return Ref(arg.index, arg.spec) if type(arg) is Value else arg


def _resolve(arg: Any, values: list[Any], inputs: dict[str, Any]) -> Any:
    kind = type(arg)
    if kind is Ref:
        return values[arg.index]
    if kind is StepInput:
        return inputs[arg.name]
    return arg
