"""The protocol between the leader, machine 0, and the agents of the other machines. Needs no torch.

An agent says ``NodeHello`` until it is told ``NodeWelcome``. To start workers, the leader has all agents open sockets
(``PrepareNode``), then start their ranks (``LaunchNode``). From then on they pass the messages of engine core and
workers on, unread.
"""

from __future__ import annotations

from executor.config import ExecutorConfig
from executor.messages import Message

PING_INTERVAL = 1.0
"""Seconds between signs of life, both ways."""
NODE_TIMEOUT = 8.0
"""Seconds without one after which a machine counts as lost."""


class NodeHello(Message, frozen=True):
    """An agent asks to join."""

    node_rank: int
    """The machine's rank."""
    nnodes: int
    """Machines, as its command line says."""
    code: str
    """Digest of the program; see ``identity.py``."""
    model: str
    """Digest of the model's files."""
    address: str
    """At which others reach it."""
    host: str
    """Name of the machine."""
    number: int
    """Counts the agent's attempts to join; it repeats the message until there is an answer."""
    session: str = ""
    """That of the last welcome: the workers' memory is still there. Empty: there was none."""
    num_engines: int = 0
    """Engines that the machine runs, from number ``node_rank`` on, out of ``nnodes``. 0: it runs workers."""


class NodeWelcome(Message, frozen=True):
    """The agent has joined."""

    session: str
    """Identifies the leader's process."""


class NodeRefused(Message, frozen=True):
    """The agent cannot join."""

    reason: str
    """In one line."""
    is_final: bool = True
    """False: it may later."""


class NodeUnknown(Message, frozen=True):
    """The leader, which is new, does not know the agent: it should say hello."""


class PrepareNode(Message, frozen=True):
    """Open sockets for the ranks of this machine. Workers that are still there end."""

    life: str
    """Of the workers; returned in answers, so that late ones are recognised."""
    config: ExecutorConfig
    """Of the workers. Paths of the model are those of the leader's machine."""


class NodePrepared(Message, frozen=True):
    """The sockets are open."""

    life: str
    """That of the request."""
    endpoints: dict[str, str]
    """By the name of the event that messages cause (``hidden_event``)."""


class LaunchNode(Message, frozen=True):
    """Start the ranks of this machine."""

    life: str
    """That of the request before."""
    addresses: tuple[str, ...]
    """Of all machines, by rank."""
    endpoints: dict[str, str]
    """Of all ranks."""


class NodeLaunched(Message, frozen=True):
    """The ranks of the machine have been started."""

    life: str
    """Of the workers."""
    pids: tuple[int, ...]
    """By rank."""


class KillNode(Message, frozen=True):
    """End the workers at once."""

    forgets_memory: bool = False
    """Give the memory of KV caches back as well."""


class NodeGoodbye(Message, frozen=True):
    """The leader ends: so should the agent."""


class NodePing(Message, frozen=True):
    """The leader lives."""


class ToRanks(Message, frozen=True):
    """A message of the engine core to each worker of the machine."""

    life: str
    """Of the workers."""
    frame: bytes
    """The message."""


class FromRank(Message, frozen=True):
    """A message of a worker to the engine core."""

    life: str
    """Of the workers."""
    frame: bytes
    """The message."""


class NodeStatus(Message, frozen=True):
    """The agent lives."""

    life: str = ""
    """Of the workers; empty: there are none."""
    states: tuple[str, ...] = ()
    """State of each worker's process, by rank; empty: it is gone."""
    seconds: tuple[float, ...] = ()
    """CPU time of each."""


class WorkerLost(Message, frozen=True):
    """A worker has died. The machine's others have ended as well."""

    life: str
    """Of the workers."""
    reason: str
    """In one line."""
    exit_code: int | None = None
    """See ``WorkerDiedError``."""


class LaunchEngine(Message, frozen=True):
    """Start an engine core."""

    life: str
    """Of the engine core."""
    engine: int
    """Which of the engines."""
    launch: bytes
    """Its start message, but for what the agent knows: addresses, folders and files of its machine."""


class KillEngine(Message, frozen=True):
    """End an engine core at once."""

    life: str
    """That one."""


class ToEngine(Message, frozen=True):
    """A message to an engine core."""

    life: str
    """That one."""
    frame: bytes
    """The message."""


class FromEngine(Message, frozen=True):
    """A message of an engine core."""

    life: str
    """Of the engine core."""
    frame: bytes
    """The message."""


class EngineEnded(Message, frozen=True):
    """An engine core has ended; all its messages have been passed on."""

    life: str
    """Of the engine core."""
    exit_code: int
    """Negative for a signal."""
    record: bytes = b""
    """Its flight record."""


class EngineStatus(Message, frozen=True):
    """The agent lives."""

    life: str = ""
    """Not used: the message concerns all engine cores of the machine."""
    states: dict[str, tuple[str, float]] = {}
    """By life: the state of the engine core's process, and its CPU time."""


ToAgent = (
    NodeWelcome
    | NodeRefused
    | NodeUnknown
    | NodeGoodbye
    | NodePing
    | PrepareNode
    | LaunchNode
    | KillNode
    | ToRanks
    | LaunchEngine
    | KillEngine
    | ToEngine
)
FromMember = NodePrepared | NodeLaunched | FromRank | NodeStatus | WorkerLost | FromEngine | EngineEnded | EngineStatus
FromAgent = NodeHello | FromMember
