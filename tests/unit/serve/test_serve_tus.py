"""tus 1.0: an upload in pieces that resumes after a break."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import find_manifest
from ssvm_worker.config.schema import StoreSection
from ssvm_worker.ledger.links import Link
from ssvm_worker.streaming.pipeline import read_bytes
from ssvm_worker.wiring import assembly
from tests import images
from tests.servers.broker import Broker
from tests.servers.s3 import S3Server
from tests.servers.service import Service, serving, settings_of
from tests.servers.worker import until
from tests.uploads import (
    IMAGE,
    PATCH,
    PREFIX,
    TUS,
    create,
    offset_of,
    patch,
    record,
    stored,
    upload_link,
    url_of,
)


def test_tus_in_pieces(service: Service, at: str) -> None:
    """An upload in pieces gives the same artifact as one in one piece."""
    url = create(service, at)
    for start in range(0, len(IMAGE), 2 << 20):
        answer = patch(service, url, start, IMAGE[start : start + (2 << 20)])
        assert (answer.status, answer.headers["Upload-Offset"]) == (204, str(min(start + (2 << 20), len(IMAGE))))
    assert (service.store / PREFIX / "7.raw").read_bytes() == IMAGE
    assert offset_of(service, url) == len(IMAGE)


def test_tus_options(service: Service, at: str) -> None:
    """OPTIONS returns the supported versions and extensions."""
    answer = service.request("OPTIONS", at)
    assert (answer.status, answer.headers["Tus-Version"]) == (204, "1.0.0")
    assert answer.headers["Tus-Extension"] == "creation,termination,expiration"


def test_tus_goes_on_within(service: Service, at: str) -> None:
    """After a broken PATCH, HEAD returns the offset, and only the rest is sent."""
    url = create(service, at)
    peer = socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])))
    lines = [f"PATCH {url} HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in PATCH.items())]
    lines += ["Upload-Offset: 0", f"Content-Length: {len(IMAGE)}", "", ""]
    peer.sendall("\r\n".join(lines).encode() + IMAGE[: 3 << 20])
    until(lambda: offset_of(service, url) > 0, "some of it has come")
    peer.close()

    def goes_on() -> bool:
        offset = offset_of(service, url)
        return bool(patch(service, url, offset, IMAGE[offset:]).status == 204)

    until(goes_on, "the break was noticed")
    assert (service.store / PREFIX / "7.raw").read_bytes() == IMAGE


def test_tus_goes_on_after_the_part(start_service: Callable[..., Service]) -> None:
    """If the pipeline ended because its sender was absent, the upload resumes at the kept part."""
    service = start_service(stall_s=1.5)
    link = upload_link(service)
    url = create(service, url_of(service, link))
    assert patch(service, url, 0, IMAGE[: 4 << 20]).status == 204
    until(lambda: record(service, link).state == "queued", "nobody waits for the rest")
    assert offset_of(service, url) == 4 << 20
    assert patch(service, url, 4 << 20, IMAGE[4 << 20 :]).status == 204
    assert (service.store / PREFIX / "7.raw").read_bytes() == IMAGE
    assert record(service, link).result is not None


def test_tus_wrong_offset(service: Service, at: str) -> None:
    """Bytes at a wrong offset are refused."""
    url = create(service, at)
    assert patch(service, url, 10, IMAGE[10:]).status == 409
    assert stored(service) == []


def test_tus_creation_begins_again(service: Service, link: Link, at: str) -> None:
    """A new creation starts at the first byte, and earlier bytes are deleted."""
    url = create(service, at)
    assert patch(service, url, 0, IMAGE[: 2 << 20]).status == 204
    again = create(service, at)
    assert (offset_of(service, again), stored(service)) == (0, [])
    assert patch(service, again, 0, IMAGE).status == 204


def test_tus_refused(service: Service, at: str) -> None:
    """An unsafe image is refused with the reason, at the latest after its last byte."""
    data = images.qcow2_backed_by("/etc/passwd")
    answer = patch(service, create(service, at, len(data)), 0, data)
    assert (answer.status, json.loads(answer.data)["error"], stored(service)) == (422, "UnsafeImage", [])


def test_tus_terminated(service: Service, link: Link, at: str) -> None:
    """A terminated upload leaves nothing, and its link ends."""
    url = create(service, at)
    assert patch(service, url, 0, IMAGE[: 2 << 20]).status == 204
    assert service.request("DELETE", url, headers=TUS).status == 204
    assert (stored(service), record(service, link).state) == ([], "cancelled")
    assert service.request("HEAD", url, headers=TUS).status == 410


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Upload-Length": "10"}, 412),
        (TUS, 400),
        (TUS | {"Upload-Length": "-1"}, 400),
        (TUS | {"Upload-Length": "9" * 18}, 413),
        (TUS | {"Upload-Length": "0"}, 400),
        (TUS | {"Upload-Defer-Length": "1"}, 400),
        (TUS | {"Upload-Length": "10", "Upload-Metadata": "name \u00e9"}, 400),
        (TUS | {"Upload-Length": "10", "Upload-Metadata": "name " + "A" * 4000}, 400),
        ({"Tus-Resumable": "0.2.2", "Upload-Length": "10"}, 412),
    ],
)
def test_tus_creation_refused(service: Service, at: str, headers: dict[str, str], status: int) -> None:
    """An invalid or too large creation is refused."""
    assert service.request("POST", at, headers=headers).status == status


def test_whole_or_not_there(service: Service, at: str) -> None:
    """Assert that the artifact is complete or absent."""
    store = assembly.open_store_named(service.settings, "primary")
    url = create(service, at)
    patch(service, url, 0, IMAGE[:-1])
    assert find_manifest(store, Artifact("template", "2", "7")) is None
    patch(service, url, len(IMAGE) - 1, IMAGE[-1:])
    assert find_manifest(store, Artifact("template", "2", "7")) is not None


def test_put_in_place_of_tus(service: Service, at: str) -> None:
    """Bytes of a tus upload are not combined with a PUT, which may send another file."""
    patch(service, create(service, at), 0, bytes(1 << 20) + IMAGE[1 << 20 : 3 << 20])
    assert service.request("PUT", at, body=IMAGE).status == 201
    assert (service.store / PREFIX / "7.raw").read_bytes() == IMAGE


def test_tus_is_said_in_every_answer(service: Service, at: str) -> None:
    """The protocol's version is in refusals too."""
    for headers in (PATCH, {"Tus-Resumable": "0.2.2"}, {}):
        for path in (at, at.replace("signature=", "signature=0")):
            answer = service.request("PATCH", path, headers=headers, body=b"")
            assert (answer.headers["Tus-Resumable"], answer.headers["Cache-Control"]) == ("1.0.0", "no-store")
            assert answer.status >= 400


def test_tus_by_post_alone(service: Service, at: str) -> None:
    """A client that can only send POST names the method in a header, which applies instead."""

    def post(url: str, method: str, body: bytes = b"", **headers: str) -> Any:
        given = PATCH | {"X-HTTP-Method-Override": method} | {name.replace("_", "-"): headers[name] for name in headers}
        return service.request("POST", url, headers=given, body=body)

    url = post(at, "POST", Upload_Length=str(len(IMAGE))).headers["Location"]
    assert post(url, "PATCH", IMAGE[: 2 << 20], Upload_Offset="0").status == 204
    told = post(url, "head")
    assert (told.status, told.headers["Upload-Offset"], told.data) == (200, str(2 << 20), b"")
    assert post(url, "OPTIONS").headers["Tus-Version"] == "1.0.0"
    assert post(url, "TRACE").status == 405
    assert post(url, "DELETE").status == 204
    assert post(url, "HEAD").status == 410


def test_tus_content_type_with_parameters(service: Service, at: str) -> None:
    """A charset in the Content-Type is ignored, because some HTTP libraries add one."""
    headers = TUS | {"Content-Type": "Application/Offset+Octet-Stream; charset=utf-8", "Upload-Offset": "0"}
    assert service.request("PATCH", create(service, at), headers=headers, body=IMAGE).status == 204
    for other in ({"Content-Type": "application/octet-stream"}, {}):
        answer = service.request("PATCH", at, headers=TUS | {"Upload-Offset": "0"} | other, body=b"x")
        assert answer.status == 415


@pytest.mark.parametrize("metadata", ["filename ZGlzay5xY293Mg==,is_confidential", "a,b", "name ZA=="])
def test_tus_metadata(service: Service, at: str, metadata: str) -> None:
    """HEAD returns the metadata of the upload's creation."""
    url = service.request("POST", at, headers=TUS | {"Upload-Length": "10", "Upload-Metadata": metadata}).headers[
        "Location"
    ]
    assert service.request("HEAD", url, headers=TUS).headers["Upload-Metadata"] == metadata


@pytest.mark.parametrize("odd", ["x=%E2%82%AC", "x=%0d%0aSet-Cookie:%20a=b", "metadata=%0d%0aa:%20b", "length=%0a1"])
def test_tus_location_has_what_is_signed(service: Service, at: str, odd: str) -> None:
    """The upload's URL has only signed parts of the request's query."""
    answer = service.request("POST", f"{at}&{odd}", headers=TUS | {"Upload-Length": "10"})
    assert (answer.status, answer.headers["Location"]) == (201, f"{at}&length=10")
    assert service.request("HEAD", f"{at}&{odd}&length=10", headers=TUS).status in (200, 404)


def test_below_a_prefix(broker: Broker, tmp_path: Path) -> None:
    """Behind a proxy with a path, the upload's URL has that path, whether the proxy strips it or not."""
    settings = settings_of(broker, tmp_path / "store")
    with serving(settings, path="/images/in") as service:
        at = url_of(service, upload_link(service))
        for asked in (at, "/images/in" + at):
            url = service.request("POST", asked, headers=TUS | {"Upload-Length": str(len(IMAGE))}).headers["Location"]
            assert url == f"/images/in{at}&length={len(IMAGE)}"
        assert b"<form>" in service.request("GET", "/images/in" + at).data
        assert patch(service, url.removeprefix("/images/in"), 0, IMAGE[: 2 << 20]).status == 204
        assert patch(service, url, 2 << 20, IMAGE[2 << 20 :]).status == 204
        assert (service.store / PREFIX / "7.raw").read_bytes() == IMAGE
        assert service.request("GET", "/images/in/health").status == 200


def test_into_s3(broker: Broker, tmp_path: Path, s3_server: S3Server) -> None:
    """An upload to S3 works like one to a directory, also in pieces."""
    store = StoreSection(
        url=f"s3://{s3_server.make_bucket()}",
        endpoint=s3_server.endpoint,
        access_key=SecretStr(s3_server.access_key),
        secret_key=SecretStr(s3_server.secret_key),
    )
    settings = settings_of(broker, tmp_path / "store").model_copy(update={"stores": {"primary": store}})
    with serving(settings) as service:
        url = create(service, url_of(service, upload_link(service)))
        for start in (0, 3 << 20):
            assert patch(service, url, start, IMAGE[start : start + (3 << 20)]).status == 204
        assert read_bytes(assembly.open_store_named(settings, "primary"), f"{PREFIX}/7.raw") == IMAGE


def test_another_file(start_service: Callable[..., Service]) -> None:
    """A part of one file is not combined with another file, which starts at its first byte."""
    service = start_service(stall_s=1.5)
    link = upload_link(service)
    patch(service, create(service, url_of(service, link)), 0, b"x" * 512 + IMAGE[512 : 2 << 20])
    until(lambda: record(service, link).state == "queued", "nobody waits for the rest")
    other = images.mbr(4 << 20)
    url = f"{url_of(service, link)}&length={len(other)}"
    assert (offset_of(service, url), patch(service, url, 0, other).status) == (0, 204)
    assert (service.store / PREFIX / "7.raw").read_bytes() == other


def test_the_end_is_told_again(service: Service, at: str) -> None:
    """A client that missed the final answer and continues after the last byte receives it again."""
    url = create(service, at)
    assert patch(service, url, 0, IMAGE).status == 204
    assert (offset_of(service, url), patch(service, url, len(IMAGE), b"").status) == (len(IMAGE), 204)
