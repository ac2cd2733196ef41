"""One connection to a management server, from Startup to its end.

The agent sends Startup. The server answers at once, then sends commands one after the other: setup, lists, and
ReadyCommand, after which the host is Up. From then on the agent pings the server. This module answers what concerns the
session itself. All other commands go to a CommandPool.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ssvm_worker.errors import WorkerError
from ssvm_worker.units import printable

from .certificates import CertificateFiles
from .command_log import describe
from .command_pool import CommandPool, failed
from .frame import FROM_SERVER, IN_SEQUENCE, REQUEST, STOP_ON_ERROR, BadFrame, Frame, RawMessage
from .link import AgentLink, LinkLost
from .server_list import AgentState, ServerList

_log = logging.getLogger("ssvm.agent")

_API, _LB, _CA = "com.cloud.agent.api.", "org.apache.cloudstack.agent.lb.", "org.apache.cloudstack.ca."
#: In a header: no management server, and an agent without an id.
_NONE = -1
#: Seconds to wait for the answers to setup commands at the end, and for a probe of a server.
_SETUP_S, _PROBE_S = 30.0, 3.0


@dataclass(frozen=True)
class SessionTimes:
    """Limits in seconds. Tests make them short."""

    #: Without a command before the host is Up. The server sends none while another connection holds the host's lock.
    startup_s: float = 180.0
    #: Between two pings, until the server names another interval.
    ping_s: float = 60.0
    #: Between the answer to MigrateAgentConnectionCommand and the end of the connection.
    migrate_s: float = 3.0
    #: Between two looks at the clock.
    tick_s: float = 0.5


@dataclass(frozen=True)
class SessionEnd:
    """Why a session has ended: the connection was lost or refused, or the server moves or stops the agent."""

    kind: Literal["lost", "refused", "migrate", "shutdown"]
    why: str
    #: Whether the host was Up.
    was_up: bool = False


@dataclass(frozen=True)
class AgentContext:
    """What an agent keeps from one connection to the next."""

    #: Returns StartupSecondaryStorageCommand for the address of this host that is connected.
    startup: Callable[[str], RawMessage]
    state: AgentState
    pool: CommandPool
    certificates: CertificateFiles
    times: SessionTimes = SessionTimes()
    #: Called when the host is Up, with its id.
    on_up: Callable[[int], None] = lambda _: None
    #: Called about twice a second. Returns a reason to end the connection, or "".
    on_tick: Callable[[], str] = lambda: ""
    #: Called with the headers of commands without an answer, when they change before the host is Up.
    on_unanswered: Callable[[tuple[tuple[int, int, int, int], ...]], None] = lambda _: None
    #: By sequence: the frames of those commands. The next connection answers them.
    unanswered: dict[int, Frame] = field(default_factory=dict)
    #: Numbers the agent's own requests.
    sequences: Iterator[int] = field(default_factory=itertools.count)


class Session:
    """The agent's side of one connection. ``run`` occupies its thread. Other threads may call ``shut_down``."""

    def __init__(self, link: AgentLink, context: AgentContext, *, transferred: bool = False) -> None:
        """*transferred*: whether the server before has moved the agent here."""
        self._link, self._context, self._transferred = link, context, transferred
        self._state, self._pool = context.state, context.pool
        self._ping_s = context.times.ping_s
        self._pinged_at = self._checked_at = self._asked_at = time.monotonic()
        self._move_at: float | None = None
        self._ready, self._over = threading.Event(), threading.Event()
        # Held while the session answers a command without the pool. The ticker moves the agent between two answers.
        self._answering = threading.Lock()
        self._host_id = _NONE
        self._end: SessionEnd | None = None
        self._own: dict[str, Callable[[dict[str, Any]], RawMessage]] = {
            f"{_API}ReadyCommand": self._on_ready,
            f"{_API}ShutdownCommand": self._on_shutdown,
            f"{_API}MaintainCommand": lambda _: _answer(f"{_API}MaintainAnswer", willMigrate=True),
            f"{_API}MigrateAgentConnectionCommand": self._on_migrate,
            f"{_LB}SetupMSListCommand": self._on_servers,
            f"{_CA}SetupKeyStoreCommand": self._on_key_store,
            f"{_CA}SetupCertificateCommand": self._on_certificate,
        }

    @property
    def peer(self) -> str:
        """Return host and port of the server."""
        return self._link.peer

    def run(self) -> SessionEnd:
        """Send Startup, and answer the server until the connection ends. Return why it has ended."""
        ticker = threading.Thread(target=self._tick, name="ticker", daemon=True)
        try:
            self._send_startup()
            self._answer_lost_commands()
            ticker.start()
            while True:
                self._receive(self._link.receive())
        except LinkLost as error:
            end = self._end or SessionEnd("lost", error.what)
        finally:
            self._over.set()
            self._link.close()
        return replace(end, was_up=self._ready.is_set())

    def shut_down(self) -> None:
        """Announce to the server that this agent stops, and end the connection.

        It first waits for the answers to setup commands, because without them the server blocks the host.
        """
        self._pool.wait_setup(_SETUP_S)
        details = {"reason": "sig.kill", "removeHost": False}
        with contextlib.suppress(LinkLost):
            flags = REQUEST | STOP_ON_ERROR | IN_SEQUENCE
            self._request(flags, RawMessage(f"{_API}ShutdownCommand", details).completed(), sequence=_NONE)
        self._finish("shutdown", "the agent stops")

    def _finish(self, kind: Literal["lost", "refused", "migrate", "shutdown"], why: str) -> None:
        self._end = self._end or SessionEnd(kind, why)
        self._link.close(why)

    # What the agent sends

    def _request(self, flags: int, message: RawMessage, sequence: int | None = None) -> None:
        number = next(self._context.sequences) if sequence is None else sequence
        host = self._host_id if self._host_id >= 0 else self._state.host_id
        host = _NONE if host is None else host
        self._link.send(Frame(flags, number, (message,), _NONE, host, host).encode())

    def _send_startup(self) -> None:
        startup = self._context.startup(self._link.local_address)
        changing = {"msHostList": str(self._state.servers), "connectionTransferred": self._transferred}
        if self._state.host_id is not None:
            changing["id"] = self._state.host_id
        _log.info(
            "connected to %s (%s), sending Startup as %s", self._link.peer, self._link.cipher, startup.content["guid"]
        )
        self._request(REQUEST | IN_SEQUENCE, RawMessage(startup.name, startup.content | changing))

    def _answer_lost_commands(self) -> None:
        """Answer the setup commands of a lost connection with a failure.

        Without an answer the server holds the lock of the host for twice its setting ``wait``, usually an hour. It
        finds the waiting command by agent and sequence, so the answer may come over another connection
        (ClusteredAgentManagerImpl). If no command waits, it drops the answer.
        """
        for frame in list(self._context.unanswered.values()):
            _log.info("answering a setup command of the lost connection")
            self._respond([frame.answered([failed("The connection was lost before the answer")])])

    def _note_unanswered(self, frame: Frame, *, answered: bool) -> None:
        waiting = self._context.unanswered
        if answered and waiting.pop(frame.sequence, None) is None:
            return
        if not answered:
            waiting[frame.sequence] = replace(frame, messages=())
        heads = [(each.flags, each.sequence, each.server, each.agent) for each in list(waiting.values())]
        self._context.on_unanswered(tuple(heads))

    def _respond(self, responses: Sequence[Frame]) -> None:
        """Send answers. They are lost with their connection: the server has then ended its wait for them, too."""
        # The refusal of an agent lacks FROM_SERVER, so its inverse would be set here.
        sent = [replace(each, flags=each.flags & ~FROM_SERVER) for each in responses]
        try:
            self._link.send(*map(_encoded, sent))
        except LinkLost as error:
            names = ", ".join(message.short for each in sent for message in each.messages)
            _log.warning("%s is lost with its connection: %s", names, error.what)
            return
        for each in sent:
            self._note_unanswered(each, answered=True)

    # What the server sends

    def _receive(self, data: bytes) -> None:
        try:
            frame = Frame.decode(data)
        except BadFrame as error:
            _log.warning("the server sent a frame that cannot be read: %s", error)
            if error.head is not None and error.head.is_request:
                self._respond([error.head.answered([failed(str(error))])])
            return
        if not frame.is_request:
            self._on_answer(frame.messages[0])
            return
        if frame.agent >= 0:
            self._host_id = frame.agent
        self._asked_at = time.monotonic()
        if all(each.name in self._own for each in frame.messages):
            for each in frame.messages:
                _log.info("← #%d %s", frame.number, describe(each))
            with self._answering:
                self._respond([frame.answered([self._answered(each) for each in frame.messages])])
            if self._end is not None:
                self._link.close(self._end.why)
        else:
            if not self._ready.is_set():
                self._note_unanswered(frame, answered=False)
            self._pool.run(frame, self._respond)

    def _answered(self, message: RawMessage) -> RawMessage:
        try:
            return self._own[message.name](message.content)
        except WorkerError as error:
            _log.warning("%s failed: %s", message.short, error)
            return failed(str(error))
        except Exception as error:  # noqa: BLE001 - without an answer the server would wait
            _log.exception("%s failed, probably because of its fields", message.short)
            return failed(f"The agent cannot handle the fields of the command ({type(error).__name__})")

    def _on_answer(self, answer: RawMessage) -> None:
        fields = answer.content
        if answer.short == "StartupAnswer":
            if not fields.get("result"):
                self._finish("refused", printable(str(fields.get("details", "the server gives no reason")))[:500])
            interval = fields.get("pingInterval")
            if isinstance(interval, int | float) and 0 < interval < 86400:
                self._ping_s = float(interval)
        elif answer.short == "PingAnswer":
            self._state.learn_servers(ServerList(()), _texts(fields.get("avoidMsList")))
            # Before ReadyCommand the server is still setting up the host. A second Startup would disturb it.
            if fields.get("sendStartup") is True and self._ready.is_set():
                _log.info("the server has lost this host and asks for Startup")
                self._send_startup()

    def _on_ready(self, fields: dict[str, Any]) -> RawMessage:
        if (details := fields.get("_details")) is not None:
            self._end = SessionEnd("refused", printable(str(details))[:500])
            return _answer(f"{_API}ReadyAnswer")
        host_id = int(fields.get("hostId") or self._host_id)
        self._host_id = host_id
        if host_id >= 0:
            self._state.learn_id(host_id)
        self._learn_servers(fields, fields.get("msHostList"), fields.get("avoidMsHostList"))
        if not self._ready.is_set():
            self._ready.set()
            _log.info("host %s is Up with the id %d", printable(str(fields.get("hostName", "")))[:100], host_id)
            self._context.on_up(host_id)
        return _answer(f"{_API}ReadyAnswer")

    def _on_shutdown(self, fields: dict[str, Any]) -> RawMessage:
        self._end = SessionEnd("shutdown", f"the server stops the agent: {printable(str(fields.get('reason')))[:200]}")
        return _answer(f"{_API}Answer")

    def _on_servers(self, fields: dict[str, Any]) -> RawMessage:
        self._learn_servers(fields, fields.get("msList"), fields.get("avoidMsList"))
        if fields.get("triggerHostLb"):
            self._checked_at = float("-inf")
        return _answer(f"{_LB}SetupMSListAnswer")

    def _learn_servers(self, fields: dict[str, Any], hosts: Any, avoid: Any) -> None:
        algorithm, check_s = fields.get("lbAlgorithm") or "static", float(fields.get("lbCheckInterval") or 0)
        self._state.learn_servers(ServerList(tuple(_texts(hosts)), str(algorithm), check_s), _texts(avoid))

    def _on_migrate(self, fields: dict[str, Any]) -> RawMessage:
        self._learn_servers(fields, fields.get("msList"), fields.get("avoidMsList"))
        others = self._state.others(self._link.host)
        if not others:
            return _answer(f"{_API}MigrateAgentConnectionAnswer", result=False, details="There is no other server")
        self._state.prefer(others[0])
        self._move_at = time.monotonic() + self._context.times.migrate_s
        return _answer(f"{_API}MigrateAgentConnectionAnswer")

    def _on_key_store(self, _: dict[str, Any]) -> RawMessage:
        name = str(self._context.startup(self._link.local_address).content["name"])
        return _answer(
            f"{_CA}SetupKeystoreAnswer", csr=self._context.certificates.request(name, self._link.local_address)
        )

    def _on_certificate(self, fields: dict[str, Any]) -> RawMessage:
        texts = [fields.get(name) or None for name in ("certificate", "privateKey", "caCertificates")]
        certificate, key, authorities = [each if isinstance(each, str) else None for each in texts]
        self._context.certificates.install(certificate or "", key, authorities)
        return _answer(f"{_CA}SetupCertificateAnswer")

    # What time brings

    def _tick(self) -> None:
        """Ping, and look for limits that have passed, until the connection ends."""
        while not self._over.wait(self._context.times.tick_s):
            try:
                self._pool.expire()
                if why := self._context.on_tick():
                    self._finish("lost", why)
                self._look(time.monotonic())
            except LinkLost:
                return
            except Exception:  # noqa: BLE001 - the thread must go on
                _log.exception("the ticker has a bug, and continues")

    def _look(self, now: float) -> None:
        is_up = self._ready.is_set()
        if is_up and self._link.quiet_s > 2 * self._ping_s:
            return self._finish("lost", f"the server has been silent for {2 * self._ping_s:g} s")
        # The server may send no command because it waits for our answer. Then a lost connection would block the host.
        limit = max(self._context.times.startup_s, 2 * self._ping_s)
        if not is_up and now - self._asked_at > limit and not self._pool.open_count:
            return self._finish("lost", f"the server has sent no command for {limit:g} s, and the host is not Up")
        if self._host_id >= 0 and now - self._pinged_at >= self._ping_s:
            self._pinged_at = now
            fields = {"changes": {}, "hostType": "Storage", "hostId": self._host_id, "outOfBand": False}
            message = RawMessage(f"{_API}PingStorageCommand", fields | {"commandInfos": []})
            self._request(REQUEST | STOP_ON_ERROR, message.completed())
        if self._move_at is not None and now >= self._move_at and self._pool.wait_setup(0):
            with self._answering:
                return self._finish("migrate", "the server moves the agent to another server")
        servers = self._state.servers
        if servers.check_s and is_up and now - self._checked_at >= servers.check_s:
            self._checked_at = now
            self._return_to(servers.hosts[0])
        return None

    def _return_to(self, first: str) -> None:
        """Move to the preferred server if no command is open and the server accepts connections."""
        if first == self._link.host or first in self._state.avoid or self._pool.open_count:
            return
        try:
            socket.create_connection((first, self._link.port), _PROBE_S).close()
        except OSError:
            return
        self._state.prefer(first)
        with self._answering:
            self._finish("migrate", f"the preferred server {first} is reachable again")


def _encoded(response: Frame) -> bytes:
    """Return the bytes of a response, or those of a failure if a bug has made it unsendable."""
    try:
        return response.encode()
    except (TypeError, ValueError, RecursionError) as error:
        _log.exception("an answer cannot be sent because of a bug")
        return replace(response, messages=(failed(f"The agent has a bug ({type(error).__name__})"),)).encode()


def _answer(name: str, **fields: Any) -> RawMessage:
    return RawMessage(name, {"result": True} | fields).completed()


def _texts(value: Any) -> Sequence[str]:
    return [str(each) for each in value if each] if isinstance(value, list) else []
