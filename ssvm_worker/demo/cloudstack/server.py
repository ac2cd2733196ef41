"""The session side of a simulated management server: connections, queues, hosts, pings and migrations.

It behaves as the recorded servers do. The comments name what was seen there.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from .authority import RootAuthority
from .releases import ORDERED, RELEASES, class_of, fields_of, knows
from .wire import FROM_SERVER, IN_SEQUENCE, REQUEST, STOP_ON_ERROR, LinkClosed, ServerLink, WireFrame
from .zone import HostRow, SimulatedZone

#: What every command and every answer has.
_SHARED = {"contextMap": {}, "wait": 0, "bypassHostMaintenance": False}
#: TLS alerts: bad_certificate without a certificate, certificate_unknown for a wrong address or a revoked one.
_BAD_CERTIFICATE, _CERTIFICATE_UNKNOWN = 42, 46
#: A ReadyCommand that refuses an agent has this sequence, and no FROM_SERVER flag.
_NOBODY = -1


@dataclass(frozen=True)
class AgentAnswer:
    """The answer to one command; *name* is "" if none came."""

    name: str
    fields: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Return the answer's result."""
        return bool(self.fields.get("result"))

    @property
    def details(self) -> str:
        """Return the text for people."""
        return str(self.fields.get("details", ""))


@dataclass(frozen=True)
class ServerTimes:
    """The settings of a real server that are times, in seconds; a test makes them short."""

    #: ping.interval; an agent is lost after ping.timeout of them.
    ping: float = 60
    ping_timeout: float = 2.5
    #: The setting wait. A synchronous command waits twice as long.
    wait: float = 1800
    ready_wait: float = 60
    #: DownloadProgressCommand, UploadStatusCommand.
    poll: float = 10
    upload_poll: float = 60


@dataclass
class _Pending:
    ended: threading.Event = field(default_factory=threading.Event)
    frame: WireFrame | None = None
    failure: str = ""


class AgentServer:
    """Listens for agents and holds their sessions. ``ManagementServer`` adds what a user of the cloud does."""

    def __init__(
        self,
        zone: SimulatedZone,
        authority: RootAuthority,
        *,
        release: str = "4.23",
        address: tuple[str, int] = ("127.0.0.1", 0),
        times: ServerTimes | None = None,
    ) -> None:
        self.zone, self.authority, self.times = zone, authority, times or ServerTimes()
        self.release = RELEASES[release]
        #: The id of this server: the MAC address of a network interface.
        self.mgmt_id = 0x02FC00000000 + secrets.randbelow(1 << 24)
        self.strict = False
        self.allow_expired = True
        self.revoked: set[int] = set()
        #: Addresses of management servers and the algorithm, which agents get with ReadyCommand.
        self.peers, self.algorithm = [address[0]], "static"
        #: Makes the next PingAnswer say sendStartup.
        self.wants_startup = False
        #: Called with each frame: direction ("agent" or "server") and frame.
        self.taps: list[Callable[[str, WireFrame], None]] = []
        self._address = address
        self._listener: socket.socket | None = None
        self._connections: set[AgentConnection] = set()
        self.stopping = threading.Event()

    def __enter__(self) -> AgentServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def host(self) -> str:
        """Return the address that it listens on."""
        return self._address[0]

    @property
    def port(self) -> int:
        """Return the port; the system chooses it at the first start if none was given."""
        return self._address[1]

    @property
    def log(self) -> list[str]:
        """Return the readable log of the zone."""
        return self.zone.log

    def start(self) -> None:
        """Listen. After ``stop`` this is a restart of the server: the database has stayed."""
        self.stopping.clear()
        self._listener = socket.create_server(self._address)
        self._address = self._listener.getsockname()[:2]
        self.zone.write(f"management server {self.host}:{self.port} of CloudStack {self._version} has started")
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        threading.Thread(target=self._watch_pings, daemon=True).start()

    def stop(self) -> None:
        """Close all connections at once, as a server that dies does. The database keeps all states."""
        self.stopping.set()
        if self._listener:
            # A close alone does not end the accept of the other thread, which would take one more connection.
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        for connection in list(self._connections):
            connection.close("the management server has stopped")
        self.zone.write(f"management server {self.host}:{self.port} has stopped")

    @property
    def _version(self) -> str:
        return ".".join(map(str, self.release[:2]))

    def _accept(self, listener: socket.socket) -> None:
        while not self.stopping.is_set():
            try:
                accepted, (address, *_) = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(accepted, address), daemon=True).start()

    def _serve(self, accepted: socket.socket, address: str) -> None:
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        context = self.authority.context(strict=self.strict, allow_expired=self.allow_expired)
        link = ServerLink(accepted, context)
        try:
            link.handshake(lambda certificate: self._refuse(certificate, address))
        except LinkClosed as error:
            self.zone.write(f"connection from {address} refused: {error}")
            link.close()
            return
        connection = AgentConnection(self, link, address)
        self._connections.add(connection)
        connection.run()
        self._connections.discard(connection)

    def _refuse(self, certificate: dict[str, Any] | None, address: str) -> int:
        """Return 0, or the TLS alert for a client certificate that a strict server refuses."""
        if not self.strict:
            return 0
        if not certificate:
            self.zone.write("Empty client certificate chain")
            return _BAD_CERTIFICATE
        if int(certificate["serialNumber"], 16) in self.revoked:
            self.zone.write("the client certificate is revoked")
            return _CERTIFICATE_UNKNOWN
        if ("IP Address", address) not in certificate.get("subjectAltName", ()):
            self.zone.write(f"Certificate ownership verification failed for client: {address}")
            return _CERTIFICATE_UNKNOWN
        return 0

    def _watch_pings(self) -> None:
        limit = self.times.ping * self.times.ping_timeout
        while not self.stopping.wait(min(self.times.ping / 4, 1)):
            for host in self.zone.up_hosts():
                connection = host.connection
                if connection and connection.server is self and time.monotonic() - connection.last_ping > limit:
                    self.zone.set_state(host, "Disconnected", f"no ping for {limit:.1f} s")
                    connection.close("behind on ping")

    def connection(self, host_name: str | None = None) -> AgentConnection:
        """Return the connection of an agent that is Up. Raise LookupError if none is."""
        for host in self.zone.up_hosts():
            if host_name in (None, host.name) and host.connection:
                return cast(AgentConnection, host.connection)
        raise LookupError(f"no agent is Up: {host_name or 'any'}")

    def prepare(self, connection: AgentConnection, host: HostRow) -> None:
        """Send the commands that come before ReadyCommand."""

    def lost(self, connection: AgentConnection) -> None:
        """Handle the end of the connection of an agent."""


class AgentConnection:
    """One connection of an agent, with the queue of commands for it (AgentAttache)."""

    def __init__(self, server: AgentServer, link: ServerLink, address: str) -> None:
        self.server, self.zone, self.address = server, server.zone, address
        self.host_row: HostRow | None = None
        self.last_ping = time.monotonic()
        self.closed = threading.Event()
        self._link = link
        self._reason = ""
        #: While the server sets up the host, the end of the connection does not end its waits (seen).
        self._joining = False
        self._pending: dict[int, _Pending] = {}
        self._sequences = itertools.count((secrets.randbelow(1 << 15) << 48) + 1)
        self._tickets, self._served = itertools.count(), 0
        self._turn = threading.Condition()

    def run(self) -> None:
        """Read frames until the connection ends."""
        try:
            while True:
                frame = self._link.receive()
                self._tap("agent", frame)
                if frame.is_request:
                    self._request(frame)
                else:
                    self._answer(frame)
        except LinkClosed as error:
            self.close(str(error))

    def close(self, reason: str) -> None:
        """Close the connection. Commands that wait for an answer fail now, except during setup."""
        if self.closed.is_set():
            return
        self._reason = reason
        self.closed.set()
        self._link.close()
        host = self.host_row
        if host and host.connection is self:
            host.connection = None
            self.zone.write(f"connection of {host.name} closed: {reason}")
            if host.state in ("Up", "Connecting") and not self.server.stopping.is_set() and not self._joining:
                self.zone.set_state(host, "Alert", "the connection was lost")
        if not self._joining:
            for pending in list(self._pending.values()):
                pending.failure = reason
                pending.ended.set()
        if host:
            self.server.lost(self)

    def _tap(self, side: str, frame: WireFrame) -> None:
        for tap in self.server.taps:
            tap(side, frame)

    def transmit(self, frame: WireFrame) -> None:
        """Send a frame. Nothing waits for its answer."""
        self._tap("server", frame)
        self._link.send(frame)

    # What the agent asks

    def _request(self, frame: WireFrame) -> None:
        name, fields = frame.name, frame.fields
        if frame.mgmt_id != -1 or frame.flags & FROM_SERVER:
            self.zone.problem(f"{name} has mgmtId {frame.mgmt_id} and flags {frame.flags:#04x}")
        if name == "StartupSecondaryStorageCommand":
            self._startup(frame)
        elif self.host_row is None:
            self.zone.problem(f"{name} dropped: the first command on a connection must be a StartupCommand")
        elif name in ("PingStorageCommand", "PingCommand"):
            self._ping(frame, fields)
        elif name == "ShutdownCommand":
            self.zone.write(f"agent {self.host_row.name} → ShutdownCommand, reason {fields.get('reason')}")
            self.zone.set_state(self.host_row, "Disconnected", "the agent has shut down")
        else:
            self._reply(frame, "AgentControlAnswer", {"result": True})

    def _reply(self, frame: WireFrame, name: str, fields: dict[str, Any]) -> None:
        flags = frame.flags & (STOP_ON_ERROR | IN_SEQUENCE) | FROM_SERVER
        known = fields_of(self.server.release, name, fields | _SHARED)
        via = _NOBODY if name == "StartupAnswer" else frame.via
        messages = ((class_of(name), known),)
        self.transmit(WireFrame(flags, frame.sequence, self.server.mgmt_id, frame.agent_id, via, messages))

    def _ping(self, frame: WireFrame, fields: dict[str, Any]) -> None:
        assert self.host_row
        if frame.agent_id != self.host_row.id or fields.get("hostId") != self.host_row.id:
            self.zone.problem(
                f"ping of host {fields.get('hostId')} with agentId {frame.agent_id}, not {self.host_row.id}"
            )
        self.last_ping = time.monotonic()
        again = self.server.wants_startup or self.host_row.state in ("Disconnected", "Alert")
        self.server.wants_startup = False
        answer = {"_command": fields, "sendStartup": again, "avoidMsList": [], "reconcileCommands": [], "result": True}
        self._reply(frame, "PingAnswer", answer)

    def _startup(self, frame: WireFrame) -> None:
        fields = frame.fields
        self.zone.write(f"agent {fields.get('name')} at {self.address} → Startup, version {fields.get('version')}")
        answer = {"hostId": 0, "hostName": "", "hostUuid": "", "pingInterval": max(1, round(self.server.times.ping))}
        self._reply(frame, "StartupAnswer", answer | {"result": True})
        if fields.get("dataCenter") not in (self.zone.id, self.zone.name):
            self._refuse(f"Host {self.address} sent incorrect data center: {fields.get('dataCenter')}")
            return
        if frame.flags != REQUEST | IN_SEQUENCE:
            self.zone.problem(f"Startup has the flags {frame.flags:#04x}")
        threading.Thread(target=self._join, args=(fields,), daemon=True).start()

    def _refuse(self, text: str) -> None:
        details = {"_details": f"java.lang.IllegalArgumentException: {text}"} | _SHARED
        self.zone.write(f"refused: {text}")
        flags = REQUEST | STOP_ON_ERROR | IN_SEQUENCE
        ready = ((class_of("ReadyCommand"), details),)
        self.transmit(WireFrame(flags, _NOBODY, _NOBODY, _NOBODY, _NOBODY, ready))
        self.close(text)

    # From Connecting to Up

    def _join(self, startup: dict[str, Any]) -> None:
        """Set up the host. Only one connection at a time holds its join lock."""
        host = self.zone.find_host(startup)
        if not host.join_lock.acquire(blocking=False):
            self.zone.write(f"host {host.name}: a new connection waits for the join lock")
            with host.join_lock:
                self.close("the join lock of the host was held too long")  # so it was seen
            return
        self._joining = True
        host.joining = self
        try:
            self._take(host, startup)
            self.server.prepare(self, host)
            self._ready(host)
        except LinkClosed as error:
            self.zone.set_state(host, "Alert", f"setup failed: {error}")
            self.close(str(error))
        finally:
            self._joining, host.joining = False, None
            host.join_lock.release()

    def _take(self, host: HostRow, startup: dict[str, Any]) -> None:
        older, host.startup = host.connection, startup
        self.host_row = host
        if older and older is not self:
            older.close("another connection of the same host has come")
        host.connection = self
        self.last_ping = time.monotonic()
        self.zone.set_state(host, "Connecting", f"connection {self.address}")

    def _ready(self, host: HostRow) -> None:
        whose = {"dcId": 1, "hostId": host.id, "hostUuid": host.uuid, "hostName": host.name}
        whose["enableHumanReadableSizes"] = True
        answer = self.send("ReadyCommand", whose | {"wait": round(self.server.times.ready_wait)})
        if not answer.ok:
            raise LinkClosed(f"no ReadyAnswer: {answer.details or self._reason}")
        if self.closed.is_set():
            raise LinkClosed(self._reason)
        self.zone.set_state(host, "Up", "ReadyAnswer")
        more: dict[str, Any] = {"avoidMsHostList": [], "lbCheckInterval": 0, "arch": "x86_64"}
        if host.startup.get("msHostList") != f"{','.join(self.server.peers)}@{self.server.algorithm}":
            more |= {"msHostList": self.server.peers, "lbAlgorithm": self.server.algorithm}
        self.send("ReadyCommand", whose | more)

    # Commands of the server

    def send(self, name: str, fields: dict[str, Any], *, wait: float | None = None) -> AgentAnswer:
        """Send a command and return its answer, or one without a name if none came within twice the *wait*.

        Commands in sequence wait for their turn. The next turn comes with an answer that has the flag IN_SEQUENCE.
        """
        if not knows(self.server.release, class_of(name)):
            raise LookupError(f"this release has no {name}")
        limit = 2 * (wait or fields.get("wait") or self.server.times.wait)
        ordered = name in ORDERED or bool(fields.get("executeInSequence"))
        if not ordered:
            return self._exchange(name, fields, limit, ordered=False)
        with self._turn:
            mine = next(self._tickets)
            self._turn.wait_for(lambda: self._served == mine)
        try:
            return self._exchange(name, fields, limit, ordered=True)
        finally:
            with self._turn:
                self._served += 1
                self._turn.notify_all()

    def frame_of(self, name: str, fields: dict[str, Any], *, ordered: bool = False) -> WireFrame:
        """Return a new frame with one command. ``transmit`` sends it."""
        host = self.host_row
        assert host
        context = {"contextMap": {"logid": secrets.token_hex(4)}}
        known = fields_of(self.server.release, name, _SHARED | context | fields)
        flags = REQUEST | STOP_ON_ERROR | FROM_SERVER | (IN_SEQUENCE if ordered else 0)
        message = (class_of(name), known)
        return WireFrame(flags, next(self._sequences), self.server.mgmt_id, host.id, host.id, (message,))

    def _exchange(self, name: str, fields: dict[str, Any], limit: float, *, ordered: bool) -> AgentAnswer:
        host, pending = self.host_row, _Pending()
        assert host
        frame = self.frame_of(name, fields, ordered=ordered)
        sequence, known = frame.sequence, frame.fields
        self._pending[sequence] = pending
        started = time.monotonic()
        try:
            self.transmit(frame)
            self.zone.write(f"server → {describe(name, known)}")
            if self.closed.is_set() and not self._joining:
                return AgentAnswer("", {"result": False, "details": self._reason})
            if not pending.ended.wait(limit):
                pending.failure = f"Timed out on {name} after {limit:.0f} s"
        except LinkClosed as error:
            pending.failure = str(error)
        finally:
            del self._pending[sequence]
        if pending.frame is None:
            self.zone.write(f"no answer to {name}: {pending.failure}")
            return AgentAnswer("", {"result": False, "details": pending.failure})
        answer = AgentAnswer(pending.frame.name, pending.frame.fields)
        asked = describe(name, {"request": known.get("request")})
        took = f"{time.monotonic() - started:.3f} s"
        self.zone.write(f"agent  → {asked}: {describe(answer.name, answer.fields)} ({took})")
        if ordered and not pending.frame.flags & IN_SEQUENCE:
            self.zone.problem(f"{answer.name} has no IN_SEQUENCE flag, so the queue of {host.name} stands still")
            self.closed.wait(max(0.0, started + limit - time.monotonic()))
        return answer

    def _answer(self, frame: WireFrame) -> None:
        host, pending = self.host_row, self._pending.get(frame.sequence)
        if host is None:  # the server finds the waiting command by the agent's id, not by the connection (read)
            host = next((each for each in self.zone.hosts if each.id == frame.agent_id and each.joining), None)
            pending = host.joining._pending.get(frame.sequence) if host else None
        unknown = [name for name, _ in frame.messages if not knows(self.server.release, name)]
        if unknown:
            self.zone.problem(f"this release cannot read {', '.join(unknown)}: the answer is lost")
        elif host is None:
            self.zone.write(f"late answer {frame.name}: no host waits for it")
        elif frame.agent_id != host.id or frame.mgmt_id != self.server.mgmt_id or frame.via != host.id:
            self.zone.problem(
                f"{frame.name} is lost: mgmtId {frame.mgmt_id}, agentId {frame.agent_id}, via {frame.via} in its header"
            )
        elif frame.flags & FROM_SERVER:
            self.zone.problem(f"{frame.name} has the flag FROM_SERVER")
        elif pending is None:
            self.zone.write(f"late answer {frame.name}: no command waits for it")
        else:
            pending.frame = frame
            pending.ended.set()


def describe(name: str, fields: dict[str, Any]) -> str:
    """Return a command or an answer as a few readable words, without secrets."""
    shown = (
        "request",
        "id",
        "_dir",
        "downloadStatus",
        "downloadPct",
        "status",
        "result",
        "installPath",
        "path",
        "details",
    )
    words = [f"{each}={fields[each]}" for each in shown if fields.get(each) not in (None, "", " ")]
    if "templateInfos" in fields:
        words.append(f"{len(fields['templateInfos'])} entries")
    return " ".join([name.removesuffix("Command"), *words])
