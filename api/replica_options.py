"""Several engines: which options go together, and which machines they need."""

from __future__ import annotations

from typing import Protocol

from api.flags import ConfigError
from api.machines import check_ray_address, is_wildcard
from engine_core.config import EngineConfig


class ReplicaOptions(Protocol):
    """The options; see ``ServerConfig``."""

    @property
    def data_parallel_size(self) -> int: ...
    @property
    def data_parallel_size_local(self) -> int | None: ...
    @property
    def data_parallel_address(self) -> str: ...
    @property
    def data_parallel_start_rank(self) -> int | None: ...
    @property
    def data_parallel_rank(self) -> int | None: ...
    @property
    def data_parallel_backend(self) -> str: ...
    @property
    def data_parallel_external_lb(self) -> bool: ...
    @property
    def data_parallel_hybrid_lb(self) -> bool: ...
    @property
    def headless(self) -> bool: ...
    @property
    def num_local_replicas(self) -> int: ...
    @property
    def engine(self) -> EngineConfig: ...


def check_replicas(config: ReplicaOptions) -> None:
    """Checks the options of several engines.

    Raises:
        ConfigError: They conflict with others, or one is missing.
    """
    size, local, rank = config.data_parallel_size, config.data_parallel_size_local, config.data_parallel_rank
    _check_start_rank(config)
    if rank is not None and rank >= size:
        raise ConfigError(f"--data-parallel-rank {rank}: must be less than --data-parallel-size, which is {size}")
    if local is not None and local > size:
        raise ConfigError(f"--data-parallel-size-local {local}: must not exceed --data-parallel-size, which is {size}")
    if local == 0 and (rank is not None or size == 1):
        raise ConfigError(
            "--data-parallel-size-local 0: needs --data-parallel-size, whose engines run on other machines, without "
            "--data-parallel-rank"
        )
    if size > 1 and config.engine.executor.parallel.enable_expert_parallel:
        raise ConfigError(
            f"--enable-expert-parallel: the engines of --data-parallel-size {size} do not share experts; use "
            "--tensor-parallel-size instead, or omit it"
        )
    if config.data_parallel_backend == "ray":
        _check_ray(config)
    if rank is not None:
        return
    if config.data_parallel_external_lb:
        raise ConfigError("--data-parallel-external-lb needs --data-parallel-rank: each server runs one engine")
    if not config.data_parallel_hybrid_lb and (config.headless or config.num_local_replicas < size):
        _check_replica_machines(config)


def _check_start_rank(config: ReplicaOptions) -> None:
    """Checks which engines are on this machine, if it does not have the first ones."""
    first, rank = config.data_parallel_start_rank, config.data_parallel_rank
    if config.data_parallel_hybrid_lb:
        if config.headless or rank is not None:
            other = "--headless" if config.headless else f"--data-parallel-rank {rank}"
            raise ConfigError(f"--data-parallel-hybrid-lb: each machine serves its own engines; omit {other}")
        if not config.data_parallel_size_local:
            raise ConfigError("--data-parallel-hybrid-lb needs --data-parallel-size-local: engines of each machine")
    elif not config.headless:
        if first:
            raise ConfigError(
                f"--data-parallel-start-rank {first}: needs --headless or --data-parallel-hybrid-lb; the server's own "
                "engines begin at 0"
            )
        return
    elif config.engine.executor.parallel.nnodes > 1:
        if config.engine.executor.parallel.node_rank == 0:
            raise ConfigError("--headless: machine 0 serves the API; it is implied on all others")
        return
    elif config.data_parallel_size == 1 or rank is not None:
        raise ConfigError("--headless needs --data-parallel-size, of which this machine runs some, or --nnodes")
    elif first is None:
        raise ConfigError("--headless needs --data-parallel-start-rank: number of the first engine on this machine")
    last = (first or 0) + config.num_local_replicas
    if not config.num_local_replicas or last > config.data_parallel_size:
        raise ConfigError(
            f"--data-parallel-start-rank {first or 0} --data-parallel-size-local {config.num_local_replicas}: engines "
            f"are numbered from 0 to {config.data_parallel_size - 1}"
        )


def _check_ray(config: ReplicaOptions) -> None:
    """Checks the options of engines on machines that Ray provides."""
    others = {
        "--data-parallel-rank": config.data_parallel_rank is not None,
        "--data-parallel-hybrid-lb": config.data_parallel_hybrid_lb,
        "--headless": config.headless,
    }
    for flag, is_given in others.items():
        if is_given:
            raise ConfigError(f"{flag}: with --data-parallel-backend ray, one server is started; omit it")
    if config.num_local_replicas == config.data_parallel_size:
        raise ConfigError(
            "--data-parallel-backend ray: Ray provides machines for engines that are not on this one; add "
            "--data-parallel-size with more than --data-parallel-size-local, or use mp"
        )
    check_ray_address(config.engine.executor.parallel.ray_address)


def _check_replica_machines(config: ReplicaOptions) -> None:
    """Checks the options of engines on several machines."""
    parallel = config.engine.executor.parallel
    if config.engine.executor.distributed_executor_backend != "mp":
        raise ConfigError(
            "engines on other machines have workers in processes; use --distributed-executor-backend mp, or omit "
            "--data-parallel-size-local"
        )
    if config.engine.executor.lora.enable_lora:
        raise ConfigError(
            "--enable-lora: adapters are files of one machine; engines on others cannot load them; omit it"
        )
    has_ray = config.data_parallel_backend == "ray"  # which knows the address, and hands out a key
    if is_wildcard(config.data_parallel_address) or not (config.data_parallel_address or has_ray):
        raise ConfigError(
            "engines on other machines need --data-parallel-address: the address of the machine that serves the API, "
            "as the others reach it. To serve each engine by itself, behind a load balancer, use --data-parallel-rank"
        )
    if not (parallel.cluster_key or has_ray):
        raise ConfigError(
            "engines on other machines need --cluster-key FILE, the same file on all machines; octavo cluster-key FILE "
            "makes one"
        )
