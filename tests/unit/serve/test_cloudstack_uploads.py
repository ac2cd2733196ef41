"""Browser uploads of CloudStack: the file of a form passes the download job's pipeline once, or leaves no byte."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest
from urllib3.filepost import encode_multipart_formdata

from ssvm_worker.errors import ObjectNotFound
from ssvm_worker.ledger.links import server_link
from ssvm_worker.wiring import assembly
from tests import images
from tests.cloudstack_uploads import UUID, connect_agent, form, metadata, parameters, post, signed
from tests.servers.service import Service
from tests.servers.worker import until
from tests.uploads import stored

IMAGE = images.mbr(6 << 20)
FOLDER = "template/tmpl/1/217"


@pytest.fixture
def service(start_service: Callable[..., Service]) -> Service:
    """A service with the routes of CloudStack, whose agent has been set up."""
    found = start_service(cloudstack=True)
    connect_agent(found)
    return found


def state(service: Service) -> str:
    with assembly.open_ledger(service.settings) as ledger, contextlib.suppress(ObjectNotFound):
        return ledger.get(server_link(UUID)).state
    return ""


def test_post(service: Service) -> None:
    """The file of a form becomes an artifact, and the answer is that of the Java agent."""
    answer = post(service, IMAGE, signed(service))
    assert (answer.status, answer.data) == (200, b"upload successful.")
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert (service.store / FOLDER / "217.raw").read_bytes() == IMAGE
    assert state(service) == "succeeded"


def test_behind_apache(service: Service) -> None:
    """The Apache of a system VM sends the UUID as a parameter, and the browser's host as a header."""
    headers = parameters(f"https://192.0.2.77/upload/{UUID}", metadata()) | {"X-Forwarded-Host": "192.0.2.77"}
    body, kind = form(IMAGE)
    answer = service.request("POST", f"/upload?uuid={UUID}", body=body, headers=headers | {"Content-Type": kind})
    assert answer.status == 200


def test_preflight(service: Service) -> None:
    """A browser may ask whether another origin may send the three headers."""
    asked = {"Origin": "https://cloud.example", "Access-Control-Request-Method": "POST"}
    answer = service.request("OPTIONS", f"/upload/{UUID}", headers=asked)
    assert answer.status == 204
    assert {"x-signature", "x-metadata", "x-expires"} <= set(
        answer.headers["Access-Control-Allow-Headers"].replace(" ", "").split(",")
    )


def test_used_once(service: Service) -> None:
    """A second upload with the same parameters is refused, and the artifact stays."""
    headers = signed(service)
    assert post(service, IMAGE, headers).status == 200
    assert post(service, images.mbr(1 << 20), headers).status == 409
    assert (service.store / FOLDER / "217.raw").read_bytes() == IMAGE


def test_wrong_signature(service: Service) -> None:
    """A wrong signature is refused, and does not use up the upload."""
    assert post(service, IMAGE, signed(service) | {"X-signature": "AAAA"}).status == 400
    assert post(service, IMAGE, signed(service)).status == 200


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"imageFormat": "QCOW2"}, 422),
        ({"checksum": "d41d8cd98f00b204e9800998ecf8427e"}, 422),
        ({"dataTo": "nfs://192.0.2.99/other"}, 400),
        ({"imageFormat": "DOCX"}, 400),
        ({"absolutePath": "template/tmpl/1/../2"}, 400),
        ({"maxUploadSize": "0"}, 200),
    ],
)
def test_conditions(service: Service, fields: dict[str, Any], status: int) -> None:
    """The conditions in the metadata hold for the file."""
    assert post(service, IMAGE, signed(service, **fields)).status == status
    assert bool(stored(service)) == (status == 200)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (lambda: form(b""), 422),
        (lambda: (form(IMAGE)[0][:-8], form(IMAGE)[1]), 400),
        (lambda: encode_multipart_formdata({"name": "value"}), 422),
        (lambda: (IMAGE, "application/octet-stream"), 415),
        (lambda: (IMAGE, "multipart/form-data; boundary=x"), 400),
    ],
)
def test_unfit_forms(service: Service, body: Callable[[], tuple[bytes, str]], status: int) -> None:
    """A form without one complete file stores nothing."""
    data, kind = body()
    boundary = {"Content-Type": kind}
    answer = service.request("POST", f"/upload/{UUID}", body=data, headers=signed(service) | boundary)
    assert (answer.status, stored(service)) == (status, [])


def test_two_files(service: Service) -> None:
    """A form with two files stores neither."""
    body, kind = encode_multipart_formdata([("a", ("a.raw", IMAGE)), ("b", ("b.raw", b"x"))])
    answer = service.request("POST", f"/upload/{UUID}", body=body, headers=signed(service) | {"Content-Type": kind})
    assert (answer.status, stored(service)) == (400, [])


@contextlib.contextmanager
def running_upload(service: Service) -> Iterator[Callable[[], None]]:
    """Send the first 3 MiB of a form, and yield a function that sends the rest. Disconnect after the block."""
    body, kind = form(IMAGE)
    given = signed(service) | {"Content-Type": kind, "Host": service.url.partition("//")[2]}
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as peer:
        peer.sendall(f"POST /upload/{UUID} HTTP/1.1\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode())
        peer.sendall(body[: 3 << 20])
        until(lambda: state(service) == "running", "the upload runs")
        yield lambda: peer.sendall(body[3 << 20 :])


def test_interrupted(service: Service) -> None:
    """An upload whose client disconnects leaves nothing, and another one may follow."""
    with running_upload(service):
        pass
    until(lambda: state(service) == "queued", "the upload ends")
    assert stored(service) == []
    assert post(service, IMAGE, signed(service)).status == 200


def test_aborted(service: Service) -> None:
    """An upload that the management server has cancelled is refused."""
    assembly.open_cloudstack_web(service.settings).abort_upload(UUID)
    assert post(service, IMAGE, signed(service)).status == 410


def test_without_key(start_service: Callable[..., Service]) -> None:
    """Before an agent has got the key of uploads, the answer asks the client to retry."""
    found = start_service(cloudstack=True)
    assert post(found, IMAGE, signed(found)).status == 503


def test_two_at_once(service: Service) -> None:
    """While an upload runs, another one with the same parameters is refused, and the first one is stored."""
    with running_upload(service) as send_rest:
        assert post(service, images.mbr(1 << 20), signed(service)).status == 423
        send_rest()
        until(lambda: state(service) == "succeeded", "the upload ends")
    assert (service.store / FOLDER / "217.raw").read_bytes() == IMAGE


@pytest.mark.parametrize("uuid", ["../../x", "a/b", ".x", "x" * 300, "a\x00b", "a b", "\u00e9", "*", ""])
def test_hostile_uuid(service: Service, uuid: str) -> None:
    """A signed UUID that is no name becomes no job and no file."""
    quoted = quote(uuid, safe="")
    headers = parameters(f"{service.url}/upload/{uuid}", metadata(uuid))
    body, kind = form(IMAGE)
    answer = service.request("POST", f"/upload?uuid={quoted}", body=body, headers=headers | {"Content-Type": kind})
    assert (answer.status, stored(service)) == (400, [])
    with assembly.open_ledger(service.settings) as ledger:
        assert ledger.page() == []
