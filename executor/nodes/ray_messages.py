"""Messages between the server and the processes that Ray is involved with. Imports little: the api needs them early."""

from __future__ import annotations

from executor.config import Config


class AgentLaunch(Config, frozen=True):
    """The start message of an agent that another program, such as Ray, starts."""

    config: bytes
    """The server's whole configuration, which the agent's module knows how to read."""
    node_rank: int
    """The machine's rank; of one with engines, the number of its first."""
    master_addr: str
    """Address of machine 0."""
    title: str
    """What the log calls the machine."""
    folder: str
    """Current folder of the server: relative paths mean the same files, if it exists on the machine."""
    secret: bytes = b""
    """The cluster's; empty: the machine has a key file of its own."""


class RayPlacement(Config, frozen=True):
    """The start message of the process that has Ray place agents."""

    option: str
    """The option that asks for it, in errors."""
    address: str
    """Of the Ray cluster; empty: that of this machine, or of ``RAY_ADDRESS``."""
    nnodes: int
    """Machines, with this one."""
    num_cpus: int
    """Ray's CPUs that an agent takes."""
    num_gpus: int
    """Ray's GPUs that an agent takes, if the cluster has any; otherwise it hides those of the machine."""
    agents: tuple[AgentLaunch, ...]
    """Of the other machines; an empty ``master_addr`` stands for this machine's address in Ray."""
    log_level: str = "info"


class RayReport(Config, frozen=True):
    """That process says, once, what came of it."""

    address: str = ""
    """This machine's, as the others reach it, once all agents have their places."""
    error: str = ""
    """In one line, if they have none."""
