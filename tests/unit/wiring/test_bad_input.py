"""Bad input from a user's view: each row is a mistake, its message and its exit status.

Every row runs the real command against a real server, then checks that no store has leftovers.
The module test_bad_neighbours has the faults of a vCenter, an S3 server or the broker.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cli import main
from tests import images
from tests.neighbours import free_port
from tests.servers.http import Behaviour, HttpServer

IMAGE = images.qcow2()
RAW = images.mbr(4 << 20)
HUGE = 1 << 60

#: The request of a case, given the server.
Ask = Callable[[HttpServer], dict[str, Any]]


@dataclass
class Case:
    """A request and its expected outcome."""

    ask: Ask
    error: str
    said: str
    exit: int = 1
    #: Set by the settings' environment names.
    environ: dict[str, str] = field(default_factory=dict)


def served(data: bytes = IMAGE, *, request: dict[str, Any] | None = None, **behaviour: Any) -> Ask:
    """Return a download of *data* from a server with this behaviour."""
    return lambda server: {"url": server.serve("image", data, **behaviour)} | (request or {})


def asked(**request: Any) -> Ask:
    """Return another request for a valid image."""
    return served(request=request)


QUICK = {"SSVM_DOWNLOAD__RESUMES": "1"}
STALL = QUICK | {"SSVM_DOWNLOAD__STALL_S": "0.6", "SSVM_DOWNLOAD__RESUMES": "0"}


def changing(times: int) -> Behaviour | None:
    """Serve a file that changes with each request, and break off each time."""
    return Behaviour(RAW, etag=f'"v{times}-"', cut_after=1 << 20, then=changing(times - 1)) if times else None


CASES = {
    # checksums
    "wrong checksum": Case(asked(checksum="sha256:" + "0" * 64), "ChecksumMismatch", "expected sha256:0000"),
    "checksum of an unknown algorithm": Case(asked(checksum="crc32:12345678"), "InvalidRequest", "unknown form", 2),
    "checksum too short": Case(asked(checksum="sha256:1234"), "InvalidRequest", "has 64 hex digits, not 4", 2),
    "checksum that is no hex": Case(asked(checksum="sha256:" + "x" * 64), "InvalidRequest", "hex digits", 2),
    "sums file that does not name the image": Case(
        lambda server: {
            "url": server.serve("image", IMAGE),
            "checksum": server.serve("SUMS", b"0" * 64 + b"  other.qcow2\n"),
        },
        "InvalidRequest",
        "names no 'image'",
    ),
    "sums file missing": Case(
        lambda server: {"url": server.serve("image", IMAGE), "checksum": server.url("SUMS")}, "SourceNotFound", "SUMS"
    ),
    # answers
    "404": Case(served(status=404), "SourceNotFound", "404"),
    "403": Case(served(status=403), "SourceDenied", "403"),
    "401": Case(served(status=401), "SourceDenied", "401"),
    "500": Case(served(status=500), "SourceUnavailable", "500", 75, QUICK),
    "redirect loop": Case(lambda server: {"url": server.redirect("a", "/a")}, "SourceDenied", "redirect"),
    "redirect to another scheme": Case(
        lambda server: {"url": server.redirect("a", "file:///etc/passwd")}, "SourceDenied", "file"
    ),
    "redirect to a metadata address": Case(
        lambda server: {"url": server.redirect("a", "http://169.254.169.254/latest")}, "SourceDenied", "169.254.169.254"
    ),
    "no server listens": Case(
        lambda server: {"url": f"http://127.0.0.1:{free_port()}/x"}, "SourceUnavailable", "127.0.0.1", 75, QUICK
    ),
    "address that is not allowed": Case(
        asked(), "SourceDenied", "allow_networks", environ={"SSVM_DOWNLOAD__ALLOW_NETWORKS": "192.0.2.0/24"}
    ),
    "scheme that is not taken": Case(lambda _: {"url": "gopher://x/y"}, "InvalidRequest", "gopher", 2),
    "file URL": Case(lambda _: {"url": "file:///etc/passwd"}, "InvalidRequest", "allow_directories"),
    "password in the URL": Case(
        lambda server: {"url": server.url("x").replace("//", "//me:s3cret@")}, "InvalidRequest", "password", 2
    ),
    # bodies
    "body shorter than promised": Case(
        served(RAW, content_length=str(len(RAW) + 1000), ranges=False), "SourceUnavailable", "", 75, QUICK
    ),
    "body longer than promised": Case(
        served(RAW, content_length=str(len(RAW) - 1000), request={"checksum": sha256(RAW).hexdigest()}),
        "ChecksumMismatch",
        "expected",
    ),
    "body cut, every time, no ranges": Case(
        served(RAW, cut_after=100_000, ranges=False), "SourceUnavailable", "", 75, QUICK
    ),
    "stalls": Case(served(RAW, stall_after=100_000), "SourceUnavailable", "moved", 75, STALL),
    "drips": Case(served(RAW, drip=True), "SourceUnavailable", "moved", 75, STALL),
    "chunked without an end": Case(
        served(RAW, chunked=True, cut_after=100_000, ranges=False), "SourceUnavailable", "", 75, QUICK
    ),
    "changes between each two ranges": Case(
        served(RAW, cut_after=1 << 20, then=changing(9)), "SourceChanged", "ETag was"
    ),
    "empty": Case(served(b""), "SourceNotFound", "empty"),
    "HTML error page with status 200": Case(
        served(b"<!DOCTYPE html><html><body>Not found</body></html>" * 20), "UnknownFormat", "HTML"
    ),
    # images
    "no known format": Case(served(b"just some text\n" * 100), "UnknownFormat", ""),
    "compressed, and damaged": Case(served(b"\x1f\x8b\x08" + bytes(4096)), "CorruptImage", "gzip"),
    "another format than asked for": Case(asked(format="vhdx"), "UnknownFormat", "vhdx was asked for"),
    "unknown format asked for": Case(asked(format="floppy"), "InvalidRequest", "Unknown image format", 2),
    "names a backing file": Case(served(images.qcow2_backed_by("/etc/passwd")), "UnsafeImage", "/etc/passwd"),
    "names a data file": Case(served(images.qcow2_data_file("/dev/sda")), "UnsafeImage", "another file: /dev/sda"),
    "descriptor that points outside": Case(
        served(b'# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\nRW 8 FLAT "/etc/shadow" 0\n'),
        "UnsafeImage",
        "",
    ),
    "two formats at once": Case(
        served(images.iso(20, system_area=images.qcow2()[:32768])), "AmbiguousFormat", "at once"
    ),
    "virtual size absurd": Case(served(images.qcow2(size=1 << 62)), "CorruptImage|TooLarge|UnsafeImage", ""),
    # sizes
    "larger than max_bytes": Case(served(RAW, request={"max_bytes": 1000}), "TooLarge", "1000"),
    "larger than max_bytes, length unknown": Case(
        served(RAW, content_length="", request={"max_bytes": 1000}), "TooLarge", "1000"
    ),
    "larger than the settings allow": Case(
        served(RAW), "TooLarge", "1000", environ={"SSVM_DOWNLOAD__MAX_BYTES": "1000"}
    ),
    "larger than the free space": Case(
        served(RAW, content_length=str(HUGE)), "StoreFull", "", environ={"SSVM_DOWNLOAD__MAX_BYTES": str(2 * HUGE)}
    ),
    # names and paths
    "id that climbs": Case(asked(id="../../etc"), "InvalidRequest", "id", 2),
    "id with NUL": Case(asked(id="a\0b"), "InvalidRequest", "id", 2),
    "absolute id": Case(asked(id="/etc/passwd"), "InvalidRequest", "id", 2),
    "id of 300 characters": Case(asked(id="a" * 300), "InvalidRequest", "300 characters", 2),
    "account that climbs": Case(asked(account=".."), "InvalidRequest", "account", 2),
    "name that climbs": Case(asked(name="../../etc/passwd"), "InvalidRequest", "name", 2),
    "name with NUL": Case(asked(name="a\0b"), "InvalidRequest", "name", 2),
    "name of 300 characters": Case(asked(name="a" * 300), "InvalidRequest", "name", 2),
    "name with control characters": Case(asked(name="a\x1b[31m"), "InvalidRequest", "name", 2),
    "job id that climbs": Case(asked(job_id="../x"), "InvalidRequest", "job_id", 2),
    # requests and settings
    "unknown field": Case(asked(chekcsum="x"), "InvalidRequest", "did you mean checksum", 2),
    "field missing": Case(lambda _: {}, "InvalidRequest", "url: missing", 2),
    "unknown store": Case(asked(stores=["nowhere"]), "InvalidRequest", "primary", 2),
    "unknown credentials": Case(asked(credentials="nobody"), "InvalidRequest", "nobody", 2),
    "unknown setting": Case(asked(), "ConfigError", "did you mean stall_s", 2, {"SSVM_DOWNLOAD__STALLS": "1"}),
    "setting of a wrong type": Case(asked(), "ConfigError", "retry.max_attempts", 2, {"SSVM_RETRY__MAX_ATTEMPTS": "x"}),
}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory that is the configured store."""
    root = tmp_path / "store"
    root.mkdir()
    monkeypatch.setenv("SSVM_STORES__PRIMARY__URL", f"file://{root}")
    monkeypatch.setenv("SSVM_DOWNLOAD__ALLOW_NETWORKS", "127.0.0.0/8")
    return root


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_input(
    case: Case,
    store: Path,
    http_server: HttpServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bad input gives a clear error of its class and exit status, and leaves nothing on any store."""
    for name, value in case.environ.items():
        monkeypatch.setenv(name, value)
    request = tmp_path / "request.json"
    fields = case.ask(http_server)
    request.write_text(json.dumps({"account": "2", "id": "7"} | fields if fields else {}))

    status = main(["run", "download", "--json", "--request", str(request)])

    shown = json.loads(capsys.readouterr().out)
    assert shown["error"] in case.error.split("|"), shown
    assert case.said in shown["message"]
    assert status == case.exit
    assert shown["remedy"]
    assert [path for path in store.rglob("*") if path.is_file()] == []


def test_secrets_of_a_url_are_not_repeated(
    store: Path, http_server: HttpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error never repeats a secret of a URL."""
    url = http_server.serve("image", IMAGE, status=403) + "?X-Amz-Signature=s3cret"

    main(["run", "download", "--json", "--url", url, "--account", "2", "--id", "7"])

    assert "s3cret" not in "".join(capsys.readouterr())
