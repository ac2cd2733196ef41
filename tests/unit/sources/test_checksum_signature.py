"""Signed checksum files: with a keyring in the settings, a checksum needs the signature of a known key."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from ssvm_worker.errors import ConfigError, InvalidRequest, SourceDenied
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from tests import images
from tests.attempts import SETTINGS, attempt
from tests.servers.http import HttpServer
from tests.servers.publisher import Publisher

IMAGE = images.mbr(1 << 20)
SUMS = f"{hashlib.sha256(IMAGE).hexdigest()}  image\n".encode()


def run(server: HttpServer, publisher: Publisher, **settings: Any) -> dict[str, Any]:
    """Run a download whose checksum is in the server's SUMS."""
    fields = {"url": server.serve("image", IMAGE), "account": 2, "id": "7", "checksum": server.url("SUMS")}
    given = {"download": SETTINGS["download"] | {"keyring": str(publisher.keyring)} | settings}
    return download.run(parse_request(download.Request, fields, "download"), attempt(settings=given))


@pytest.mark.parametrize("ending", [".gpg", ".asc", ".sign"])
def test_signature_beside_it(http_server: HttpServer, publisher: Publisher, ending: str) -> None:
    """A signature in its own file is found by each of the usual endings."""
    http_server.serve("SUMS", SUMS)
    http_server.serve(f"SUMS{ending}", publisher.sign(SUMS))
    assert run(http_server, publisher)["format"] == "raw"


def test_signature_within(http_server: HttpServer, publisher: Publisher) -> None:
    """A signature may be inside the file."""
    http_server.serve("SUMS", publisher.clear_sign(SUMS))
    assert run(http_server, publisher)["format"] == "raw"


def test_only_what_is_signed_counts(http_server: HttpServer, publisher: Publisher) -> None:
    """A line after the signed text is ignored."""
    other = publisher.clear_sign(b"0" * 64 + b"  other\n")
    http_server.serve("SUMS", other + SUMS)
    with pytest.raises((InvalidRequest, SourceDenied)):
        run(http_server, publisher)


def changed(publisher: Publisher, _: Publisher) -> bytes:
    return publisher.sign(SUMS + b"more")


def strange(_: Publisher, stranger: Publisher) -> bytes:
    return stranger.sign(SUMS)


def garbage(_: Publisher, __: Publisher) -> bytes:
    return b"no signature"


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize(
    ("bad", "text"), [(changed, "has been changed"), (strange, "not in the keyring"), (garbage, "cannot be read")]
)
def test_bad(
    http_server: HttpServer, publisher: Publisher, stranger: Publisher, bad: Any, text: str, required: bool
) -> None:
    """A bad signature is refused with the reason, required or not."""
    http_server.serve("SUMS", SUMS)
    http_server.serve("SUMS.asc", bad(publisher, stranger))
    with pytest.raises(SourceDenied, match=text):
        run(http_server, publisher, require_signature=required)


def test_missing(http_server: HttpServer, publisher: Publisher) -> None:
    """A file without a signature is refused."""
    http_server.serve("SUMS", SUMS)
    with pytest.raises(SourceDenied, match="not signed"):
        run(http_server, publisher)


def test_missing_where_none_is_required(http_server: HttpServer, publisher: Publisher) -> None:
    """A file without a signature is accepted if the settings do not require one."""
    http_server.serve("SUMS", SUMS)
    assert run(http_server, publisher, require_signature=False)["format"] == "raw"


def test_no_such_keyring(http_server: HttpServer, publisher: Publisher) -> None:
    """A missing keyring is an error of the settings."""
    http_server.serve("SUMS", SUMS)
    http_server.serve("SUMS.asc", publisher.sign(SUMS))
    with pytest.raises(ConfigError):
        run(http_server, publisher, keyring="/nonexistent/keys.gpg")
