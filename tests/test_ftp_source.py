"""Downloads over FTP: by the same rules as over HTTP."""

from __future__ import annotations

import dataclasses

import pytest

from ssvm_worker.addresses import AddressRule
from ssvm_worker.errors import InvalidRequest, SourceChanged, SourceDenied, SourceNotFound, SourceUnavailable
from ssvm_worker.sources.access import Access
from ssvm_worker.sources.exchange import HttpSettings
from ssvm_worker.sources.ftp import FtpSource, FtpVersion
from ssvm_worker.stream import Resuming
from tests.contracts.source import DATA, SourceContract, gather
from tests.neighbours import free_port
from tests.servers.ftp import FtpServer

ACCESS = Access(HttpSettings(AddressRule(("127.0.0.0/8",))))


def source(url: str, version: FtpVersion | None = None, **more: object) -> FtpSource:
    return FtpSource(url, dataclasses.replace(ACCESS, **more), version)  # type: ignore[arg-type]


class TestFtpSource(SourceContract):
    @pytest.fixture
    def source(self, ftp_server: FtpServer) -> FtpSource:
        ftp_server.serve("an image", DATA)
        return source(ftp_server.url("an%20image"))

    @pytest.fixture
    def missing(self, ftp_server: FtpServer) -> FtpSource:
        return source(ftp_server.url("nothing"))


def test_resumes(ftp_server: FtpServer) -> None:
    """A transfer that breaks off goes on where it broke."""
    ftp_server.cut_after, ftp_server.cut_times = 700_000, 2
    it = Resuming(source(ftp_server.serve("image", DATA)), lambda _: None)
    assert b"".join(it) == DATA
    assert [each for each in ftp_server.asked if each.startswith("REST")] == ["REST 700000", "REST 1400000"]


def test_a_later_attempt(ftp_server: FtpServer) -> None:
    """A later attempt goes on with the version alone, if the file still has that size and time."""
    url = ftp_server.serve("image", DATA)
    version = FtpVersion(len(DATA), ftp_server.modified)
    assert gather(source(url, version), 1000) == DATA[1000:]
    ftp_server.modified = "20210102030405"
    with pytest.raises(SourceChanged):
        gather(source(url, version), 1000)


@pytest.mark.parametrize("command", ["SIZE", "MDTM"])
def test_not_resumable(ftp_server: FtpServer, command: str) -> None:
    """A server that does not tell size or time is read in one go."""
    ftp_server.unknown.add(command)
    it = source(ftp_server.serve("image", DATA))
    assert gather(it) == DATA
    assert not it.resumable


@pytest.mark.parametrize("after", [700_000, 0])
def test_short(ftp_server: FtpServer, after: int) -> None:
    """A transfer that ends early is not whole, whatever the server says, and may be whole the next time."""
    ftp_server.cut_after, ftp_server.lies = after, True
    with pytest.raises(SourceUnavailable, match=f"ended at {after} of"):
        gather(source(ftp_server.serve("image", DATA)))


def test_empty(ftp_server: FtpServer) -> None:
    """An empty file is none."""
    with pytest.raises(SourceNotFound, match="empty"):
        gather(source(ftp_server.serve("image", b"")))


def test_credentials(ftp_server: FtpServer) -> None:
    """A user and password are those of the credentials; without, or with wrong ones, the server refuses us."""
    ftp_server.users = {"joe": "secret"}
    url = ftp_server.serve("image", DATA)
    assert gather(source(url, username="joe", password="secret")) == DATA
    with pytest.raises(SourceDenied) as caught:
        gather(source(url, username="joe", password="wrong"))
    assert "wrong" not in str(caught.value)


def test_address_rule(ftp_server: FtpServer) -> None:
    """The control connection obeys the address rule."""
    with pytest.raises(SourceDenied, match="loopback"):
        gather(FtpSource(ftp_server.serve("image", DATA), Access()))


def test_data_connection_goes_to_the_same_host(ftp_server: FtpServer) -> None:
    """A server cannot send us elsewhere for the data: its answer's address is not looked at."""
    ftp_server.passive_host = "169,254,169,254"
    assert gather(source(ftp_server.serve("image", DATA))) == DATA


def test_nobody_listens() -> None:
    """A refused connection may be tried again."""
    with pytest.raises(SourceUnavailable):
        gather(source(f"ftp://127.0.0.1:{free_port()}/image"))


@pytest.mark.parametrize(
    "url",
    [
        "ftp://127.0.0.1/",
        "ftp://127.0.0.1",
        "ftp://joe:secret@127.0.0.1/x",
        "ftp://127.0.0.1/x%0d%0aDELE%20y",
        "ftp://127.0.0.1/x?y",
        "ftp:///x",
    ],
)
def test_bad_url(url: str) -> None:
    """What names no file, holds a password or would smuggle in a command is an error of the request."""
    with pytest.raises(InvalidRequest):
        source(url)
