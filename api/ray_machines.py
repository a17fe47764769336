"""Machines that Ray provides: agents start there by themselves, with this server's configuration."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from msgspec.structs import replace

from api.config import ServerConfig
from api.errors import EngineDeadError
from engine_core.launch import AgentLaunch, HeldKey, ModelError, RayMachines, RayPlacement
from engine_core.messages import EXIT_MODEL


@contextmanager
def with_machines(config: ServerConfig) -> Iterator[ServerConfig]:
    """The configuration once there are agents on the machines that it asks Ray for, which end afterwards.

    Without ``--distributed-executor-backend ray`` or ``--data-parallel-backend ray``, it is as given.

    Raises:
        EngineDeadError: Ray is not installed, there is no cluster, or it has too few machines.
    """
    executor = config.engine.executor
    if executor.distributed_executor_backend != "ray" and config.data_parallel_backend != "ray":
        yield config
        return
    parallel = executor.parallel
    own = None if parallel.cluster_key else HeldKey()
    machines = RayMachines(_placement(config, b"" if own is None else own.secret))
    try:
        try:
            address = machines.start()
        except ModelError as error:
            raise EngineDeadError(str(error), EXIT_MODEL) from None
        yield of_machine(config, None, _address(config) or address, parallel.cluster_key if own is None else own.path)
    finally:
        machines.close()
        if own is not None:
            own.close()


def _has_engines(config: ServerConfig) -> bool:
    """Whether the machines have whole engines, not stages of one."""
    return config.data_parallel_backend == "ray"


def _address(config: ServerConfig) -> str:
    """The address at which other machines join, as it is given."""
    return config.data_parallel_address if _has_engines(config) else config.engine.executor.parallel.master_addr


def _placement(config: ServerConfig, secret: bytes) -> RayPlacement:
    executor = config.engine.executor
    num_cpus = executor.device.num_threads or 1
    if _has_engines(config):
        option, each = "--data-parallel-backend ray", max(1, config.num_local_replicas)
        ranks = range(config.num_local_replicas, config.data_parallel_size, each)
        num_cpus *= each
        num_gpus = each * executor.parallel.world_size
    else:
        option, ranks = "--distributed-executor-backend ray", range(1, executor.parallel.nnodes)
        num_gpus = executor.parallel.most_local_workers
    encoded = msgspec.msgpack.encode(replace(config, api_key=[], admin_api_key=[]))  # agents serve no API
    launches = [
        AgentLaunch(
            config=encoded,
            node_rank=rank,
            master_addr=_address(config),
            title=f"the machine of engine {rank}" if _has_engines(config) else f"machine {rank}",
            folder=os.getcwd(),
            secret=secret,
        )
        for rank in ranks
    ]
    return RayPlacement(
        option=option,
        address=executor.parallel.ray_address,
        nnodes=1 + len(launches),
        num_cpus=num_cpus,
        num_gpus=0 if executor.device.device == "cpu" else num_gpus,
        agents=tuple(launches),
        log_level=config.log_level,
    )


def of_machine(config: ServerConfig, node_rank: int | None, master_addr: str, cluster_key: str) -> ServerConfig:
    """The configuration of one of the machines that Ray has provided: from here on they are as others.

    Args:
        config: The server's.
        node_rank: Which of the machines: its rank, or the number of its first engine. None: the server's own.
        master_addr: Address of machine 0.
        cluster_key: Path of the key there.
    """
    executor = config.engine.executor
    parallel = replace(executor.parallel, cluster_key=cluster_key)
    if node_rank is not None:
        parallel = replace(parallel, node_address=os.environ.get("VLLM_HOST_IP", ""))
    if _has_engines(config):
        config = _with_engines(config, node_rank, master_addr)
    else:
        parallel = replace(parallel, node_rank=node_rank or 0, master_addr=master_addr)
        executor = replace(executor, distributed_executor_backend="mp")
    return replace(config, engine=replace(config.engine, executor=replace(executor, parallel=parallel)))


def _with_engines(config: ServerConfig, first: int | None, address: str) -> ServerConfig:
    """The options of a machine with engines from ``first`` on; None: the server's own."""
    local = config.num_local_replicas
    config = replace(config, data_parallel_backend="mp", data_parallel_address=address, data_parallel_size_local=local)
    if first is None:
        return config
    count = min(max(1, local), config.data_parallel_size - first)
    return replace(config, headless=True, data_parallel_start_rank=first, data_parallel_size_local=count)
