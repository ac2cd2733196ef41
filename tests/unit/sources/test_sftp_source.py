"""Downloads over SSH: from servers with a known key, as the user of the credentials."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest

from ssvm_worker.errors import (
    Cancelled,
    ConfigError,
    InvalidRequest,
    SourceChanged,
    SourceDenied,
    SourceUnavailable,
)
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.sources.options import HttpSettings, SourceOptions
from ssvm_worker.sources.sftp import SftpSource, SftpVersion
from ssvm_worker.streaming.pipeline import Resuming
from tests.contracts.source import DATA, SourceContract, gather
from tests.neighbours import free_port
from tests.servers.sftp import SftpServer
from tests.waiting import PATIENCE_S

LOOPBACK = HttpSettings(AddressRule(("127.0.0.0/8",)))


def source(server: SftpServer, url: str, version: SftpVersion | None = None, **more: Any) -> SftpSource:
    access = SourceOptions(LOOPBACK, username="joe", password="secret", known_hosts=str(server.known_hosts))
    return SftpSource(url, dataclasses.replace(access, **more), version)


class TestSftpSource(SourceContract):
    @pytest.fixture
    def source(self, sftp_server: SftpServer) -> SftpSource:
        return source(sftp_server, sftp_server.serve("image", DATA))

    @pytest.fixture
    def missing(self, sftp_server: SftpServer) -> SftpSource:
        return source(sftp_server, sftp_server.url("nothing"))


def test_scp(sftp_server: SftpServer) -> None:
    """scp:// is another name of sftp://."""
    sftp_server.serve("image", DATA)
    assert gather(source(sftp_server, sftp_server.url("image", "scp"))) == DATA


def test_private_key(sftp_server: SftpServer) -> None:
    """A private key replaces a password."""
    url = sftp_server.serve("image", DATA)
    assert gather(source(sftp_server, url, password=None, private_key=str(sftp_server.user_key))) == DATA


def test_wrong_password(sftp_server: SftpServer) -> None:
    """A server's refusal of the login is permanent, and no text has the password."""
    with pytest.raises(SourceDenied) as caught:
        gather(source(sftp_server, sftp_server.serve("image", DATA), password="wrong"))
    assert "wrong" not in str(caught.value)


def test_another_host_key(sftp_server: SftpServer) -> None:
    """A server whose key differs from the known one gets no password."""
    sftp_server.know(paramiko.ECDSAKey.generate())
    with pytest.raises(SourceDenied, match="another one"):
        gather(source(sftp_server, sftp_server.serve("image", DATA)))


def test_unknown_host_key(sftp_server: SftpServer, tmp_path: Path) -> None:
    """A server with an unknown key gets no password either."""
    (tmp_path / "empty").write_text("")
    url = sftp_server.serve("image", DATA)
    with pytest.raises(SourceDenied, match=r"not known.*download\.known_hosts"):
        gather(source(sftp_server, url, known_hosts=str(tmp_path / "empty")))
    with pytest.raises(SourceDenied, match="No host key is known"):
        gather(source(sftp_server, url, known_hosts=None))


def test_no_known_hosts(sftp_server: SftpServer) -> None:
    """An unreadable file of known hosts is an error of the settings."""
    with pytest.raises(ConfigError):
        gather(source(sftp_server, sftp_server.url("image"), known_hosts="/nonexistent/known_hosts"))


def test_resumes(sftp_server: SftpServer) -> None:
    """A connection that breaks resumes at that byte."""
    url = sftp_server.serve("image", DATA)
    sftp_server.cut_after = 1_500_000
    assert b"".join(Resuming(source(sftp_server, url), lambda _: None)) == DATA


def test_a_later_attempt(sftp_server: SftpServer) -> None:
    """A later attempt resumes if the file has the same size and time."""
    url = sftp_server.serve("image", DATA)
    version = SftpVersion(len(DATA), sftp_server.modified)
    assert gather(source(sftp_server, url, version), 1000) == DATA[1000:]
    sftp_server.modified += 1
    with pytest.raises(SourceChanged):
        gather(source(sftp_server, url, version), 1000)


def test_cancel(sftp_server: SftpServer) -> None:
    """A cancel takes effect while the server sends nothing."""

    def check() -> None:
        if sftp_server.stalled.is_set():
            raise Cancelled("user")

    sftp_server.stall = True
    with pytest.raises(Cancelled):
        gather(source(sftp_server, sftp_server.serve("image", DATA), check=check))


def test_connection_that_breaks_at_the_log_in(sftp_server: SftpServer) -> None:
    """A connection that breaks during the login is a temporary error, not a refusal."""
    sftp_server.breaks_at_login = True
    with pytest.raises(SourceUnavailable):
        gather(source(sftp_server, sftp_server.serve("image", DATA)))


def test_more_than_was_asked_for(sftp_server: SftpServer) -> None:
    """A server that sends more than each read asked for is left, because the excess would fill the memory."""
    sftp_server.excess = 1 << 20
    with pytest.raises(SourceUnavailable, match="more than it was asked for"):
        gather(source(sftp_server, sftp_server.serve("image", DATA)))


@contextlib.contextmanager
def saying(words: bytes) -> Iterator[tuple[int, threading.Event]]:
    """Return a port of loopback that repeats the bytes, and an event that is set when a client has left."""
    left = threading.Event()

    def say() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as client:
            with contextlib.suppress(OSError):
                while True:
                    client.sendall(words)
            left.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=say, daemon=True).start()
        yield listener.getsockname()[1], left


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(b"x" * 1000, id="a line without an end"),
        pytest.param(b"\x1b]0;x\x07\x9b2J\r\n", id="lines without an end"),
        pytest.param(b"SSH-9.9-\x1b[2J\r\nINFO job stored\r\n", id="another version"),
        pytest.param(b"SSH-2.0-x\r\n" + b"\x00\x00\x80\x00" + bytes(40_000), id="packets without an end"),
        pytest.param(b"SSH-2.0-x\r\n" + b"\xff\xff\xff\xf0" + bytes(40_000), id="a packet of 4 GiB"),
        pytest.param(b"SSH-2.0-x\r\n" + b"\x00\x00\x00\x0c\x04\x14" + bytes(40_000), id="a broken packet"),
    ],
)
def test_words_of_the_server(sftp_server: SftpServer, caplog: pytest.LogCaptureFixture, words: bytes) -> None:
    """A server without SSH is left, and its text is one safe line in the error only."""
    with saying(words) as (port, left):
        with pytest.raises(SourceUnavailable) as caught:
            gather(source(sftp_server, f"sftp://127.0.0.1:{port}/image"))
        assert left.wait(PATIENCE_S)
    assert str(caught.value).isprintable()
    assert not [each for each in caplog.records if each.name.startswith("paramiko")]


def test_address_rule(sftp_server: SftpServer) -> None:
    """The connection obeys the address rule."""
    with pytest.raises(SourceDenied, match="loopback"):
        gather(source(sftp_server, sftp_server.url("image"), http=HttpSettings()))


def test_nobody_listens(sftp_server: SftpServer) -> None:
    """A refused connection is a temporary error."""
    with pytest.raises(SourceUnavailable):
        gather(source(sftp_server, f"sftp://127.0.0.1:{free_port()}/image"))


def test_without_a_user(sftp_server: SftpServer) -> None:
    """A URL without a user is an error of the request."""
    with pytest.raises(InvalidRequest, match="credentials"):
        source(sftp_server, sftp_server.url("image"), username=None)
