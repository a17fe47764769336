"""Several machines: where a process is among them, and what they cannot do."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Mapping
from typing import Any

from msgspec.structs import replace

from api.flags import ConfigError
from engine_core.config import EngineConfig, ParallelConfig

LAUNCHERS = {
    "LeaderWorkerSet": {
        "nnodes": "LWS_GROUP_SIZE",
        "node_rank": "LWS_WORKER_INDEX",
        "master_addr": "LWS_LEADER_ADDRESS",
    },
    "Slurm": {"nnodes": "SLURM_NNODES", "node_rank": "SLURM_NODEID", "master_addr": "SLURM_JOB_NODELIST"},
    "torchrun": {"nnodes": "GROUP_WORLD_SIZE", "node_rank": "GROUP_RANK", "master_addr": "MASTER_ADDR"},
}
"""Names of options and of variables, by who sets these."""
PLACE = ("nnodes", "node_rank", "master_addr")
"""Options that ``place_from`` may give."""
PROCESSES = ("mp", "ray")
"""Backends whose workers are processes."""


def is_wildcard(address: str) -> bool:
    """Whether it means all addresses of a machine, in any spelling: ``0.0.0.0``, ``0``, ``[::]``. Names are not looked
    up."""
    host = address.strip("[]")
    if host == "*":
        return True
    try:
        found = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST) if host else []
    except OSError:
        return False
    return any(ipaddress.ip_address(str(each[4][0])).is_unspecified for each in found)


def first_host(names: str) -> str:
    """The first of the hosts in Slurm's notation: ``node[07-09,12],head`` -> ``node07``."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", names)
    assert match is not None
    return "".join(part or "" for part in match.groups())


def place_from(environment: Mapping[str, str], given: Iterable[str]) -> dict[str, Any]:
    """Options that say which of the machines this is, as the program says that has started it.

    Args:
        environment: ``os.environ``.
        given: Names of the options that are given otherwise.

    Raises:
        ConfigError: A variable is no number.
    """
    for variables in LAUNCHERS.values():
        if not all(environment.get(variable) for variable in variables.values()):
            continue
        result: dict[str, Any] = {}
        for option, variable in variables.items():
            value = environment[variable]
            if option in given:
                continue
            if option == "master_addr":
                result[option] = first_host(value) if variable == "SLURM_JOB_NODELIST" else value
            elif value.isdecimal():
                result[option] = int(value)
            else:
                raise ConfigError(f"{variable}: expected a number, got {value!r}")
        return result
    return {}


def with_rays_machines(engine: EngineConfig) -> EngineConfig:
    """The configuration with as many machines as Ray has to provide: one for each pipeline stage, if it does not say.

    Raises:
        ConfigError: That is one.
    """
    executor = engine.executor
    parallel = executor.parallel
    if executor.distributed_executor_backend != "ray" or parallel.nnodes > 1:
        return engine
    if parallel.pipeline_parallel_size == 1:
        raise ConfigError(
            "--distributed-executor-backend ray: Ray provides machines for pipeline stages; add "
            "--pipeline-parallel-size with the number of machines, --nnodes to divide layers among so many with "
            "--tensor-parallel-size, or use mp on one"
        )
    parallel = replace(parallel, nnodes=parallel.pipeline_parallel_size)
    return replace(engine, executor=replace(executor, parallel=parallel))


def _check_ray(parallel: ParallelConfig) -> None:
    if parallel.node_rank:
        raise ConfigError(
            f"--node-rank {parallel.node_rank}: with --distributed-executor-backend ray, machine 0 alone is started; "
            "ray start makes others available"
        )
    check_ray_address(parallel.ray_address)


def check_ray_address(address: str) -> None:
    """Checks ``--ray-address``.

    Raises:
        ConfigError: It is for clients outside of the cluster.
    """
    if address.startswith("ray://"):
        raise ConfigError(
            f"--ray-address {address}: the server runs on a machine of the cluster; give the address of ray start, "
            "such as 10.0.0.1:6379, without ray://"
        )


def _check_shares(parallel: ParallelConfig) -> None:
    """Checks that each machine has a share of the model."""
    nnodes, num_stages = parallel.nnodes, parallel.pipeline_parallel_size
    if nnodes <= num_stages:
        return
    if nnodes % num_stages:
        raise ConfigError(
            f"--nnodes {nnodes}: {num_stages} pipeline stages cannot have the same number of machines; use "
            f"--pipeline-parallel-size {nnodes}, or a divisor of it"
        )
    if parallel.tensor_parallel_size < nnodes // num_stages:
        raise ConfigError(
            f"--nnodes {nnodes}: machines divide a model by pipeline stages, or layers among their workers; use "
            f"--pipeline-parallel-size {nnodes} or more, or --tensor-parallel-size {nnodes // num_stages} or more"
        )


def check_machines(engine: EngineConfig, num_replicas: int, replica_backend: str) -> None:
    """Checks the options of several machines.

    Args:
        engine: The engine's configuration.
        num_replicas: ``--data-parallel-size``.
        replica_backend: ``--data-parallel-backend``.

    Raises:
        ConfigError: They conflict with others, or one is missing.
    """
    parallel = engine.executor.parallel
    nnodes, rank = parallel.nnodes, parallel.node_rank
    backend = engine.executor.distributed_executor_backend
    if parallel.ray_address and "ray" not in (backend, replica_backend):
        raise ConfigError(
            f"--ray-address {parallel.ray_address}: needs --distributed-executor-backend ray or "
            "--data-parallel-backend ray"
        )
    if parallel.private_interface and nnodes == 1:
        raise ConfigError(
            f"--private-interface {parallel.private_interface}: connects the workers of several machines; it needs "
            "--nnodes"
        )
    if nnodes == 1:
        if rank:
            raise ConfigError(f"--node-rank {rank}: needs --nnodes, the number of machines")
        return
    if backend == "ray":
        _check_ray(parallel)
    elif not parallel.cluster_key:
        raise ConfigError(
            f"--nnodes {nnodes} needs --cluster-key FILE, the same file on all machines; octavo cluster-key FILE makes "
            "one"
        )
    if is_wildcard(parallel.master_addr) or not (parallel.master_addr or backend == "ray"):
        raise ConfigError(
            f"--nnodes {nnodes} needs --master-addr: the address of machine 0 at which the others reach it"
        )
    if is_wildcard(parallel.node_address):
        raise ConfigError(f"--node-address {parallel.node_address}: must be one address of this machine")
    if rank >= nnodes:
        raise ConfigError(f"--node-rank {rank}: must be less than --nnodes, which is {nnodes}")
    if backend not in PROCESSES:
        raise ConfigError(f"--nnodes {nnodes}: workers are processes; use --distributed-executor-backend mp")
    _check_shares(parallel)
    if num_replicas > 1:
        raise ConfigError(
            f"--nnodes {nnodes}: with several engines, each has one machine; omit --nnodes and add machines with "
            "--data-parallel-address and --headless, start a server for each with --data-parallel-rank, or omit "
            "--data-parallel-size"
        )
    if engine.cache.kv_cache_dir:
        raise ConfigError(f"--nnodes {nnodes}: --kv-cache-dir keeps the KV cache of one machine; omit it")
