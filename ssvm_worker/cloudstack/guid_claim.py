"""Hold the GUID of an agent in the ledger, so that of several agents with one GUID only one connects.

A server that sees two agents with one GUID disconnects the older one each time. The others wait.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections import Counter
from dataclasses import replace

from ssvm_worker import __version__
from ssvm_worker.errors import StoreDenied, StoreUnavailable
from ssvm_worker.ledger.agents import BUCKETS, AgentInfo, AgentRegistry

_log = logging.getLogger("ssvm.agent")

#: The longest time in seconds between two tries to take or renew the claim.
_EVERY_S = 1.0


class GuidClaim:
    """Takes and renews the claim in a thread, and counts answers. Other threads may call every method."""

    def __init__(self, registry: AgentRegistry, guid: str, zone: str, claim_s: float) -> None:
        """*claim_s*: seconds after which the claim of a dead agent expires."""
        self._registry, self._guid, self._claim_s = registry, guid, claim_s
        self._holder = uuid.uuid4().hex
        self._info = AgentInfo(socket.gethostname(), os.getpid(), zone, __version__)
        self._held_until = 0.0
        self._lost = False
        self._said = ""
        self._inherited: tuple[tuple[int, int, int, int], ...] = ()
        self._over, self._news = threading.Event(), threading.Event()
        self._counts: Counter[tuple[str, str, int]] = Counter()
        self._seconds: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._repeat, name="claim", daemon=True)

    def start(self) -> None:
        """Start to take the claim."""
        self._thread.start()

    @property
    def held(self) -> bool:
        """Return whether the ledger has confirmed the claim within its time. A new connection needs this."""
        return time.monotonic() < self._held_until

    @property
    def lost(self) -> bool:
        """Return whether another agent holds the claim. An existing connection then must end.

        If only the ledger is away, the connection continues, because no other agent can take the claim from there.
        """
        return self._lost

    def wait(self, stopping: threading.Event) -> bool:
        """Wait until this agent holds the claim. Return False if *stopping* is set first."""
        while not self.held:
            if stopping.wait(0.1):
                return False
        return True

    def describe(self, server: str, host_id: int | None) -> None:
        """Set what the next renewal stores: the server, and the id of the host while it is Up."""
        self._info = replace(self._info, server=server, host_id=host_id, up_since=time.time() if host_id else None)

    def note_replaced(self) -> None:
        """Store that a server has ended the connection just after Up, as it does when another agent has the GUID."""
        self._info = replace(self._info, replaced_at=time.time())
        self._news.set()

    def note_unanswered(self, headers: tuple[tuple[int, int, int, int], ...]) -> None:
        """Store at once which commands have no answer, so that the next holder of the GUID can answer them."""
        self._info = replace(self._info, unanswered=headers)
        self._news.set()

    def take_unanswered(self) -> tuple[tuple[int, int, int, int], ...]:
        """Return the commands that the last holder of the GUID left without an answer, once."""
        inherited, self._inherited = self._inherited, ()
        return inherited

    def note(self, command: str, ok: bool, seconds: float) -> None:
        """Count an answer. The next renewal stores it."""
        kind = (command if command.isidentifier() else "other", "ok" if ok else "failed")
        bucket = sum(seconds > limit for limit in BUCKETS)
        with self._lock:
            self._counts[*kind, bucket] += 1
            self._seconds[kind] += seconds  # type: ignore[assignment]  # a Counter of floats

    def release(self) -> None:
        """Store the counts and release the claim, so that another agent takes it at once."""
        self._over.set()
        self._news.set()
        self._thread.join(10)
        self.describe("", None)
        try:
            self._store_counts()
            if self.held:
                self._registry.hold(self._guid, self._holder, 0, self._info)
        except (StoreUnavailable, StoreDenied) as error:
            _log.warning("the claim to the GUID %s expires later: %s", self._guid, error)
        self._held_until = 0.0

    def _repeat(self) -> None:
        while not self._over.is_set():
            try:
                self._renew()
                self._store_counts()
            except (StoreUnavailable, StoreDenied) as error:
                self._say(f"the ledger is away: {error}", logging.WARNING)
            except Exception:  # noqa: BLE001 - without this thread, the agent would lose its claim
                _log.exception("the claim has a bug, and continues")
            self._news.wait(min(_EVERY_S, self._claim_s / 4))
            self._news.clear()

    def _renew(self) -> None:
        started = time.monotonic()
        sent = self._info
        if (before := self._registry.hold(self._guid, self._holder, self._claim_s, sent)) is not None:
            self._inherited += before.unanswered if before is not sent else ()
            self._say(f"this agent holds the GUID {self._guid}", logging.INFO)
            self._held_until, self._lost = started + self._claim_s, False
            return
        self._held_until, self._lost = 0.0, True
        holder = next((each.info for each in self._registry.agents() if each.guid == self._guid), None)
        where = f" on {holder.host} (process {holder.pid})" if holder else ""
        self._say(f"another agent{where} holds the GUID {self._guid}; this one waits", logging.WARNING)

    def _store_counts(self) -> None:
        with self._lock:
            counts, seconds = self._counts, self._seconds
            self._counts, self._seconds = Counter(), Counter()
        if not counts:
            return
        try:
            self._registry.note(counts, seconds)
        except (StoreUnavailable, StoreDenied):
            with self._lock:
                self._counts.update(counts)
                self._seconds.update(seconds)
            raise

    def _say(self, text: str, level: int) -> None:
        """Log a change of the state, once."""
        if text != self._said:
            self._said = text
            _log.log(level, "%s", text)
