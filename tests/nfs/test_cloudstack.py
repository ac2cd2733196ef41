"""A simulated management server, an agent and a worker with real exports that only the server names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ssvm_worker.demo.cloudstack.zone import ImageStoreRow
from tests import images
from tests.nfs.hosts import command
from tests.nfs.server import ADDRESS, BEHIND, Server
from tests.nfs.test_mounting import mounted
from tests.servers.http import HttpServer
from tests.servers.worker import Site
from tests.servers.zone import Zone, running_zone
from tests.waiting import PATIENCE_S, RECONNECT_S, SLOWNESS, until

pytest_plugins = ["tests.servers.broker", "tests.servers.http", "tests.servers.worker"]

IMAGE = images.mbr(1 << 20)


def test_story(make_site: Callable[..., Site], server: Server, http_server: HttpServer, tmp_path: Path) -> None:
    """Templates are made, listed and deleted on two exports, and one that hangs disturbs only its own commands."""
    export, healthy = server.export("cs"), server.export("cs-healthy")
    settings = {
        "nfs": {"probe_s": 3 * SLOWNESS, "probe_every_s": 1, "mount_s": PATIENCE_S},
        "download": {"allow_networks": ["127.0.0.0/8"]},
    }
    with running_zone(make_site, tmp_path / "ca", settings) as zone:
        management = zone.server
        management.zone.stores.clear()
        hung = management.zone.add_store(export.url, nfs_version="4.1")
        # Another address and version, because the mounts of one server and version share their connections.
        well = management.zone.add_store(f"nfs://{BEHIND}{healthy.directory}", nfs_version="3")
        zone.start()
        assert [mount.options["vers"] for each in (export, healthy) for mount in mounted(each)] == ["4.1", "3"]
        first = management.register_template(http_server.serve("a.raw", IMAGE), "RAW", store=hung)
        management.wait_ready(first, PATIENCE_S)
        names = (f"{first.id}.raw", "manifest.json", "template.properties")
        assert export.files() == [f"{first.directory}/{name}" for name in names]
        assert export.read(first.install_path) == IMAGE

        server.hang(f"{ADDRESS}/32")
        until(lambda: _listed(zone, hung) is None, "a list of the export fails")
        second = management.register_template(http_server.serve("b.raw", IMAGE), "RAW", store=well)
        management.wait_ready(second, PATIENCE_S)
        assert [answer.ok for _, answer in management.collect_stats()] == [False, True]
        assert _listed(zone, well) == {second.unique_name}

        server.go_on()
        until(lambda: _listed(zone, hung) == {first.unique_name}, "the list is complete", PATIENCE_S + RECONNECT_S)
        assert [management.delete(each).ok for each in (first, second)] == [True, True]
        assert export.files() == healthy.files() == []
        assert management.host_row("s-1-VM").states == ["Connecting", "Up"]
        assert management.zone.problems == []
        zone.agents[0].terminate()
        zone.site.workers[0].terminate()
    # Mounts of one server and version share their connections, so these would have an effect on other tests.
    for mount in (*mounted(export), *mounted(healthy)):
        command("umount", mount.point)


def _listed(zone: Zone, store: ImageStoreRow) -> set[str] | None:
    """Return the names of a list, or None if the list has failed."""
    answer = zone.server.connection().send("ListTemplateCommand", {"store": store.transfer_object()})
    return set(answer.fields["templateInfos"]) if answer.ok else None
