"""Peephole fusion: folds instructions into the prologue or epilogue of another. No fusion changes a bit.

linear, act_and_mul           -> one product with the activation as its epilogue, where the weight is paired
linear, activation            -> one product with the activation as its epilogue; so with scale, softcap and clip
linear, add                   -> one product that adds the other operand, after an activation if there is one
gather_rows, linear           -> one product that reads only the selected rows
norm, linear                  -> one product that normalises the rows it reads (RMS norm or layer norm)
rms_norm, add                 -> one norm that adds the other operand
rms_norm, rotary, attention   -> attention that normalises and rotates the heads of q and k as it reads them
linear, all_gather            -> one product that writes its columns of the ranks' common rows; so with attention and
                                 with functions of one number
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ops.cpu import library as lib
from ops.cpu.instructions import Instruction
from ops.cpu.library import Heads
from ops.dispatch import Node, Ref


@dataclass
class Item:
    """A recorded call, with its instruction if there is one."""

    node: Node
    instruction: Instruction | None

    @property
    def out(self) -> Ref:
        """The one value that the instruction produces."""
        (out,) = self.node.outs
        return out

    def reads(self) -> list[int]:
        """Values that the item reads."""
        if self.instruction is None:
            return [ref.index for ref in self.node.references()]
        return [ref.index for ref in self.instruction.matrices.values()]


_SHARED_OPS = (lib.OP_LINEAR, lib.OP_ATTENTION, lib.OP_EXPERTS, lib.OP_ACT_AND_MUL, lib.OP_ACTIVATION)
"""Instructions whose results several ranks may make together, each some columns."""


class Fusion:
    """One pass over the items of a program, in order."""

    def __init__(self, items: list[Item], uses: Mapping[int, int]) -> None:
        """Takes the items and the number of uses of each value, slices included."""
        self._items = items
        self._uses = uses
        self._made_by: dict[int, Item] = {}

    def run(self) -> list[Item]:
        """The items that remain."""
        result: list[Item] = []
        gone: set[int] = set()
        for item in self._items:
            gone.update(id(absorbed) for absorbed in self._absorb(item))
            self._made_by.update({out.index: item for out in item.node.outs})
            result.append(item)
        return [item for item in result if id(item) not in gone]

    def _absorb(self, item: Item) -> list[Item]:
        """Folds the producers of an item's operands into it; returns the absorbed items."""
        instruction = item.instruction
        if instruction is None:
            return []
        if instruction.ranks is not None:
            return self._shared(item, instruction) if instruction.op == lib.OP_ACTIVATION else []
        if instruction.op == lib.OP_ACT_AND_MUL:
            return self._gated(item, instruction)
        if instruction.op == lib.OP_ACTIVATION:
            return self._activated(item, instruction)
        if instruction.op == lib.OP_ADD:
            return self._residual(item, instruction)
        if instruction.op == lib.OP_LINEAR:
            return [*self._gathered(instruction), *self._normed(instruction)]
        if instruction.op == lib.OP_ATTENTION:
            return [*self._heads(instruction, "q"), *self._heads(instruction, "k")]
        return []

    def _maker(self, ref: Any, *ops: int, shared: bool = False) -> Item | None:
        """The producer of a value, if it is an instruction with one of these opcodes and the value has no other reader.

        One by several ranks counts only if it may be ``shared``.
        """
        item = self._made_by.get(ref.index)
        if item is None or item.instruction is None or item.instruction.op not in ops or self._uses[ref.index] != 1:
            return None
        return item if shared or item.instruction.ranks is None else None

    def _shared(self, item: Item, gather: Instruction) -> list[Item]:
        maker = self._maker(gather.matrices["x"], *_SHARED_OPS)
        if maker is None or maker.instruction is None:
            return []
        item.instruction = replace(
            maker.instruction,
            matrices=dict(maker.instruction.matrices),
            ranks=gather.ranks,
            column=gather.column,
            width=gather.width,
            num_ops=maker.instruction.num_ops + gather.num_ops,
        )
        return [maker]

    def _linear(self, ref: Any, *epilogues: int, activated: bool = False, shared: bool = True) -> Item | None:
        """The product that makes a value, if it has one of these epilogues, and no activation unless ``activated``."""
        item = self._maker(ref, lib.OP_LINEAR, shared=shared)
        if item is None or item.instruction is None or item.instruction.fields["epilogue"] not in epilogues:
            return None
        return item if activated or item.instruction.fields["activation"] == lib.IDENTITY else None

    def _gated(self, item: Item, act: Instruction) -> list[Item]:
        linear = self._linear(act.matrices["x"], lib.EPILOGUE_STORE, shared=False)
        if linear is None or linear.instruction is None or not linear.instruction.fields["weight"].paired:
            return []
        item.instruction = _finished_by(
            linear.instruction,
            act,
            epilogue=lib.EPILOGUE_GATED,
            **{name: act.fields[name] for name in ("activation", "parameter", "limit")},
        )
        return [linear]

    def _activated(self, item: Item, act: Instruction) -> list[Item]:
        linear = self._linear(act.matrices["x"], lib.EPILOGUE_STORE, lib.EPILOGUE_LOGITS)
        if linear is None or linear.instruction is None:
            return []
        item.instruction = _finished_by(
            linear.instruction, act, activation=act.fields["activation"], parameter=act.fields["parameter"]
        )
        return [linear]

    def _residual(self, item: Item, add: Instruction) -> list[Item]:
        for name, other in (("y", "x"), ("x", "y")):
            linear = self._linear(add.matrices[name], lib.EPILOGUE_STORE, activated=True)
            if linear is not None and linear.instruction is not None:
                item.instruction = _finished_by(linear.instruction, add, epilogue=lib.EPILOGUE_RESIDUAL)
                item.instruction.matrices["residual"] = add.matrices[other]
                return [linear]
        for name, other in (("y", "x"), ("x", "y")):
            norm = self._rms_norm(add.matrices[name])
            if norm is not None:
                matrices = norm.matrices | {"residual": add.matrices[other]}
                item.instruction = replace(norm, matrices=matrices, num_ops=norm.num_ops + add.num_ops)
                return [self._made_by[add.matrices[name].index]]
        return []

    def _rms_norm(self, ref: Any) -> Instruction | None:
        """The norm that makes a value, if it adds nothing."""
        norm = self._maker(ref, lib.OP_RMS_NORM)
        if norm is None or norm.instruction is None or "residual" in norm.instruction.matrices:
            return None
        return norm.instruction

    def _gathered(self, linear: Instruction) -> list[Item]:
        gather = self._maker(linear.matrices["x"], lib.OP_GATHER_ROWS)
        if gather is None or gather.instruction is None:
            return []
        linear.matrices["x"] = gather.instruction.matrices["x"]
        linear.fields["gather"] = 1
        linear.step |= gather.instruction.step
        linear.num_ops += gather.instruction.num_ops
        return [gather]

    def _normed(self, linear: Instruction) -> list[Item]:
        x = linear.matrices["x"]
        norm = self._maker(x, lib.OP_LAYER_NORM)
        source = self._rms_norm(x) if norm is None else norm.instruction
        if source is None or source.fields["groups"] != 1:
            return []
        linear.matrices["x"] = source.matrices["x"]
        if source.op == lib.OP_RMS_NORM:
            linear.fields |= {"norm": lib.RMS_NORM, "rms_norm": source.fields["rms_norm"]}
        else:
            linear.fields["norm"] = lib.LAYER_NORM
            linear.fields["norm_weight"], linear.fields["norm_eps"] = source.fields["weight"], source.fields["eps"]
            linear.fields["norm_bias"] = source.fields["bias"]
        linear.keep += source.keep
        linear.num_ops += source.num_ops
        return [self._made_by[x.index]]

    def _heads(self, attention: Instruction, name: str) -> list[Item]:
        if name not in attention.matrices:
            return []
        absorbed = []
        heads = Heads()
        head_dim = attention.fields["head_dim"]
        rotary = self._maker(attention.matrices[name], lib.OP_ROTARY)
        if rotary is not None and rotary.instruction is not None and rotary.instruction.fields["head_dim"] == head_dim:
            turn = rotary.instruction.fields["heads"]
            heads.rotary_dim, heads.cos_sin, heads.interleaved = turn.rotary_dim, turn.cos_sin, turn.interleaved
            self._take(attention, name, rotary.instruction)
            absorbed.append(rotary)
        source = attention.matrices[name]
        norm = self._rms_norm(source)
        if norm is not None and norm.fields["size"] == head_dim and not norm.fields["weight_stride"]:
            heads.norm, heads.has_norm = norm.fields["rms_norm"], 1
            self._take(attention, name, norm)
            absorbed.append(self._made_by[source.index])
        attention.fields[f"{name}_heads"] = heads
        return absorbed

    @staticmethod
    def _take(attention: Instruction, name: str, source: Instruction) -> None:
        attention.matrices[name] = source.matrices["x"]
        attention.step |= source.step
        attention.keep += source.keep
        attention.num_ops += source.num_ops


def _finished_by(linear: Instruction, end: Instruction, **fields: Any) -> Instruction:
    """The product with the instruction that follows it as its epilogue."""
    return replace(
        linear,
        matrices=dict(linear.matrices),
        fields=linear.fields | fields,
        width=end.width,
        num_ops=linear.num_ops + end.num_ops,
    )
