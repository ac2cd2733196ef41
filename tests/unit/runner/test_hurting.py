"""The fault injectors really cause their faults, because a fault that does not occur proves nothing."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.disk import SmallDisk, require_mounts
from tests.servers.http import HttpServer
from tests.servers.wire import Wire
from tests.waiting import PATIENCE_S

DATA = bytes(100_000)


@pytest.fixture
def wire(http_server: HttpServer) -> Iterator[Wire]:
    """Return a wire to a server that has DATA at /data."""
    http_server.serve("data", DATA)
    with contextlib.closing(Wire(http_server.port)) as wire:
        yield wire


def get(wire: Wire, patience_s: float = PATIENCE_S) -> int:
    """Return the received bytes, including headers."""
    with socket.create_connection(("127.0.0.1", wire.port), timeout=patience_s) as client:
        client.sendall(b"GET /data HTTP/1.1\r\nHost: x\r\n\r\n")
        return sum(map(len, iter(lambda: client.recv(65536), b"")))


def test_wire_passes_on(wire: Wire) -> None:
    """A healthy wire forwards all bytes and counts them."""
    came = get(wire)
    assert came > len(DATA)
    assert (wire.up, wire.down) == (31, came)


def test_wire_is_cut(wire: Wire) -> None:
    """A cut wire resets every connection, and works again after it is healed."""
    wire.cut()
    with pytest.raises(ConnectionError):
        get(wire)
    wire.heal()
    assert get(wire) > len(DATA)


def test_wire_holds(wire: Wire) -> None:
    """A holding wire forwards nothing until it is healed or reset."""
    wire.hold()
    with pytest.raises(TimeoutError):
        get(wire, patience_s=0.2)
    wire.heal()
    assert get(wire) > len(DATA)


def test_wire_resets(wire: Wire) -> None:
    """A reset ends the existing connections, but no later ones."""
    wire.hold()
    with socket.create_connection(("127.0.0.1", wire.port), timeout=PATIENCE_S) as client:
        client.sendall(b"GET /data HTTP/1.1\r\n\r\n")
        with pytest.raises(ConnectionError):
            _send_until_reset(client, wire)
    wire.heal()
    assert get(wire) > len(DATA)


def _send_until_reset(client: socket.socket, wire: Wire) -> None:
    while True:
        wire.reset()
        client.send(b"x")


def test_disk_is_full(tmp_path: Path) -> None:
    """A filled disk reports that it is full, and accepts files again when it is emptied."""
    require_mounts()
    with contextlib.closing(SmallDisk(tmp_path, 1 << 20)) as disk:
        disk.fill(leave=4096)
        (tmp_path / "small").write_bytes(b"fits")
        with pytest.raises(OSError) as full:
            (tmp_path / "large").write_bytes(DATA)
        assert full.value.errno == errno.ENOSPC
        disk.empty()
        (tmp_path / "large").write_bytes(DATA)
