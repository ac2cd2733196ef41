"""Keep one agent connected to a management server: connect, run the session, wait, and connect again."""

from __future__ import annotations

import logging
import random
import threading
import time

from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import ConfigError

from .certificates import CertificateFiles
from .command_pool import CommandPool, JointHandler
from .frame import Frame, Handler
from .guid_claim import GuidClaim
from .link import AgentLink, LinkLost, LinkTrust
from .server_list import AgentState, ServerList
from .session import AgentContext, Session, SessionEnd, SessionTimes
from .startup import startup_command

_log = logging.getLogger("ssvm.agent")

#: Seconds that commands in progress get after SIGTERM. Their jobs continue in the workers anyway.
_DRAIN_S = 5.0
#: A connection that ends so many seconds after its start may have been replaced by that of another agent.
_BRIEF_S = 10.0


class Agent:
    """One agent. ``run`` occupies its thread; ``stop`` may be called by another thread or a signal handler."""

    def __init__(
        self,
        settings: Settings,
        handler: Handler,
        *,
        joint: JointHandler | None = None,
        times: SessionTimes | None = None,
        claim: GuidClaim | None = None,
    ) -> None:
        """Prepare. With a *claim*, connect only while it is held. Raise ConfigError if [cloudstack] names no server."""
        section = settings.cloudstack
        if not section.servers:
            raise ConfigError(
                "[cloudstack] names no management server",
                "cloudstack.servers",
                "Set servers, name and ca_file. In a system VM use --from-cmdline",
            )
        self._section, self._claim = section, claim
        self._stopping = threading.Event()
        self._session: Session | None = None
        self._trust = LinkTrust(section.ca_file, section.fingerprint, section.certificate_file, section.key_file)
        configured = ServerList(section.servers, section.algorithm).ordered(section.name or "")
        path = settings.state_dir / "cloudstack" / f"{section.guid or section.name}.json"
        self._context = AgentContext(
            lambda address: startup_command(section, settings.zone, address),
            AgentState(path, configured),
            CommandPool(handler, claim.note if claim else (lambda *_: None), joint, threads=section.max_commands),
            CertificateFiles(section.certificate_file, section.key_file, section.ca_file),
            times or SessionTimes(),
            on_up=self._on_up,
            on_tick=self._on_tick,
            on_unanswered=claim.note_unanswered if claim else lambda _: None,
        )

    def run(self) -> None:
        """Stay connected until ``stop``, or until the server stops the agent."""
        transferred, why = False, ""
        while self._may_connect():
            host = self._context.state.next_server()
            try:
                link = AgentLink(host, self._section.port, self._trust)
            except LinkLost as error:
                if str(error) != why:  # the same line every few seconds would hide others
                    _log.warning("%s", error)
                why, transferred = str(error), False
                self._pause()
                continue
            why = ""
            end = self._run_session(Session(link, self._context, transferred=transferred))
            transferred = end.kind == "migrate"
            if end.kind == "shutdown":
                return
            if end.kind != "migrate":
                self._pause()

    def stop(self) -> None:
        """End: the server learns that this agent stops. Safe to repeat."""
        self._stopping.set()
        session = self._session
        if session is not None:
            self._context.pool.wait_idle(_DRAIN_S)
            session.shut_down()

    def _may_connect(self) -> bool:
        """Wait for the claim. Return False when the agent stops."""
        if self._claim is not None:
            if not self._claim.wait(self._stopping):
                return False
            for flags, sequence, server, agent in self._claim.take_unanswered():
                self._context.unanswered[sequence] = Frame(flags, sequence, (), server, agent, agent)
        return not self._stopping.is_set()

    def _run_session(self, session: Session) -> SessionEnd:
        self._session = session
        if self._stopping.is_set():  # ``stop`` may have seen no session
            session.shut_down()
            return SessionEnd("shutdown", "the agent stops")
        started = time.monotonic()
        end = session.run()
        self._session = None
        if self._claim is not None:
            self._claim.describe("", None)
        level = logging.ERROR if end.kind == "refused" else logging.WARNING if end.kind == "lost" else logging.INFO
        _log.log(level, "the connection has ended: %s", end.why)
        if end.kind == "lost" and end.was_up and time.monotonic() - started < _BRIEF_S:
            if self._claim is not None:
                self._claim.note_replaced()
            _log.warning(
                "the host was Up only briefly: perhaps another agent uses the GUID %s without a claim in this ledger. "
                "Stop the Java agent of the system VM, or let all agents share one broker",
                self._section.guid or self._section.name,
            )
        return end

    def _pause(self) -> None:
        """Wait before the next connection, so that the server can finish with the last one."""
        self._stopping.wait(self._section.backoff_s * random.uniform(1, 1.5))  # noqa: S311 - no secret

    def _on_up(self, host_id: int) -> None:
        session = self._session
        if self._claim is not None and session is not None:
            self._claim.describe(session.peer, host_id)

    def _on_tick(self) -> str:
        if self._claim is not None and self._claim.lost:
            return "another agent holds the GUID now"
        return ""
