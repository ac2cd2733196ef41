"""Upload links: an image passes the download job's pipeline once, or is refused."""

from __future__ import annotations

import json
import select
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker import cli
from ssvm_worker.config.schema import QuotaSection
from ssvm_worker.ledger.links import Link
from ssvm_worker.operations.scaling import decisions
from ssvm_worker.serve.upload_job import Inbox
from ssvm_worker.wiring import assembly
from ssvm_worker.wiring.celery_sender import send_wakeup
from tests import images
from tests.servers.broker import Broker
from tests.servers.service import Service, serving, settings_file, settings_of
from tests.servers.worker import until
from tests.uploads import (
    IMAGE,
    PATCH,
    PREFIX,
    SHA256,
    TUS,
    begin_put,
    create,
    is_interrupted,
    patch,
    record,
    state,
    stored,
    upload_link,
    url_of,
)
from tests.waiting import PATIENCE_S


def test_put(service: Service, link: Link, at: str) -> None:
    """A PUT creates an artifact like any download, and a job of the ledger."""
    answer = service.request("PUT", at, body=IMAGE)
    assert (answer.status, json.loads(answer.data)["digest"]) == (201, f"sha256:{SHA256}")
    assert (service.store / PREFIX / "7.raw").read_bytes() == IMAGE
    assert stored(service) == ["7.raw", "manifest.json", "template.properties"]
    assert (record(service, link).state, record(service, link).job) == ("succeeded", "download")


def test_put_of_unknown_length(service: Service, at: str) -> None:
    """The length may be unknown, as in `… | curl -T -`."""
    answer = service.request("PUT", at, body=iter([IMAGE[: 1 << 20], IMAGE[1 << 20 :]]), chunked=True)
    assert (answer.status, (service.store / PREFIX / "7.raw").read_bytes() == IMAGE) == (201, True)


def test_once(service: Service, at: str) -> None:
    """A used link is refused, and its artifact stays unchanged."""
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
    """An image that a download would refuse is refused with the reason, and the link stays usable."""
    link = upload_link(service, **request_)
    answer = service.request("PUT", url_of(service, link), body=data)
    assert (answer.status, error in answer.data.decode()) == (status, True)
    assert stored(service) == []


def test_failed_upload_is_retried(service: Service, link: Link, at: str) -> None:
    """After a failure the same link accepts the right file, and the ledger has both attempts."""
    assert service.request("PUT", at, body=b"<html>" + bytes(1 << 20)).status == 422
    assert record(service, link).state == "failed"
    assert service.request("PUT", at, body=IMAGE).status == 201
    assert [bool(each.error) for each in record(service, link).attempts] == [True, False]


def test_broken_put(service: Service, link: Link, at: str) -> None:
    """A broken PUT leaves nothing, and the link accepts it again from its first byte."""
    begin_put(service, at, IMAGE[: 3 << 20]).close()
    until(lambda: is_interrupted(service, link), "the job waits for its sender")
    assert stored(service) == []
    # 423 until the first request has ended; its job has ended already.
    until(lambda: service.request("PUT", at, body=IMAGE).status == 201, "the link takes it again")


def test_two_at_once(service: Service, link: Link, at: str) -> None:
    """During an upload, another to the same artifact is refused, by this or another link."""
    with begin_put(service, at, IMAGE[: 1 << 20]) as peer:
        until(lambda: state(service, link) == "running", "the first sends")
        assert service.request("PUT", at, body=IMAGE).status == 423
        assert service.request("PUT", url_of(service, upload_link(service)), body=IMAGE).status == 423
        peer.sendall(IMAGE[1 << 20 :])
        assert peer.recv(100).startswith(b"HTTP/1.1 201")
    assert (service.store / PREFIX / "7.raw").read_bytes() == IMAGE


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "POST", "PATCH", "DELETE"])
def test_badly_signed(service: Service, at: str, method: str) -> None:
    """An unauthorised client changes nothing: no file, and no key in the ledger."""
    client = assembly.open_links(service.settings)._redis
    before = client.dbsize()
    headers = PATCH | {"Upload-Length": "10", "Upload-Offset": "0"}
    answer = service.request(method, at.replace("signature=", "signature=0"), headers=headers, body=b"0123456789")
    assert (answer.status, client.dbsize(), stored(service)) == (403, before, [])


def test_link_to_fetch_is_none_to_send(service: Service, at: str) -> None:
    """The signature contains the link's purpose, so a link cannot be used for another one."""
    assert service.request("GET", at.replace("/put/", "/get/").replace("?", "/primary/x?", 1)).status == 403


def test_expired(service: Service) -> None:
    """An upload cannot start after the link's expiry."""
    assert service.request("PUT", url_of(service, upload_link(service, seconds=-1)), body=IMAGE).status == 410


def test_page(service: Service, at: str) -> None:
    """The page shows the target, runs only its own scripts, and sends no referrer."""
    answer = service.request("GET", at)
    assert PREFIX in answer.data.decode()
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Referrer-Policy"] == "no-referrer"


def test_command(service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`ssvm link --upload` prints a URL with the given conditions, and no second one for its artifact."""
    file = settings_file(service, tmp_path)
    argv = ["link", "--config", str(file), "--json", "--upload", PREFIX]
    assert cli.main([*argv, "--checksum", f"sha256:{SHA256}", "--name", "Debian", "--max-bytes", str(len(IMAGE))]) == 0
    made = json.loads(capsys.readouterr().out)
    assert service.request("PUT", made["url"], body=IMAGE[:-1] + b"x").status == 422
    assert service.request("PUT", made["url"], body=IMAGE).status == 201
    assert b"Debian" in (service.store / PREFIX / "template.properties").read_bytes()
    assert cli.main(argv) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["snapshots/2/v/7"], "kind"),
        (["elsewhere/7"], "Invalid prefix of an artifact"),
        ([PREFIX, "--checksum", "12"], "hecksum"),
        ([PREFIX, "--format", "exe"], "format"),
        ([PREFIX, "--max-bytes", "-1"], "max_bytes"),
        ([PREFIX, "--kind", "volume"], "KEY does not match --kind volume"),
        ([PREFIX, "--store", "nowhere"], "no image store"),
    ],
)
def test_command_refused(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    """An invalid request is refused when the link is created, not during the upload."""
    assert cli.main(["link", "--config", str(settings_file(service, tmp_path)), "--upload", *argv]) == 2
    assert says in capsys.readouterr().err


def test_revoked_while_it_is_sent(service: Service, tmp_path: Path, link: Link, at: str) -> None:
    """The revocation of a link stops its upload and leaves nothing."""
    file = settings_file(service, tmp_path)
    with begin_put(service, at, IMAGE[: 1 << 20]) as peer:
        until(lambda: state(service, link) == "running", "somebody sends")
        assert cli.main(["link", "--config", str(file), "--revoke", link.id]) == 0
        assert peer.recv(100).startswith(b"HTTP/1.1 410")
    assert (record(service, link).state, stored(service)) == ("cancelled", [])


def test_service_tidies(service: Service, link: Link, at: str) -> None:
    """After a link has ended, its incomplete upload is deleted, and its name is forgotten."""
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
    """Clean-up deletes ended links, cancels uploads that wait for them, and then deletes their bytes."""
    service = start_service(stall_s=1.5)
    link = upload_link(service)
    patch(service, create(service, url_of(service, link)), 0, IMAGE[: 2 << 20])
    until(lambda: record(service, link).state == "queued", "nobody waits for the rest")
    file, argv = settings_file(service, tmp_path), ["--older-than", "0s"]
    assert cli.main(["cleanup", "--config", str(file), *argv]) == 0
    assert len(stored(service)) == 2  # the draft and the part of an upload that may resume
    assembly.open_links(service.settings).revoke(link)
    assert cli.main(["cleanup", "--config", str(file), "--dry-run"]) == 0
    assert record(service, link).state == "queued"
    assert cli.main(["cleanup", "--config", str(file), *argv]) == 0
    assert (record(service, link).state, stored(service)) == ("cancelled", [])


def test_quota(broker: Broker, tmp_path: Path) -> None:
    """An upload above the account's quota is refused."""
    settings = settings_of(broker, tmp_path / "store")
    with serving(settings.model_copy(update={"quota": QuotaSection(default=1 << 20)})) as service:
        answer = service.request("PUT", url_of(service, upload_link(service)), body=IMAGE)
        assert (answer.status, "quota" in answer.data.decode(), stored(service)) == (507, True, [])


def test_refused_early(service: Service, at: str) -> None:
    """A sender whose upload cannot be stored is refused before the end of the body."""
    image = images.qcow2_backed_by("/etc/passwd")
    with begin_put(service, at, image, length=1 << 30) as peer:
        peer.settimeout(PATIENCE_S)
        while not select.select([peer], [], [], 0)[0]:
            peer.sendall(bytes(1 << 18))
        answer = peer.recv(4096)
    assert answer.startswith(b"HTTP/1.1 422")
    assert b"connection: close" in answer.lower()
    assert stored(service) == []


def test_curl(service: Service, at: str, tmp_path: Path) -> None:
    """`curl -T` sends a file, and with an invalid link it sends no byte."""
    (file := tmp_path / "image.raw").write_bytes(IMAGE)
    curl = ["curl", "-sS", "-w", "%{http_code} %{size_upload}", "-o", "/dev/null", "-T", str(file)]
    refused = subprocess.run([*curl, service.url + at.replace("signature=", "signature=0")], capture_output=True)
    assert refused.stdout == b"403 0"
    done = subprocess.run([*curl, service.url + at], capture_output=True)
    assert done.stdout == f"201 {len(IMAGE)}".encode()


def test_no_worker_is_called(service: Service, link: Link, at: str) -> None:
    """An upload that waits for its sender sends no message, and requests no worker."""
    begin_put(service, at, IMAGE[: 1 << 20]).close()
    until(lambda: is_interrupted(service, link), "the job waits for its sender")
    assert send_wakeup(service.settings, record(service, link))
    broker = service.settings.broker
    assert not assembly.open_links(service.settings)._redis.exists(f"{broker.prefix}ssvm.zone1.inbound")
    assert [each.queued for each in decisions(service.settings)] == [0]


def test_cleanup_ends_strays(service: Service, link: Link, at: str, tmp_path: Path) -> None:
    """A failed upload that is retried after its link was forgotten does not wait forever."""
    assert service.request("PUT", at, body=b"<html>" + bytes(1 << 20)).status == 422
    book, ledger = assembly.open_links(service.settings), assembly.open_ledger(service.settings)
    book.revoke(link)
    book.forget("put", link.id)
    ledger.retry(link.job_id, "a person")
    assert cli.main(["cleanup", "--config", str(settings_file(service, tmp_path))]) == 0
    assert record(service, link).state == "cancelled"


def test_a_link_does_not_fill_its_record(service: Service, link: Link, at: str) -> None:
    """Repeated failures require pauses and finally end the link, and the record stays small."""
    for _ in range(6):
        assert service.request("PUT", at, body=b"abcd").status == 422
    answer = service.request("PUT", at, body=b"abcd")
    assert (answer.status, int(answer.headers["Retry-After"]) > 0) == (429, True)
    length = {"Upload-Length": "10"}
    assert service.request("POST", at, headers=TUS | length).status == 429
    assert service.request("PATCH", f"{at}&length=4", headers=PATCH | {"Upload-Offset": "0"}, body=b"a").status == 429
    with assembly.open_ledger(service.settings) as ledger:
        while (known := ledger.get(link.job_id)).attempted < 50:
            ledger.retry(link.job_id, "the test")
            claim = ledger.claim(link.job_id, "w")
            assert claim
            assert claim.number == known.attempted + 1
            ledger.finish(claim, "failed", error={"error": "UnknownFormat"})
        assert [each.number for each in ledger.get(link.job_id).attempts] == list(range(31, 51))
        ledger.retry(link.job_id, "the test")
        assert len(ledger.get(link.job_id).attempts) == 20
    assert service.request("PUT", at, body=IMAGE).status == 409


def test_a_broken_sender_must_pause(service: Service, link: Link, at: str) -> None:
    """A broken PUT counts like a failed attempt, so it requires a pause too."""
    begin_put(service, at, IMAGE[: 3 << 20]).close()
    until(lambda: is_interrupted(service, link), "the break was noticed")
    with assembly.open_ledger(service.settings) as ledger:
        for _ in range(15):  # the pause is longer than any test
            claim = ledger.claim(link.job_id, "w")
            assert claim
            ledger.release(claim, None, counted=False)
    until(lambda: service.request("PUT", at, body=IMAGE).status != 423, "the first request has ended")
    assert service.request("PUT", at, body=IMAGE).status == 429
