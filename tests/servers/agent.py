"""Agents of management servers: in a thread of the test, and as processes of ``ssvm agent``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssvm_worker.cloudstack.agent import Agent
from ssvm_worker.cloudstack.commands import Dispatcher
from ssvm_worker.cloudstack.frame import Handler
from ssvm_worker.cloudstack.services import open_services
from ssvm_worker.cloudstack.session import SessionTimes
from ssvm_worker.config import parse
from ssvm_worker.config.schema import Settings
from ssvm_worker.demo.cloudstack.server import AgentServer
from tests.neighbours import ROOT
from tests.waiting import PATIENCE_S

QUICK = SessionTimes(migrate_s=0.1, tick_s=0.05)


def section_for(server: AgentServer, **values: Any) -> dict[str, Any]:
    """Return the section [cloudstack] of an agent of that server. The agent trusts the server's certificate."""
    given = {"servers": [server.host], "port": server.port, "name": "s-1-VM", "zone": "1", "pod": "1", "backoff_s": 0.1}
    if not {"ca_file", "insecure", "fingerprint"} & values.keys():
        given["fingerprint"] = f"sha256:{server.authority.fingerprint}"
    return given | values


def settings_for(server: AgentServer, tmp_path: Path, **values: Any) -> Settings:
    """Return the settings of an agent of that server."""
    return parse({"state_dir": str(tmp_path / "state"), "cloudstack": section_for(server, **values)}, "the test")


@contextmanager
def running_agent(settings: Settings, handler: Handler | None = None, times: SessionTimes = QUICK) -> Iterator[Agent]:
    """Run an agent in a thread while the block runs. Stop it regularly at the end."""
    joint = None
    if handler is None:
        handler = Dispatcher(open_services(settings))
        joint = handler.answer_together
    agent = Agent(settings, handler, joint=joint, times=times)
    thread = threading.Thread(target=agent.run, daemon=True)
    thread.start()
    try:
        yield agent
    finally:
        agent.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


class AgentProcess:
    """A process of ``ssvm agent`` with its log."""

    def __init__(self, log: Path, settings: dict[str, Any], *arguments: str) -> None:
        """*settings* are plain values. The process gets them in its environment."""
        self.log = log
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SSVM_")}
        for name, value in settings.items():
            environ[f"SSVM_{name.upper()}"] = value if isinstance(value, str) else json.dumps(value)
        with log.open("wb") as output:
            command = [sys.executable, "-m", "ssvm_worker", "agent", *arguments]
            self.process = subprocess.Popen(command, env=environ, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)

    @property
    def text(self) -> str:
        """Return its complete log."""
        return self.log.read_text()

    def kill(self) -> None:
        """Kill the process with SIGKILL."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """Send SIGTERM, and return the exit status."""
        self.process.terminate()
        return self.process.wait(PATIENCE_S)
