"""Stories of a zone: simulated management servers, processes of ``ssvm agent`` and of the worker, and real stores."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ssvm_worker.cloudstack.examination import examine_agent
from ssvm_worker.units import MiB
from tests.servers.http import HttpServer
from tests.servers.played_agent import PlayedAgent
from tests.servers.s3 import S3Server
from tests.servers.worker import Site
from tests.servers.zone import Zone, image, running_zone
from tests.unit.cloudstack.commands.agents import s3_object
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.e2e


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


def test_lost_file(zone: Zone, http_server: HttpServer) -> None:
    """A template whose files are gone is downloaded again, with the checksum that the agent has reported before."""
    zone.start()
    data = image(MiB)
    template = zone.server.register_template(http_server.serve("a.qcow2", data))
    zone.server.wait_ready(template, PATIENCE_S)
    assert template.checksum == "{SHA-256}" + hashlib.sha256(data).hexdigest()
    shutil.rmtree((zone.site.store / template.install_path).parent)
    zone.server.connection().close("the test")
    until(lambda: zone.server.host_row("s-1-VM").states.count("Up") == 2, "Up again")
    until(lambda: any("Removing leftover template" in line for line in zone.server.log), "the server misses it")
    zone.server.wait_ready(template, PATIENCE_S)
    assert (zone.site.store / template.install_path).read_bytes() == data
    assert "DOWNLOAD_ERROR" not in template.reports


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
