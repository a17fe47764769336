"""Op sets: chosen per kind of device, imported when they are chosen, with runners for programs of their own."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import ops
from executor.graphs import Program
from ops import OpSet
from ops.dispatch import OP_SETS, Node, Spec, StepInput
from tests.ops.cpu import using
from tests.ops.test_cpu_build import ROOT


class ToyRunner:
    """Calls the nodes, and notes what it was made of."""

    native_ops, python_ops, num_bytes = 2, 0, 0

    def __init__(self, nodes: list[Node], outputs: list[int], capacity: dict[str, int]) -> None:
        self.nodes = nodes
        self.outputs = outputs
        self.capacity = capacity

    def replay(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        return [torch.full((1, 1), float(index)) for index in self.outputs]


class ToyOps(OpSet):
    """A set with one op and a runner."""

    def __init__(self) -> None:
        super().__init__("toy", {"add": lambda x, y: x - y})

    def compile(
        self,
        nodes: list[Node],
        specs: list[Spec],
        inputs: dict[str, int],
        outputs: list[int],
        capacity: dict[str, int],
    ) -> ToyRunner:
        assert len(specs) == 3 and inputs == {"x": 0}
        return ToyRunner(nodes, outputs, capacity)


def test_a_set_serves_its_device_and_the_references_do_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OP_SETS, "toy", f"{__name__}:ToyOps")
    x = torch.tensor([[-1.0, 2.0]])
    with using("toy"):
        assert ops.op_set("cpu").name == "toy"
        assert torch.equal(ops.add(x, x), torch.zeros(1, 2))
        assert torch.equal(ops.activation(x, "relu"), torch.tensor([[0.0, 2.0]]))
    assert torch.equal(ops.add(x, x), 2 * x)
    with pytest.raises(ValueError, match="^unknown op set 'tritn'; choose from "):
        ops.use("cpu", "tritn")


def test_programs_are_run_by_the_set_of_their_device() -> None:
    with using(ToyOps()):
        program = Program("cpu", max_tokens=5, max_samples=2)
        x: Any = program.input("x", Spec("tokens", 4, torch.float32))
        program.finish(ops.gather_rows(ops.add(x, x), StepInput("rows")))
    runner = program._runner
    assert isinstance(runner, ToyRunner)
    assert [node.name for node in runner.nodes] == ["add", "gather_rows"]
    assert runner.capacity == {"tokens": 5, "samples": 2}
    assert (program.native_ops, program.python_ops) == (2, 0)
    assert program.replay({})[0].item() == 2
    # Which values die where is known whoever runs the program.
    assert program._dead == [(0,), (1,)]


def test_sets_are_imported_when_they_are_used() -> None:
    code = (
        "import sys, torch, ops\n"
        "def loaded(): return sorted({'ops.cpu', 'ops.triton', 'triton'} & set(sys.modules))\n"
        "assert not loaded()\n"
        "ops.use('cpu', 'reference'); ops.add(torch.ones(1, 1), torch.ones(1, 1))\n"
        "assert not loaded()\n"
        "ops.use('cpu', 'cpu')\n"
        "assert loaded() == ['ops.cpu']\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
