"""Links to objects: the owner of a link gets the bytes, with ranges and conditions, and others learn nothing."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
import urllib3

from ssvm_worker import cli, config
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, write_manifest
from ssvm_worker.ledger.links import GET, Link, Signer, new_id, object_path
from ssvm_worker.streaming.interfaces import Owner
from ssvm_worker.streaming.pipeline import put_bytes
from ssvm_worker.wiring import assembly
from tests.servers.broker import StoppableBroker
from tests.servers.s3 import S3Server
from tests.servers.service import SECRET, Service, serving, settings_file, settings_of
from tests.waiting import PATIENCE_S

IMAGE = os.urandom(3 << 20)
DIGEST = f"sha256:{hashlib.sha256(IMAGE).hexdigest()}"
KEY = "template/tmpl/2/7/7.qcow2"


def put_image(service: Service, data: bytes = IMAGE, digest: str = DIGEST) -> None:
    """Store an artifact with one object."""
    store, artifact = assembly.open_store_named(service.settings, "primary"), Artifact("template", "2", "7")
    put_bytes(store, KEY, data, Owner())
    write_manifest(store, Manifest(artifact, "j", (Entry("7.qcow2", len(data), digest),)), Owner())


def link(service: Service, key: str = KEY, seconds: int = 3600, store: str = "primary") -> str:
    """Return a registered link to any target."""
    made = Link(new_id(), GET, int(time.time()) + seconds, store, key)
    assembly.open_links(service.settings).add(made)
    return assembly.link_signer(service.settings).sign(made.path, made.until)


@pytest.fixture
def at(service: Service) -> str:
    """Return a link to an image."""
    put_image(service)
    return link(service)


def test_get(service: Service, at: str) -> None:
    """A link gives the exact bytes, with their name, their digest and the support of ranges."""
    answer = service.request("GET", at)
    assert (answer.status, answer.data) == (200, IMAGE)
    assert answer.headers["ETag"] == f'"{DIGEST}"'
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["Content-Disposition"] == 'attachment; filename="7.qcow2"'
    assert answer.headers["Last-Modified"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_head(service: Service, at: str) -> None:
    """HEAD returns the headers of GET without a body."""
    answer = service.request("HEAD", at)
    assert (answer.status, answer.data, answer.headers["Content-Length"]) == (200, b"", str(len(IMAGE)))


def test_range(service: Service, at: str) -> None:
    """A range gives exactly its bytes, so a broken download can resume."""
    answer = service.request("GET", at, headers={"Range": "bytes=1048577-", "If-Range": f'"{DIGEST}"'})
    assert (answer.status, answer.data) == (206, IMAGE[1048577:])
    assert answer.headers["Content-Range"] == f"bytes 1048577-{len(IMAGE) - 1}/{len(IMAGE)}"


def test_range_not_satisfiable(service: Service, at: str) -> None:
    """A range after the end is refused with the size."""
    answer = service.request("GET", at, headers={"Range": f"bytes={len(IMAGE)}-"})
    assert (answer.status, answer.headers["Content-Range"]) == (416, f"bytes */{len(IMAGE)}")


def test_not_modified(service: Service, at: str) -> None:
    """A client with this version gets no body again."""
    answer = service.request("GET", at, headers={"If-None-Match": f'"{DIGEST}"'})
    assert (answer.status, answer.data) == (304, b"")


def test_several_on_one_connection(service: Service, at: str) -> None:
    """After sendfile, the connection accepts another request."""
    pool = urllib3.HTTPConnectionPool("127.0.0.1", int(service.url.rpartition(":")[2]), maxsize=1)
    for first in (0, 100, len(IMAGE) - 1):
        assert pool.request("GET", at, headers={"Range": f"bytes={first}-"}).data == IMAGE[first:]
    assert pool.num_connections == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("signature=", "signature=0"),
        ("7.qcow2?", "8.qcow2?"),
        ("until=", "until=9"),
        ("key=k1", "key=k2"),
        ("/primary/", "/archive/"),
        ("signature=", "nothing="),
    ],
)
def test_badly_signed(service: Service, at: str, old: str, new: str) -> None:
    """A link with one changed character is refused without a request to store or ledger."""
    client = assembly.open_links(service.settings)._redis
    before = client.dbsize(), sorted(service.store.rglob("*")), client.info("commandstats")
    answer = service.request("GET", at.replace(old, new, 1))
    after = client.dbsize(), sorted(service.store.rglob("*"))
    assert (answer.status, b"not valid" in answer.data) == (403, True)
    assert after == before[:2]
    assert client.info("commandstats").get("cmdstat_get") == before[2].get("cmdstat_get")


def test_old_key(service: Service, at: str) -> None:
    """An older key's signature is valid exactly while the settings have that key."""
    signer = Signer({"k0": SECRET, "k1": "another that is as long as the first"}, "k1")
    path, _, query = at.partition("?")
    values = dict(each.split("=") for each in query.split("&"))
    old = Signer({"k0": SECRET}, "k0").sign(path, int(values["until"])).partition("?")[2]
    asked = dict(each.split("=") for each in old.split("&"))
    assert signer.is_signed(path, asked)
    assert not Signer({"k1": SECRET}, "k1").is_signed(path, asked)


def test_expired(service: Service, at: str) -> None:
    """A link is refused from the second of its expiry, even if the ledger still has it."""
    link_id, now = at.split("/")[2], int(time.time())
    signer = assembly.link_signer(service.settings)
    assert service.request("GET", signer.sign(object_path(link_id, "primary", KEY), now + 60)).status == 200
    assert service.request("GET", signer.sign(object_path(link_id, "primary", KEY), now)).status == 410


def test_another_object(service: Service, at: str) -> None:
    """A link's id opens no other object, even with a valid signature."""
    path = object_path(at.split("/")[2], "primary", KEY + ".old")
    assert (
        service.request("GET", assembly.link_signer(service.settings).sign(path, int(time.time()) + 60)).status == 410
    )


def test_signed_but_not_written_down(service: Service, at: str) -> None:
    """A signature is not enough, because the link must be in the ledger."""
    path = object_path(new_id(), "primary", KEY)
    signed = assembly.link_signer(service.settings).sign(path, int(time.time()) + 60)
    assert service.request("GET", signed).status == 410


def test_ledger_away(stoppable_broker: StoppableBroker, tmp_path: Path) -> None:
    """Without the ledger nothing is sent, because revocations are unknown."""
    with serving(settings_of(stoppable_broker.with_prefix("t:"), tmp_path / "store")) as service:
        put_image(service)
        at = link(service)
        stoppable_broker.stop()
        assert service.request("GET", at).status == 503
        stoppable_broker.start()
        assert service.request("GET", at).data == IMAGE


@pytest.mark.parametrize(
    "key",
    ["template/tmpl/2/7/manifest.json", "template/tmpl/2/7/other", "template/tmpl/2/8/8.qcow2", "etc/passwd", "x"],
)
def test_not_listed(service: Service, at: str, key: str) -> None:
    """A file that no manifest lists does not exist for a link."""
    (service.store / "template/tmpl/2/7/other").write_bytes(b"secret")
    assert service.request("GET", link(service, key)).status == 404


def test_symbolic_link(service: Service, at: str) -> None:
    """No symbolic link is followed in any component."""
    directory = service.store / "template/tmpl/2/7"
    (tmp := service.store.parent / "elsewhere").write_bytes(IMAGE)
    (directory / "7.qcow2").unlink()
    (directory / "7.qcow2").symlink_to(tmp)
    assert service.request("GET", at).status >= 400
    moved = directory.rename(service.store.parent / "moved")
    directory.symlink_to(moved)
    (moved / "7.qcow2").unlink()
    (moved / "7.qcow2").write_bytes(IMAGE)
    assert service.request("GET", at).status >= 400


def test_other_size(service: Service, at: str) -> None:
    """An object whose size differs from its manifest is not sent."""
    with (service.store / KEY).open("ab") as file:
        file.write(b"x")
    answer = service.request("GET", at)
    assert (answer.status, json.loads(answer.data)["error"]) == (500, "CorruptImage")


def test_health(service: Service) -> None:
    """Probes need no link."""
    assert service.request("GET", "/health").data == b"ok\n"


def test_slow_reader(start_service: Callable[..., Service]) -> None:
    """A client that stops reading is disconnected, and its thread is free again."""
    service = start_service(stall_s=0.5, min_rate=1 << 20)
    data = bytes(64 << 20)
    put_image(service, data, f"sha256:{hashlib.sha256(data).hexdigest()}")
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as peer:
        peer.sendall(f"GET {link(service)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        while _is_open(peer):
            time.sleep(0.05)
    assert service.request("GET", "/health").status == 200


def test_steady_reader(start_service: Callable[..., Service]) -> None:
    """A steady reader is served far beyond the time limit of a request's head."""
    service = start_service(stall_s=1.5, min_rate=1 << 10)
    data = bytes(64 << 20)
    put_image(service, data, f"sha256:{hashlib.sha256(data).hexdigest()}")
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as peer:
        peer.sendall(f"GET {link(service)} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        received, beyond = 0, time.monotonic() + 2
        while got := len(peer.recv(1 << 17)):
            received += got
            if time.monotonic() < beyond:
                time.sleep(0.01)  # so that it lasts; no code waits for this time
    assert received > len(data)


def _is_open(peer: socket.socket) -> bool:
    """Return whether the connection is open. TCP_INFO's first byte is its state: 1 established, 8 half closed."""
    return peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 1


def test_slow_request(start_service: Callable[..., Service]) -> None:
    """A client that never ends its headers is disconnected."""
    service = start_service(stall_s=0.3)
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as peer:
        peer.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        peer.settimeout(PATIENCE_S)
        with pytest.raises(ConnectionResetError):
            assert peer.recv(1) != b""


def test_command(service: Service, at: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`ssvm link` prints a working URL, lists it, and revokes it by its key."""
    file = settings_file(service, tmp_path)

    def run(*argv: str) -> str:
        assert cli.main(["link", "--config", str(file), *argv]) == 0
        return capsys.readouterr().out

    url = run(KEY, "--for", "1h").strip()
    assert service.request("GET", url).data == IMAGE
    listed = json.loads(run("--list", "--json"))
    assert [each["key"] for each in listed] == [KEY, KEY]
    revoked = json.loads(run("--revoke", KEY, "--json"))["revoked"]
    assert set(revoked) == {each["link"] for each in listed}
    assert service.request("GET", url).status == 410


@pytest.mark.usefixtures("at")
@pytest.mark.parametrize(
    ("argv", "says", "status"),
    [
        (["template/tmpl/2/9/9.raw"], "no complete template", 1),
        (["template/tmpl/2/7/nothing"], "no such object", 1),
        ([KEY, "--for", "8d"], "7 days", 2),
        ([KEY, "--for", "soon"], "--for", 2),
        (["--revoke", "ffff"], "no such link", 1),
    ],
)
def test_command_refused(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str, status: int
) -> None:
    """A link to an impossible target is refused with the reason."""
    assert cli.main(["link", "--config", str(settings_file(service, tmp_path)), *argv]) == status
    assert says in capsys.readouterr().err


def test_tls(start_service: Callable[..., Service], tmp_path: Path) -> None:
    """With its own certificate the service sends the same bytes, without sendfile."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    service = start_service(certificate_file=tmp_path / "cert.pem", private_key_file=tmp_path / "key.pem")
    put_image(service)
    http = urllib3.PoolManager(ca_certs=str(tmp_path / "ca.pem"))
    assert http.request("GET", service.url + link(service)).data == IMAGE
    assert http.request("GET", service.url + link(service), headers={"Range": "bytes=-5"}).data == IMAGE[-5:]


def test_command_on_s3(s3_server: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An S3 link is the server's own: it needs no service and no ledger, and cannot be revoked."""
    (file := tmp_path / "worker.toml").write_text(
        f'[stores.archive]\nurl = "s3://{s3_server.make_bucket()}/zone"\nendpoint = "{s3_server.endpoint}"\n'
        f'access_key = "{s3_server.access_key}"\nsecret_key = "{s3_server.secret_key}"\n'
    )
    store = assembly.open_store_named(config.load(file, {}), "archive")
    put_bytes(store, KEY, IMAGE, Owner())
    entries = (Entry("7.qcow2", len(IMAGE), DIGEST),)
    write_manifest(store, Manifest(Artifact("template", "2", "7"), "j", entries), Owner())
    assert cli.main(["link", "--config", str(file), KEY, "--store", "archive", "--for", "4h", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["revocable"] is False
    assert urllib3.PoolManager().request("GET", made["url"]).data == IMAGE
