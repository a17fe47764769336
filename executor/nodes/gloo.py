"""Machines connected by torch.distributed, in a network that one trusts: Gloo encrypts nothing, and asks for no key.

It listens on one interface, and so does the store through which the machines find each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, PrefixStore, Store

from executor.nodes.addresses import host_and_port
from executor.parallel.store import CONNECT_TIMEOUT, connect_store
from ops import PeerLostError

PATIENCE = timedelta(days=1)
"""How long an operation waits for others. The engine core alone decides that they hang, and ends their workers."""


class GlooGather:
    """See ``executor.nodes.ranks.Gather``."""

    def __init__(
        self, interface: str, endpoint: str, listener: int | None, group: str, place: int, nodes: Sequence[int]
    ) -> None:
        """Connects to the others. Returns once all have called it.

        Args:
            interface: Name of the network interface here.
            endpoint: Where the store is.
            listener: Its listening socket, which this takes over: the store is here. None: it is elsewhere.
            group: Name of the group, in the store.
            place: This machine's, in the group.
            nodes: The machines of the group.

        Raises:
            PeerLostError: They cannot be reached.
        """
        gloo: Any = dist.ProcessGroupGloo  # torch's types lack what is needed
        try:
            store = PrefixStore(group, connect_store(host_and_port(endpoint), listener, interface))
            _greet(store, place, nodes, f"--private-interface {interface}: {endpoint} cannot be reached by machine")
            options = gloo._Options()
            options._devices = [gloo.create_device(interface=interface)]
            options._timeout = CONNECT_TIMEOUT
            self._group = gloo(store, place, len(nodes), options)
            self._options = AllgatherOptions()
            self._options.asyncOp, self._options.timeout = False, PATIENCE
            self.gather(torch.zeros(1, dtype=torch.uint8), [1] * len(nodes))  # all have connected
        except PeerLostError:
            raise
        except RuntimeError as error:
            raise PeerLostError(
                f"--private-interface {interface}: the machines of a layer cannot reach each other: {error}"
            ) from error

    def gather(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        most = max(sizes)
        if own.numel() < most:  # as long as the longest
            own = torch.nn.functional.pad(own, (0, most - own.numel()))
        out = torch.empty(len(sizes) * most, dtype=torch.uint8)
        try:
            self._group._allgather_base(out, own, self._options).wait()
        except RuntimeError as error:
            raise PeerLostError(f"another machine cannot be reached: {error}") from error
        return [part[:size] for part, size in zip(out.split(most), sizes, strict=True)]


def _greet(store: Store, place: int, nodes: Sequence[int], complaint: str) -> None:
    """Waits until all machines of the group have reached the store: Gloo would not say which one has not."""
    store.set(f"here {place}", "")
    for index, node in enumerate(nodes):
        try:
            store.wait([f"here {index}"], CONNECT_TIMEOUT)
        except RuntimeError as error:
            raise PeerLostError(f"{complaint} {node} ({error})") from error
