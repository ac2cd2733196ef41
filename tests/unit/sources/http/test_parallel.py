"""Downloads over several connections: the same bytes in the same order, even if connections fail."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from contextlib import closing
from pathlib import Path

import pytest

from ssvm_worker.errors import Cancelled, SourceUnavailable
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.sources.http.parallel import ConnectionPolicy, ConnectionSpeed
from ssvm_worker.sources.http.source import HttpSource
from ssvm_worker.sources.options import HttpSettings
from ssvm_worker.streaming.pipeline import Resuming
from ssvm_worker.units import KiB, MiB
from tests.contracts.source import DATA, SourceContract, gather
from tests.servers.http import Behaviour, HttpServer

#: Every connection is too slow, and is checked after each read.
MANY = ConnectionPolicy(connections=3, range_size=96 * KiB, enough_rate=float("inf"), judge_s=0.0)
LOOPBACK = HttpSettings(AddressRule(("127.0.0.0/8",)), parallel=MANY)
#: The first answer arrives in small pieces, and waits until another connection has requested a range.
SLOW = {"rate": 20e6, "hold_after": 400_000}
#: The first answer never ends, so only ranges give the rest.
STUCK = {"stall_after": 400_000}


def source(url: str, **more: object) -> HttpSource:
    return HttpSource(url, LOOPBACK, **more)  # type: ignore[arg-type]


def ranges(server: HttpServer) -> list[str]:
    """Return the requested ranges that have an end."""
    return [each for request in server.requests if (each := request.headers.get("Range", "")) and each[-1] != "-"]


def test_a_busy_reader_needs_no_more_connections() -> None:
    """Only the time without bytes on the connection counts, not the reader's own time."""
    pace = ConnectionSpeed(ConnectionPolicy(connections=4))
    for _ in range(100):
        pace.add(MiB, starved=0.05)
    assert not pace.slow
    pace.add(MiB, starved=100.0)
    assert pace.slow


class TestSeveralConnections(SourceContract):
    @pytest.fixture
    def source(self, http_server: HttpServer) -> HttpSource:
        return source(http_server.serve("image", DATA, **SLOW))

    @pytest.fixture
    def missing(self, http_server: HttpServer) -> HttpSource:
        return source(http_server.url("nothing"))


def test_over_tls(https_server: HttpServer, tmp_path: Path) -> None:
    """Each connection authenticates its server."""
    trusting = dataclasses.replace(LOOPBACK, ca_file=https_server.ca_file(tmp_path))
    whole_by_ranges = [Behaviour(DATA)] * 1000
    assert gather(HttpSource(https_server.serve("image", DATA, **STUCK, ranged=whole_by_ranges), trusting)) == DATA
    assert len(ranges(https_server)) > 6


def test_asks_for_ranges_of_the_same_object(http_server: HttpServer) -> None:
    """The rest is requested by ranges of the same object, over connections that are reused."""
    assert gather(source(http_server.serve("image", DATA, **STUCK, ranged=[Behaviour(DATA)] * 1000))) == DATA
    asked = [each for each in http_server.requests if "Range" in each.headers]
    assert len(asked) > 6
    assert {each.headers["If-Range"] for each in asked} == {'"v1"'}
    assert len({each.port for each in asked}) < len(asked)


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param({"ranges": False}, id="no ranges"),
        pytest.param({"etag": None}, id="no validator"),
        pytest.param({"etag": 'W/"v1"'}, id="a weak validator"),
        pytest.param({"chunked": True}, id="no length"),
    ],
)
def test_one_connection_where_the_object_is_not_certain(http_server: HttpServer, behaviour: dict[str, object]) -> None:
    """Without ranges, a strong validator and a length, one connection is used."""
    assert gather(source(http_server.serve("image", DATA, rate=20e6, **behaviour))) == DATA
    assert len(http_server.requests) == 1


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(dataclasses.replace(MANY, enough_rate=0.0), id="fast enough"),
        pytest.param(dataclasses.replace(MANY, connections=1), id="one connection allowed"),
        pytest.param(dataclasses.replace(MANY, range_size=len(DATA)), id="too small"),
    ],
)
def test_one_connection_where_it_is_enough(http_server: HttpServer, policy: ConnectionPolicy) -> None:
    """A second connection is made only if it is allowed and may help."""
    url = http_server.serve("image", DATA, rate=20e6)
    assert gather(HttpSource(url, dataclasses.replace(LOOPBACK, parallel=policy))) == DATA
    assert len(http_server.requests) == 1


BROKEN = [
    pytest.param(Behaviour(status=503), id="busy"),
    pytest.param(Behaviour(DATA, cut_after=1000), id="cut"),
    pytest.param(Behaviour(DATA, cut_after=40_000, reset=True), id="reset"),
    pytest.param(Behaviour(DATA, content_length="7"), id="shorter than asked for"),
    pytest.param(Behaviour(status=403), id="refused"),
    pytest.param(Behaviour(DATA, ignore_range=True), id="range ignored"),
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_range_is_tried_again(http_server: HttpServer, broken: Behaviour) -> None:
    """A failed range is fetched again by any connection, but the first bytes are not."""
    url = http_server.serve("image", DATA, **STUCK, ranged=[broken, *[Behaviour(DATA)] * 1000])
    assert gather(source(url)) == DATA
    assert sum("Range" not in each.headers for each in http_server.requests) == 1


@pytest.mark.parametrize("broken", [each for each in BROKEN if each.id in ("busy", "refused", "range ignored")])
def test_a_server_that_takes_one_connection_only(http_server: HttpServer, broken: Behaviour) -> None:
    """If no second connection works, one connection reads to the end."""
    url = http_server.serve("image", DATA, **SLOW, ranged=[broken] * 1000)
    assert b"".join(Resuming(source(url), lambda _: None)) == DATA


OTHERS = [
    pytest.param(Behaviour(DATA, etag='"v2"'), id="whole, another ETag"),
    pytest.param(Behaviour(DATA, etag='"v2"', last_modified='"v1"'), id="range with another ETag"),
    pytest.param(Behaviour(DATA + b"more"), id="longer"),
    pytest.param(Behaviour(DATA, content_range="bytes 0-9/10"), id="another range"),
    pytest.param(Behaviour(DATA, content_range="bytes */10"), id="no range"),
    pytest.param(Behaviour(DATA, etag=None, last_modified='"v1"'), id="range without the ETag"),
    pytest.param(Behaviour(DATA, headers={"Content-Encoding": "gzip"}), id="range in another coding"),
    pytest.param(Behaviour(DATA, headers={"Content-Type": "multipart/byteranges; boundary=x"}), id="parts"),
    pytest.param(Behaviour(status=416), id="416"),
    pytest.param(Behaviour(status=500), id="500"),
    pytest.param(Behaviour(status=501), id="501"),
]


@pytest.mark.parametrize("other", OTHERS)
def test_ranges_that_cannot_be_used(http_server: HttpServer, other: Behaviour) -> None:
    """If ranges are refused, wrong or of another copy, the first answer is read to its end."""
    it = source(http_server.serve("image", DATA, **SLOW, ranged=[other] * 1000))
    assert gather(it) == DATA
    assert sum("Range" not in each.headers for each in http_server.requests) == 1


@pytest.mark.parametrize("other", OTHERS)
def test_a_range_of_another_object(http_server: HttpServer, other: Behaviour) -> None:
    """If the first answer breaks, no byte of another object's range is used."""
    url = http_server.serve("image", DATA, **SLOW, cut_after=600_000, ranged=[other] * 1000)
    taken = bytearray()
    with pytest.raises(SourceUnavailable):
        taken.extend(itertools.chain.from_iterable(source(url).open()))
    assert taken == DATA[: len(taken)]


def test_the_copy_of_another_node(http_server: HttpServer) -> None:
    """A connection to another node is replaced by one to the first node."""
    other = Behaviour(DATA[::-1], etag='"other"')
    url = http_server.serve("image", DATA, **STUCK, ranged=[other, Behaviour(DATA)] * 500)
    assert gather(source(url)) == DATA


def test_all_connections_fail(http_server: HttpServer) -> None:
    """When no connection is left, the last error is raised."""
    url = http_server.serve("image", DATA, cut_after=400_000, ranged=[Behaviour(status=403)] * 1000, rate=20e6)
    with pytest.raises(SourceUnavailable, match="status 403"):
        gather(source(url))


def test_resumed(http_server: HttpServer) -> None:
    """A stream whose connections have all failed resumes after the last delivered byte."""
    broken = [Behaviour(DATA, cut_after=0)] * 12
    url = http_server.serve("image", DATA, cut_after=400_000, cut_times=1, ranged=broken, rate=20e6)
    assert b"".join(Resuming(source(url), lambda _: None)) == DATA


def test_a_link_that_expires(http_server: HttpServer) -> None:
    """If a redirect led to an expired link, the redirect is requested again."""
    http_server.serve("first", DATA, rate=20e6, cut_after=400_000, ranged=[Behaviour(status=403)] * 1000)
    http_server.serve("second", DATA)
    url = http_server.redirect("image", "/first")
    http_server.paths["/image"].then = Behaviour(status=302, headers={"Location": "/second"})
    assert b"".join(Resuming(source(url), lambda _: None)) == DATA


def test_a_stuck_connection_is_replaced(http_server: HttpServer) -> None:
    """A connection that blocks all others loses its range to another one."""
    stuck = [Behaviour(DATA, stall_after=1000), *[Behaviour(DATA)] * 1000]
    url = http_server.serve("image", DATA, **STUCK, ranged=stuck)
    assert gather(source(url)) == DATA
    ends = [each.rpartition("-")[2] for each in ranges(http_server)]
    assert len(set(ends)) < len(ends)


def test_cancel(http_server: HttpServer) -> None:
    """A cancel takes effect while every connection waits."""

    def check() -> None:
        if http_server.stalled.is_set():
            raise Cancelled("user")

    stuck = [Behaviour(DATA, stall_after=10) for _ in range(1000)]
    with pytest.raises(Cancelled):
        gather(source(http_server.serve("image", DATA, stall_after=600_000, ranged=stuck, rate=20e6), check=check))


def test_window(http_server: HttpServer) -> None:
    """Two connections buffer at most three unread ranges."""
    most = MANY.connections * 3 // 2
    taken = 0
    for chunk in source(http_server.serve("image", DATA, **SLOW)).open():
        taken += len(chunk)
        assert len(ranges(http_server)) <= taken / MANY.range_size + most + 1


def test_no_thread_is_left(http_server: HttpServer) -> None:
    """A reader that closes also closes the connections."""
    with closing(source(http_server.serve("image", DATA, **SLOW)).open()) as chunks:
        while not ranges(http_server):
            next(chunks)
    assert not [each for each in threading.enumerate() if each.name.startswith("range-")]
