"""Commands of a management server for a real export that only the command names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests import images
from tests.nfs.hosts import command as command_of_host
from tests.nfs.server import Export, Server
from tests.nfs.test_mounting import mounted
from tests.servers.http import HttpServer
from tests.servers.worker import Site, until
from tests.unit.cloudstack.commands.agents import Agent, data_object
from tests.waiting import PATIENCE_S, RECONNECT_S, SLOWNESS

pytest_plugins = ["tests.servers.broker", "tests.servers.http", "tests.servers.worker"]

IMAGE = images.mbr(1 << 20)


def _store(export: Export) -> dict[str, Any]:
    return {"com.cloud.agent.api.to.NfsTO": {"_url": export.url, "_role": "Image", "nfsVersion": "4.1"}}


def test_story(make_site: Callable[..., Site], server: Server, http_server: HttpServer) -> None:
    """A template is made, listed and deleted, and while its export hangs, commands fail within seconds."""
    export, other = server.export("cs"), server.export("cs-other")
    site = make_site(
        nfs={"probe_s": 3 * SLOWNESS, "probe_every_s": 1, "mount_s": PATIENCE_S},
        download={"allow_networks": ["127.0.0.0/8"]},
    )
    worker, agent = site.start(), Agent(site.settings)
    assert agent.send("SecStorageSetupCommand", store=_store(export))["result"] is True
    [mount] = mounted(export)
    assert mount.options["vers"] == "4.1"
    command = {
        "url": http_server.serve("a.raw", IMAGE),
        "_store": _store(export),
        "resourceType": "TEMPLATE",
        "installPath": "template/tmpl/2/202",
        "format": "RAW",
        "name": "202-2-aaaa",
        "id": 202,
        "accountId": 2,
    }
    until(lambda: agent.send("DownloadCommand", **command)["downloadStatus"] == "DOWNLOADED", "it is downloaded")
    assert export.files() == [
        f"template/tmpl/2/202/{name}" for name in ("202.raw", "manifest.json", "template.properties")
    ]
    assert _listed(agent, export) == {"202-2-aaaa"}

    server.hang()
    until(lambda: _listed(agent, export) is None, "a list of the export fails", PATIENCE_S)
    assert agent.send("GetStorageStatsCommand", store=_store(export))["result"] is False
    assert agent.send("CheckHealthCommand")["result"] is True

    server.go_on()
    until(lambda: _listed(agent, export) == {"202-2-aaaa"}, "the list is complete", PATIENCE_S + RECONNECT_S)
    assert agent.send("SecStorageSetupCommand", store=_store(other))["result"] is True
    deleted = agent.send("DeleteCommand", data=data_object("Template", "template/tmpl/2/202/202.raw", _store(export)))
    assert deleted["result"] is True, deleted
    assert export.files() == []
    worker.terminate()
    # Mounts of one server and version share their connections, so these would have an effect on other tests.
    for each in (*mounted(export), *mounted(other)):
        command_of_host("umount", each.point)


def _listed(agent: Agent, export: Export) -> set[str] | None:
    """Return the names of a list, or None if the list has failed."""
    answer = agent.send("ListTemplateCommand", store=_store(export))
    return set(answer["templateInfos"]) if answer["result"] else None
