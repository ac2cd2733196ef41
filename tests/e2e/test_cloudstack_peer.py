"""`make cloudstack-peer` with the simulated server, and an API in front of it that has the commands of the stories."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from ssvm_worker.demo.cloudstack.management import ManagementServer, make_management_server
from ssvm_worker.demo.cloudstack.server import ServerTimes
from tests.cloudstack_peer import signed
from tests.neighbours import ROOT
from tests.servers.agent import section_for
from tests.servers.http import HttpServer
from tests.servers.worker import Site
from tests.unit.cloudstack.commands.agents import PLACE
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.e2e


def answer(server: ManagementServer, given: dict[str, str]) -> dict[str, Any]:
    """Answer a command of the API as CloudStack does."""
    command, template = given["command"], server.zone.entities.get(int(given.get("id", "0")))
    if command == "listHosts":
        return {"host": [{"name": each.name, "state": each.state} for each in server.zone.hosts]}
    if command == "registerTemplate":
        made = server.register_template(given["url"], given["format"])
        return {"template": [{"id": str(made.id)}]}
    assert template
    if command == "listTemplates":
        # A real server shows the error of a lost connection, too, but only until the agent is back.
        return {"template": [{"isready": template.ready, "status": "Download Complete" if template.ready else ""}]}
    if command == "extractTemplate":
        return {"template": {"url": server.extract(template).url}}
    assert command == "deleteTemplate"
    return {"success": server.delete(template).ok}


@contextmanager
def api(server: ManagementServer) -> Iterator[str]:
    """Run the API while the block runs. Commands that change a template answer with a job."""
    jobs: dict[str, dict[str, Any]] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = dict(parse_qsl(urlsplit(self.path).query))
            signature = given.pop("signature")
            assert dict(parse_qsl(signed(given, "secret")))["signature"] == signature
            command = given["command"]
            if command == "queryAsyncJobResult":
                content: dict[str, Any] = {"jobstatus": 1, "jobresult": jobs[given["jobid"]]}
            elif command in ("extractTemplate", "deleteTemplate"):
                jobs[f"j{len(jobs)}"] = answer(server, given)
                content = {"jobid": f"j{len(jobs) - 1}"}
            else:
                content = answer(server, given)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({f"{command.lower()}response": content}).encode())

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}/client/api"
    web.shutdown()
    web.server_close()


def test_stories(make_site: Callable[..., Site], http_server: HttpServer, tmp_path: Path) -> None:
    """All stories end well with the simulated server, and nothing of their templates stays."""
    from tests.e2e.test_cloudstack_stories import RATE, image

    with make_management_server(
        tmp_path / "ca", times=ServerTimes(ping=1, ping_timeout=PATIENCE_S, poll=0.2)
    ) as server:
        server.zone.add_store(PLACE)
        server.zone.add_system_vm("s-1-VM", "192.0.2.77")
        site = make_site(cloudstack=section_for(server, stores={PLACE: "primary"}))
        with api(server) as url:
            given = {
                "PEER": f"{server.host}:{server.port}",
                "CLOUDSTACK_API": url,
                "CLOUDSTACK_API_KEY": "key",
                "CLOUDSTACK_SECRET_KEY": "secret",
                "CLOUDSTACK_ZONE": "1",
                "CLOUDSTACK_OSTYPE": "1",
                "TEMPLATE_URL": http_server.serve("a.qcow2", image(), rate=RATE),
                "AGENT_NAME": "s-1-VM",
                "SSVM_CONFIG": str(site.file),
            }
            command = [sys.executable, "-m", "tests.cloudstack_peer"]
            environ = {name: value for name, value in os.environ.items() if not name.startswith("SSVM_")} | given
            done = subprocess.run(
                command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=4 * PATIENCE_S, check=False
            )
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        assert "all stories have ended well" in done.stdout
        assert server.zone.entities == {}
        assert server.zone.problems == []


def test_missing_values() -> None:
    """Without its values the program says which are missing."""
    environ = {"PATH": os.environ["PATH"], "PEER": "127.0.0.1:1"}
    command = [sys.executable, "-m", "tests.cloudstack_peer"]
    done = subprocess.run(
        command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, "set CLOUDSTACK_API" in done.stderr) == (1, True)
