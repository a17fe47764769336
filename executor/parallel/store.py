"""Through what processes of several machines find each other, for torch.distributed."""

from __future__ import annotations

from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

from ops import PeerLostError

CONNECT_TIMEOUT = timedelta(seconds=60)
"""How long machines wait for each other before weights are loaded."""


def connect_store(address: tuple[str, int], listener: int | None, interface: str) -> TCPStore:
    """Opens the store of machine 0, or connects to it.

    Args:
        address: Host and port where it is.
        listener: Its listening socket, which this takes over: the store is here. By itself, torch would listen at all
            addresses. None: it is elsewhere.
        interface: Name of the network interface, for errors.

    Raises:
        PeerLostError: It cannot be reached.
    """
    host, port = address
    try:
        if listener is None:
            return TCPStore(host, port, timeout=CONNECT_TIMEOUT, wait_for_workers=False)
        return TCPStore(
            host, port, is_master=True, timeout=CONNECT_TIMEOUT, wait_for_workers=False, master_listen_fd=listener
        )
    except RuntimeError as error:
        raise PeerLostError(
            f"--private-interface {interface}: machine 0 cannot be reached at {host}, port {port}: {error}"
        ) from error
