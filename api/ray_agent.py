"""The agent of a machine that Ray provides: the process that an actor starts (``executor/nodes/ray_agent.py``).

It does what ``octavo serve --node-rank`` does, with the configuration of the server instead of a command line.
"""

from __future__ import annotations

import contextlib
import os
import sys

import msgspec

from api.cli import run_machine
from api.config import ServerConfig
from api.ray_machines import of_machine
from engine_core.launch import AgentLaunch, HeldKey, become_child, read_payload


def main() -> int:
    """Runs the agent. Returns the exit code."""
    become_child("octavo machine")
    try:
        launch = msgspec.msgpack.decode(read_payload(), type=AgentLaunch)
    except EOFError:
        return 0
    config = msgspec.msgpack.decode(launch.config, type=ServerConfig)
    with contextlib.suppress(OSError):
        os.chdir(launch.folder)
    key = config.engine.executor.parallel.cluster_key
    if launch.secret:
        key = HeldKey(launch.secret).path
    return run_machine(of_machine(config, launch.node_rank, launch.master_addr, key))


if __name__ == "__main__":
    sys.exit(main())
