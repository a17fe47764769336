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

    Without ``--distributed-executor-backend ray``, it is as given.

    Raises:
        EngineDeadError: Ray is not installed, there is no cluster, or it has too few machines.
    """
    executor = config.engine.executor
    if executor.distributed_executor_backend != "ray":
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
        yield of_machine(config, 0, parallel.master_addr or address, parallel.cluster_key if own is None else own.path)
    finally:
        machines.close()
        if own is not None:
            own.close()


def _placement(config: ServerConfig, secret: bytes) -> RayPlacement:
    executor = config.engine.executor
    nnodes = executor.parallel.nnodes
    encoded = msgspec.msgpack.encode(replace(config, api_key=[], admin_api_key=[]))  # agents serve no API
    launches = [
        AgentLaunch(
            config=encoded,
            node_rank=rank,
            master_addr=executor.parallel.master_addr,
            folder=os.getcwd(),
            secret=secret,
        )
        for rank in range(1, nnodes)
    ]
    return RayPlacement(
        address=executor.parallel.ray_address,
        nnodes=nnodes,
        num_cpus=executor.device.num_threads or 1,
        agents=tuple(launches),
        log_level=config.log_level,
    )


def of_machine(config: ServerConfig, node_rank: int, master_addr: str, cluster_key: str) -> ServerConfig:
    """The configuration of one of the machines that Ray has provided: from here on they are as others.

    Args:
        config: The server's.
        node_rank: Which of the machines.
        master_addr: Address of machine 0.
        cluster_key: Path of the key there.
    """
    executor = config.engine.executor
    parallel = replace(executor.parallel, node_rank=node_rank, master_addr=master_addr, cluster_key=cluster_key)
    if node_rank:
        parallel = replace(parallel, node_address=os.environ.get("VLLM_HOST_IP", ""))
    executor = replace(executor, parallel=parallel, distributed_executor_backend="mp")
    return replace(config, engine=replace(config.engine, executor=executor))
