"""One name per op, one implementation per op set.

An op is declared once, by its plain-torch reference (``ops/reference``), which is its definition, its fallback and the
oracle of its tests. Op sets provide faster implementations with the same signature, and the runner for captured
programs. Each kind of device uses one set: ``use`` selects it when a worker starts, and only then is the set imported.

Calling an op with tensors runs the implementation for the device of its first argument. Calling it with
``Value``s, the symbolic tensors of a program under capture (``executor/graphs.py``), records a node in that
program instead. The mode travels with the data, so there is no ambient state and models need no special code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

import torch

SLICE = "slice"
"""Name of nodes that slice columns of a value: (value, dimension, start, width)."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Spec:
    """Shape and type of an op's result: ``[rows, width]``, where the number of rows is known only per step."""

    rows: str
    """What the rows are: ``tokens`` or ``samples``."""
    width: int
    dtype: torch.dtype
    is_transposed: bool = False
    """The tensor is ``[width, rows]``, as positions along several axes are."""

    @property
    def rows_dim(self) -> int:
        """The dimension that holds the rows."""
        return 1 if self.is_transposed else 0

    def num_bytes(self, rows: Mapping[str, int]) -> int:
        """Size in a step with this many rows of each kind."""
        return rows[self.rows] * self.width * self.dtype.itemsize


Specs = Spec | tuple[Spec, ...]
"""What an op returns: one tensor, or a tuple of them."""


class Recorder(Protocol):
    """Interface of a program under capture, as its values see it."""

    def record(self, op: Op[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def slice_columns(self, value: Value, start: int, width: int) -> Value: ...
    def add(self, value: Value, other: Value) -> Value: ...


class Value:
    """A tensor of a program under capture: shape and type without data.

    It offers the few tensor methods that models use; everything else goes through ops.
    """

    __slots__ = ("index", "recorder", "spec")

    def __init__(self, recorder: Recorder, index: int, spec: Spec) -> None:
        self.recorder = recorder
        self.index = index
        self.spec = spec

    @property
    def dtype(self) -> torch.dtype:
        return self.spec.dtype

    @property
    def width(self) -> int:
        return self.spec.width

    def split(self, sizes: list[int], dim: int = -1) -> tuple[Value, ...]:
        """Columns ``[:sizes[0]]``, ``[sizes[0]:sizes[0] + sizes[1]]``, and so on, as views."""
        if dim != -1 or self.spec.is_transposed or sum(sizes) != self.spec.width:
            raise ValueError(f"cannot split {self.spec} into columns of {sizes} along dimension {dim}")
        parts, start = [], 0
        for size in sizes:
            parts.append(self.recorder.slice_columns(self, start, size))
            start += size
        return tuple(parts)

    def __add__(self, other: Value) -> Value:
        return self.recorder.add(self, other)

    def __repr__(self) -> str:
        return f"Value({self.index}, {self.spec})"


@dataclass(frozen=True)
class StepInput:
    """An argument that each step brings: recorded by name, looked up at every replay."""

    name: str


@dataclass(frozen=True)
class Ref:
    """An argument of a node: the result of an earlier node, or an input of the program."""

    index: int
    spec: Spec

    @property
    def dtype(self) -> torch.dtype:
        return self.spec.dtype

    @property
    def width(self) -> int:
        return self.spec.width


@dataclass
class Node:
    """One recorded call: ``out = function(*args, **kwargs)`` with references and step inputs filled in."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Ref | tuple[Ref, ...]
    """Mirrors what the function returns: one result or a tuple of them."""

    @property
    def outs(self) -> tuple[Ref, ...]:
        """The values that the node produces."""
        return (self.out,) if type(self.out) is Ref else self.out  # type: ignore[return-value]

    def references(self) -> list[Ref]:
        """The values that the node reads."""
        return [arg for arg in (*self.args, *self.kwargs.values()) if type(arg) is Ref]

    def results(self, returned: Any) -> Iterable[tuple[int, Any]]:
        """Pairs of value index and tensor for what the function returned."""
        if type(self.out) is Ref:
            return ((self.out.index, returned),)
        return zip((ref.index for ref in self.outs), returned, strict=True)


class KeptInputs(dict[str, Any]):
    """Inputs of a program that are the same tensors in each of its replays, though their numbers may change."""

    description: object = None
    """What the program has made of them, for the next replay."""


class ProgramRunner(Protocol):
    """A captured program, compiled for an op set."""

    native_ops: int
    """Recorded ops that a replay runs in compiled kernels, without Python."""
    python_ops: int
    """Recorded ops that a replay calls from Python."""
    num_bytes: int
    """Memory for the values of a step that fills the capacity."""

    def replay(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """See ``executor.graphs.Program.replay``."""


class UnsupportedOpError(ValueError):
    """An op set cannot run a program, since it lacks an op."""

    def __init__(self, op: str) -> None:
        super().__init__(f"no kernel for {op!r}")
        self.op = op


class OpSet:
    """Implementations of ops for one kind of device. The base class has none: every op runs its reference."""

    capability: str = "reference"
    """The machine's instructions that it uses, for choices of arithmetic; those of CPUs: ``ops/cpu/build.py``."""
    block_types: frozenset[str] | None = None
    """The types of GGUF blocks that it can multiply; None: all that the references can."""
    rounds_activations: bool = True
    """Whether quantised weights can be multiplied with activations in 8 bits."""
    multiplies_fp8: bool = True
    """Whether weights in FP8 can be multiplied with activations in FP8."""

    def __init__(
        self, name: str = "reference", implementations: Mapping[str, Callable[..., Any]] | None = None
    ) -> None:
        """Takes implementations by op name; an op without one runs its reference."""
        self.name = name
        self.implementations = implementations or {}

    def compile(
        self,
        nodes: list[Node],
        specs: list[Spec],
        inputs: dict[str, int],
        outputs: list[int],
        capacity: dict[str, int],
    ) -> ProgramRunner | None:
        """Compiles a recorded program. None: call its nodes one by one.

        Args:
            nodes: The calls, in recording order.
            specs: Of all values.
            inputs: Values that a step brings, by name.
            outputs: Values that ``replay`` returns.
            capacity: Rows (``tokens`` and ``samples``) to make room for from the start; more are possible.
        """
        return None


OP_SETS = {
    "reference": "ops.dispatch:OpSet",
    "cpu": "ops.cpu.op_set:create",
    "triton": "ops.triton.op_set:create",
}
"""Factory of each set by name, imported when the set is first used."""
DEFAULTS = {"cpu": "cpu"}
"""Sets of device types for which none was selected; all others use the references."""

_used: dict[str, OpSet] = {}


def use(device_type: str, op_set: str | OpSet) -> OpSet:
    """Selects the op set of a device type, once, before weights are packed or programs captured.

    Args:
        device_type: As torch names it.
        op_set: A set, or the name of one.

    Raises:
        ValueError: No set has that name.
    """
    if isinstance(op_set, str):
        if op_set not in OP_SETS:
            raise ValueError(f"unknown op set {op_set!r}; choose from {', '.join(OP_SETS)}")
        module, _, attribute = OP_SETS[op_set].partition(":")
        op_set = getattr(importlib.import_module(module), attribute)()
    assert isinstance(op_set, OpSet)
    _used[device_type] = op_set
    return op_set


def op_set(device_type: str) -> OpSet:
    """The set that a device type uses."""
    return _used.get(device_type) or use(device_type, DEFAULTS.get(device_type, "reference"))


def is_used(name: str) -> bool:
    """Whether a device type uses the set of this name."""
    return any(used.name == name for used in _used.values())


class Op(Generic[P, R]):
    """A tensor function with one implementation per op set."""

    def __init__(self, reference: Callable[P, R], infer: Callable[..., Specs]) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.infer = infer
        self.__doc__ = reference.__doc__
        self.__name__ = self.name

    def implementation(self, chosen: OpSet) -> Callable[P, R]:
        """The function that computes the op in a set."""
        return chosen.implementations.get(self.name, self.reference)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        if type(first) is Value:
            result: R = first.recorder.record(self, args, kwargs)
            return result
        return self.implementation(op_set(first.device.type))(*args, **kwargs)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"<op {self.name}>"


def op(infer: Callable[..., Specs]) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declares an op by its reference. The result must not alias the arguments, whose memory is reused.

    Args:
        infer: Maps the op's arguments, with ``Value``s in place of the step's tensors, to the result's ``Spec``, or to
            a tuple of them for an op with several results.
    """

    def declare(reference: Callable[P, R]) -> Op[P, R]:
        return Op(reference, infer)

    return declare


def like_first(x: Value, *_: object, **__: object) -> Spec:
    """The result has the spec of the first argument."""
    return x.spec
