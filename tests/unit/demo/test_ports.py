"""Ports for servers that need a fixed number: no other process gets one before its server listens."""

from __future__ import annotations

import socket

import pytest

from ssvm_worker.demo.ports import free_port


def _bound(port: int, *, reuse: bool) -> bool:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        try:
            server.bind(("127.0.0.1", port))
        except OSError:
            return False
        server.listen()
        return True


@pytest.mark.parametrize("reuse", [True, False])
def test_reserved(reuse: bool) -> None:
    """A server with SO_REUSEADDR can listen on a reserved port, and no other socket can bind it."""
    assert _bound(free_port(), reuse=reuse) == reuse


def test_distinct() -> None:
    """Consecutive ports differ, because each is reserved for a minute."""
    ports = [free_port() for _ in range(200)]
    assert len(set(ports)) == len(ports)
