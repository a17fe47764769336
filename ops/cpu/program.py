"""Captured programs on the kernels: segments of one kernel call each, with Python in between.

Each value of the program has a place in an arena that is fixed before the step: room for ``capacity`` rows of its
width. Values whose lifetimes do not overlap share a place. So addresses stay fixed until a step has more rows than any
before.

Values that several ranks make together lie in an arena that all of them map, at the same places. There, the place of a
value is free for another one only after the ranks have met once more: until then, a rank may still be reading it.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from ops.arena import Arena
from ops.collective import PeerLostError
from ops.cpu import instructions, memory
from ops.cpu.fusion import Fusion, Item
from ops.cpu.instructions import Instruction
from ops.cpu.kernels import fill_adapters, fill_group
from ops.cpu.library import IDS, ROWS, Group, Library, Matrix, Step
from ops.cpu.library import Node as NodeStruct
from ops.cpu.ranks import SharedRank
from ops.dispatch import SLICE, KeptInputs, Node, Ref, Spec, StepInput

_ALIGNMENT = 64
_ALIASING = 4096
"""Rows a multiple of this many bytes apart compete for the same few lines of the L1 cache."""


@dataclass(frozen=True)
class Place:
    """Where a value lies: in the rows of value ``base``, starting at a column."""

    base: int
    column: int


@dataclass
class Segment:
    """Instructions that run in one call."""

    items: list[Item] = field(default_factory=list)
    nodes: Any = None
    """Array of ``library.Node``."""
    structs: list[ctypes.Structure] = field(default_factory=list)

    def link(self, matrix: Any) -> None:
        """Builds the array of nodes; ``matrix`` gives the address of each value."""
        self.structs = []
        self.nodes = (NodeStruct * len(self.items))()
        for node, item in zip(self.nodes, self.items, strict=True):
            instruction = item.instruction
            assert instruction is not None
            matrices = {name: matrix(ref) for name, ref in instruction.matrices.items()}
            struct = instruction.struct(matrices | {"out": matrix(item.out)})
            self.structs.append(struct)
            node.op, node.args = instruction.op, ctypes.addressof(struct)
            node.meets = int(instruction.ranks is not None)


def _stride_bytes(spec: Spec) -> int:
    result = -(-spec.width * spec.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return result + _ALIGNMENT if result % _ALIASING == 0 else result


@dataclass(frozen=True)
class _Description:
    """What a program has made of inputs that are kept."""

    layout: object
    """Where values were."""
    step: Step
    """Points at the inputs."""
    results: list[Tensor]
    """Those of each replay."""


class NativeProgram:
    """A recorded program, compiled for the kernels."""

    native_ops: int
    """Recorded ops that a replay runs in kernels."""
    python_ops: int
    """Recorded ops that a replay runs in Python."""
    num_bytes: int
    """Memory for the values of a step of ``capacity`` rows: the arena, the results of Python ops, and what experts have
    between their products."""

    def __init__(
        self,
        kernels: Library,
        nodes: list[Node],
        specs: list[Spec],
        inputs: dict[str, int],
        outputs: list[int],
        capacity: dict[str, int],
    ) -> None:
        """Compiles the program.

        Args:
            kernels: The library to run on.
            nodes: The calls, in recording order.
            specs: Of all values.
            inputs: Values that a step brings, by name.
            outputs: Values that ``replay`` returns.
            capacity: Rows (``tokens`` and ``samples``) to make room for from the start; more are possible.
        """
        self._kernels = kernels
        self._specs = specs
        self._inputs = inputs
        self._outputs = outputs
        self._places = {index: Place(index, 0) for index in range(len(specs))}
        self._rows_name = ""
        """Step input that holds the rows whose logits are needed."""
        self._adapter_names: dict[int, str] = {}
        """Step inputs that hold the adapters of the rows, by what rows these are."""
        self._group_names: list[str] = []
        items = self._fuse(self._lower(nodes))
        self.native_ops = sum(item.instruction.num_ops for item in items if item.instruction is not None)
        self.python_ops = sum(item.instruction is None for item in items)
        self._parts = _parts(items)
        native_reads = {self._base(index) for item in items if item.instruction for index in item.reads()}
        self._imported = native_reads - {item.out.index for item in items if item.instruction}
        """Values that kernels read but do not produce."""
        self._shared = {item.out.index for item in items if item.instruction and item.instruction.ranks}
        """Values that ranks make together."""
        self._ranks = next(
            (item.instruction.ranks for item in items if item.instruction and item.instruction.ranks), None
        )
        self._arena = Arena(specs, _stride_bytes, memory.map_zeros)
        self._common = Arena(specs, _stride_bytes, memory.map_zeros if self._ranks is None else self._ranks.memory)
        self._place(items)
        if self._ranks is not None:
            self._ranks.agree(crc32(repr(self._common.places()).encode()), "the places of what they share")
        self.num_bytes = self._size(items, capacity)
        self._dead = self._last_python_reads()
        self._views: dict[int, Tensor] = {}
        self._layout = object()
        """Another one whenever values move."""
        self._step = self._new_step()
        self._reserve(capacity)

    # -- compiling -----------------------------------------------------------------------------------------

    def _size(self, items: list[Item], capacity: dict[str, int]) -> int:
        """See ``num_bytes``."""
        returned = [ref.spec for item in items if item.instruction is None for ref in item.node.outs]
        num_bytes = self._arena.num_bytes(capacity) + sum(spec.num_bytes(capacity) for spec in returned)
        if self._ranks is not None:
            num_bytes += self._common.num_bytes(capacity) // self._ranks.size
        native = [item.instruction for item in items if item.instruction is not None]
        return num_bytes + max((each.workspace_of(capacity["tokens"]) for each in native), default=0)

    def _lower(self, nodes: list[Node]) -> list[Item]:
        items: list[Item] = []
        nodes = list(nodes)
        while nodes:
            node = nodes.pop(0)
            lookup = self._shared_lookup(node, *nodes[:2])
            if lookup is not None:
                items.append(lookup)
                del nodes[:2]
            elif node.name == SLICE:
                value, _, start, _ = node.args
                source = self._places[value.index]
                self._places[node.outs[0].index] = Place(source.base, source.column + start)
            else:
                items.append(Item(node, self._instruction(node)))
        return items

    def _shared_lookup(self, *nodes: Node) -> Item | None:
        """Lookup in a table of which each rank has some rows, as layers record it: the rows of ids in the own share
        (``shard_ids``), those rows (``embedding``), all ranks' rows (``select_rows``)."""
        if [node.name for node in nodes] != ["shard_ids", "embedding", "select_rows"]:
            return None
        shard, table, select = nodes
        ids, first, _ = shard.args
        rows, ranks, is_here = select.args
        if (table.args[0], rows, is_here) != (shard.outs[0], table.out, shard.outs[1]):
            return None
        instruction = self._instruction(Node(table.name, table.function, (ids, *table.args[1:]), {}, table.out))
        if instruction is None or not isinstance(ranks, SharedRank):
            return None
        instruction.fields["first"] = first
        instruction.ranks, instruction.num_ops = ranks, len(nodes)
        return Item(select, instruction)

    def _instruction(self, node: Node) -> Instruction | None:
        """The kernel instruction of a node; None: the node runs in Python."""
        describe = instructions.BY_NAME.get(node.name)
        instruction = describe(*node.args, **node.kwargs) if describe is not None else None
        if instruction is None or not all(type(x) is Ref for x in instruction.matrices.values()):
            return None
        for name, source in instruction.step.items():
            if name == "group":
                if source.name not in self._group_names:
                    self._group_names.append(source.name)
                instruction.fields["group"] = self._group_names.index(source.name)
            elif name == "logits_rows":
                if type(source) is not StepInput or self._rows_name not in ("", source.name):
                    return None
                self._rows_name = source.name
            elif name == "adapters":
                rows = instruction.fields.get("rows", ROWS["tokens"])
                if type(source) is not StepInput or self._adapter_names.get(rows, source.name) != source.name:
                    return None
                self._adapter_names[rows] = source.name
            elif type(source) is not Ref:
                return None
            elif name == "input_ids":  # of an embedding
                chosen = next((each for each in IDS if self._inputs.get(each) == source.index), None)
                if chosen is None:
                    return None
                instruction.fields["ids"] = IDS[chosen]
            elif self._inputs.get(name) != source.index:
                return None
        return instruction

    def _fuse(self, items: list[Item]) -> list[Item]:
        uses = Counter(self._base(index) for item in items for index in item.reads())
        uses.update({self._base(index): 2 for index in self._outputs})  # outputs must survive to the end
        return Fusion(items, uses).run()

    def _base(self, index: int) -> int:
        return self._places[index].base

    def _place(self, items: list[Item]) -> None:
        """Allocates a place for every value that a kernel reads or writes, for its lifetime."""
        made = [{out.index for out in item.node.outs} for item in items]
        used = [made[i] | {self._base(index) for index in item.reads()} for i, item in enumerate(items)]
        last_use = {index: i for i, values in enumerate(used) for index in values}
        kept = {self._base(index) for index in self._outputs}
        placed = set()
        unread: list[int] = []  # shared values that this rank has read for the last time since the ranks met
        for index in sorted(self._imported & set(self._inputs.values())):
            self._arena.allocate(index)
            placed.add(index)
        for i, item in enumerate(items):
            for index in sorted(made[i] if item.instruction is not None else made[i] & self._imported):
                self._arena_of(index).allocate(index)
                placed.add(index)
            last = [index for index in sorted(used[i] & placed - kept) if last_use[index] == i]
            for index in last:
                if index not in self._shared:
                    self._arena.release(index)
            unread += [index for index in last if index in self._shared]
            if item.instruction is not None and item.instruction.ranks is not None:
                for index in unread:
                    self._common.release(index)
                unread.clear()
        self._waits_first = bool(unread)
        """Whether ranks may still read what the next replay writes before they meet."""

    def _arena_of(self, index: int) -> Arena:
        return self._common if index in self._shared else self._arena

    def _last_python_reads(self) -> list[tuple[int, ...]]:
        """For each part, the tensors held in Python that nothing reads after it. Kernels read copies."""
        seen = {self._base(index) for index in self._outputs}
        result: list[tuple[int, ...]] = []
        for part in reversed(self._parts):
            used: set[int] = set()
            if isinstance(part, Node):
                used = {self._base(ref.index) for ref in (*part.references(), *part.outs)}
            result.append(tuple(sorted(used - seen)))
            seen |= used
        return result[::-1]

    def _reserve(self, rows: dict[str, int]) -> None:
        moved = self._arena.reserve(rows)
        if self._ranks is not None:
            moved |= self._common.reserve(rows)
        if not moved:
            return
        self._views.clear()
        self._layout = object()
        for part in self._parts:
            if isinstance(part, Segment):
                part.link(self._matrix)

    def _matrix(self, ref: Ref) -> Matrix:
        view = self._view(ref.index)
        return Matrix(view.data_ptr(), view.stride(0))

    def _view(self, index: int) -> Tensor:
        """A value in the arena, [capacity, width]."""
        if index not in self._views:
            place, spec = self._places[index], self._specs[index]
            self._views[index] = self._arena_of(place.base).tensor(place.base)[
                :, place.column : place.column + spec.width
            ]
        return self._views[index]

    # -- replay --------------------------------------------------------------------------------------------

    def replay(self, inputs: dict[str, Any]) -> list[Tensor]:
        """Runs the program; see ``executor.graphs.Program.replay``. The results live until the next replay.

        Raises:
            PeerLostError: A rank that this one computes with has left.
        """
        if isinstance(inputs, KeptInputs):
            known = inputs.description
            if isinstance(known, _Description) and known.layout is self._layout:
                self._run(known.step, {}, inputs, {})
                return known.results
        step = self._new_step() if isinstance(inputs, KeptInputs) else self._step
        rows, keep = self._read_step(step, inputs)
        self._reserve(rows)
        values: dict[int, Tensor] = {}
        for name, index in self._inputs.items():
            self._set(index, inputs[name], values, rows)
        self._run(step, values, inputs, rows)
        results = [self._tensor(index, values, rows) for index in self._outputs]
        may_keep = not self.python_ops and not self._imported
        may_keep &= {*map(id, keep)} <= {*map(id, inputs.values())}  # they were read where they are
        if isinstance(inputs, KeptInputs) and may_keep:
            inputs.description = _Description(self._layout, step, results)
        return results

    def _run(self, step: Step, values: dict[int, Tensor], inputs: dict[str, Any], rows: dict[str, int]) -> None:
        """Runs all parts. Without parts in Python, nothing is read but what the step descriptor points to."""
        address = ctypes.addressof(step)
        if self._ranks is not None and self._waits_first:
            self._ranks.wait()
        for part, dead in zip(self._parts, self._dead, strict=True):
            if isinstance(part, Segment):
                if self._kernels.run(part.nodes, len(part.items), address, 0):
                    raise PeerLostError("another rank has left")
                continue
            self._call(part, values, inputs, rows)
            for index in dead:
                values.pop(index, None)

    def _call(self, node: Node, values: dict[int, Tensor], inputs: dict[str, Any], rows: dict[str, int]) -> None:
        """Runs a node in Python."""
        args = [self._argument(arg, values, inputs, rows) for arg in node.args]
        kwargs = {name: self._argument(arg, values, inputs, rows) for name, arg in node.kwargs.items()}
        for index, tensor in node.results(node.function(*args, **kwargs)):
            self._set(index, tensor, values, rows)

    def _new_step(self) -> Step:
        """A step descriptor."""
        step = Step(groups=(Group * max(1, len(self._group_names)))())
        if self._ranks is not None:
            step.ranks = ctypes.pointer(self._ranks.struct)
        return step

    def _read_step(self, step: Step, inputs: dict[str, Any]) -> tuple[dict[str, int], list[Any]]:
        """Points a step descriptor at a step's inputs.

        Returns:
            The row counts, and objects to keep alive until the replay ends.
        """
        keep: list[Any] = []
        rows = {"tokens": 0, "samples": 0}
        for name, index in self._inputs.items():
            tensor = inputs[name]
            spec = self._specs[index]
            rows[spec.rows] = tensor.shape[spec.rows_dim]
            if name in IDS:
                tensor = tensor.to(torch.int32).contiguous()
                setattr(step, name, tensor.data_ptr())
                keep.append(tensor)
        if self._rows_name:
            wanted = inputs[self._rows_name]
            rows["samples"] = wanted.shape[0]
            step.logits_rows = wanted.data_ptr()
        for number, name in enumerate(self._group_names):
            fill_group(step.groups[number], inputs[name])
        for kind, name in self._adapter_names.items():
            fill_adapters(step.adapters[kind], inputs[name])
        step.num_tokens, step.num_samples = rows["tokens"], rows["samples"]
        return rows, keep

    def _set(self, index: int, tensor: Tensor, values: dict[int, Tensor], rows: dict[str, int]) -> None:
        """Records a value that no kernel produced, and copies it to where the kernels read it."""
        values[index] = tensor
        if index in self._imported:
            self._view(index)[: tensor.shape[0]].copy_(tensor)

    def _tensor(self, index: int, values: dict[int, Tensor], rows: dict[str, int]) -> Tensor:
        place, spec = self._places[index], self._specs[index]
        if place.base in values:
            whole = values[place.base]
            return whole if place.base == index else whole[:, place.column : place.column + spec.width]
        return self._view(index)[: rows[spec.rows]]

    def _argument(self, arg: Any, values: dict[int, Tensor], inputs: dict[str, Any], rows: dict[str, int]) -> Any:
        if type(arg) is Ref:
            return self._tensor(arg.index, values, rows)
        return inputs[arg.name] if type(arg) is StepInput else arg


def _parts(items: list[Item]) -> list[Segment | Node]:
    """Segments of instructions, and the nodes between them."""
    parts: list[Segment | Node] = []
    for item in items:
        if item.instruction is None:
            parts.append(item.node)
        elif parts and isinstance(parts[-1], Segment):
            parts[-1].items.append(item)
        else:
            parts.append(Segment([item]))
    return parts
