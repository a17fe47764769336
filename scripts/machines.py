"""A second machine for scripts: a network namespace behind a virtual cable, with an agent or a node of Ray, which are
restarted."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import ROOT, Server, free_port

HERE, THERE = "10.77.1.1", "10.77.1.2"
CABLE = f"o{os.getpid()}"
"""The interface, on both sides."""


def ip(*arguments: str) -> None:
    """Runs ip (8), which needs root and iproute2."""
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def namespace() -> Iterator[list[str]]:
    """A network namespace that is connected to ours. Yields the prefix of commands that run in it."""
    name, cable = f"octavo{os.getpid()}", CABLE
    ip("netns", "add", name)
    try:
        ip("link", "add", cable, "type", "veth", "peer", "name", CABLE, "netns", name)
        ip("address", "add", f"{HERE}/24", "dev", cable)
        ip("-n", name, "address", "add", f"{THERE}/24", "dev", CABLE)
        ip("-n", name, "link", "set", CABLE, "up")
        ip("-n", name, "link", "set", "lo", "up")
        ip("link", "set", cable, "up")
        yield ["ip", "netns", "exec", name]
    finally:
        subprocess.run(["ip", "link", "delete", cable], check=False)
        ip("netns", "delete", name)


@contextmanager
def other_machine(
    arguments: list[str], *, has_engine: bool = False, share: str = "-pp"
) -> Iterator[tuple[list[str], Server]]:
    """Runs an agent in a namespace, again and again until it ends by itself.

    Args:
        arguments: Of ``octavo serve`` on both machines.
        has_engine: The other machine has an engine of its own, instead of a worker.
        share: Of its worker: ``-pp``, the second pipeline stage, or ``-tp``, half of each layer.

    Yields:
        Arguments that machine 0 needs besides, and the processes of the other machine.
    """
    with tempfile.TemporaryDirectory() as folder, namespace() as prefix:
        key = str(Path(folder) / "key")
        program = [sys.executable, "-m", "api"]
        subprocess.run([*program, "cluster-key", key], check=True, stdout=subprocess.DEVNULL)
        port = str(free_port())
        if has_engine:
            place = ["-dp", "2", "--data-parallel-address", HERE, "--data-parallel-rpc-port", port]
            own, role = ["--data-parallel-size-local", "1"], ["--headless", "--data-parallel-start-rank", "1"]
        else:
            place, own = ["--nnodes", "2", share, "2", "--master-addr", HERE, "--master-port", port], []
            role = ["--node-rank", "1"]
        place += ["--cluster-key", key]
        loop = 'until "$@"; do sleep 0.2; done'
        agent = [*program, "serve", *arguments, *place, *role]
        processes = Server([*prefix, "bash", "-c", loop, "bash", *agent])
        try:
            yield [*place, *own], processes
        finally:
            processes.stop()


@contextmanager
def node_of_ray(*, has_engine: bool = False, share: str = "-pp") -> Iterator[tuple[list[str], Server]]:
    """Runs a Ray cluster of two nodes, one in a namespace, which is started again whenever it ends.

    Args:
        has_engine: See ``other_machine``.
        share: Likewise.

    Yields:
        Arguments of a server on the first node, and the processes of the other node.
    """
    if has_engine:
        place = ["-dp", "2", "--data-parallel-size-local", "1", "--data-parallel-backend", "ray"]
    else:
        place = [share, "2", "--nnodes", "2", "--distributed-executor-backend", "ray"]
    program = str(Path(sys.executable).parent / "ray")
    small = ["--include-dashboard=false", "--object-store-memory=80000000", "--disable-usage-stats"]
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder, namespace() as prefix:
        port = free_port()
        environment = {
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": os.urandom(32).hex(),
            "RAY_SCHEDULER_EVENTS": "0",
        }
        os.environ.update(environment)
        head = ["--head", f"--node-ip-address={HERE}", f"--port={port}", "--num-cpus=0", f"--temp-dir={folder}", *small]
        first = Server([program, "start", "--block", *head])
        try:
            join = ["start", "--block", f"--address={HERE}:{port}", f"--node-ip-address={THERE}", "--num-cpus=1"]
            loop = 'while true; do "$@"; sleep 0.2; done'
            second = Server([*prefix, "bash", "-c", loop, "bash", program, *join, "--object-store-memory=80000000"])
            try:
                yield [*place, "--ray-address", f"{HERE}:{port}"], second
            finally:
                second.stop()
        finally:
            first.stop()
