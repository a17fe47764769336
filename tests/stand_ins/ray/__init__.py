"""Stands for the package ray: all nodes are this machine, and actors are threads. Of its interface what we use."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from . import exceptions, util

__all__ = ["exceptions", "util"]

num_nodes = int(os.environ.get("STAND_IN_NODES", "2"))
num_gpus = 0
actors: list[_Actor] = []
"""All that were ever created."""


def init(address: str, **options: Any) -> None:
    if address == "192.0.2.1:6379":
        raise ConnectionError(f"Failed to connect to Ray cluster at {address}\nmore about it")
    assert options == {"log_to_driver": True, "logging_level": "warning", "namespace": "octavo"}


def nodes() -> list[dict[str, Any]]:
    alive = [{"Alive": True, "NodeID": str(i), "NodeManagerAddress": f"127.0.0.{i}"} for i in range(1, 1 + num_nodes)]
    return [{**alive[0], "Alive": False, "NodeID": "9"}, *alive]


def cluster_resources() -> dict[str, float]:
    return {"CPU": 8.0 * num_nodes, **({"GPU": float(num_gpus)} if num_gpus else {})}


def get_runtime_context() -> Any:
    return SimpleNamespace(gcs_address="127.0.0.1:6379", get_node_id=lambda: "1")


class _Method:
    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def remote(self, *arguments: Any) -> concurrent.futures.Future[Any]:
        result: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def work() -> None:
            try:
                result.set_result(self._run(*arguments))
            except Exception as error:
                result.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return result


class _Actor:
    def __init__(self, target: Any, options: dict[str, Any]) -> None:
        self.options = options
        self.is_killed = False
        self.run = _Method(target.run)


class _ActorClass:
    def __init__(self, kind: Callable[[], Any]) -> None:
        self._kind = kind
        self._options: dict[str, Any] = {}

    def options(self, **options: Any) -> _ActorClass:
        self._options = options
        return self

    def remote(self) -> _Actor:
        actors.append(_Actor(self._kind(), self._options))
        return actors[-1]


def remote(kind: Callable[[], Any]) -> _ActorClass:
    return _ActorClass(kind)


def wait(references: Sequence[Any], timeout: float) -> tuple[list[Any], list[Any]]:
    done, rest = concurrent.futures.wait(references, timeout, concurrent.futures.FIRST_COMPLETED)
    return list(done), list(rest)


def get(reference: concurrent.futures.Future[Any]) -> Any:
    return reference.result()


def kill(actor: _Actor) -> None:
    actor.is_killed = True
