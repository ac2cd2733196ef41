"""The management servers of an agent: their order, and those to avoid. Both survive a restart of the agent."""

from __future__ import annotations

import json
import logging
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

_log = logging.getLogger("ssvm.agent")


@dataclass(frozen=True)
class ServerList:
    """A list of servers in order of preference, as ReadyCommand, SetupMSListCommand and property files give it."""

    hosts: tuple[str, ...]
    algorithm: str = "static"
    #: Seconds between two checks whether the first server is reachable again. 0: never.
    check_s: float = 0.0

    @classmethod
    def parse(cls, text: str) -> ServerList:
        """Return the list of a text such as ``10.0.0.2,10.0.0.3@static``. The algorithm is optional."""
        hosts, _, algorithm = text.partition("@")
        return cls(tuple(each.strip() for each in hosts.split(",") if each.strip()), algorithm.strip() or "static")

    def __str__(self) -> str:
        return f"{','.join(self.hosts)}@{self.algorithm}"

    def ordered(self, name: str) -> ServerList:
        """Return a list of the settings in the order of its algorithm.

        *name*: the name of the agent. With roundrobin the agent s-7-VM starts with server 7 modulo the number of
        servers. The lists of a server need no such step, because it orders them for each agent.
        """
        hosts = list(self.hosts)
        if self.algorithm == "shuffle":
            random.shuffle(hosts)
        elif self.algorithm == "roundrobin" and hosts:
            number = int((re.findall(r"\d+", name) or ["0"])[0]) % len(hosts)
            hosts = hosts[number:] + hosts[:number]
        return replace(self, hosts=tuple(hosts))


class AgentState:
    """What the agent learned from servers: its id, and the list of servers. Stored in a file after each change."""

    def __init__(self, path: Path, configured: ServerList) -> None:
        """Read *path*. The *configured* servers count if the file is missing or unreadable, or they have changed."""
        self._path, self._configured = path, configured
        self.host_id: int | None = None
        self.servers = configured
        #: Servers in maintenance. They are used if there are no others.
        self.avoid: frozenset[str] = frozenset()
        self._position = 0
        try:
            values = json.loads(path.read_text())
            self.host_id = values["host_id"] if values["host_id"] is None else int(values["host_id"])
            if values["configured"] == sorted(configured.hosts):
                hosts = tuple(map(str, values["hosts"]))
                self.servers = ServerList(hosts, str(values["algorithm"]), float(values["check_s"]))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _log.warning("the state file %s is unreadable and will be replaced: %s", path, error)

    def learn_id(self, host_id: int) -> None:
        """Store the id that the server uses for this host."""
        if host_id != self.host_id:
            self.host_id = host_id
            self._save()

    def learn_servers(self, servers: ServerList, avoid: Sequence[str]) -> None:
        """Store a list from the server. An empty one changes only the servers to avoid."""
        self.avoid = frozenset(avoid)
        if servers.hosts and servers != self.servers:
            _log.info("the server sends a new list of servers: %s", servers)
            self.servers, self._position = servers, 0
            self._save()

    def next_server(self) -> str:
        """Return the next server to try, in order and then from the start again. Avoided ones count last."""
        hosts = self.servers.hosts
        usable = [each for each in hosts if each not in self.avoid] or list(hosts)
        for _ in hosts:
            host = hosts[self._position % len(hosts)]
            self._position += 1
            if host in usable:
                return host
        return usable[0]

    def others(self, host: str) -> list[str]:
        """Return the servers that are neither *host* nor to avoid."""
        return [each for each in self.servers.hosts if each != host and each not in self.avoid]

    def prefer(self, host: str) -> None:
        """Make *host* the next server to try."""
        self._position = self.servers.hosts.index(host)

    def _save(self) -> None:
        values = {
            "host_id": self.host_id,
            "configured": sorted(self._configured.hosts),
            "hosts": self.servers.hosts,
            "algorithm": self.servers.algorithm,
            "check_s": self.servers.check_s,
        }
        part = self._path.with_suffix(".part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(values))
            os.replace(part, self._path)
        except OSError as error:
            _log.warning("the state cannot be stored, so a restart starts with the settings: %s", error)
