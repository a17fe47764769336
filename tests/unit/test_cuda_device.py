"""What the host does for a GPU, with a stand-in for torch's streams and events: transfers, results, capture."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from executor.base import ModelError
from executor.config import ExecutorConfig
from executor.device import cuda
from executor.device.cuda import CudaDevice, CudaSteps, joined
from executor.parallel import ParallelState
from executor.worker import Worker
from tests.stub_cuda import Event, Graph, stubbed


class Kernel:
    def compile(self) -> None:
        pass

    def run(self) -> None:
        Graph.log.append("launch")


@pytest.fixture
def steps() -> Iterator[CudaSteps]:
    with stubbed():
        yield CudaSteps(torch.device("cpu"))


def wait(steps: CudaSteps) -> None:
    assert select.select([steps.fileno()], [], [], 60)[0]


def test_results_arrive_with_their_types_and_shapes(steps: CudaSteps) -> None:
    numbers = np.arange(6, dtype=np.int32).reshape(2, 3)
    views = steps.upload({"numbers": numbers, "halves": np.array([0.5, 1.5])})
    pending = steps.download([views["numbers"] + 1, views["halves"][1:], views["numbers"][:, 1]])
    wait(steps)
    arrays = pending.collect()
    assert arrays[0].dtype == np.int32 and arrays[0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert arrays[1].dtype == np.float64 and arrays[1].tolist() == [1.5] and arrays[2].tolist() == [1, 4]
    assert pending.device_ms == 1.5
    assert not select.select([steps.fileno()], [], [], 0)[0]


def test_steps_in_flight_have_buffers_of_their_own(steps: CudaSteps) -> None:
    block = steps.graphs.block(64)
    pending = []
    for number in range(2):
        views = steps.upload({"number": np.array([number])})
        block.write(np.full(64, number, np.uint8))
        pending.append(steps.download([views["number"], block.device.clone()]))
    for number, results in enumerate(pending):
        wait(steps)
        arrays = results.collect()
        assert arrays[0].tolist() == [number] and arrays[1].tolist() == [number] * 64
    assert [len(pool._free) for pool in steps.pools] == [2, 2]


def test_an_error_of_the_device_reaches_the_worker(steps: CudaSteps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "error", RuntimeError("an illegal memory access was encountered"))
    pending = steps.download([])
    wait(steps)
    assert pending.is_ready()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        pending.collect()
    assert pending.device_ms == 0


def test_large_uploads_do_not_wait_for_the_step_before(steps: CudaSteps) -> None:
    stream: Any = torch.cuda.current_stream()
    steps.upload({"few": np.zeros(10)})
    assert not stream.waits
    steps.upload({"many": np.zeros(cuda.LARGE_COPY, np.uint8)})
    assert stream.waits == [steps._copies]


def test_a_graph_is_captured_without_stopping_other_threads(steps: CudaSteps) -> None:
    replay = steps.graphs.capture([Kernel(), Kernel()])
    replay()
    assert Graph.log == ["begin thread_local", "launch", "launch", "end", "replay"]


def test_each_kernel_is_compiled_once(steps: CudaSteps, monkeypatch: pytest.MonkeyPatch) -> None:
    pointwise: Any = pytest.importorskip("ops.triton.pointwise")
    recorded = pytest.importorskip("ops.triton.launch").recorded
    compiled: list[str] = []
    monkeypatch.setattr("ops.triton.launch.Launch.compile", lambda each: compiled.append(each.name))
    x = torch.zeros(2, 32)
    with recorded() as launches:
        for _ in range(2):
            pointwise.add(x, x)
            pointwise.scale(x, 2.0)
    steps.graphs.compile(launches)
    assert len(launches) == 4 and len(compiled) == 2


def test_neighbours_are_copied_at_once() -> None:
    memory = torch.arange(10000, dtype=torch.int32)
    near, next_to_it, far = memory[4:6], memory[6:9], memory[9000:9001]
    other = torch.zeros(3)
    stretches = joined([far, next_to_it, other, near])
    sizes = sorted(stretch.nbytes for stretch, _ in stretches)
    assert sizes == [4, 12, 20]
    for stretch, members in stretches:
        for index, begin in members.items():
            tensor = [far, next_to_it, other, near][index]
            assert torch.equal(stretch[begin : begin + tensor.nbytes].view(tensor.dtype), tensor)


def test_reasons_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert CudaDevice.unavailable() == f"torch {torch.__version__} is built for CPUs only"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert CudaDevice.unavailable() == "no GPU with a driver for CUDA 13.0 was found"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CC", "/opt/cc")
    assert CudaDevice.unavailable() is None
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "install gcc" in (CudaDevice.unavailable() or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert CudaDevice.unavailable() == "Triton is not installed: pip install 'octavo[gpu]'"


def test_kernels_that_compute_nonsense_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tests.triton_interpreter")  # amends the interpreter
    self_test = pytest.importorskip("ops.triton.self_test")
    cpu = torch.device("cpu")  # whose kernels are interpreted
    cuda.refuse_wrong_kernels(cpu, "a GPU")
    linear, attention = self_test.linear, self_test.paged_attention
    monkeypatch.setattr(self_test, "paged_attention", lambda *args: attention(*args) * torch.nan)
    with pytest.raises(ModelError, match=r"results of attention are wrong on a GPU with Triton .*--device cpu"):
        cuda.refuse_wrong_kernels(cpu, "a GPU")
    monkeypatch.setattr(self_test, "linear", lambda *args: linear(*args) * 0.9)
    with pytest.raises(ModelError, match="products of matrices are wrong"):
        cuda.refuse_wrong_kernels(cpu, "a GPU")


def test_memory_that_others_took_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*shape: int, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30))
    with pytest.raises(ModelError, match="--gpu-memory-utilization: 2 GiB .* only 1 GiB are free"):
        CudaDevice().allocate_kv((2, 1 << 30), torch.int8)


def test_each_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [cuda.own_index(0, rank) for rank in range(2)] == [0, 1] and cuda.own_index(1, 0) == 1
    with pytest.raises(ModelError, match="--data-parallel-size: a replica needs GPU 2, but this machine has only 2$"):
        cuda.own_index(2, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    with pytest.raises(ModelError, match=r"worker 2 needs .* only 2, those of CUDA_VISIBLE_DEVICES=1,3; use at most 2"):
        cuda.own_index(0, 2)


def test_gpus_that_share_a_model_need_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    device = CudaDevice()
    assert device.communicator(ParallelState()).size == 1 and device.stage_transfer() is None
    for place, reason in (
        (ParallelState(0, 2), "-parallel-size 1: ranks are processes, which --distributed-executor-backend mp starts"),
        (ParallelState(pp_size=2, rendezvous_fd=0), "--pipeline-parallel-size 2: torch .* lacks NCCL"),
    ):
        with pytest.raises(ModelError, match=reason):
            device.communicator(place)


def test_gpus_of_several_machines_need_a_trusted_network() -> None:
    links: Any = object()
    worker = Worker(ParallelState(), ExecutorConfig(), lambda message: None, links=links)
    with pytest.raises(ModelError, match=r"--device cuda: NCCL encrypts nothing; .* with --private-interface$"):
        worker._meet(CudaDevice())


@pytest.mark.parametrize("version", [(2, 27, 3), (2, 29, 0)])
def test_nccl_uses_the_named_interface(version: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(cuda.logger, "warning", lambda text, *values: warnings.append(text % values))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: version)
    monkeypatch.setattr("executor.device.group.join_group", lambda *arguments: arguments)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    device = CudaDevice()
    device.torch_device = torch.device("cuda", 0)
    place = ParallelState(1, 2, rank=1, store=("10.0.0.1", 5000), interface="eth1")
    joined: Any = device.communicator(place)
    assert joined[:2] == (place, "nccl")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=eth1", "the option counts, and no eth10"
    expected = "NCCL 2.29.0 may hang in graphs across machines; add --enforce-eager"
    assert warnings == ([] if version < (2, 28) else [expected])
