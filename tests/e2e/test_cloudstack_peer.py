"""`make cloudstack-peer` with simulated servers, and an API in front of them that has the commands of the stories."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from ssvm_worker.demo.cloudstack.management import ManagementServer
from ssvm_worker.demo.cloudstack.zone import Entity, ImageStoreRow
from ssvm_worker.units import MiB
from tests.cloudstack_peer import signed
from tests.e2e.test_cloudstack_copies import OVA, SECOND
from tests.neighbours import ROOT
from tests.servers.broker import StoppableBroker
from tests.servers.http import HttpServer
from tests.servers.service import SECRET, serving
from tests.servers.worker import Site
from tests.servers.zone import RATE, TIMES, Zone, image, running_zone
from tests.unit.cloudstack.commands.agents import PLACE
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.e2e

#: The commands that a real server answers with the id of a job.
_JOBS = ("extractTemplate", "deleteTemplate", "copyTemplate", "issueCertificate")
_STRICT, _EXPIRED = "ca.plugin.root.auth.strictness", "ca.plugin.root.allow.expired.cert"


@dataclass
class Cloud:
    """The API of simulated servers: those of the first zone, and one of a second zone."""

    servers: list[ManagementServer]
    other: ManagementServer | None = None
    #: The templates of the second zone, by the ids that they have in the first one.
    copies: dict[str, Entity] = field(default_factory=dict)
    #: All templates that were registered.
    seen: list[Entity] = field(default_factory=list)

    def answer(self, given: dict[str, str]) -> dict[str, Any]:
        """Answer a command."""
        for handler in (self._of_templates, self._of_servers, self._of_settings):
            if (found := handler(given)) is not None:
                return found
        raise LookupError(given["command"])

    def _of_templates(self, given: dict[str, str]) -> dict[str, Any] | None:
        server = self.servers[0]
        match given["command"]:
            case "registerTemplate":
                store = next(each for each in server.zone.stores if not each.readonly)
                columns = {"store": store, "hypervisor": given["hypervisor"]}
                self.seen.append(server.register_template(given["url"], given["format"], **columns))
                return {"template": [{"id": str(self.seen[-1].id)}]}
            case "getUploadParamsForTemplate":
                address = server.zone.system_vms[0].public_address
                ticket = server.upload_ticket(given["format"], address=address)
                fields = {"signature": ticket.signature, "metadata": ticket.metadata, "expires": ticket.expires}
                url = ticket.url.replace("https:", "http:")
                return {"getuploadparams": fields | {"id": str(ticket.entity.id), "postURL": url}}
            case "listTemplates":
                parent = self._entity(given.get("parenttemplateid", given.get("id", "")), given)
                return {"template": [_shown(each) for each in (parent.children if "id" not in given else [parent])]}
            case "extractTemplate":
                return {"template": {"url": server.extract(self._entity(given["id"], given)).url}}
            case "copyTemplate":
                assert self.other
                # A real server lets the system VMs fetch from each other. These agents have this address.
                ports = [{"add": True, "sourceIp": "127.0.0.1", "port": "443", "intf": "eth2"}]
                fields = {"portConfigs": ports, "isAppendAIp": True}
                assert server.connection().send("SecStorageFirewallCfgCommand", fields).ok
                self.copies[given["id"]] = server.copy_template(self._entity(given["id"], given), self.other)
                return {"template": {"id": given["id"]}}
            case "deleteTemplate":
                owner = self.other if given["zoneid"] == "2" else server
                assert owner
                return {"success": owner.delete(self._entity(given["id"], given)).ok}
        return None

    def _entity(self, template: str, given: dict[str, str]) -> Entity:
        there = given.get("zoneid") == "2" and given["command"] != "copyTemplate"
        return self.copies[template] if there else self.servers[0].zone.entities[int(template)]

    def _of_servers(self, given: dict[str, str]) -> dict[str, Any] | None:
        zone = self.servers[0].zone
        match given["command"]:
            case "listHosts":
                hosts = [{"name": each.name, "state": each.state} for each in zone.hosts]
                used = [self._number(each.connection.server) if each.connection else "" for each in zone.hosts]
                return {"host": [host | {"managementserverid": each} for host, each in zip(hosts, used, strict=True)]}
            case "listManagementServers":
                return {"managementserver": [{"id": self._number(each), "state": "Up"} for each in self.servers]}
            case "listSystemVms":
                return {"systemvm": [{"name": each.name, "state": "Running"} for each in zone.system_vms]}
            case "listImageStores":
                return {"imagestore": [{"id": each.url} for each in zone.stores]}
            case "updateImageStore":
                store: ImageStoreRow = next(each for each in zone.stores if each.url == given["id"])
                store.readonly = given["readonly"] == "true"
                return {}
            case "prepareForMaintenance":
                moved = self.servers[int(given["managementserverid"])]
                moved.migrate([each.host for each in self.servers], avoid=[moved.host])
                return {}
            case "cancelMaintenance":
                return {}
        return None

    def _number(self, server: object) -> str:
        return str([each is server for each in self.servers].index(True))

    def _of_settings(self, given: dict[str, str]) -> dict[str, Any] | None:
        first = self.servers[0]
        match given["command"]:
            case "listConfigurations":
                value = first.strict if given["name"] == _STRICT else first.allow_expired
                return {"configuration": [{"name": given["name"], "value": str(value).lower()}]}
            case "updateConfiguration":
                for each in self.servers:
                    setattr(
                        each, {_STRICT: "strict", _EXPIRED: "allow_expired"}[given["name"]], given["value"] == "true"
                    )
                return {}
            case "issueCertificate":
                issued = first.authority.issue(given["ipaddress"], days=float(given.get("duration", "30")))
                files = {"certificate": issued.certificate, "privatekey": issued.key, "cacertificates": issued.ca}
                return {"certificates": {name: file.read_text() for name, file in files.items()}}
        return None


def _shown(template: Entity) -> dict[str, Any]:
    # A real server shows the error of a lost connection, too, but only until the agent is back.
    return {"isready": template.ready, "status": f"{template.percent}% Downloaded" if template.percent else ""}


@contextmanager
def api(cloud: Cloud) -> Iterator[str]:
    """Run the API while the block runs. At the path /restart it restarts the first server."""
    jobs: dict[str, dict[str, Any]] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/restart":
                cloud.servers[0].stop()
                cloud.servers[0].start()
                return self._reply({})
            given = dict(parse_qsl(urlsplit(self.path).query))
            signature = given.pop("signature")
            assert dict(parse_qsl(signed(given, "secret")))["signature"] == signature
            command = given["command"]
            if command == "queryAsyncJobResult":
                content: dict[str, Any] = {"jobstatus": 1, "jobresult": jobs[given["jobid"]]}
            elif command in _JOBS:
                jobs[f"j{len(jobs)}"] = cloud.answer(given)
                content = {"jobid": f"j{len(jobs) - 1}"}
            else:
                content = cloud.answer(given)
            return self._reply({f"{command.lower()}response": content})

        def _reply(self, answer: dict[str, Any]) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    web.server_close()


def run_stories(cloud: Cloud, zone: Zone, http_server: HttpServer, stories: str, **values: str) -> None:
    """Run the stories, and check that they end well, that nothing stays, and that no download was seen to fail."""
    server = cloud.servers[0]
    with api(cloud) as url:
        given = {
            "PEER": f"{server.host}:{server.port}",
            "CLOUDSTACK_API": f"{url}/client/api",
            "CLOUDSTACK_API_KEY": "key",
            "CLOUDSTACK_SECRET_KEY": "secret",
            "CLOUDSTACK_ZONE": "1",
            "CLOUDSTACK_OSTYPE": "1",
            "TEMPLATE_URL": http_server.serve("a.qcow2", image(4 * MiB), rate=RATE),
            "AGENT_NAME": "s-1-VM",
            "SSVM_CONFIG": str(zone.site.file),
            "PEER_POLL_S": "0.2",
            "STORIES": stories,
            "RESTART_SERVER": f"{sys.executable} -c 'import urllib.request as r; r.urlopen(\"{url}/restart\")'",
        }
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SSVM_")}
        command = [sys.executable, "-m", "tests.cloudstack_stories"]
        limits: dict[str, Any] = {"timeout": 6 * PATIENCE_S, "check": False}
        done = subprocess.run(command, env=environ | given | values, cwd=ROOT, capture_output=True, text=True, **limits)
    shown = f"{done.stdout}{done.stderr[-5000:]}" + "\n".join(server.log[-100:])
    assert done.returncode == 0, shown
    assert [each for each in stories.split() if f"\n{each}: ended well" not in done.stdout] == [], shown
    assert server.zone.entities == {}, shown
    assert server.zone.problems == [], shown
    assert ["DOWNLOAD_ERROR" in each.reports for each in cloud.seen] == [False] * len(cloud.seen), shown
    downloads = [each for each in zone.site.ledger.page() if each.job_id.startswith("cs-download-")]
    assert len(downloads) == len(cloud.seen), "each download is one job"


def test_one_server(make_site: Callable[..., Site], http_server: HttpServer, tmp_path: Path) -> None:
    """The stories of one server end well: a life, a kill, a restart, and an export that hangs next to another one."""
    second = tmp_path / "second"
    second.mkdir()
    on = {"stores": {"second": {"url": f"file://{second}"}}}
    with running_zone(make_site, tmp_path / "ca", on, stores={PLACE: "primary", SECOND: "second"}) as zone:
        zone.server.zone.add_store(SECOND)
        given = {"HANG_EXPORT": "true", "FREE_EXPORT": "true", "HUNG_STORE": SECOND}
        run_stories(Cloud([zone.server]), zone, http_server, "life killed restart hung_export", **given)


def test_two_servers(make_site: Callable[..., Site], http_server: HttpServer, tmp_path: Path) -> None:
    """The stories of two servers end well: a migration, and certificates that a strict server refuses."""
    with running_zone(make_site, tmp_path / "ca") as zone:
        first = zone.server
        with ManagementServer(first.zone, first.authority, address=("127.0.0.2", first.port), times=TIMES) as second:
            cloud = Cloud([first, second])
            run_stories(cloud, zone, http_server, "migration certificates", MIGRATE="yes", STRICT="yes")


def test_two_zones(
    make_site: Callable[..., Site], http_server: HttpServer, tmp_path: Path, session_broker: StoppableBroker
) -> None:
    """The stories of a system VM end well: an OVA with two disks, an upload, and a copy to a second zone."""
    serve = {"keys": {"k1": {"secret": SECRET}}, "key": "k1", "listen": "127.0.0.1:0", "cloudstack": True}
    other = {"on": session_broker.with_prefix("second-zone:")}
    with (
        running_zone(make_site, tmp_path / "a", {"serve": serve}) as first,
        running_zone(make_site, tmp_path / "b", other) as second,
        serving(first.site.settings) as service,
    ):
        first.server.zone.system_vms[0].public_address = urlsplit(service.url).netloc
        second.server.zone.allowed_internal_sites = ["127.0.0.0/8"]
        second.start()
        given = {"OVA_URL": http_server.serve("a.ova", OVA), "UPLOAD": "yes", "CLOUDSTACK_ZONE_2": "2"}
        cloud = Cloud([first.server], second.server)
        run_stories(cloud, first, http_server, "ova upload copy", **given)
        assert second.server.zone.entities == {}
        assert second.server.zone.problems == []


def test_missing_values() -> None:
    """Without its values the program says which are missing."""
    environ = {"PATH": os.environ["PATH"], "PEER": "127.0.0.1:1"}
    command = [sys.executable, "-m", "tests.cloudstack_stories"]
    done = subprocess.run(
        command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, "set CLOUDSTACK_API" in done.stderr) == (1, True)
