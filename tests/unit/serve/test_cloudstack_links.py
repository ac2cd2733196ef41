"""Links and copies of CloudStack: the bytes of an object for those who may have them, and nothing else."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.ledger.cloudstack_web import CopyLogin, PublishedLink
from ssvm_worker.wiring import assembly
from tests.cloudstack_uploads import DIRECTORY, connect_agent
from tests.servers.broker import StoppableBroker
from tests.servers.service import Service, serving, settings_of

IMAGE = os.urandom(1 << 20)
KEY = "template/tmpl/2/202/9e8d7c6b-0000-3000-8000-000000000001.qcow2"
PATH = "33333333-2222-4333-8444-555555555555/A test.template.qcow2"
COPY = f"/copy/SecStorage/{DIRECTORY}/{KEY}"


@pytest.fixture
def service(start_service: Callable[..., Service]) -> Service:
    """A service whose store has an image that the Java agent wrote, so without a manifest."""
    found = start_service(cloudstack=True)
    connect_agent(found)
    file = found.store / KEY
    file.parent.mkdir(parents=True)
    file.write_bytes(IMAGE)
    return found


def publish(service: Service, path: str = PATH, key: str = KEY, seconds: int = 600, store: str = "primary") -> str:
    link = PublishedLink(path, store, key, int(time.time()) + seconds)
    assembly.open_cloudstack_web(service.settings).publish(link)
    return "/userdata/" + path.replace(" ", "%20")


def test_link(service: Service) -> None:
    """A link gives the bytes under its own name, with ranges."""
    at = publish(service)
    answer = service.request("GET", at)
    assert (answer.status, answer.data) == (200, IMAGE)
    assert answer.headers["Content-Disposition"] == 'attachment; filename="A test.template.qcow2"'
    part = service.request("GET", at, headers={"Range": "bytes=5-9", "If-Range": answer.headers["ETag"]})
    assert (part.status, part.data) == (206, IMAGE[5:10])
    assert service.request("HEAD", at).headers["Content-Length"] == str(len(IMAGE))


def test_name_outside_ascii(service: Service) -> None:
    """A name may have any letters."""
    publish(service, "d/é.qcow2")
    answer = service.request("GET", "/userdata/d/%C3%A9.qcow2")
    assert answer.headers["Content-Disposition"] == "attachment; filename*=UTF-8''%C3%A9.qcow2"


def test_revoked(service: Service) -> None:
    """A revoked link gives nothing."""
    at = publish(service)
    assembly.open_cloudstack_web(service.settings).revoke(PATH)
    assert service.request("GET", at).status == 404


def test_expired(service: Service) -> None:
    """A link ends at its time."""
    at = publish(service, seconds=1)
    time.sleep(1.1)
    assert service.request("GET", at).status == 404
    web = assembly.open_cloudstack_web(service.settings)
    assert (web.take_expired(), web.take_expired()) == ([PATH], [])


@pytest.mark.parametrize("path", ["", "33333333-2222-4333-8444-555555555555/", "%2e%2e/" + KEY, KEY])
def test_other_paths(service: Service, path: str) -> None:
    """No other path below /userdata/ gives anything."""
    publish(service)
    assert service.request("GET", "/userdata/" + path).status == 404


@pytest.mark.parametrize(("link", "target", "rest"), [("202/x.qcow2", "/etc/passwd", ""), ("up", "/etc", "/passwd")])
def test_symbolic_link(service: Service, link: str, target: str, rest: str) -> None:
    """A symbolic link on the store leads nowhere."""
    (service.store / "template/tmpl/2" / link).symlink_to(target)
    at = publish(service, key=f"template/tmpl/2/{link}{rest}")
    assert service.request("GET", at).status == 404


def ours(caplog: pytest.LogCaptureFixture) -> str:
    """Return our own log lines: other servers and clients in the process of the tests log requests, too."""
    return "\n".join(each.getMessage() for each in caplog.records if each.name.startswith("ssvm"))


def test_secret_path(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """If the object of a link is missing, the log names the object, and hides the link like the answer."""
    caplog.set_level("DEBUG", "ssvm")
    at = publish(service)
    (service.store / KEY).unlink()
    answer = service.request("GET", at)
    assert (answer.status, answer.data) == (404, b"The file cannot be read now\n")
    assert KEY in ours(caplog)
    assert PATH.split("/")[0] not in ours(caplog)


def test_broker_away(stoppable_broker: StoppableBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without the broker nothing is sent, because revocations are unknown, and the log does not show the path."""
    settings = settings_of(stoppable_broker.with_prefix("t:"), tmp_path / "store", cloudstack=True)
    with serving(settings) as service:
        at = publish(service)
        stoppable_broker.stop()
        for path in (at, COPY):
            assert service.request("GET", path, headers=login()).status == 503
        assert PATH.split("/")[0] not in ours(caplog)


def login(user: str = "cloud", password: str = "s3cret") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def allow(service: Service, *addresses: str) -> None:
    web = assembly.open_cloudstack_web(service.settings)
    web.set_copy_login(CopyLogin("cloud", "s3cret"))
    web.set_copy_addresses(addresses, append=False)


def test_copy(service: Service) -> None:
    """Another zone gets any object of a store with the login, from an allowed address."""
    allow(service, "127.0.0.1")
    answer = service.request("GET", COPY, headers=login())
    assert (answer.status, answer.data) == (200, IMAGE)


@pytest.mark.parametrize("given", [{}, login(password="wrong"), login(user="x"), {"Authorization": "Basic ?"}])
def test_copy_login(service: Service, given: dict[str, str]) -> None:
    """A copy needs the login that the management server sent."""
    allow(service, "127.0.0.1")
    answer = service.request("GET", COPY, headers=given)
    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, 'Basic realm="copy"')


def test_copy_without_login(service: Service) -> None:
    """Before the management server has sent a login, no client may copy."""
    assert service.request("GET", COPY, headers=login()).status == 401


def test_copy_address(service: Service, start_service: Callable[..., Any]) -> None:
    """An address that neither the management server nor the settings allow may not copy."""
    allow(service, "192.0.2.9")
    assert service.request("GET", COPY, headers=login()).status == 403
    other = start_service(cloudstack=True, copy_networks=["127.0.0.0/8"])
    assert other.request("GET", COPY, headers=login()).status == 200


@pytest.mark.parametrize(
    ("forwarded", "status"),
    [("192.0.2.9", 200), ("127.0.0.1, 192.0.2.9", 200), ("192.0.2.9, 192.0.2.10", 403), ("nonsense", 403), ("", 403)],
)
def test_copy_through_a_proxy(start_service: Callable[..., Any], forwarded: str, status: int) -> None:
    """Behind a trusted proxy, the last address that it reports counts."""
    service = start_service(cloudstack=True, trusted_proxies=["127.0.0.1/32"], copy_networks=["10.0.0.0/8"])
    connect_agent(service)
    (service.store / KEY).parent.mkdir(parents=True)
    (service.store / KEY).write_bytes(IMAGE)
    allow(service, "192.0.2.9", "127.0.0.1")
    answer = service.request("GET", COPY, headers=login() | {"X-Forwarded-For": forwarded})
    assert answer.status == status


@pytest.mark.parametrize("path", [f"{DIRECTORY}/../x", f"{DIRECTORY}/template", "other/" + KEY, f"{DIRECTORY}/.hidden"])
def test_copy_other_paths(service: Service, path: str) -> None:
    """A copy gives objects only: no directories, hidden files or unknown stores."""
    allow(service, "127.0.0.1")
    assert service.request("GET", f"/copy/SecStorage/{path}", headers=login()).status == 404


def test_not_by_default(start_service: Callable[..., Service]) -> None:
    """Without the setting the service has none of these paths."""
    found = start_service()
    for path in ("/userdata/x/y", "/upload/x", COPY):
        assert found.request("GET", path).status == 404
