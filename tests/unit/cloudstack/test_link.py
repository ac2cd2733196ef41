"""The link over real TLS: its records, whom it trusts, and bad peers."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cloudstack.frame import MAX_JSON
from ssvm_worker.cloudstack.link import FOLLOWING, MAX_RECORD, AgentLink, LinkLost, LinkTrust, fingerprint_of
from ssvm_worker.demo.cloudstack.authority import RootAuthority
from ssvm_worker.demo.cloudstack.wire import LinkClosed, ServerLink
from tests.servers.scripted_server import ScriptedServer, authority_in
from tests.waiting import PATIENCE_S


def meanwhile(action: Callable[[], Any]) -> threading.Thread:
    """Run the server's side in a thread. Its errors are those that the client causes."""

    def run() -> None:
        with contextlib.suppress(LinkClosed, OSError):
            action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def connected(
    server: ScriptedServer, trust: LinkTrust | None = None, context: ssl.SSLContext | None = None
) -> AgentLink:
    """Return a link to the server, whose side is ready as well."""
    thread = meanwhile(lambda: server.accept(context))
    link = AgentLink(server.host, server.port, trust or LinkTrust(), timeout_s=PATIENCE_S)
    thread.join(PATIENCE_S)
    return link


def records_of(server: ScriptedServer) -> list[int]:
    """Return the headers of the records of one message."""
    headers, more = [], True
    while more:
        (header,) = struct.unpack(">I", server.link._read(4))
        server.link._read(header & 0xFFFF)
        headers.append(header)
        more = bool(header & FOLLOWING)
    return headers


@pytest.mark.parametrize(("size", "records"), [(1, 1), (40, 1), (16_000, 1), (16_001, 2), (1_000_000, 63)])
def test_records(scripted: ScriptedServer, size: int, records: int) -> None:
    """A message is split into records of at most 18000 bytes, and all but the last have the flag."""
    link = connected(scripted)
    thread = meanwhile(lambda: link.send(bytes(size)))
    headers = records_of(scripted)
    thread.join(PATIENCE_S)
    assert len(headers) == records
    assert all(header & 0xFFFF <= MAX_RECORD for header in headers)
    assert [bool(header & FOLLOWING) for header in headers] == [True] * (records - 1) + [False]


def test_send_several(scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several messages arrive as messages of their own, and short ones leave with one write."""
    link = connected(scripted)
    writes: list[int] = []
    write = link._write

    def counted(data: bytearray) -> None:
        writes.append(len(data))
        write(data)

    monkeypatch.setattr(link, "_write", counted)
    thread = meanwhile(lambda: link.send(b"a", bytes(500), b"c"))
    assert [records_of(scripted) for _ in range(3)] == [[0x1E], [0x211], [0x1E]]
    thread.join(PATIENCE_S)
    assert len(writes) == 1
    sizes = [30_000, 1, 70_000]
    thread = meanwhile(lambda: link.send(*map(bytes, sizes)))
    assert [len(records_of(scripted)) for _ in sizes] == [2, 1, 5]
    thread.join(PATIENCE_S)
    assert len(writes) == 3, "a large answer is not in memory twice"


def test_record_sizes_of_java(scripted: ScriptedServer) -> None:
    """The records have the sizes that were seen with the Java classes: 1 byte is 0x1e, 40 are 0x45, 500 are 0x211."""
    link = connected(scripted)
    found = []
    for size in (1, 40, 500):
        link.send(bytes(size))
        found += records_of(scripted)
    assert found == [0x1E, 0x45, 0x211]


@pytest.mark.parametrize("size", [1, 16_384, 48_680, 1_000_000])
def test_receive(scripted: ScriptedServer, size: int) -> None:
    """A message of any number of records arrives complete, also if two records have one header."""
    link = connected(scripted)
    content = bytes(range(256)) * (size // 256 + 1)

    def send() -> None:
        assert scripted.link
        assert scripted.socket
        for start in range(0, size, 16_384):
            scripted.link._tls.write(content[start : min(size, start + 16_384)])
            record = scripted.link._outgoing.read()
            following = FOLLOWING if start + 16_384 < size else 0
            scripted.socket.sendall(struct.pack(">I", len(record) | following) + record)

    thread = meanwhile(send)
    assert link.receive() == content[:size]
    thread.join(PATIENCE_S)
    scripted.link._tls.write(b"first")
    scripted.link._tls.write(b"second")
    both = scripted.link._outgoing.read()
    scripted.socket.sendall(struct.pack(">I", len(both)) + both)
    assert link.receive() == b"firstsecond"


def test_tls_1_2_only(scripted: ScriptedServer) -> None:
    """The link never uses TLS 1.3, whose session tickets have no header, and no weak cipher."""
    link = connected(scripted)
    assert link.cipher.startswith("TLSv1.2 ECDHE-")
    modern = scripted.authority.context(strict=False, allow_expired=True)
    modern.minimum_version = ssl.TLSVersion.TLSv1_3
    meanwhile(lambda: scripted.accept(modern))
    with pytest.raises(LinkLost, match="handshake"):
        AgentLink(scripted.host, scripted.port, LinkTrust(), timeout_s=PATIENCE_S)


def test_trust_by_file(scripted: ScriptedServer, tmp_path: Path) -> None:
    """The server must show one of the certificates of ca_file, which may have several and comments between them."""
    authority = scripted.authority
    several = tmp_path / "several.pem"
    other = authority_in(tmp_path / "other")
    several.write_text(f"# ä\n{other.certificate_file.read_text()}text\n{authority.certificate_file.read_text()}")
    for ca_file in (authority.certificate_file, several):
        connected(scripted, LinkTrust(ca_file=ca_file)).close()
    with pytest.raises(LinkLost, match="not expected") as caught:
        connected(scripted, LinkTrust(ca_file=other.certificate_file))
    assert authority.fingerprint in str(caught.value)
    assert "update ca_file" in str(caught.value)


def test_trust_by_fingerprint(scripted: ScriptedServer) -> None:
    """The server must show the certificate with the fingerprint."""
    connected(scripted, LinkTrust(fingerprint=f"sha256:{scripted.authority.fingerprint}")).close()
    with pytest.raises(LinkLost, match="not expected"):
        connected(scripted, LinkTrust(fingerprint="sha256:" + "00" * 32))
    der = ssl.PEM_cert_to_DER_cert(scripted.authority.certificate_file.read_text())
    assert fingerprint_of(der) == f"sha256:{scripted.authority.fingerprint}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "no certificate"),
        ("-----BEGIN CERTIFICATE-----\n@@@\n-----END CERTIFICATE-----", "damaged|not expected"),
    ],
)
def test_bad_ca_file(scripted: ScriptedServer, tmp_path: Path, text: str | None, message: str) -> None:
    """Without a readable ca_file, which may be written later, no server is trusted."""
    file = tmp_path / "ca.pem"
    if text is not None:
        file.write_text(text)
    with pytest.raises(LinkLost, match=message):
        connected(scripted, LinkTrust(ca_file=file))


def test_client_certificate(scripted: ScriptedServer, tmp_path: Path) -> None:
    """A certificate is shown if its files exist, and a key of another one is an error before any connection."""
    issued, other = scripted.authority.issue("127.0.0.1"), scripted.authority.issue("127.0.0.1")
    strict = scripted.authority.context(strict=True, allow_expired=True)
    connected(scripted, LinkTrust(certificate_file=issued.certificate, key_file=issued.key), strict)
    assert scripted.link._tls.getpeercert()["subjectAltName"]
    connected(scripted, LinkTrust(certificate_file=tmp_path / "later.crt", key_file=tmp_path / "later.key"), strict)
    assert scripted.link._tls.getpeercert() is None
    with pytest.raises(LinkLost, match="cannot be used"):
        AgentLink(scripted.host, scripted.port, LinkTrust(certificate_file=issued.certificate, key_file=other.key))


@pytest.mark.parametrize("alert", [42, 46])
def test_refused_certificate(scripted: ScriptedServer, alert: int) -> None:
    """If the server refuses the agent's certificate, the error names its address, the files and the clocks."""

    def refuse() -> None:
        accepted = scripted.accept_plain()
        ServerLink(accepted, scripted.authority.context(strict=True, allow_expired=True)).handshake(lambda _: alert)

    meanwhile(refuse)
    with pytest.raises(LinkLost, match="without a certificate") as caught:
        AgentLink(scripted.host, scripted.port, LinkTrust(), timeout_s=PATIENCE_S)
    for word in ("127.0.0.1", "certificate_file", "clocks", "strictness"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x16\x03\x03\xff\xff" + bytes(70_000), b"", b"\x16"]
)
def test_not_a_server(scripted: ScriptedServer, said: bytes) -> None:
    """A peer that speaks something else, or closes the connection, is an error that names it."""

    def speak() -> None:
        accepted = scripted.accept_plain()
        accepted.sendall(said)
        accepted.close()

    meanwhile(speak)
    with pytest.raises(LinkLost, match=f"{scripted.host}:{scripted.port}"):
        AgentLink(scripted.host, scripted.port, LinkTrust(), timeout_s=PATIENCE_S)


def test_silent_handshake(scripted: ScriptedServer) -> None:
    """A peer that accepts the connection and says nothing ends the attempt in time."""
    meanwhile(scripted.accept_plain)
    with pytest.raises(LinkLost, match="handshake"):
        AgentLink(scripted.host, scripted.port, LinkTrust(), timeout_s=0.2)


def test_nobody_listens(scripted: ScriptedServer) -> None:
    """An address without a server is an error that names it."""
    scripted.close()
    with pytest.raises(LinkLost, match="Cannot connect"):
        AgentLink(scripted.host, scripted.port, LinkTrust())


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", MAX_RECORD + 1) + bytes(100),
        struct.pack(">I", 0),
        struct.pack(">I", 0x00020010) + bytes(16),
        struct.pack(">I", 0x80000010) + bytes(16),
        b"GET / HTTP/1.1\r\n",
        struct.pack(">I", 30) + bytes(30),
        struct.pack(">I", 45) + b"\x17\x03\x03\x00\x28" + bytes(40),
    ],
)
def test_bad_records(scripted: ScriptedServer, data: bytes) -> None:
    """A header that Java's reader refuses, and bytes that are no TLS, end the link."""
    link = connected(scripted)
    scripted.socket.sendall(data)
    with pytest.raises(LinkLost):
        link.receive()


@pytest.mark.parametrize("cut", [1, 4, 20])
def test_cut_record(scripted: ScriptedServer, cut: int) -> None:
    """A record that is cut by the end of the connection is the end of the link, not a message."""
    link = connected(scripted)
    scripted.link._tls.write(b"some text")
    record = scripted.link._outgoing.read()
    scripted.socket.sendall((struct.pack(">I", len(record)) + record)[:cut])
    scripted.link.close()
    with pytest.raises(LinkLost, match="closed the connection"):
        link.receive()


def test_endless_message(scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message without an end is refused before it fills the memory."""
    monkeypatch.setattr("ssvm_worker.cloudstack.link._MAX_MESSAGE", 100_000)
    link = connected(scripted)

    def send() -> None:
        while True:
            scripted.link._tls.write(bytes(16_000))
            record = scripted.link._outgoing.read()
            scripted.socket.sendall(struct.pack(">I", len(record) | FOLLOWING) + record)

    meanwhile(send)
    with pytest.raises(LinkLost, match="more than 100000 bytes"):
        link.receive()
    link.close()
    assert MAX_JSON < 1 << 26


def test_closed_by_another_thread(scripted: ScriptedServer) -> None:
    """A close with a reason ends a waiting receive and later sends, and their errors have the reason."""
    link = connected(scripted)
    threading.Timer(0.1, lambda: link.close("the test closes it")).start()
    with pytest.raises(LinkLost, match="the test closes it"):
        link.receive()
    with pytest.raises(LinkLost, match="the test closes it"):
        link.send(b"text")


def test_stuck_server(scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that reads nothing blocks senders only for a limited time, and the link ends."""
    monkeypatch.setattr("ssvm_worker.cloudstack.link._SEND_S", 1.0)
    link = connected(scripted)
    with pytest.raises(LinkLost):
        link.send(bytes(64_000_000))


def test_many_senders(scripted: ScriptedServer) -> None:
    """Messages of several threads do not mix."""
    link = connected(scripted)
    texts = {bytes([number]) * 40_000 for number in range(8)}
    senders = [meanwhile(lambda text=text: link.send(text)) for text in texts]
    found = set()
    for _ in senders:
        data, more = b"", True
        while more:
            (header,) = struct.unpack(">I", scripted.link._read(4))
            scripted.link._incoming.write(scripted.link._read(header & 0xFFFF))
            more = bool(header & FOLLOWING)
            data += scripted.link._decrypt()
        found.add(data)
    assert found == texts


def test_certificate_of_the_authority(authority: RootAuthority) -> None:
    """The certificate of the tests has the key usage for which OpenSSL refuses a real server's certificate."""
    context = ssl.create_default_context(cafile=str(authority.certificate_file))
    context.check_hostname = False
    server = ScriptedServer(authority)
    meanwhile(server.accept)

    with (
        pytest.raises(ssl.SSLError, match="unsuitable certificate purpose"),
        socket.create_connection((server.host, server.port)) as plain,
    ):
        context.wrap_socket(plain)
    server.close()
