"""The process that has Ray place agents on machines, and place them again when they end.

A placement group has a bundle for this machine and one for each agent, all on different nodes of Ray. Ray does no more:
messages between machines are those of ``messages.py``, on connections of our own. If this process ends, so do the
actors, and with them the agents.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from executor.base import ModelError
from executor.log import get_logger, printable, setup_logging
from executor.nodes.ray_agent import AgentActor
from executor.nodes.ray_messages import AgentLaunch, RayPlacement, RayReport
from executor.process import become_child, read_descriptors, read_payload

logger = get_logger()

PLACE_TIMEOUT = 300.0
"""Seconds in which there must be machines and places for all agents; clusters that grow by themselves take minutes."""
REMINDER = 5.0
"""Seconds between lines that say what is waited for."""
TURN = 1.0
"""Seconds after which the loop looks at its clock."""
SHORT_TURN = 0.2
"""The same while no agent runs."""
MAX_DELAY = 30.0
"""Most seconds before an agent that keeps ending is started again."""
STEADY = 60.0
"""Seconds after which an agent that ended was in order."""
_OWN_SHARE = 0.001
"""Of the resource by which Ray names a node: it is there to be found, not to be used up."""


@dataclass
class Seat:
    """An agent's place."""

    launch: AgentLaunch
    bundle: int
    actor: Any = None
    started_at: float = 0.0
    start_at: float = 0.0
    """When to start it again."""
    delay: float = 0.0


class AgentKeeper:
    """Places agents through Ray, and keeps them running."""

    def __init__(self, ray: Any, placement: RayPlacement, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            ray: The module.
            placement: What to place.
            clock: Monotonic clock in seconds.
        """
        self._ray = ray
        self._placement = placement
        self._clock = clock
        self._group: Any = None
        self._running: dict[Any, Seat] = {}
        """By Ray's reference to the exit code."""
        self._waiting: list[Seat] = []
        self._cluster = ""
        self._num_gpus = 0
        """That each agent takes."""
        self.address = ""
        """This machine's."""

    def connect(self) -> None:
        """Joins the cluster.

        Raises:
            ModelError: There is none.
        """
        given = self._placement.address
        try:
            self._ray.init(given or "auto", log_to_driver=True, logging_level="warning", namespace="octavo")
        except (self._ray.exceptions.RayError, RuntimeError, ValueError, OSError, AssertionError) as error:
            where = f"--ray-address {given}" if given else self._placement.option
            raise ModelError(
                f"{where}: cannot join a Ray cluster ({_first_line(error)}); ray start --head begins one here"
            ) from None
        context = self._ray.get_runtime_context()
        own = context.get_node_id()
        self.address = next(str(each["NodeManagerAddress"]) for each in self._ray.nodes() if each["NodeID"] == own)
        self._cluster = str(context.gcs_address)

    def place(self) -> None:
        """Waits for machines, and for places on them.

        Raises:
            ModelError: There are not enough within ``PLACE_TIMEOUT``.
        """
        begin = reminded_at = self._clock()
        num_agents = len(self._placement.agents)
        while True:
            missing = self._placement.nnodes - self._count_machines()
            if missing <= 0 and self._group is None:
                own = {f"node:{self.address}": _OWN_SHARE}
                self._find_gpus()
                bundles = [own, *(self._share() for _ in range(num_agents))]
                self._group = self._ray.util.placement_group(bundles, strategy="STRICT_SPREAD")
            if self._group is None:
                time.sleep(TURN)
            elif self._group.wait(TURN):
                break
            reason = self._too_few(missing)
            if (now := self._clock()) - begin >= PLACE_TIMEOUT:
                raise ModelError(f"{self._placement.option}: {reason}")
            if now - reminded_at >= REMINDER or reminded_at == begin:
                reminded_at = now
                logger.info("waiting for machines: %s", reason)
        logger.info("Ray has placed %d machines beside this one, %s", num_agents, self.address)
        for index, launch in enumerate(self._placement.agents, 1):
            master = launch.master_addr or self.address
            self._start(Seat(msgspec.structs.replace(launch, master_addr=master), index))

    def _find_gpus(self) -> None:
        """Finds out whether agents take GPUs."""
        has_any = self._ray.cluster_resources().get("GPU", 0) > 0
        self._num_gpus = self._placement.num_gpus if has_any else 0

    def _share(self) -> dict[str, int]:
        """What an agent takes of a machine, in Ray's words."""
        share = {"CPU": self._placement.num_cpus}
        return {**share, "GPU": self._num_gpus} if self._num_gpus else share

    def _count_machines(self) -> int:
        return sum(bool(node["Alive"]) for node in self._ray.nodes())

    def _too_few(self, missing: int) -> str:
        if missing > 0:
            has = self._placement.nnodes - missing
            return (
                f"the Ray cluster has {has} of {self._placement.nnodes} machines; ray start "
                f"--address={self._cluster} on another adds it"
            )
        takes = f"{self._placement.num_cpus} of its CPUs"
        takes += f" and {self._num_gpus} of its GPUs" if self._num_gpus else ""
        return (
            f"Ray has no room for {len(self._placement.agents)} agents on machines other than this one, each with "
            f"{takes}; ray status shows what is taken"
        )

    def _start(self, seat: Seat) -> None:
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=seat.bundle
        )
        actor = self._ray.remote(AgentActor).options(
            scheduling_strategy=strategy, num_cpus=self._placement.num_cpus, num_gpus=self._num_gpus, max_restarts=0
        )
        seat.actor = actor.remote()
        seat.started_at = self._clock()
        self._running[seat.actor.run.remote(msgspec.msgpack.encode(seat.launch))] = seat

    def turn(self) -> None:
        """Waits a moment for agents that end, and starts again those that have."""
        if self._running:
            ended, _ = self._ray.wait(list(self._running), timeout=TURN)
        else:
            ended = []
            time.sleep(SHORT_TURN)
        for reference in ended:
            self._ended(reference, self._running.pop(reference))
        due = [seat for seat in self._waiting if self._clock() >= seat.start_at]
        self._waiting = [seat for seat in self._waiting if seat not in due]
        for seat in due:
            self._start(seat)

    def _ended(self, reference: Any, seat: Seat) -> None:
        try:
            reason = f"its agent ended with exit code {int(self._ray.get(reference))}"
        except self._ray.exceptions.RayError as error:
            reason = _first_line(error)
        self._ray.kill(seat.actor)
        now = self._clock()
        lasted = now - seat.started_at >= STEADY
        seat.delay = 0.0 if lasted else min(max(1.0, 2 * seat.delay), MAX_DELAY)
        seat.start_at = now + seat.delay
        self._waiting.append(seat)
        logger.warning("%s: %s; Ray starts another in %.0f s", seat.launch.title, reason, seat.delay)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return printable(" ".join(lines[0].split())) if lines else type(error).__name__


def load_ray(option: str) -> Any:
    """The package, with all that is used of it.

    Args:
        option: Who needs it, for the error.

    Raises:
        ModelError: It is not installed.
    """
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.util.scheduling_strategies")
    except ImportError:
        raise ModelError(f"{option}: Ray is not installed; pip install 'octavo[ray]' on all machines") from None
    return ray


def _warn_of_strangers(placement: RayPlacement) -> None:
    """Says, after Ray has settled its environment, who could read what passes through it."""
    if any(launch.secret for launch in placement.agents) and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        logger.warning(
            "this Ray cluster has no token authentication (RAY_AUTH_MODE=token): whoever reaches its ports can run "
            "programs on its machines, and read the cluster key"
        )


def main() -> int:
    """Runs until the parent ends. Returns the exit code."""
    become_child("octavo ray")
    try:
        placement = msgspec.msgpack.decode(read_payload(), type=RayPlacement)
    except EOFError:
        return 0
    (reports,) = read_descriptors()
    setup_logging("ray", placement.log_level)
    os.chdir("/")  # Ray has its workers import from the current folder
    report = RayReport(error="Ray's driver has failed; the log above says how")
    try:
        keeper = AgentKeeper(load_ray(placement.option), placement)
        keeper.connect()
        _warn_of_strangers(placement)
        keeper.place()
        report = RayReport(address=keeper.address)
    except ModelError as error:
        report = RayReport(error=str(error))
    finally:
        with os.fdopen(reports, "wb") as pipe:
            pipe.write(msgspec.msgpack.encode(report))
    while not report.error:
        keeper.turn()
    return 1


if __name__ == "__main__":
    sys.exit(main())
