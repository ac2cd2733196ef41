"""Downloads over FTP follow the rules of HTTP."""

from __future__ import annotations

import dataclasses

import pytest

from ssvm_worker.errors import (
    InvalidRequest,
    SourceChanged,
    SourceDenied,
    SourceNotFound,
    SourceUnavailable,
    WorkerError,
)
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.sources.ftp import FtpSource, FtpVersion
from ssvm_worker.sources.options import HttpSettings, SourceOptions
from ssvm_worker.streaming.pipeline import Resuming
from tests.contracts.source import DATA, SourceContract, gather
from tests.neighbours import free_port
from tests.servers.ftp import FtpServer
from tests.waiting import PATIENCE_S

ACCESS = SourceOptions(HttpSettings(AddressRule(("127.0.0.0/8",))))


def source(url: str, version: FtpVersion | None = None, stall_s: float = 60.0, **more: object) -> FtpSource:
    http = dataclasses.replace(ACCESS.http, stall_s=stall_s)
    return FtpSource(url, dataclasses.replace(ACCESS, http=http, **more), version)  # type: ignore[arg-type]


class TestFtpSource(SourceContract):
    @pytest.fixture
    def source(self, ftp_server: FtpServer) -> FtpSource:
        ftp_server.serve("an image", DATA)
        return source(ftp_server.url("an%20image"))

    @pytest.fixture
    def missing(self, ftp_server: FtpServer) -> FtpSource:
        return source(ftp_server.url("nothing"))


def test_resumes(ftp_server: FtpServer) -> None:
    """A transfer that breaks off resumes at that byte."""
    ftp_server.cut_after, ftp_server.cut_times = 700_000, 2
    it = Resuming(source(ftp_server.serve("image", DATA)), lambda _: None)
    assert b"".join(it) == DATA
    assert [each for each in ftp_server.asked if each.startswith("REST")] == ["REST 700000", "REST 1400000"]


def test_a_later_attempt(ftp_server: FtpServer) -> None:
    """A later attempt resumes with the version alone, if the file has the same size and time."""
    url = ftp_server.serve("image", DATA)
    version = FtpVersion(len(DATA), ftp_server.modified)
    assert gather(source(url, version), 1000) == DATA[1000:]
    ftp_server.modified = "20210102030405"
    with pytest.raises(SourceChanged):
        gather(source(url, version), 1000)


@pytest.mark.parametrize("command", ["SIZE", "MDTM"])
def test_not_resumable(ftp_server: FtpServer, command: str) -> None:
    """A file without a size or time is read in one pass."""
    ftp_server.unknown.add(command)
    it = source(ftp_server.serve("image", DATA))
    assert gather(it) == DATA
    assert not it.resumable


@pytest.mark.parametrize("after", [700_000, 0])
def test_short(ftp_server: FtpServer, after: int) -> None:
    """A transfer that ends early is incomplete for any final reply, and is a temporary error."""
    ftp_server.cut_after, ftp_server.lies = after, True
    with pytest.raises(SourceUnavailable, match=f"ended at {after} of"):
        gather(source(ftp_server.serve("image", DATA)))


def test_empty(ftp_server: FtpServer) -> None:
    """An empty file is an error."""
    with pytest.raises(SourceNotFound, match="empty"):
        gather(source(ftp_server.serve("image", b"")))


def test_credentials(ftp_server: FtpServer) -> None:
    """User and password come from the credentials; without or with wrong ones, the server refuses."""
    ftp_server.users = {"joe": "secret"}
    url = ftp_server.serve("image", DATA)
    assert gather(source(url, username="joe", password="secret")) == DATA
    with pytest.raises(SourceDenied) as caught:
        gather(source(url, username="joe", password="wrong"))
    assert "wrong" not in str(caught.value)


def test_address_rule(ftp_server: FtpServer) -> None:
    """The control connection obeys the address rule."""
    with pytest.raises(SourceDenied, match="loopback"):
        gather(FtpSource(ftp_server.serve("image", DATA), SourceOptions()))


def test_data_connection_goes_to_the_same_host(ftp_server: FtpServer) -> None:
    """The address in the server's answer is ignored, so data comes from the same host."""
    ftp_server.passive_host = "169,254,169,254"
    assert gather(source(ftp_server.serve("image", DATA))) == DATA


COMMANDS = ["", "USER", "PASS", "TYPE", "MDTM", "SIZE", "PASV", "REST", "RETR"]


@pytest.mark.parametrize("command", COMMANDS)
def test_answer_without_an_end(ftp_server: FtpServer, command: str) -> None:
    """An answer is read up to a limit, and then the server is left."""
    ftp_server.endless = command
    it = source(ftp_server.serve("image", DATA), FtpVersion(len(DATA), ftp_server.modified))
    with pytest.raises(SourceUnavailable, match="without an end"):
        gather(it, 1000)
    assert ftp_server.left.wait(PATIENCE_S)


@pytest.mark.parametrize("command", COMMANDS)
def test_line_without_an_end(ftp_server: FtpServer, command: str) -> None:
    """A line is read up to a limit too."""
    ftp_server.answers[command] = b"220 " + b"x" * 100_000 + b"\r\n"
    it = source(ftp_server.serve("image", DATA), FtpVersion(len(DATA), ftp_server.modified))
    with pytest.raises(SourceUnavailable, match="bytes"):
        gather(it, 1000)


@pytest.mark.parametrize(
    ("login", "text"), [({"username": "u", "password": "wrong"}, "Correct username and password"), ({}, "as anonymous")]
)
def test_wrong_password(ftp_server: FtpServer, login: dict[str, str], text: str) -> None:
    """Wrong credentials and missing ones have different errors."""
    ftp_server.users = {"u": "right"}
    options = dataclasses.replace(ACCESS, **login)  # type: ignore[arg-type]
    with pytest.raises(SourceDenied, match=f"refused the login: '530.*{text}"):
        gather(FtpSource(ftp_server.serve("image", DATA), options, None))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("code", [b"421", b"550", b"530", b"999", b"\xff\xfe\x9b"])
def test_words_of_the_server(ftp_server: FtpServer, command: str, code: bytes) -> None:
    """A server's text in an error is one line without terminal controls."""
    ftp_server.answers[command] = (
        code + b"-\x1b]0;x\x07\xc2\x9b2J\r\nINFO job stored\x1b[2J\r\n" + code + b" \x1b[2J\r\n"
    )
    it = source(ftp_server.serve("image", DATA), FtpVersion(len(DATA), ftp_server.modified))
    with pytest.raises(WorkerError) as caught:
        gather(it, 1000)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        *(("SIZE", each) for each in ("213 abc", "213 -1", "213 " + "9" * 5000, "213", "213 \u0661", "200 ", "x")),
        *(("MDTM", each) for each in ("213 abc", "213 yesterday at noon", "213", "213 " + "9" * 5000, "200", "")),
        *(("PASV", each) for each in ("227", "227 (1,2,3)", "227 (127,0,0,1,999999,1)", "227 (127,0,0,1,0,0)")),
        *(("PASV", each) for each in ("227 (" + ",".join(["9" * 5000] * 6) + ")", "229 (|||x|)", "200 no")),
        *(("RETR", each) for each in ("226 done already", "350 what", "", "-")),
    ],
)
def test_odd_answer(ftp_server: FtpServer, command: str, answer: str) -> None:
    """An unknown form of answer prevents resumption or is a clear error, never a crash."""
    ftp_server.answers[command] = answer.encode() + b"\r\n"
    it = source(ftp_server.serve("image", DATA), stall_s=1.0)
    try:
        assert gather(it) == DATA
    except SourceUnavailable:
        return
    assert not it.resumable


def test_nobody_listens() -> None:
    """A refused connection is a temporary error."""
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
    """A URL without a file, with a password, or with a hidden command is an error of the request."""
    with pytest.raises(InvalidRequest):
        source(url)
