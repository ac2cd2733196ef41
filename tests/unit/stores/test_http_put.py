"""Uploads by PUT: all bytes arrive, or the error has the server's reason."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path

import pytest

from ssvm_worker.errors import (
    Cancelled,
    InvalidRequest,
    ObjectNotFound,
    StoreDenied,
    StoreFull,
    StoreUnavailable,
    WorkerError,
)
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.net.http import HttpOptions
from ssvm_worker.stores.http_put import PutSink
from ssvm_worker.streaming.pipeline import store_stream
from tests.contracts.source import DATA
from tests.neighbours import free_port
from tests.servers.http import HttpServer
from tests.waiting import PATIENCE_S

CHUNKS = [DATA[start : start + 100_000] for start in range(0, len(DATA), 100_000)]
#: More than any socket buffers, so that a server which stops reading is noticed during the upload.
ENDLESS = [bytes(1_000_000)] * 40
DEFAULTS = HttpOptions(AddressRule(("127.0.0.0/8",)))


def put(url: str, chunks: list[bytes] = CHUNKS, settings: HttpOptions = DEFAULTS, **more: object) -> None:
    """Send the chunks and commit; *size* overrides their real size."""
    size = more.pop("size", sum(map(len, chunks)))
    with PutSink(url, size, settings, **more) as sink:  # type: ignore[arg-type]
        for chunk in chunks:
            sink.write(chunk)
        stored = sink.commit()
    assert (stored.key, stored.size) == (sink.key, size)


def test_whole(http_server: HttpServer) -> None:
    """The server has the bytes, with their length and the caller's headers."""
    put(http_server.take("disk"), headers={"Content-Type": "application/x-disk"})
    assert http_server.stored["/disk"] == DATA
    sent = http_server.requests[0].headers
    assert (sent["Content-Length"], sent["Content-Type"]) == (str(len(DATA)), "application/x-disk")


def test_whole_over_tls(https_server: HttpServer, tmp_path: Path) -> None:
    """The upload works over TLS with a private authority."""
    put(https_server.take("disk"), settings=dataclasses.replace(DEFAULTS, ca_file=https_server.ca_file(tmp_path)))
    assert https_server.stored["/disk"] == DATA


def test_empty(http_server: HttpServer) -> None:
    """An empty object can be uploaded."""
    put(http_server.take("disk"), [])
    assert http_server.stored["/disk"] == b""


def test_as_a_sink(http_server: HttpServer) -> None:
    """The sink works in the central loop, on its own thread."""
    url = http_server.take("disk")
    stored = store_stream(CHUNKS, {"there": PutSink(url, len(DATA), DEFAULTS)})
    assert (stored.objects["there"].size, http_server.stored["/disk"]) == (len(DATA), DATA)


STATUS = [
    pytest.param(403, StoreDenied, "expired", id="403: the presigned URL may have expired"),
    pytest.param(401, StoreDenied, "401", id="401"),
    pytest.param(404, ObjectNotFound, "bucket", id="404"),
    pytest.param(400, StoreDenied, "400", id="400"),
    pytest.param(405, StoreDenied, "405", id="405"),
    pytest.param(501, StoreDenied, "501", id="501: knows no PUT"),
    pytest.param(307, StoreDenied, "redirects", id="307"),
    pytest.param(507, StoreFull, "no room", id="507"),
    pytest.param(429, StoreUnavailable, "429", id="429"),
    pytest.param(500, StoreUnavailable, "500", id="500"),
    pytest.param(503, StoreUnavailable, "503", id="503"),
]


@pytest.mark.parametrize(("status", "error", "text"), STATUS)
@pytest.mark.parametrize("early", [None, 150_000, 0], ids=["at the end", "in the middle", "at once"])
def test_status(http_server: HttpServer, status: int, error: type[WorkerError], text: str, early: int | None) -> None:
    """The answer's status determines the error, at the end or during the upload."""
    with pytest.raises(error, match=text):
        put(http_server.take("disk", status=status, early_after=early))


def test_early_answer_over_tls(https_server: HttpServer, tmp_path: Path) -> None:
    """Over TLS an early refusal is reported, and not the broken pipe after it."""
    url = https_server.take("disk", status=403, early_after=150_000)
    with pytest.raises(StoreDenied):
        put(url, ENDLESS, dataclasses.replace(DEFAULTS, ca_file=https_server.ca_file(tmp_path)))


def test_server_names_its_reason(http_server: HttpServer) -> None:
    """The error has the code of an S3 server's answer."""
    url = http_server.take("disk", status=403, body=b"<Error><Code>SignatureDoesNotMatch</Code></Error>")
    with pytest.raises(StoreDenied, match="403 SignatureDoesNotMatch"):
        put(url)


def test_yes_before_the_end(http_server: HttpServer) -> None:
    """A success before the last byte is an error, because the object is not stored."""
    with pytest.raises(StoreUnavailable, match="answered 200 after"):
        put(http_server.take("disk", early_after=150_000), ENDLESS)


def test_no_answer(http_server: HttpServer) -> None:
    """A server that closes without an answer is an error."""
    with pytest.raises(StoreUnavailable):
        put(http_server.take("disk", silent=True))


def test_stall(http_server: HttpServer) -> None:
    """A server that stops reading is given up."""
    with pytest.raises(StoreUnavailable, match="moved"):
        put(http_server.take("disk", stall_after=1000), ENDLESS, dataclasses.replace(DEFAULTS, stall_s=0.5))


def test_cancel(http_server: HttpServer) -> None:
    """A cancel ends a write that waits for the server."""

    def check() -> None:
        if http_server.stalled.is_set():
            raise Cancelled("user")

    with pytest.raises(Cancelled):
        put(http_server.take("disk", stall_after=1000), ENDLESS, check=check)


def test_abort(http_server: HttpServer) -> None:
    """After an abort the server has a body shorter than declared."""
    with PutSink(http_server.take("disk"), len(DATA), DEFAULTS) as sink:
        sink.write(CHUNKS[0])
        sink.write(CHUNKS[1])
    assert http_server.put_broken.wait(PATIENCE_S)
    assert (http_server.broken["/disk"], http_server.stored) == (CHUNKS[0], {})


def test_abort_before_the_first_byte(http_server: HttpServer) -> None:
    """A sink without a write never connects, and may be aborted twice."""
    sink = PutSink(http_server.take("disk"), len(DATA), DEFAULTS)
    sink.abort()
    sink.suspend()
    assert not http_server.requests


@pytest.mark.parametrize("chunks", [[b"abc"], [b"abcde"]], ids=["fewer bytes", "more bytes"])
def test_another_size(http_server: HttpServer, chunks: list[bytes]) -> None:
    """A writer with another size than declared is a programming error, and commits nothing."""
    with pytest.raises(ValueError, match="promised"):
        put(http_server.take("disk"), chunks, size=4)
    assert http_server.stored == {}


def test_address_rule(http_server: HttpServer) -> None:
    """With a rule, a PUT uses only addresses that downloads may use."""
    with pytest.raises(StoreDenied, match="loopback"):
        put(http_server.take("disk"), settings=HttpOptions())


def test_nobody_listens() -> None:
    """A refused connection is a temporary error."""
    with pytest.raises(StoreUnavailable, match="refused"):
        put(f"http://127.0.0.1:{free_port()}/disk")


def test_untrusted_certificate(https_server: HttpServer) -> None:
    """A certificate of an unknown authority is refused, with the remedy."""
    with pytest.raises(StoreDenied, match="ca_file"):
        put(https_server.take("disk"))


@pytest.mark.parametrize("url", ["ftp://example.org/x", "http://joe:secret@example.org/x", "disk"])
def test_bad_url(url: str) -> None:
    """An invalid URL is an error of the request, and no text shows its password."""
    with pytest.raises(InvalidRequest) as caught:
        PutSink(url, 1, DEFAULTS)
    assert "secret" not in repr(caught.value)


def test_signature_is_never_named(http_server: HttpServer) -> None:
    """The key and every error omit the values of a presigned URL."""
    sink = PutSink(http_server.url("disk?X-Amz-Signature=secret"), 0, DEFAULTS)
    assert sink.key.endswith("/disk?X-Amz-Signature=***")
    with suppress(WorkerError):
        sink.commit()
    assert http_server.requests[0].path.endswith("=secret")
