"""Upload links: an image comes in by PUT or by tus, through the download job's pipeline, once, or not at all."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker import assembly, cli
from ssvm_worker.errors import ObjectNotFound
from ssvm_worker.keys import Artifact
from ssvm_worker.ledger import Record
from ssvm_worker.links import PUT, Link, new_id
from ssvm_worker.manifest import find_manifest
from ssvm_worker.serve.session import Inbox
from tests import images
from tests.servers.service import Service, settings_file
from tests.servers.worker import until

IMAGE = images.mbr(6 << 20)
SHA256 = hashlib.sha256(IMAGE).hexdigest()
PREFIX = "template/tmpl/2/7"
TUS = {"Tus-Resumable": "1.0.0"}
PATCH = TUS | {"Content-Type": "application/offset+octet-stream"}


def upload_link(service: Service, seconds: int = 3600, **request: Any) -> Link:
    """A link that stands."""
    link_id = new_id()
    values = {"url": f"upload:{link_id}", "account": "2", "id": "7", "kind": "template", "stores": ["primary"]}
    link = Link(link_id, PUT, int(time.time()) + seconds, "primary", PREFIX, values | request)
    assembly.open_links(service.settings).add(link)
    return link


def url_of(service: Service, link: Link) -> str:
    return assembly.link_signer(service.settings).sign(link.path, link.until)


def record(service: Service, link: Link) -> Record:
    with assembly.open_ledger(service.settings) as ledger:
        return ledger.get(link.job_id)


def stored(service: Service) -> list[str]:
    """All that lies in the store, hidden parts too."""
    return sorted(each.name for each in service.store.rglob("*") if each.is_file())


@pytest.fixture
def link(service: Service) -> Link:
    """One without conditions."""
    return upload_link(service)


@pytest.fixture
def at(service: Service, link: Link) -> str:
    """Its URL."""
    return url_of(service, link)


def create(service: Service, at: str, length: int = len(IMAGE)) -> str:
    """A tus upload; returns its URL."""
    answer = service.request("POST", at, headers=TUS | {"Upload-Length": str(length)})
    assert answer.status == 201
    return answer.headers["Location"]


def patch(service: Service, url: str, offset: int, data: bytes) -> Any:
    return service.request("PATCH", url, headers=PATCH | {"Upload-Offset": str(offset)}, body=data)


def offset_of(service: Service, url: str) -> int:
    answer = service.request("HEAD", url, headers=TUS)
    assert answer.status == 200
    return int(answer.headers["Upload-Offset"])


def begin_put(service: Service, at: str, data: bytes, length: int = len(IMAGE)) -> socket.socket:
    """A PUT of which *data* has been sent."""
    peer = socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])))
    peer.sendall(f"PUT {at} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode() + data)
    return peer


def test_put(service: Service, link: Link, at: str) -> None:
    """What is sent by PUT is an artifact like any download, and a job of the ledger like any other."""
    answer = service.request("PUT", at, body=IMAGE)
    assert (answer.status, json.loads(answer.data)["digest"]) == (201, f"sha256:{SHA256}")
    assert (service.store / PREFIX / "7.raw").read_bytes() == IMAGE
    assert stored(service) == ["7.raw", "manifest.json", "template.properties"]
    assert (record(service, link).state, record(service, link).job) == ("succeeded", "download")


def test_put_of_unknown_length(service: Service, at: str) -> None:
    """A length need not be known: `… | curl -T -`."""
    answer = service.request("PUT", at, body=iter([IMAGE[: 1 << 20], IMAGE[1 << 20 :]]), chunked=True)
    assert (answer.status, (service.store / PREFIX / "7.raw").read_bytes() == IMAGE) == (201, True)


def test_once(service: Service, at: str) -> None:
    """A link that has been used is refused, and what it brought stays as it is."""
    assert service.request("PUT", at, body=IMAGE).status == 201
    assert service.request("PUT", at, body=images.mbr(1 << 20)).status == 409
    assert (service.store / PREFIX / "7.raw").read_bytes() == IMAGE


@pytest.mark.parametrize(
    ("request_", "data", "status", "error"),
    [
        ({"checksum": "sha256:" + "0" * 64}, IMAGE, 422, "ChecksumMismatch"),
        ({"max_bytes": 1 << 20}, IMAGE, 413, ""),
        ({"format": "qcow2"}, IMAGE, 422, "UnknownFormat"),
        ({}, b"<html>" + bytes(1 << 20), 422, "UnknownFormat"),
        ({}, images.qcow2_backed_by("/etc/passwd"), 422, "UnsafeImage"),
        ({}, b"", 422, "UnknownFormat"),
    ],
)
def test_refused(service: Service, request_: dict[str, Any], data: bytes, status: int, error: str) -> None:
    """What a download would refuse is refused, with the reason; nothing of it is there, and a better one may follow."""
    link = upload_link(service, **request_)
    answer = service.request("PUT", url_of(service, link), body=data)
    assert (answer.status, error in answer.data.decode()) == (status, True)
    assert stored(service) == []


def test_failed_upload_is_retried(service: Service, link: Link, at: str) -> None:
    """After a failure the same link takes the right file, and the ledger tells of both attempts."""
    assert service.request("PUT", at, body=b"<html>" + bytes(1 << 20)).status == 422
    assert record(service, link).state == "failed"
    assert service.request("PUT", at, body=IMAGE).status == 201
    assert [bool(each.error) for each in record(service, link).attempts] == [True, False]


def test_broken_put(service: Service, link: Link, at: str) -> None:
    """A PUT that breaks leaves nothing, and the link takes it again from its first byte."""
    begin_put(service, at, IMAGE[: 3 << 20]).close()
    until(lambda: _state(service, link) == "queued" and record(service, link).attempts, "the job waits for its sender")
    assert stored(service) == []
    assert service.request("PUT", at, body=IMAGE).status == 201


def _state(service: Service, link: Link) -> str:
    try:
        return record(service, link).state
    except ObjectNotFound:
        return ""


def test_two_at_once(service: Service, link: Link, at: str) -> None:
    """While one sends, another is refused, by the same link or by another for the same artifact."""
    with begin_put(service, at, IMAGE[: 1 << 20]) as peer:
        until(lambda: _state(service, link) == "running", "the first sends")
        assert service.request("PUT", at, body=IMAGE).status == 423
        assert service.request("PUT", url_of(service, upload_link(service)), body=IMAGE).status == 423
        peer.sendall(IMAGE[1 << 20 :])
        assert peer.recv(100).startswith(b"HTTP/1.1 201")
    assert (service.store / PREFIX / "7.raw").read_bytes() == IMAGE


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "POST", "PATCH", "DELETE"])
def test_badly_signed(service: Service, at: str, method: str) -> None:
    """Who is not let in changes nothing: no file, and no key in the ledger."""
    client = assembly.open_links(service.settings)._redis
    before = client.dbsize()
    headers = PATCH | {"Upload-Length": "10", "Upload-Offset": "0"}
    answer = service.request(method, at.replace("signature=", "signature=0"), headers=headers, body=b"0123456789")
    assert (answer.status, client.dbsize(), stored(service)) == (403, before, [])


def test_link_to_fetch_is_none_to_send(service: Service, at: str) -> None:
    """The signature holds what the link is for: it cannot be used in another place."""
    assert service.request("GET", at.replace("/put/", "/get/").replace("?", "/primary/x?", 1)).status == 403


def test_expired(service: Service) -> None:
    """An upload cannot begin when the link has expired."""
    assert service.request("PUT", url_of(service, upload_link(service, seconds=-1)), body=IMAGE).status == 410


def test_tus_in_pieces(service: Service, at: str) -> None:
    """An upload in pieces is the same artifact as one in one piece."""
    url = create(service, at)
    for start in range(0, len(IMAGE), 2 << 20):
        answer = patch(service, url, start, IMAGE[start : start + (2 << 20)])
        assert (answer.status, answer.headers["Upload-Offset"]) == (204, str(min(start + (2 << 20), len(IMAGE))))
    assert (service.store / PREFIX / "7.raw").read_bytes() == IMAGE
    assert offset_of(service, url) == len(IMAGE)


def test_tus_options(service: Service, at: str) -> None:
    """What is spoken is told to whoever asks."""
    answer = service.request("OPTIONS", at)
    assert (answer.status, answer.headers["Tus-Version"]) == (204, "1.0.0")
    assert answer.headers["Tus-Extension"] == "creation,termination,expiration"


def test_tus_goes_on_within(service: Service, at: str) -> None:
    """A broken PATCH costs what was under way: HEAD says where to go on, and the rest is all that is sent."""
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
    """When the pipeline was ended for want of a sender, the part it left is where to go on."""
    service = start_service(stall_s=0.5)
    link = upload_link(service)
    url = create(service, url_of(service, link))
    assert patch(service, url, 0, IMAGE[: 4 << 20]).status == 204
    until(lambda: record(service, link).state == "queued", "nobody waits for the rest")
    assert offset_of(service, url) == 4 << 20
    assert patch(service, url, 4 << 20, IMAGE[4 << 20 :]).status == 204
    assert (service.store / PREFIX / "7.raw").read_bytes() == IMAGE
    assert record(service, link).result is not None


def test_tus_wrong_offset(service: Service, at: str) -> None:
    """Bytes that belong elsewhere are refused."""
    url = create(service, at)
    assert patch(service, url, 10, IMAGE[10:]).status == 409
    assert stored(service) == []


def test_tus_creation_begins_again(service: Service, link: Link, at: str) -> None:
    """Who creates the upload anew begins at its first byte, and what had come goes."""
    url = create(service, at)
    assert patch(service, url, 0, IMAGE[: 2 << 20]).status == 204
    again = create(service, at)
    assert (offset_of(service, again), stored(service)) == (0, [])
    assert patch(service, again, 0, IMAGE).status == 204


def test_tus_refused(service: Service, at: str) -> None:
    """An unsafe image is refused when its last byte has come at the latest, with the reason."""
    data = images.qcow2_backed_by("/etc/passwd")
    answer = patch(service, create(service, at, len(data)), 0, data)
    assert (answer.status, json.loads(answer.data)["error"], stored(service)) == (422, "UnsafeImage", [])


def test_tus_terminated(service: Service, link: Link, at: str) -> None:
    """An upload that its sender gives up leaves nothing, and its link ends."""
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
    ],
)
def test_tus_creation_refused(service: Service, at: str, headers: dict[str, str], status: int) -> None:
    """A creation that is none, or too large, is refused."""
    assert service.request("POST", at, headers=headers).status == status


def test_page(service: Service, at: str) -> None:
    """The page says what will be stored where, runs no script but its own, and tells nobody its address."""
    answer = service.request("GET", at)
    assert PREFIX in answer.data.decode()
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Referrer-Policy"] == "no-referrer"


def test_whole_or_not_there(service: Service, at: str) -> None:
    """The artifact is whole, or nothing of it is there."""
    store = assembly.open_store_named(service.settings, "primary")
    url = create(service, at)
    patch(service, url, 0, IMAGE[:-1])
    assert find_manifest(store, Artifact("template", "2", "7")) is None
    patch(service, url, len(IMAGE) - 1, IMAGE[-1:])
    assert find_manifest(store, Artifact("template", "2", "7")) is not None


def test_command(service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`ssvm link --upload` gives a URL that takes an image with the conditions that were given, and no second one."""
    file = settings_file(service, tmp_path)
    argv = ["link", "--config", str(file), "--json", "--upload", PREFIX]
    assert cli.main([*argv, "--checksum", f"sha256:{SHA256}", "--name", "Debian", "--max-bytes", str(len(IMAGE))]) == 0
    made = json.loads(capsys.readouterr().out)
    assert service.request("PUT", made["url"], body=IMAGE[:-1] + b"x").status == 422
    assert service.request("PUT", made["url"], body=IMAGE).status == 201
    assert b"Debian" in (service.store / PREFIX / "template.properties").read_bytes()
    assert cli.main(argv) == 1
    assert "one already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["snapshots/2/v/7"], "kind"),
        (["elsewhere/7"], "No artifact can lie there"),
        ([PREFIX, "--checksum", "12"], "hecksum"),
        ([PREFIX, "--format", "exe"], "format"),
        ([PREFIX, "--max-bytes", "-1"], "max_bytes"),
        ([PREFIX, "--kind", "volume"], "No volume lies there"),
        ([PREFIX, "--store", "nowhere"], "no image store"),
    ],
)
def test_command_refused(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    """What is wrong with a request is said when the link is asked for, not to its sender."""
    assert cli.main(["link", "--config", str(settings_file(service, tmp_path)), "--upload", *argv]) == 1
    assert says in capsys.readouterr().err


def test_revoked_while_it_is_sent(service: Service, tmp_path: Path, link: Link, at: str) -> None:
    """Revoking the link of an upload stops who sends by it, and leaves nothing."""
    file = settings_file(service, tmp_path)
    with begin_put(service, at, IMAGE[: 1 << 20]) as peer:
        until(lambda: _state(service, link) == "running", "somebody sends")
        assert cli.main(["link", "--config", str(file), "--revoke", link.id]) == 0
        assert peer.recv(100).startswith(b"HTTP/1.1 410")
    assert (record(service, link).state, stored(service)) == ("cancelled", [])


def test_service_tidies(service: Service, link: Link, at: str) -> None:
    """When a link has ended, what came by it and is not whole goes, and nobody keeps its name."""
    patch(service, create(service, at), 0, IMAGE[: 2 << 20])
    book = assembly.open_links(service.settings)
    inbox = Inbox(service.settings, assembly.open_ledger(service.settings))
    book.revoke(link)
    inbox.end_links()
    assert (record(service, link).state, book.gone()) == ("running", [("put", link.id)])
    inbox.ledger.cancel(link.job_id, "a person")
    until(lambda: record(service, link).state == "cancelled", "the sender is stopped")
    inbox.end_links()
    assert (stored(service), book.gone()) == ([], [])


def test_cleanup_ends_links(start_service: Callable[..., Service], tmp_path: Path) -> None:
    """Clean-up forgets links that have ended, cancels uploads that wait by them, and then removes what had come."""
    service = start_service(stall_s=0.3)
    link = upload_link(service)
    patch(service, create(service, url_of(service, link)), 0, IMAGE[: 2 << 20])
    until(lambda: record(service, link).state == "queued", "nobody waits for the rest")
    file, argv = settings_file(service, tmp_path), ["--older-than", "0s"]
    assert cli.main(["cleanup", "--config", str(file), *argv]) == 0
    assert len(stored(service)) == 2  # the draft and the part of an upload that may go on
    assembly.open_links(service.settings).revoke(link)
    assert cli.main(["cleanup", "--config", str(file), "--dry-run"]) == 0
    assert record(service, link).state == "queued"
    assert cli.main(["cleanup", "--config", str(file), *argv]) == 0
    assert (record(service, link).state, stored(service)) == ("cancelled", [])
