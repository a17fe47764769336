"""Two machines, played by processes of this one: whatever dies, streams go on with the tokens of one rank."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from api.config import make_config
from api.ray_machines import with_machines
from engine_core.messages import WorkersLost
from tests.e2e.rank_harness import Agent, ranks
from tests.e2e.server import ROOT, run_cli
from tests.ports import free_port

pytestmark = pytest.mark.alone  # stages wait for each other


@pytest.fixture(scope="module")
def cluster_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "key"
    done = run_cli("cluster-key", str(path))
    assert done.returncode == 0 and re.match(rf"{path}: written", done.stdout)
    return path


@pytest.fixture
def port() -> int:
    return free_port()


def flags_of_agent(model: Path, place: dict[str, Any], share: str = "-pp") -> list[str]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in place.items()]
    return ["--model", str(model), share, "2", "--node-rank", "1", *flags]


@pytest.mark.timeout(300)
def test_two_machines(
    one_rank: list[list[int]], tiny_model: Path, cluster_key: Path, port: int, tmp_path: Path
) -> None:
    place = {"nnodes": 2, "master_addr": "127.0.0.1", "master_port": port, "cluster_key": str(cluster_key)}
    flags = flags_of_agent(tiny_model, place)
    agents = [Agent(*flags)]
    try:
        with ranks(tiny_model, tmp_path, 1, 2, **place) as two:
            assert two.generate() == one_rank

            # A worker of the other machine.
            pids = two.workers.worker_pids()
            assert two.generate(lambda: os.kill(pids[1], signal.SIGKILL)) == one_rank
            (lost,) = two.messages(WorkersLost)
            assert re.match(
                rf"worker 1 \(pid {pids[1]}\) ended with exit code -9 on machine 1 \(.*, 127.0.0.1\)", lost.reason
            )

            # The other machine.
            def replace_agent() -> None:
                agents[0].kill()
                agents.append(Agent(*flags))

            assert two.generate(replace_agent) == one_rank
            assert re.match(
                r"machine 1 \(.*, 127.0.0.1\) (is gone|has started again)", two.messages(WorkersLost)[1].reason
            )
        assert agents[1].wait() == 0, "the leader has said goodbye"
    finally:
        for agent in agents:
            agent.kill()


@pytest.mark.timeout(300)
def test_machines_that_ray_provides(
    one_rank: list[list[int]], tiny_model: Path, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a stand-in, whose actors run in the process that would ask Ray: all others are real."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "stand_ins"))
    options = {"distributed_executor_backend": "ray", "pipeline_parallel_size": 2, "master_port": port}
    with with_machines(make_config({"model": str(tiny_model), **options})[0]) as config:
        parallel = config.engine.executor.parallel
        place = {name: getattr(parallel, name) for name in ("nnodes", "master_addr", "master_port", "cluster_key")}
        with ranks(tiny_model, tmp_path, 1, 2, **place) as two:
            assert two.generate() == one_rank
            (agent,) = processes("octavo machine 1")
            assert two.generate(agent.kill) == one_rank
            assert re.match(r"machine 1 \(.*, 127.0.0.1\) is gone", two.messages(WorkersLost)[0].reason)
    _, alive = psutil.wait_procs(processes("octavo ray", "octavo machine 1"), timeout=60)
    assert not alive, "agents end with the server"


def processes(*titles: str) -> list[psutil.Process]:
    """Processes that this one has started, also indirectly."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).strip() in titles:
                found.append(process)
    return found


NAMESPACE, LINK = f"octavo{os.getpid()}", f"o{os.getpid()}"
HERE, THERE = "10.77.0.1", "10.77.0.2"


@pytest.fixture
def cable() -> Iterator[str]:
    """The name of an interface that leads to another network namespace."""

    def ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"network namespaces cannot be used: ip {' '.join(arguments)}: {done.stderr.strip()}")

    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    try:
        ip("netns", "add", NAMESPACE)
        ip("link", "add", LINK, "type", "veth", "peer", "name", "eth0", "netns", NAMESPACE)
        ip("address", "add", f"{HERE}/24", "dev", LINK)
        ip("-n", NAMESPACE, "address", "add", f"{THERE}/24", "dev", "eth0")
        ip("-n", NAMESPACE, "link", "set", "eth0", "up")
        ip("link", "set", LINK, "up")
        yield LINK
    finally:
        subprocess.run(["ip", "link", "delete", LINK], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "delete", NAMESPACE], capture_output=True, check=False)


@pytest.mark.timeout(300)
def test_a_pulled_cable(
    one_rank: list[list[int]],
    tiny_model: Path,
    cluster_key: Path,
    port: int,
    cable: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of machines that divide layers, with interfaces of different names."""
    place = {"nnodes": 2, "master_addr": HERE, "master_port": port, "cluster_key": str(cluster_key)}
    flags = flags_of_agent(tiny_model, {**place, "private_interface": "eth0"}, "-tp")
    agent = Agent(*flags, prefix=["ip", "netns", "exec", NAMESPACE])
    try:
        with ranks(tiny_model, tmp_path, 2, 1, **place, private_interface=cable) as two:

            def pull() -> None:
                subprocess.run(["ip", "link", "set", cable, "down"], check=True)
                with monkeypatch.context() as patch:  # no sooner: agents on a busy machine may be late
                    patch.setattr("executor.nodes.members.NODE_TIMEOUT", 2.0)
                    two.run_until(lambda: bool(two.messages(WorkersLost)))
                subprocess.run(["ip", "link", "set", cable, "up"], check=True)

            assert two.generate(pull) == one_rank
            (lost,) = two.messages(WorkersLost)
            assert re.match(rf"machine 1 \(.*, {THERE}\) has said nothing for \d s", lost.reason)
            listening = subprocess.run(
                ["ip", "netns", "exec", NAMESPACE, "ss", "-Hltn"], capture_output=True, text=True, check=False
            ).stdout
            addresses = [line.split()[3] for line in listening.splitlines()]
            assert len(addresses) >= 2, "a link, and Gloo"
            assert all(address.startswith(f"{THERE}:") for address in addresses), "no other address"
    finally:
        agent.kill()
