"""Bytes that arrive from other hosts, by the kernel's own count: a link that moves any is alive, however slow.

A message of minutes over a slow link leaves little room for the beats beside it (`mpdqn.heartbeat`). Its bytes show
what late beats do not.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Collection, Iterator

BYTES_RECEIVED = 128
"""Where ``tcpi_bytes_received``, a u64, stands in ``struct tcp_info`` of linux/tcp.h."""


def own_addresses() -> list[str]:
    """Return this process's addresses in its TCP connections to other hosts; loopback is left out."""
    return sorted({own for own, _, _ in _connections() if not own.startswith("127.") and own != "::1"})


def bytes_from(addresses: Collection[str]) -> int:
    """Return how many bytes this process's TCP connections have received from hosts of ``addresses`` so far."""
    return sum(received for _, peer, received in _connections() if peer in addresses)


def _connections() -> Iterator[tuple[str, str, int]]:
    """Yield own address, peer's address and bytes received of every TCP connection of this process."""
    for number in os.listdir("/proc/self/fd"):
        try:
            connection = socket.socket(fileno=os.dup(int(number)))
        except OSError:  # closed meanwhile, or not a socket
            continue
        with connection, contextlib.suppress(OSError):  # not connected
            if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
                continue
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            if len(info) < BYTES_RECEIVED + 8:  # a kernel older than 4.1
                continue
            (received,) = struct.unpack_from("=Q", info, BYTES_RECEIVED)
            own, peer = connection.getsockname()[0], connection.getpeername()[0]
            yield own.removeprefix("::ffff:"), peer.removeprefix("::ffff:"), received
