"""Addresses of machines. Needs no torch."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import socket
import struct
from typing import Any

import zmq

from executor.base import ModelError

_SIOCGIFADDR = 0x8915
"""Asks Linux for the address of an interface."""


def endpoint_of(host: str, port: int) -> str:
    """ZeroMQ's spelling of an address."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def host_and_port(endpoint: str) -> tuple[str, int]:
    """What ``endpoint_of`` was told."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def private_address(interface: str) -> str:
    """The IPv4 address of an interface in a private network.

    Raises:
        ModelError: There is no such interface, or anybody may reach it.
    """
    option = f"--private-interface {interface}"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            socket.if_nametoindex(interface)  # the next call would cut a name that is too long
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()))
        except OSError as error:
            reason = f"has no IPv4 address here: {error.strerror or error}; ip address lists those that have"
            raise ModelError(f"{option}: {reason}") from None
    address = socket.inet_ntoa(answer[20:24])
    if ipaddress.ip_address(address).is_global:  # not so those that VPNs share with carriers, 100.64.0.0/10
        raise ModelError(
            f"{option}: {address} is no private address, and what goes over it is not encrypted; name another "
            "interface, such as one of a VPN, or omit it"
        )
    return address


def use_ipv6(connection: zmq.Socket[Any], endpoint: str) -> None:
    """Prepares a socket for an endpoint, whose address may be one of IPv6, or a name."""
    host, _ = host_and_port(endpoint)
    try:
        is_other = ipaddress.ip_address(host).version != 4
    except ValueError:
        is_other = True  # a name: either
    if is_other:
        connection.setsockopt(zmq.IPV6, 1)


def numeric(host: str) -> str:
    """The first address of a host, of which others than this machine can reach it if there is one.

    Raises:
        OSError: The name is unknown, or means all addresses of a machine.
    """
    found = [str(each[4][0]) for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    parsed = {address: ipaddress.ip_address(address.partition("%")[0]) for address in found}
    if any(address.is_unspecified for address in parsed.values()):
        raise OSError(errno.EADDRNOTAVAIL, "means all addresses of this machine; give the one at which others reach it")
    return min(found, key=lambda address: parsed[address].is_loopback)


def address_towards(host: str, port: int) -> str:
    """The address of this machine from which it reaches another one. Nothing is sent.

    Raises:
        OSError: The name is unknown, or there is no route.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def listen(address: str) -> tuple[int, str]:
    """Opens a socket on a port that the system chooses.

    Args:
        address: A numeric address of this machine.

    Returns:
        Its descriptor, which the caller owns, and its endpoint.

    Raises:
        OSError: It is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family)
    port = int(listener.getsockname()[1])
    return listener.detach(), endpoint_of(address, port)
