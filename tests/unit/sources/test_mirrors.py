"""One file on several mirrors: another mirror replaces a failing one, and bytes are never mixed without a check."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest

from ssvm_worker.artifacts.checksums import Digest
from ssvm_worker.errors import (
    ChecksumMismatch,
    InvalidRequest,
    SourceChanged,
    SourceDenied,
    SourceNotFound,
    SourceUnavailable,
)
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request, redact
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.sources import Mirrors, Offer, find_source, open_source
from ssvm_worker.sources.metalink import is_metalink, parse_metalink
from ssvm_worker.sources.options import HttpSettings, SourceOptions
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.pipeline import Resuming, read_bytes
from tests import images
from tests.attempts import attempt
from tests.contracts.source import DATA, SourceContract, gather
from tests.servers.http import HttpServer

ACCESS = SourceOptions(HttpSettings(AddressRule(("127.0.0.0/8",))))
CHECKSUM = Digest("sha256", hashlib.sha256(DATA).hexdigest())
HALF = len(DATA) // 2


@pytest.fixture
def other() -> Iterator[HttpServer]:
    """Return a second mirror."""
    server = HttpServer()
    yield server
    server.close()


def mirrors(*urls: str, checksum: Digest | None = CHECKSUM, **more: Any) -> Mirrors:
    return find_source(urls, ACCESS, checksum, **more)


def resumed(source: Mirrors, offset: int = 0) -> bytes:
    return b"".join(Resuming(source, lambda _: None, offset=offset, tries=2))


class TestMirrors(SourceContract):
    @pytest.fixture
    def source(self, http_server: HttpServer, other: HttpServer) -> Mirrors:
        return mirrors(http_server.serve("image", DATA), other.url("nothing"))

    @pytest.fixture
    def missing(self, http_server: HttpServer, other: HttpServer) -> Mirrors:
        return mirrors(http_server.url("nothing"), other.url("nothing"))


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param({"status": 404}, id="not there"),
        pytest.param({"status": 403}, id="refused"),
        pytest.param({"status": 503}, id="busy"),
        pytest.param({"cut_after": 0}, id="cut before the first byte"),
        pytest.param({"content_length": "-1"}, id="nonsense"),
    ],
)
@pytest.mark.parametrize("checksum", [None, CHECKSUM], ids=["unverified", "verified"])
def test_next_place(
    http_server: HttpServer, other: HttpServer, behaviour: dict[str, Any], checksum: Digest | None
) -> None:
    """A mirror without a first byte is skipped, with or without a checksum."""
    source = mirrors(http_server.serve("image", DATA, **behaviour), other.serve("image", DATA), checksum=checksum)
    assert gather(source) == DATA


def test_forbidden_place(http_server: HttpServer) -> None:
    """A mirror with a forbidden address is refused by the same rule, and the next one is tried."""
    assert gather(mirrors("http://169.254.169.254/image", http_server.serve("image", DATA))) == DATA


def test_the_error_that_may_pass_is_told(http_server: HttpServer, other: HttpServer) -> None:
    """When no mirror works, a temporary error is raised if there is one."""
    source = mirrors(http_server.serve("image", DATA, status=503), other.url("nothing"))
    with pytest.raises(SourceUnavailable):
        gather(source)


def test_goes_on_in_the_middle(http_server: HttpServer, other: HttpServer) -> None:
    """With a checksum, a mirror that fails permanently is replaced in the middle."""
    first = http_server.serve("image", DATA, cut_after=HALF, cut_times=1, then=None)
    http_server.paths["/image"].then = type(http_server.paths["/image"])(status=503)
    assert resumed(mirrors(first, other.serve("image", DATA, etag='"elsewhere"'))) == DATA
    assert other.requests[-1].headers["Range"] == f"bytes={HALF}-"


def test_comes_back_after_a_break(http_server: HttpServer, other: HttpServer) -> None:
    """A connection that breaks resumes at the same mirror."""
    source = mirrors(http_server.serve("image", DATA, cut_after=HALF, cut_times=1), other.serve("image", DATA))
    assert resumed(source) == DATA
    assert not other.requests


@pytest.mark.parametrize(
    ("checksum", "there"),
    [
        pytest.param(None, DATA, id="no checksum would tell"),
        pytest.param(CHECKSUM, DATA + b"more", id="another length"),
    ],
)
def test_no_mixture(http_server: HttpServer, other: HttpServer, checksum: Digest | None, there: bytes) -> None:
    """Bytes of two mirrors are combined only if lengths agree and a checksum will be compared."""
    first = http_server.serve("image", DATA)
    source = mirrors(first, other.serve("image", there), checksum=checksum)
    next(source.open())
    http_server.serve("image", DATA, status=503)
    with pytest.raises((SourceChanged, SourceUnavailable)):
        gather(source, HALF)


def test_slow_place(http_server: HttpServer, other: HttpServer) -> None:
    """A mirror that is too slow is left, and the faster one continues at that byte."""
    urls = (http_server.serve("image", DATA, rate=5e6), other.serve("image", DATA))
    offer = Offer(urls, verified=True, slow=float("inf"), judge_s=0.05)
    source = Mirrors(offer, lambda url, version: open_source(url, ACCESS, version))
    stream = Resuming(source, lambda _: None)
    assert b"".join(stream) == DATA
    assert other.requests
    assert stream.resumptions


def test_a_later_attempt_asks_the_same_place(http_server: HttpServer, other: HttpServer) -> None:
    """The validator records which mirror sent the first bytes."""
    urls = (http_server.url("nothing"), other.serve("image", DATA))
    first = mirrors(*urls)
    gather(first)
    assert first.validator
    version = {"place": first.validator.place, "validator": first.validator.validator}
    http_server.requests.clear()
    assert gather(mirrors(*urls, version=version), HALF) == DATA[HALF:]
    assert not http_server.requests


def test_credentials_stay_with_the_first_url(http_server: HttpServer, other: HttpServer) -> None:
    """Secrets are sent only to the URL that they belong to, and to no mirror."""
    access = SourceOptions(ACCESS.http, {"Authorization": "Bearer s"})
    gather(find_source([http_server.url("nothing"), other.serve("image", DATA)], access, CHECKSUM))
    assert http_server.requests[0].headers["Authorization"] == "Bearer s"
    assert other.requests[0].headers["Authorization"] is None


# The job


IMAGE = images.mbr(1 << 20)


def request(url: str, **fields: Any) -> download.Request:
    return parse_request(download.Request, {"url": url, "account": 2, "id": "7"} | fields, "download")


def metalink(*urls: str, digest: str = hashlib.sha256(IMAGE).hexdigest(), size: int = len(IMAGE)) -> bytes:
    """Return a document with the URLs in the order of their priority."""
    lines = "".join(f'<url priority="{number}">{url}</url>' for number, url in enumerate(urls, 1))
    return (
        '<?xml version="1.0"?><metalink xmlns="urn:ietf:params:xml:ns:metalink"><file name="image">'
        f'<size>{size}</size><hash type="sha-256">{digest}</hash>{lines}</file></metalink>'
    ).encode()


def test_job_with_mirrors(http_server: HttpServer, other: HttpServer) -> None:
    """A download request may name mirrors."""
    store = MemoryStore("primary")
    asked = request(http_server.url("nothing"), mirrors=[other.serve("image", IMAGE)], max_rate=1 << 30)
    download.run(asked, attempt(store))
    assert read_bytes(store, "template/tmpl/2/7/7.raw") == IMAGE


def test_job_with_metalink(http_server: HttpServer, other: HttpServer) -> None:
    """A metalink gives the mirrors, and the file must have its hash."""
    store = MemoryStore("primary")
    document = metalink(http_server.url("nothing"), other.serve("image", IMAGE))
    download.run(request(http_server.serve("image.meta4", document)), attempt(store))
    assert read_bytes(store, "template/tmpl/2/7/7.raw") == IMAGE


def test_metalink_by_content(http_server: HttpServer, other: HttpServer) -> None:
    """A metalink is recognised by its content too, because mirror services choose it by media type."""
    store = MemoryStore("primary")
    document = metalink(http_server.url("nothing"), other.serve("image", IMAGE))
    media_type = {"Content-Type": "application/metalink4+xml"}
    download.run(request(http_server.serve("image.iso", document, headers=media_type)), attempt(store))
    assert read_bytes(store, "template/tmpl/2/7/7.raw") == IMAGE


def metalink_3(*urls: str, digest: str = hashlib.sha256(IMAGE).hexdigest(), kind: str = "sha256") -> bytes:
    """Return a document of version 3, with the best URL last, and a torrent with the highest preference."""
    lines = "".join(
        f'<url type="{url.partition(":")[0]}" location="de" preference="{number}">{url}</url>'
        for number, url in zip(range(90, 90 + len(urls)), reversed(urls), strict=True)
    )
    return (
        '<?xml version="1.0" encoding="ISO-8859-1"?><metalink version="3.0" xmlns="http://www.metalinker.org/"><files>'
        f'<file name="image"><size>{len(IMAGE)}</size><verification><hash type="md5sum">?</hash>'
        f'<hash type="{kind}">{digest}</hash><pieces type="sha1" length="4"><hash piece="0">00</hash></pieces>'
        f'</verification><resources><url type="bittorrent" preference="100">{urls[0]}.torrent</url>{lines}</resources>'
        "</file></files></metalink>"
    ).encode()


@pytest.mark.parametrize("name", ["image.metalink", "image.iso"])
@pytest.mark.parametrize("kind", ["sha256", "SHA-256", "sha2-256"])
def test_metalink_of_version_3(http_server: HttpServer, other: HttpServer, name: str, kind: str) -> None:
    """A metalink of version 3 is read by its ending or its content, with the best mirror first."""
    store = MemoryStore("primary")
    document = metalink_3(other.serve("image", IMAGE), http_server.url("image"), kind=kind)
    download.run(request(http_server.serve(name, document)), attempt(store))
    assert read_bytes(store, "template/tmpl/2/7/7.raw") == IMAGE
    assert [each.path for each in http_server.requests] == [f"/{name}"]


def test_metalink_of_version_3_is_compared(http_server: HttpServer) -> None:
    """The file must have the hash of the version 3 metalink."""
    document = metalink_3(http_server.serve("image", IMAGE), digest="0" * 64)
    with pytest.raises(ChecksumMismatch, match="checksum is wrong"):
        download.run(request(http_server.serve("image.metalink", document)), attempt())


@pytest.mark.parametrize("checksum", [None, "sha256:" + "1" * 64])
def test_metalink_by_content_is_compared(http_server: HttpServer, checksum: str | None) -> None:
    """The file must have the hash of a recognised metalink, and the request must agree with it."""
    document = metalink(http_server.serve("image", IMAGE), digest="0" * 64)
    with pytest.raises(ChecksumMismatch, match="announces" if checksum else "checksum is wrong"):
        download.run(request(http_server.serve("image.iso", document), checksum=checksum), attempt())


def test_metalink_of_a_metalink(http_server: HttpServer) -> None:
    """One metalink is followed, but no chain of them."""
    url = http_server.serve("a", metalink(http_server.serve("b", metalink(http_server.url("c")))))
    with pytest.raises(SourceChanged, match="bytes there"):
        download.run(request(url), attempt())


def test_metalink_hash_is_compared(http_server: HttpServer) -> None:
    """A file without the metalink's hash is not stored."""
    url = http_server.serve("image.meta4", metalink(http_server.serve("image", IMAGE), digest="0" * 64))
    with pytest.raises(ChecksumMismatch, match="checksum is wrong"):
        download.run(request(url), attempt())


def test_metalink_disagrees(http_server: HttpServer) -> None:
    """A metalink whose hash differs from the request's checksum is an error before any fetch."""
    url = http_server.serve("image.meta4", metalink(http_server.serve("image", IMAGE)))
    with pytest.raises(ChecksumMismatch, match="announces"):
        download.run(request(url, checksum="0" * 64), attempt())
    assert len(http_server.requests) == 1


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/image", "http://169.254.169.254/image", "file:///etc/passwd", "http://u:p@127.0.0.1/x"]
)
def test_metalink_urls_obey_the_rules(http_server: HttpServer, url: str) -> None:
    """A metalink's URLs obey the rules of users' URLs, and refused ones are skipped."""
    document = metalink(url, http_server.serve("image", IMAGE))
    store = MemoryStore("primary")
    download.run(request(http_server.serve("image.meta4", document)), attempt(store))
    assert read_bytes(store, "template/tmpl/2/7/7.raw") == IMAGE


def test_metalink_size(http_server: HttpServer) -> None:
    """A file whose length differs from the metalink's is refused."""
    url = http_server.serve("image.meta4", metalink(http_server.serve("image", IMAGE), size=7))
    with pytest.raises(SourceChanged, match="7 were expected"):
        download.run(request(url), attempt())


def test_metalink_size_without_a_length(http_server: HttpServer) -> None:
    """A wrong size is detected even if the server sends no length."""
    document = metalink(http_server.serve("image", IMAGE, content_length="", ranges=False), size=7)
    with pytest.raises(SourceChanged, match="7 bytes were announced"):
        download.run(request(http_server.serve("image.meta4", document)), attempt())


def test_metalink_without_a_url_that_we_take(http_server: HttpServer) -> None:
    """A metalink with only unsupported URLs is refused."""
    with pytest.raises(SourceDenied, match="no URL that is allowed"):
        mirrors(http_server.serve("x.meta4", metalink("file:///etc/passwd", "s3://bucket/key")))


def test_bad_mirror() -> None:
    """An invalid mirror is an error of the request, even if it is not needed."""
    with pytest.raises(InvalidRequest):
        mirrors("http://127.0.0.1/image", "gopher://127.0.0.1/image")


def test_mirrors_are_redacted() -> None:
    """Mirrors are shown without the values of their queries."""
    shown = redact({"mirrors": ["https://a.example/x?token=secret"]}, download.Request)
    assert shown == {"mirrors": ["https://a.example/x?***"]}


# The document


ENTITY = '<!DOCTYPE x [<!ENTITY a "aaaa">]><metalink xmlns="urn:ietf:params:xml:ns:metalink"/>'


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("<html>", id="no XML"),
        pytest.param(ENTITY, id="a document type"),
        pytest.param('<metalink xmlns="urn:ietf:params:xml:ns:metalink"/>', id="no file"),
        pytest.param(metalink().decode(), id="no URL"),
        pytest.param(metalink("http://a").decode().replace("</file>", '</file><file name="b"/>'), id="two files"),
        pytest.param(metalink("http://a", digest="abc").decode(), id="broken hash"),
        pytest.param(metalink("http://a").decode().replace("<size>", "<size>-"), id="negative size"),
        pytest.param('<metalink xmlns="http://www.metalinker.org/"><files/></metalink>', id="version 3, no file"),
        pytest.param(metalink(*(f"http://a/{n}" for n in range(101))).decode(), id="a hundred and one URLs"),
    ],
)
def test_bad_metalink(text: str) -> None:
    """A document that does not follow RFC 5854, or is malicious, is refused."""
    with pytest.raises(SourceDenied):
        parse_metalink(text, "here")


def test_metalink_priorities() -> None:
    """The lowest priority is first, no priority is last, and unknown hashes are ignored."""
    text = (
        '<m:metalink xmlns:m="urn:ietf:params:xml:ns:metalink"><m:file name="x"><m:hash type="tiger">0</m:hash>'
        f'<m:hash type="md5">{"0" * 32}</m:hash><m:hash type="sha-512">{"1" * 128}</m:hash><m:url>http://c</m:url>'
        '<m:url priority="2">http://b</m:url><m:url priority="1"> http://a </m:url></m:file></m:metalink>'
    )
    offer = parse_metalink(text, "here")
    assert offer == Offer(("http://a", "http://b", "http://c"), (Digest("sha512", "1" * 128), Digest("md5", "0" * 32)))


def test_metalink_by_name() -> None:
    """A metalink is recognised by the ending of its path."""
    assert is_metalink("https://a.example/x.iso.META4?y=1")
    assert not is_metalink("https://a.example/x.iso?f=y.meta4")


def test_missing_metalink(http_server: HttpServer) -> None:
    """A missing metalink has its own error."""
    with pytest.raises(SourceNotFound):
        mirrors(http_server.url("x.meta4"))
