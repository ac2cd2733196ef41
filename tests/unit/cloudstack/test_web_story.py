"""Links, uploads and copies with a simulated management server, an agent, and a web server: ours, or a real Apache."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium.webdriver.remote.webdriver import WebDriver

from ssvm_worker.config.cloudstack_section import CloudStackSection
from ssvm_worker.config.schema import Settings
from ssvm_worker.demo.cloudstack.management import ManagementServer, make_management_server
from ssvm_worker.demo.cloudstack.zone import Entity
from ssvm_worker.errors import WorkerError
from ssvm_worker.runner.messages import Message
from ssvm_worker.runner.run import run_job
from ssvm_worker.wiring.assembly import open_ledger
from tests import images
from tests.cloudstack_commands import NFS, PARENT
from tests.cloudstack_uploads import form
from tests.servers.agent import running_agent, section_for
from tests.servers.apache import running_apache
from tests.servers.broker import Broker
from tests.servers.service import Service, serving, settings_of
from tests.waiting import PATIENCE_S, until

IMAGE = images.mbr(3 << 20)
KEY = "template/tmpl/1/202/disk.raw"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ManagementServer]:
    """A server with one NFS store and a system VM."""
    with make_management_server(tmp_path / "ca") as found:
        found.zone.add_store(NFS)
        found.zone.add_system_vm("s-1-VM", "192.0.2.77")
        yield found


@contextmanager
def zone(server: ManagementServer, broker: Broker, directory: Path, web_root: Path | None = None) -> Iterator[Service]:
    """Run an agent and its service while the block runs. The NFS store is a directory."""
    settings = settings_of(broker, directory / "store", cloudstack=True)
    section = CloudStackSection(**section_for(server, stores={NFS: "primary"}, web_root=web_root))
    settings = settings.model_copy(update={"cloudstack": section})
    with serving(settings) as service, running_agent(service.settings):
        server.wait_up(timeout=PATIENCE_S)
        yield service


def upload(server: ManagementServer, web: Any) -> Entity:
    """Upload an image as a browser does, and wait until the server offers the template."""
    ticket = server.upload_ticket("RAW")
    url = urlsplit(ticket.url)
    body, kind = form(IMAGE)
    headers = ticket.headers | {"Content-Type": kind, "Host": url.netloc}
    answer = web.request("POST", url.path, body=body, headers=headers)
    assert answer.data == b"upload successful."
    # A browser refuses two of these headers, even with the same value.
    assert answer.headers.getlist("Access-Control-Allow-Origin") == ["*"]
    return server.wait_ready(ticket.entity, PATIENCE_S)


def put_file(service: Service) -> Entity:
    """Store a file as the Java agent does, and return an entity for it."""
    file = service.store / KEY
    file.parent.mkdir(parents=True)
    file.write_bytes(IMAGE)
    return Entity(202, "TEMPLATE", "202-1-a", None, "RAW", None, install_path=KEY)


def test_upload_and_link(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """A browser's upload becomes a template, which a link gives until the server deletes the link."""
    with zone(server, broker, tmp_path) as service:
        template = upload(server, service)
        assert (template.size, template.physical_size) == (len(IMAGE), len(IMAGE))
        link = server.extract(template)
        path = urlsplit(link.url).path
        assert service.request("GET", path).data == IMAGE
        assert server.expire(link).ok
        assert service.request("GET", path).status == 404
    assert server.zone.problems == []


def test_refused_upload(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """The server learns why an upload was refused."""
    with zone(server, broker, tmp_path) as service:
        ticket = server.upload_ticket("QCOW2")
        body, kind = form(IMAGE)
        headers = ticket.headers | {"Content-Type": kind, "Host": "192.0.2.77"}
        assert service.request("POST", urlsplit(ticket.url).path, body=body, headers=headers).status == 422
        server.wait(lambda: ticket.entity.state == "UPLOAD_ERROR", "the server sees the error", PATIENCE_S)
        assert "qcow2" in ticket.entity.error


def test_apache(server: ManagementServer, broker: Broker, open_directory: Path) -> None:
    """With a real Apache in front, links, uploads and copies work through its configuration for the Java agent."""
    settings = settings_of(broker, open_directory / "store", cloudstack=True)
    with (
        serving(settings) as probe,
        running_apache(open_directory, urlsplit(probe.url).netloc) as apache,
        zone(server, broker, open_directory, apache.root) as service,
    ):
        entity = put_file(service)
        entity.store = server.zone.stores[0]
        link = server.extract(entity)
        path = urlsplit(link.url).path
        assert apache.request("GET", path).data == IMAGE
        assert apache.request("GET", path, headers={"Range": "bytes=5-9"}).data == IMAGE[5:10]
        assert server.expire(link).ok
        assert apache.request("GET", path).status == 404
        upload(server, apache)
        check_copies(server, apache)


def work(settings: Settings) -> None:
    """Run the next queued job, as a worker does."""
    with open_ledger(settings) as ledger:
        until(lambda: bool(ledger.page(state="queued")), "a job is queued")
        (record,) = ledger.page(state="queued")
    run_job(settings, Message(record.job, [{"job_id": record.job_id}], {}, record.job_id))


def test_copy_from_another_zone(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """A worker fetches a template from the service of another zone, with the login and from an allowed address."""
    server.zone.allowed_internal_sites = ["127.0.0.0/8"]
    with zone(server, broker, tmp_path) as service:
        put_file(service)
        ports = [{"add": True, "sourceIp": "127.0.0.1", "port": "443", "intf": "eth2"}]
        server.connection().send("SecStorageFirewallCfgCommand", {"portConfigs": ports, "isAppendAIp": True})
        auth = {"userName": "cloud", "password": server.zone.copy_password}
        copy = server.register_template(f"{service.url}/copy/SecStorage/{PARENT}/{KEY}", "RAW", auth=auth)
        work(service.settings)
        server.wait_ready(copy, PATIENCE_S)
        assert (service.store / copy.install_path).read_bytes() == IMAGE


def test_internal_address(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """A worker fetches nothing from a private address that is none of the server's internal sites."""
    server.zone.allowed_internal_sites = ["10.0.0.0/8"]
    with zone(server, broker, tmp_path) as service:
        template = server.register_template(f"{service.url}/health", "RAW")
        with contextlib.suppress(WorkerError):
            work(service.settings)
        server.wait(lambda: template.state == "DOWNLOAD_ERROR", "the server sees the error", PATIENCE_S)
        assert "Only public addresses are allowed" in template.error
        assert list(service.store.rglob("*.raw")) == []


SNAPSHOT = "snapshots/1/31/5d6e"


def copy_snapshot(server: ManagementServer, service: Service, names: list[str]) -> dict[str, Any]:
    """Send the command for a copy of these files to volume 32, run its job, and return the next answer."""
    ports = [{"add": True, "sourceIp": "127.0.0.1", "port": "443", "intf": "eth2"}]
    server.connection().send("SecStorageFirewallCfgCommand", {"portConfigs": ports, "isAppendAIp": True})
    fields = {
        "resourceType": "SNAPSHOT",
        "installPath": "snapshots/1/32",
        "id": 7,
        "_store": server.zone.stores[0].transfer_object(),
        "url": "\n".join(f"{service.url}/copy/SecStorage/{PARENT}/{SNAPSHOT}/{name}" for name in names),
        "auth": {"userName": "cloud", "password": server.zone.copy_password},
        "name": "snap",
    }
    job_id = server.connection().send("DownloadCommand", fields).fields["jobId"]
    with contextlib.suppress(WorkerError):
        work(service.settings)
    progress = fields | {"jobId": job_id, "request": "GET_STATUS"}
    return server.connection().send("DownloadProgressCommand", progress).fields


def put_snapshot(service: Service, *names: str) -> None:
    for name in names:
        file = service.store / SNAPSHOT / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(IMAGE)


@pytest.mark.parametrize(
    ("names", "path"),
    [
        (["5d6e"], "snapshots/1/32/5d6e/5d6e"),
        (["5d6e.ovf", "5d6e-disk0.vmdk"], "snapshots/1/32/5d6e/5d6e"),
        (["other.qcow2"], "snapshots/1/32/other.qcow2"),
        (["other.qcow2_temp"], "snapshots/1/32/other.qcow2"),
    ],
)
def test_copy_of_a_snapshot(
    server: ManagementServer, broker: Broker, tmp_path: Path, names: list[str], path: str
) -> None:
    """All files of a snapshot are fetched from another zone, to the keys of the Java agent."""
    server.zone.allowed_internal_sites = ["127.0.0.0/8"]
    with zone(server, broker, tmp_path) as service:
        put_snapshot(service, *names)
        answer = copy_snapshot(server, service, names)
        assert (answer["downloadStatus"], answer["installPath"]) == ("DOWNLOADED", path)
        assert answer["templatePhySicalSize"] == len(names) * len(IMAGE)
        copies = [each for each in (service.store / "snapshots/1/32").rglob("*") if each.is_file()]
        assert [each.read_bytes() == IMAGE for each in copies] == [True] * len(names)


def test_incomplete_copy_of_a_snapshot(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """If a file of a snapshot is missing, the copy fails and leaves no file."""
    server.zone.allowed_internal_sites = ["127.0.0.0/8"]
    with zone(server, broker, tmp_path) as service:
        put_snapshot(service, "5d6e.ovf")
        answer = copy_snapshot(server, service, ["5d6e.ovf", "5d6e-disk0.vmdk"])
        assert (answer["downloadStatus"], answer["result"]) == ("DOWNLOAD_ERROR", True)
        left = [each for each in (service.store / "snapshots/1/32").rglob("*") if each.is_file()]
        assert left == []


#: What the web interface of CloudStack does with the parameters of an upload.
_SEND = """
const [url, headers, size, done] = arguments;
const form = new FormData();
const disk = new Uint8Array(size);
disk.set([0x55, 0xaa], 510);
form.append('files[]', new File([disk], 'disk.raw'));
fetch(url, {method: 'POST', body: form, headers})
    .then(async answer => done([answer.status, await answer.text()]), error => done([0, String(error)]));
"""


def test_browser(server: ManagementServer, broker: Broker, tmp_path: Path, browser: WebDriver) -> None:
    """A page of another origin uploads a file, as the web interface of CloudStack does."""
    with zone(server, broker, tmp_path) as service:
        ticket = server.upload_ticket("RAW", address=urlsplit(service.url).netloc)
        url = f"{service.url}/upload/{ticket.entity.uuid}"
        browser.get(service.url.replace("127.0.0.1", "localhost") + "/health")
        browser.set_script_timeout(PATIENCE_S)
        answer = browser.execute_async_script(_SEND, url, ticket.headers, 3 << 20)
        assert answer == [200, "upload successful."]
        assert server.wait_ready(ticket.entity, PATIENCE_S).size == 3 << 20


def check_copies(server: ManagementServer, apache: Any) -> None:
    """A copy needs the login and an allowed address."""
    copy = f"/copy/SecStorage/{PARENT}/{KEY}"
    login = base64.b64encode(f"cloud:{server.zone.copy_password}".encode()).decode()
    assert apache.request("GET", copy, headers={"Authorization": f"Basic {login}"}).status == 403
    ports = [{"add": True, "sourceIp": "127.0.0.1", "port": "443", "intf": "eth2"}]
    server.connection().send("SecStorageFirewallCfgCommand", {"portConfigs": ports, "isAppendAIp": True})
    assert apache.request("GET", copy, headers={"Authorization": f"Basic {login}"}).data == IMAGE
    assert apache.request("GET", copy).status == 401
    assert apache.request("GET", "/copy/.htpasswd").status == 403
