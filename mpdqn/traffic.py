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
    return sorted({own[0] for own, _, _ in _connections() if not own[0].startswith("127.") and own[0] != "::1"})


def bytes_from(addresses: Collection[str], *, except_port: int = 0) -> int:
    """Return how many bytes this process's TCP connections have received from hosts of ``addresses`` so far.

    Connections to ``except_port``, such as that of a launcher's store, are not counted: no rank sends there.
    """
    return sum(received for _, peer, received in _connections() if peer[0] in addresses and peer[1] != except_port)


def _connections() -> Iterator[tuple[tuple[str, int], tuple[str, int], int]]:
    """Yield own address and port, the peer's, and bytes received of every TCP connection of this process."""
    for number in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            copy = os.dup(int(number))
        except OSError:  # closed meanwhile, or no descriptor is left
            continue
        try:
            connection = socket.socket(fileno=copy)
        except OSError:  # closed and opened again meanwhile, as something else
            os.close(copy)
            continue
        with connection, contextlib.suppress(OSError):  # not connected
            if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
                continue
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            if len(info) < BYTES_RECEIVED + 8:  # a kernel older than 4.1
                continue
            (received,) = struct.unpack_from("=Q", info, BYTES_RECEIVED)
            own, peer = connection.getsockname(), connection.getpeername()
            yield (own[0].removeprefix("::ffff:"), own[1]), (peer[0].removeprefix("::ffff:"), peer[1]), received
