"""Free TCP ports on loopback, for servers that cannot choose a port themselves."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Reserve a TCP port for about a minute and return it.

    A connection in TIME_WAIT holds the port. The kernel assigns such a port to no other process, but a server that
    sets SO_REUSEADDR can listen on it. Without this, another process could take the port first.
    """
    with socket.socket() as listener, socket.socket() as client:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        accepted.close()  # the side that closes first is the one in TIME_WAIT
        client.recv(1)
        return int(listener.getsockname()[1])
