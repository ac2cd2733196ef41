"""Sockets: allowed addresses, stalls and cancels."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from pathlib import Path

import pytest

from ssvm_worker.errors import Cancelled, ConfigError
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.net.sockets import (
    AddressRefused,
    ConnectOptions,
    Stalled,
    StallWatch,
    WatchedSocket,
    connect,
    secure,
)
from ssvm_worker.net.tls import tls_context
from tests.neighbours import free_port
from tests.servers.http import HttpServer

REFUSED = [
    pytest.param("127.0.0.1", "loopback", id="loopback"),
    pytest.param("127.255.0.9", "loopback", id="far loopback"),
    pytest.param("0.0.0.0", "unspecified", id="unspecified"),
    pytest.param("10.1.2.3", "private", id="private 10/8"),
    pytest.param("172.31.255.255", "private", id="private 172.16/12"),
    pytest.param("192.168.1.1", "private", id="private 192.168/16"),
    pytest.param("100.64.0.1", "carrier-grade", id="carrier-grade NAT"),
    pytest.param("169.254.169.254", "metadata", id="cloud metadata"),
    pytest.param("168.63.129.16", "metadata", id="Azure's wire server, a public address"),
    pytest.param("192.0.2.1", "not a public", id="documentation"),
    pytest.param("198.18.0.1", "not a public", id="benchmarking"),
    pytest.param("192.88.99.1", "6to4", id="6to4 relay"),
    pytest.param("224.0.0.1", "multicast", id="multicast"),
    pytest.param("240.0.0.1", "reserved", id="reserved"),
    pytest.param("255.255.255.255", "reserved", id="broadcast"),
    pytest.param("::", "unspecified", id="v6 unspecified"),
    pytest.param("::1", "loopback", id="v6 loopback"),
    pytest.param("::127.0.0.1", "not a public", id="v4-compatible"),
    pytest.param("::ffff:127.0.0.1", "loopback", id="v4-mapped loopback"),
    pytest.param("::ffff:10.0.0.1", "private", id="v4-mapped private"),
    pytest.param("64:ff9b::7f00:1", "loopback", id="NAT64 of loopback"),
    pytest.param("64:ff9b::a9fe:a9fe", "metadata", id="NAT64 of metadata"),
    pytest.param("64:ff9b:1::808:808", "NAT64", id="local NAT64"),
    pytest.param("2002:7f00:1::", "6to4", id="6to4 of loopback"),
    pytest.param("2001:0:5ef5:79fd::1", "Teredo", id="Teredo"),
    pytest.param("2001:db8::1", "not a public", id="v6 documentation"),
    pytest.param("fd00:ec2::254", "metadata", id="v6 metadata"),
    pytest.param("fd00:20::1", "unique local", id="unique local"),
    pytest.param("fe80::1%lo", "link-local", id="link-local with a zone"),
    pytest.param("fec0::1", "site-local", id="site-local"),
    pytest.param("ff02::1", "multicast", id="v6 multicast"),
    pytest.param("5f00::1", "not a public", id="segment routing"),
    pytest.param("4000::1", "not a public", id="never given out"),
]


@pytest.mark.parametrize(("address", "reason"), REFUSED)
def test_refused(address: str, reason: str) -> None:
    """Any address outside the public internet is refused, with the reason."""
    assert reason in (AddressRule().refuse(address) or "")


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "172.32.0.1", "100.128.0.1"],
)
def test_public(address: str) -> None:
    """Public addresses are allowed, also through a mapping or a translator."""
    assert AddressRule().refuse(address) is None


@pytest.mark.parametrize(
    ("address", "allowed"),
    [("10.20.0.7", True), ("::ffff:10.20.0.7", True), ("10.21.0.7", False), ("fd00:20::9", True), ("127.0.0.1", False)],
)
def test_allowed_networks(address: str, allowed: bool) -> None:
    """A listed network is allowed, but no address outside it."""
    rule = AddressRule(("10.20.0.0/16", "fd00:20::/64"))
    assert (rule.refuse(address) is None) == allowed


@pytest.mark.parametrize("network", ["10.20.0.0/33", "10.20.0.1/16", "intranet", ""])
def test_no_network(network: str) -> None:
    """An invalid network is an error of the settings that names it."""
    with pytest.raises(ConfigError, match="allow_networks") as caught:
        AddressRule((network,))
    assert network in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0"])
def test_spellings_of_loopback(http_server: HttpServer, host: str) -> None:
    """No spelling of the loopback address reaches a local server."""
    with pytest.raises(AddressRefused, match=r"loopback|unspecified"):
        connect(host, http_server.port, ConnectOptions(AddressRule()), StallWatch())


def test_connected_peer_is_judged(http_server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connected socket is refused if the peer's address differs from the checked one."""
    monkeypatch.setattr(WatchedSocket, "getpeername", lambda self: ("169.254.169.254", 80))
    with pytest.raises(AddressRefused, match=r"connected to 169\.254\.169\.254"):
        connect("127.0.0.1", http_server.port, ConnectOptions(AddressRule(("127.0.0.0/8",))), StallWatch())


def test_only_the_allowed_of_several(http_server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with a forbidden and an allowed address is reached at the allowed one."""
    both = [(socket.AF_INET, 1, 6, "", (each, http_server.port)) for each in ("10.0.0.1", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: both)
    with connect(
        "image.example", http_server.port, ConnectOptions(AddressRule(("127.0.0.0/8",))), StallWatch()
    ) as sock:
        assert sock.getpeername()[0] == "127.0.0.1"


def test_second_address(http_server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the first address refuses the connection, the second is tried."""
    ports = (free_port(), http_server.port)
    both = [(socket.AF_INET, 1, 6, "", ("127.0.0.1", port)) for port in ports]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: both)
    with connect("image.example", http_server.port, ConnectOptions(), StallWatch()) as sock:
        assert sock.getpeername()[1] == http_server.port


def test_first_address(http_server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preferred address is tried before the first addresses of the name."""
    both = [(socket.AF_INET, 1, 6, "", (each, http_server.port)) for each in ("127.0.0.3", "127.0.0.2", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: both)
    with connect("image.example", http_server.port, ConnectOptions(preferred="127.0.0.1"), StallWatch()) as sock:
        assert sock.getpeername()[0] == "127.0.0.1"


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".example", "h\ud800"])
def test_no_host_name(host: str) -> None:
    """An invalid host name is an OSError, like all other failures of this module."""
    with pytest.raises(OSError, match=r"host name|known"):
        connect(host, 80, ConnectOptions(), StallWatch())


def test_name_servers_that_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up without answer times out, and a cancel ends it earlier."""
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: over.wait() and [])

    def check() -> None:
        raise Cancelled("user")

    with pytest.raises(TimeoutError, match="No name server"):
        connect("image.example", 80, ConnectOptions(), StallWatch(stall_s=0.2))
    with pytest.raises(Cancelled):
        connect("image.example", 80, ConnectOptions(), StallWatch(check))
    over.set()


def test_nobody_listens() -> None:
    """The error of a refused connection names the address."""
    with pytest.raises(ConnectionRefusedError, match=r"127\.0\.0\.1"):
        connect("127.0.0.1", free_port(), ConnectOptions(), StallWatch())


def test_connect_times_out() -> None:
    """A connection to a listener that does not accept it times out."""
    with socket.socket() as full, socket.socket() as taken:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        taken.connect(full.getsockname())
        with pytest.raises(TimeoutError, match="did not answer"):
            connect("127.0.0.1", full.getsockname()[1], ConnectOptions(timeout_s=0.2), StallWatch())


def pair(watch: StallWatch) -> tuple[WatchedSocket, socket.socket]:
    """Return a watched socket and its peer."""
    near, far = socket.socketpair()
    watched = WatchedSocket(fileno=near.detach())
    watched.settimeout(0.05)
    watched.watch = watch
    return watched, far


def test_quiet_is_a_stall() -> None:
    """A peer that sends nothing is a stall."""
    near, far = pair(StallWatch(stall_s=0.2))
    with near, far, pytest.raises(Stalled, match="Not a byte"):
        near.recv_into(bytearray(10))


def test_drip_is_a_stall() -> None:
    """Single bytes with short pauses between them are a stall."""
    watch = StallWatch(stall_s=60, min_rate=10)
    for _ in range(59):
        watch.spent(1.0, 1)
    with pytest.raises(Stalled, match="Only 60 bytes"):
        watch.spent(1.0, 1)


def test_slow_but_steady_is_none() -> None:
    """A slow peer above the minimum rate is no stall."""
    watch = StallWatch(stall_s=60, min_rate=10)
    for _ in range(600):
        watch.spent(1.0, 10)


def test_full_peer_is_a_stall() -> None:
    """A peer that reads nothing is a stall."""
    near, far = pair(StallWatch(stall_s=0.2))
    with near, far, pytest.raises(Stalled):
        near.sendall(bytes(10_000_000))


@pytest.mark.parametrize("blocked", ["recv_into", "sendall"])
def test_cancel(blocked: str) -> None:
    """A cancel ends a blocked read and a blocked write."""

    def check() -> None:
        raise Cancelled("user")

    near, far = pair(StallWatch(check))
    with near, far, pytest.raises(Cancelled):
        getattr(near, blocked)(bytearray(10_000_000))


@pytest.mark.parametrize("watch", [StallWatch(stall_s=0.5), None], ids=["given up", "cancelled"])
def test_handshake_byte_by_byte(watch: StallWatch | None) -> None:
    """A slow TLS handshake times out, and a cancel ends it earlier."""
    begun, over = threading.Event(), threading.Event()

    def check() -> None:
        if begun.is_set():
            raise Cancelled("user")

    near, far = pair(watch or StallWatch(check, stall_s=3600.0))

    def drip() -> None:
        far.sendall(b"\x16\x03\x03\x40\x00")  # a record of 16 KiB
        begun.set()
        with contextlib.suppress(OSError):  # the other end is closed by now
            while not over.wait(0.02):
                far.sendall(b"\x00")

    dripping = threading.Thread(target=drip)
    dripping.start()
    with pytest.raises((TimeoutError, Cancelled)):
        secure(near, "image.example", tls_context())
    over.set()
    dripping.join()
    far.close()


def test_deadline_though_bytes_move() -> None:
    """A read ends at the deadline, even while bytes keep arriving."""
    watch = StallWatch(stall_s=60.0)
    near, far = pair(watch)
    with near, far:
        far.sendall(b"one")
        near.recv_into(bytearray(3))
        watch.deadline = 0.0
        far.sendall(b"two")
        with pytest.raises(Stalled, match="though bytes moved"):
            near.recv_into(bytearray(3))


class _Scripted(WatchedSocket):
    """Reads by a script of counts and errors."""

    replies: list[int | OSError]

    def _read(self, view: memoryview) -> int:
        if isinstance(reply := self.replies.pop(0), OSError):
            raise reply
        return reply


def test_cancel_without_a_wait() -> None:
    """A cancel ends a reader that never has to wait."""

    def check() -> None:
        raise Cancelled("user")

    def read_on() -> None:
        while near.replies:
            near.recv_into(bytearray(1))

    with _Scripted() as near:
        near.watch, near.replies = StallWatch(check), [1] * 1000
        with pytest.raises(Cancelled):
            read_on()


def test_bytes_before_a_reset_count() -> None:
    """An error after some bytes is raised at the next read, so the bytes are kept."""
    with _Scripted() as near:
        near.watch, near.replies = StallWatch(), [3, ConnectionResetError("gone")]
        assert near.recv_into(bytearray(100_000)) == 3
        with pytest.raises(ConnectionResetError):
            near.recv_into(bytearray(100_000))


@pytest.mark.parametrize("quiet", [BlockingIOError(errno.EAGAIN, "again"), TimeoutError("timed out")])
def test_quiet_is_no_end(quiet: OSError) -> None:
    """A wait without bytes is not an end of file, because the standard library treats None as one."""
    with _Scripted() as near:
        near.watch, near.replies = StallWatch(), [quiet, 3, quiet, 4, quiet, 0]
        reader = near.makefile("rb")
        assert [len(reader.read1(100_000)) for _ in range(3)] == [3, 4, 0]
        assert near.ended


def test_a_dead_connection_is_an_error() -> None:
    """The kernel's own time-out, which looks like a clean end, is raised as an error."""
    for before in ([], [3]):
        with _Scripted() as near:
            near.watch, near.replies = StallWatch(), [*before, TimeoutError(errno.ETIMEDOUT, "dead"), 0]
            assert [near.recv_into(bytearray(100_000)) for _ in before] == before
            with pytest.raises(TimeoutError, match="dead"):
                near.recv_into(bytearray(100_000))
            assert not near.ended


def test_a_late_reader_is_not_starved() -> None:
    """Time counts as a wait for the peer only if no bytes had arrived."""
    watch = StallWatch()
    near, far = pair(watch)
    with near, far:
        far.sendall(b"early")
        near.recv_into(bytearray(10))
        assert watch.starved == 0.0
        watch.check = lambda: far.sendall(b"late")  # after the first TICK without bytes
        near.recv_into(bytearray(10))
        assert watch.starved > 0.0


def test_small_reads_do_not_wait() -> None:
    """A header parser's read returns the bytes that have arrived."""
    near, far = pair(StallWatch())
    with near, far:
        far.sendall(b"HTTP")
        assert near.recv_into(bytearray(8192)) == 4


def test_all_is_sent() -> None:
    """sendall sends all bytes, even if few fit at a time."""
    near, far = pair(StallWatch())
    data, got = bytes(range(256)) * 20_000, bytearray()

    def drain() -> None:
        while piece := far.recv(100_000):
            got.extend(piece)

    reader = threading.Thread(target=drain)
    reader.start()
    with far:
        with near:
            near.sendall(data)
        reader.join()
    assert bytes(got) == data


def test_no_certificates(tmp_path: Path) -> None:
    """A CA file without certificates is an error of the settings."""
    file = tmp_path / "ca.pem"
    file.write_text("not PEM")
    with pytest.raises(ConfigError, match=r"ca\.pem"):
        tls_context(str(file))
