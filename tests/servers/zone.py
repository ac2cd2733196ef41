"""A zone of CloudStack: a simulated management server, and processes of ``ssvm agent`` and of the worker."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssvm_worker.demo.cloudstack.management import ManagementServer, make_management_server
from ssvm_worker.demo.cloudstack.server import ServerTimes
from ssvm_worker.demo.cloudstack.zone import Entity
from ssvm_worker.formats.writers.qcow2 import CLUSTER, qcow2
from ssvm_worker.units import MiB
from tests.servers.agent import AgentProcess, section_for
from tests.servers.http import HttpServer
from tests.servers.worker import Site
from tests.unit.cloudstack.commands.agents import PLACE
from tests.waiting import PATIENCE_S, until

#: The agent reconnects after two silent intervals of its pings. On a busy machine a server may be silent for seconds.
TIMES = ServerTimes(ping=PATIENCE_S, poll=0.2, upload_poll=0.2)
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
