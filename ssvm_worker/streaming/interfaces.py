"""Define what moves and where: sources, sinks, stores and their objects.

A chunk is a non-empty, immutable ``bytes`` of 1 MiB at the most. Threads share it and never copy it.
Sizes of chunks mean nothing; their order and concatenation mean everything.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Protocol, Self

from ssvm_worker.units import MiB

_log = logging.getLogger("ssvm.stream")

#: The largest chunk. On two cores one of 256 KiB costs a third more time for each byte, 512 KiB a sixth; 2 MiB no less.
CHUNK = MiB

Observer = Callable[[bytes], None]
Check = Callable[[], None]


@dataclass(frozen=True)
class StoredObject:
    """One committed object of a store."""

    key: str
    #: Bytes, as the store itself reports them.
    size: int
    #: ``sha256:HEX`` where it is known; the manifest is the place to look for it.
    digest: str | None = None
    #: Seconds since the epoch.
    when: float = 0.0


@dataclass(frozen=True)
class Owner:
    """Who writes: the job and its fencing token, so that a part left behind can be told from one that is in use."""

    job_id: str = "local"
    token: int = 0


@dataclass(frozen=True)
class StoreUsage:
    """Bytes of a store; None where the store cannot know."""

    total: int | None
    used: int | None
    free: int | None


class Source(Protocol):
    """Gives the bytes of one object."""

    @property
    def name(self) -> str:
        """Safe to log: no credentials."""

    @property
    def size(self) -> int | None:
        """Bytes on the wire; known at the latest when the first chunk has come, if ever."""

    @property
    def resumable(self) -> bool:
        """Whether ``open`` takes an offset; known after the first open."""

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks from *offset* on, of the *same* object as the first open gave.

        Raises SourceChanged when it no longer is, SourceUnavailable when the bytes end early or stop coming.
        """


class Sink(Protocol):
    """Takes the bytes of one object. A context manager: leaving it aborts, unless it was committed or suspended."""

    key: str
    #: Bytes that an earlier attempt has left here, when the writer was asked to resume; ``write`` goes on behind them.
    offset: int

    def write(self, chunk: bytes) -> None: ...

    def resumed(self) -> Iterator[bytes]:
        """The chunks of the first ``offset`` bytes, for the hashes; empty when there are none."""

    def commit(self) -> StoredObject:
        """Make the object visible, whole and durable under its key, with its size read back from the store."""

    def abort(self) -> None:
        """Leave nothing behind; safe to repeat, from several threads, and after a commit, which it does not undo."""

    def suspend(self) -> None:
        """Keep what was written for a later attempt, where the store can; else abort."""

    def settle(self) -> int:
        """How many of the first bytes another attempt finds whatever becomes of this host, which this call sees to.

        For another thread than the one that writes; 0 where the store keeps nothing of an object that is not whole.
        """

    def __enter__(self) -> Sink: ...

    def __exit__(self, *exc: object) -> None: ...


class LeavingAborts:
    """Leaving the ``with`` block aborts; ``abort`` itself does nothing once the sink is committed or suspended."""

    key: str

    @abstractmethod
    def abort(self) -> None:
        """Leave nothing behind. Several threads may call it at once."""

    def settle(self) -> int:
        """Nothing can be relied upon before the commit."""
        return 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Abort; an error of the abort never takes the place of the error in the block."""
        try:
            self.abort()
        except Exception as failed:
            if exc[1] is None:
                raise
            _log.warning("%s: the abort failed too, the next sweep removes what is left: %s", self.key, failed)


class CannotResume(LeavingAborts):
    """A sink that starts at the first byte, and whose unfinished bytes are of no use to anybody."""

    offset = 0

    def resumed(self) -> Iterator[bytes]:
        """Nothing."""
        return iter(())

    def suspend(self) -> None:
        """Abort: there is nowhere to keep the bytes."""
        self.abort()


class Store(Protocol):
    """An image store. Keys are checked by ``keys.check_key``; the conformance suite says all that is promised."""

    #: The name in the settings.
    name: str
    #: Safe to log: no credentials.
    url: str
    #: Whether a writer asked to resume may find bytes of an earlier attempt.
    resumable: bool

    def writer(
        self,
        key: str,
        size_hint: int | None = None,
        *,
        owner: Owner,
        resume: bool = False,
        most: int | None = None,
        twin: Store | None = None,
    ) -> Sink:
        """A sink for *key*; *size_hint* (bytes) sizes S3 parts and is checked against the free space (StoreFull).

        Asked to *resume*, it goes on with what an earlier attempt of the job has left of this very object: all, or the
        first *most* bytes, if no more can be relied upon (see Sink.settle). What is written is also the object of that
        key in *twin*: a server that holds both may copy what it then need not get.
        """

    def reader(self, key: str) -> Source:
        """A resumable source; ObjectNotFound when it is opened and nothing is there."""

    def stat(self, key: str) -> StoredObject:
        """Size and time of an object; ObjectNotFound."""

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """Committed objects below *prefix*, a whole path component: ``a/2`` does not list ``a/20/x``. Sorted by key."""

    def delete(self, key: str) -> None:
        """Delete one object; missing is fine."""

    def sweep(self, older_than_s: float, prefix: str = "", *, spare: str = "") -> int:
        """Remove uncommitted writes below *prefix* untouched for older_than_s, but not those of job id *spare*.

        Returns how many there were.
        """

    def leftovers(self, prefix: str = "") -> Iterator[StoredObject]:
        """Uncommitted writes below *prefix*, those under way too: the key that each is for, bytes so far, last touched.

        What a sweep of that age would remove; a small object may have none before its commit.
        """

    def usage(self) -> StoreUsage: ...
