"""Links between stages on different machines."""

from __future__ import annotations

import pickle
import select
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import zmq

from executor.config import ParallelConfig
from executor.multiproc import Network
from executor.nodes.gloo import GlooLinks, GlooSource, meeting_of
from executor.nodes.head import open_listeners
from executor.nodes.keys import Curve
from executor.nodes.links import LinkError, NetworkLinks, NetworkTarget
from executor.parallel import places
from ops import PeerLostError

RANKS = places(ParallelConfig(pipeline_parallel_size=3, nnodes=3))
DEADLINE = 60.0


def open_links(stack: ExitStack, missing: int | None = None, interface: str = "") -> list[NetworkLinks | None]:
    """The links of each rank, but of one that is missing."""
    listeners = [open_listeners(RANKS, rank, "127.0.0.1", interface) for rank in range(3)]
    endpoints = {name: endpoint for each in listeners for name, (_, endpoint) in each.items()}
    network = Network(cluster_key=b"k" * 32, addresses=("a", "b", "c"), endpoints=endpoints)
    result: list[NetworkLinks | None] = []
    for rank, own in enumerate(listeners):
        if rank == missing:
            result.append(None)
            continue
        links = NetworkLinks(network, RANKS, RANKS[rank], {name: fd for name, (fd, _) in own.items()})
        stack.callback(links.close)
        result.append(links)
    return result


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_messages_between_machines(stack: ExitStack) -> None:
    first, second, third = open_links(stack)
    assert first is not None and second is not None and third is not None
    for links in (first, second, third):
        links.check(DEADLINE)
    assert [links.first_rank for links in (first, second, third)] == [0, 1, 2]
    assert set(first.sources) == {"tokens.0"} and set(first.targets) == {"hidden.1"}
    assert set(second.sources) == {"hidden.1", "tokens.1"} and set(second.targets) == {"hidden.2"}
    assert set(third.sources) == {"hidden.2"} and set(third.targets) == {"tokens.0", "tokens.1"}
    source, target = second.sources["hidden.1"], first.targets["hidden.1"]
    assert source.num_arrived() == 0
    for step in range(1, 6):
        target.send(step, torch.full((step, 300), step, dtype=torch.bfloat16))
    count = 0
    while count < 5:
        assert select.select([source], [], [], DEADLINE)[0]
        count = source.num_arrived()
    for step in range(1, 6):
        assert source.take(step).view(torch.bfloat16).tolist() == [step] * step * 300
    target.send(6, torch.zeros(0))
    target.send(8, torch.zeros(1))
    while source.num_arrived() < 7:
        assert select.select([source], [], [], DEADLINE)[0]
    assert len(source.take(6)) == 0
    with pytest.raises(
        LinkError, match="^the connection to another machine broke: message 7 is missing, message 8 came$"
    ):
        source.take(7)


def test_strangers_are_not_heard(stack: ExitStack) -> None:
    first, second, third = open_links(stack)
    assert first is not None and second is not None and third is not None
    for endpoint in first.network.endpoints.values():
        for data in (pickle.dumps(print), bytes(range(256)) * 10):
            with socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2]))) as connection:
                connection.sendall(data)
    context: zmq.Context[Any] = zmq.Context()
    stranger = NetworkTarget(context, Curve(b"another key" + bytes(21)), first.network.endpoints["hidden.1"])
    stranger.send(1, torch.ones(1))
    second.check(DEADLINE)
    first.targets["hidden.1"].send(1, torch.zeros(1))
    while second.sources["hidden.1"].num_arrived() < 1:
        assert select.select([second.sources["hidden.1"]], [], [], DEADLINE)[0]
    assert second.sources["hidden.1"].take(1).view(torch.float32).tolist() == [0]
    assert second.sources["hidden.1"].num_arrived() == 1
    stranger.close()
    context.term()


def test_a_machine_that_cannot_reach_another_one_is_named(stack: ExitStack) -> None:
    first, _, third = open_links(stack, missing=1)
    assert first is not None and third is not None
    first.check(DEADLINE)
    with pytest.raises(
        LinkError, match=r"^machine 1 \(b\) cannot reach machine 2 at tcp://127.0.0.1:\d+: no connection"
    ):
        third.check(0.05)


def open_gloo(stack: ExitStack) -> list[GlooLinks]:
    """Links of which Gloo moves the hidden states."""
    links = [each for each in open_links(stack, interface="lo") if each is not None]

    def meet(own: NetworkLinks, rank: int) -> GlooLinks:
        own.check(DEADLINE)
        meeting = meeting_of(own, RANKS[rank], "lo")
        assert meeting is not None
        stack.callback(lambda: meeting)  # it lasts as long as the links
        return GlooLinks(own, meeting, RANKS, rank)

    with ThreadPoolExecutor(3) as threads:
        result = list(threads.map(meet, links, range(3)))
    for each in result:
        stack.callback(each.close)
    return result


def arrived(source: Any, count: int) -> None:
    """Waits until so many messages have come."""
    while source.num_arrived() < count:
        assert select.select([source], [], [], DEADLINE)[0]


def test_hidden_states_by_gloo(stack: ExitStack) -> None:
    first, second, third = open_gloo(stack)
    assert set(second.sources) == {"hidden.1", "tokens.1"} and set(second.targets) == {"hidden.2"}
    assert isinstance(third.targets["tokens.1"], NetworkTarget), "tokens stay encrypted"
    source, target = second.sources["hidden.1"], first.targets["hidden.1"]
    assert source.num_arrived() == 0
    hidden = torch.zeros((30, 300), dtype=torch.bfloat16)
    for step in range(1, 31):  # more than may be under way
        hidden.fill_(step)  # what was sent before is a copy
        target.send(step, hidden[:step])
    arrived(source, 30)
    for step in range(1, 31):
        assert source.take(step).view(torch.bfloat16).tolist() == [step] * step * 300
    target.send(31, torch.zeros(0))
    target.send(33, torch.zeros(1))
    arrived(source, 32)
    assert len(source.take(31)) == 0
    with pytest.raises(LinkError, match="^the connection to another machine broke: message 32 is missing"):
        source.take(32)
    second.targets["hidden.2"].send(1, torch.arange(4))
    arrived(third.sources["hidden.2"], 1)
    assert third.sources["hidden.2"].take(1).view(torch.int64).tolist() == [0, 1, 2, 3]


def test_a_rank_that_ends_while_gloo_moves_hidden_states() -> None:
    """Who waits for them learns of it, as soon as it asks."""

    class Group:
        def recv(self, *args: Any) -> Any:
            raise RuntimeError("Connection closed by peer")

    with ExitStack() as stack:
        links = [each for each in open_links(stack) if each is not None]
        for each in links:
            each.check(DEADLINE)
        source = GlooSource(Group(), links[1].sources["hidden.1"])
        stack.callback(source.close)
        links[0].targets["hidden.1"].send(1, torch.tensor([100]))
        arrived(source, 1)
        with pytest.raises(PeerLostError, match="^another machine cannot be reached: Connection closed by peer$"):
            source.take(1)
