"""Stories of a zone: simulated management servers, processes of ``ssvm agent`` and of the worker, and real stores."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from ssvm_worker.cloudstack.examination import examine_agent
from ssvm_worker.demo.cloudstack.management import ManagementServer, make_management_server
from ssvm_worker.demo.cloudstack.server import ServerTimes
from ssvm_worker.demo.cloudstack.zone import Entity
from ssvm_worker.formats.writers.qcow2 import CLUSTER, qcow2
from ssvm_worker.units import MiB
from tests.servers.agent import AgentProcess, section_for
from tests.servers.broker import StoppableBroker
from tests.servers.http import HttpServer
from tests.servers.played_agent import PlayedAgent
from tests.servers.s3 import S3Server
from tests.servers.service import SECRET, serving
from tests.servers.worker import Site
from tests.unit.cloudstack.commands.agents import PLACE, s3_object
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.e2e

TIMES = ServerTimes(ping=1, ping_timeout=PATIENCE_S, poll=0.2)
SIZE, RATE = 6 * MiB, 1 * MiB


def image(size: int = SIZE) -> bytes:
    """Return a qcow2 image with random data."""
    clusters = ((at, os.urandom(CLUSTER)) for at in range(0, size, CLUSTER))
    return b"".join(qcow2(clusters, 1 << 30, size // CLUSTER, "a.qcow2"))


@dataclass
class Zone:
    """A management server, and a site with a worker and an agent as processes."""

    server: ManagementServer
    site: Site
    agents: list[AgentProcess] = field(default_factory=list)

    def start_agent(self) -> AgentProcess:
        """Start one more process of the agent."""
        log = self.site.directory / f"agent{len(self.agents)}.log"
        self.agents.append(AgentProcess(log, {}, "--config", str(self.site.file)))
        return self.agents[-1]

    def start(self) -> None:
        """Start a worker and an agent, and wait until the host is Up."""
        self.site.start()
        self.start_agent()
        self.server.wait_up(timeout=PATIENCE_S)

    def register_slowly(self, http_server: HttpServer, data: bytes, **columns: Any) -> Entity:
        """Register a template whose source is slow, and return it while its download runs."""
        template = self.server.register_template(http_server.serve("slow.qcow2", data, rate=RATE), **columns)
        until(lambda: template.percent > 0, "the server sees progress")
        assert not template.ready
        return template

    def check(self, template: Entity, data: bytes) -> None:
        """Check that the template becomes ready, and that no answer has said DOWNLOAD_ERROR."""
        self.server.wait_ready(template, PATIENCE_S)
        assert (template.size, template.physical_size) == (1 << 30, len(data))
        assert "DOWNLOAD_ERROR" not in template.reports, template.reports
        records = [each for each in self.site.ledger.page() if each.job == "download"]
        assert [each.state for each in records] == ["succeeded"]
        assert self.server.zone.problems == []


@contextmanager
def running_zone(
    make_site: Callable[..., Site], directory: Path, on: dict[str, Any] | None = None, **cloudstack: Any
) -> Iterator[Zone]:
    """Make a server and a site of its zone. *on*: the broker and sections of the settings."""
    with make_management_server(directory, times=TIMES) as server:
        server.zone.add_store(PLACE)
        server.zone.add_system_vm("s-1-VM", "192.0.2.77")
        section = section_for(server, **({"stores": {PLACE: "primary"}} | cloudstack))
        zone = Zone(server, make_site(cloudstack=section, **(on or {})))
        try:
            yield zone
        finally:
            for each in zone.agents:
                each.kill()


@pytest.fixture
def zone(make_site: Callable[..., Site], tmp_path: Path) -> Iterator[Zone]:
    """A zone with one NFS store, which is a directory."""
    with running_zone(make_site, tmp_path / "ca") as zone:
        yield zone


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_killed_halfway(zone: Zone, http_server: HttpServer, s3_server: S3Server, kind: str) -> None:
    """After kill -9 of agent and worker during a download, the server sees no error, and the template gets ready."""
    row, data = zone.server.zone.stores[0], image()
    if kind == "s3":
        (fields,) = s3_object(s3_server, s3_server.make_bucket()).values()
        row = zone.server.zone.add_store("s3", s3=fields)
    zone.start()
    template = zone.register_slowly(http_server, data, store=row)
    zone.agents[0].kill()
    zone.site.workers[0].kill()
    until(lambda: zone.server.host_row("s-1-VM").state == "Alert", "the server has noticed")
    zone.start()
    zone.check(template, data)
    if kind == "directory":
        assert (zone.site.store / template.install_path).read_bytes() == data
    assert zone.server.delete(template).ok


def test_restart_of_the_server(zone: Zone, http_server: HttpServer) -> None:
    """A download continues while the server restarts, and its end is the answer to the next command."""
    zone.start()
    data = image()
    template = zone.register_slowly(http_server, data)
    zone.server.stop()
    (record,) = [each for each in zone.site.ledger.page() if each.job == "download"]
    zone.site.wait(record.job_id)
    zone.server.start()
    zone.server.wait_up(timeout=PATIENCE_S)
    zone.check(template, data)


def test_migration(make_site: Callable[..., Site], tmp_path: Path, http_server: HttpServer) -> None:
    """A download continues while the agent moves to another server, which attaches to the same job."""
    with running_zone(make_site, tmp_path / "ca", servers=["127.0.0.1", "127.0.0.2"]) as zone:
        first = zone.server
        second = ManagementServer(first.zone, first.authority, address=("127.0.0.2", first.port), times=TIMES)
        with second:
            zone.start()
            data = image()
            template = zone.register_slowly(http_server, data)
            (moved,) = first.migrate([first.host, second.host], avoid=[first.host])
            assert moved.ok
            until(lambda: _server_of(first) is second, "the host is at the other server")
            zone.check(template, data)


def _server_of(server: ManagementServer) -> Any:
    connection = server.host_row("s-1-VM").connection
    return connection and connection.server


def test_lost_file(zone: Zone, http_server: HttpServer) -> None:
    """A template whose files are gone is downloaded again, with the checksum that the agent has reported before."""
    zone.start()
    data = image(MiB)
    template = zone.server.register_template(http_server.serve("a.qcow2", data))
    zone.server.wait_ready(template, PATIENCE_S)
    assert template.checksum == "{SHA-512}" + hashlib.sha512(data).hexdigest()
    shutil.rmtree((zone.site.store / template.install_path).parent)
    zone.server.connection().close("the test")
    until(lambda: zone.server.host_row("s-1-VM").states.count("Up") == 2, "Up again")
    until(lambda: any("Removing leftover template" in line for line in zone.server.log), "the server misses it")
    zone.server.wait_ready(template, PATIENCE_S)
    assert (zone.site.store / template.install_path).read_bytes() == data
    assert "DOWNLOAD_ERROR" not in template.reports


def test_copy_between_two_agents(
    make_site: Callable[..., Site], tmp_path: Path, http_server: HttpServer, session_broker: StoppableBroker
) -> None:
    """The agent of a second zone fetches a template from the HTTP service of the first zone."""
    serve = {"keys": {"k1": {"secret": SECRET}}, "key": "k1", "listen": "127.0.0.1:0", "cloudstack": True}
    other = {"on": session_broker.with_prefix("second-zone:")}
    with (
        running_zone(make_site, tmp_path / "a", {"serve": serve}) as first,
        running_zone(make_site, tmp_path / "b", other) as second,
        serving(first.site.settings) as service,
    ):
        data = image(MiB)
        first.server.zone.system_vms[0].public_address = urlsplit(service.url).netloc
        second.server.zone.allowed_internal_sites = ["127.0.0.0/8"]
        first.start()
        second.start()
        template = first.server.register_template(http_server.serve("a.qcow2", data))
        first.server.wait_ready(template, PATIENCE_S)
        ports = [{"add": True, "sourceIp": "127.0.0.1", "port": "443", "intf": "eth2"}]
        fields = {"portConfigs": ports, "isAppendAIp": True}
        assert first.server.connection().send("SecStorageFirewallCfgCommand", fields).ok
        copy = first.server.copy_template(template, second.server)
        second.check(copy, data)
        assert (second.site.store / copy.install_path).read_bytes() == data
        assert first.server.delete(template).ok
        assert second.server.delete(copy).ok


def test_java_agent_with_the_same_guid(zone: Zone) -> None:
    """If an agent without a claim takes the connection away, ``ssvm doctor --cloudstack`` says so."""
    zone.start()
    java = PlayedAgent((zone.server.host, zone.server.port))
    java.start_up()

    def reported() -> bool:
        rows = [each for each in examine_agent(zone.site.settings, web_port=1) if each.check == "guid"]
        return any("Stop the Java agent" in each.detail for each in rows)

    try:
        until(reported, "the doctor reports it")
    finally:
        java.close()
