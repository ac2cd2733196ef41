"""Define what moves and where: sources, sinks, stores and their objects.

A chunk is a non-empty, immutable ``bytes`` of at most BURST bytes. Threads share chunks and never copy them.
The sizes of chunks have no meaning. Only their order and their content count.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

from ssvm_worker.units import MiB

_log = logging.getLogger("ssvm.stream")

#: The usual chunk. Measured on two cores: chunks of 256 KiB cost a third more time for each byte, chunks of 512 KiB
#: a sixth more.
CHUNK = MiB
#: The largest chunk. Linux gives a sender a buffer of at most 4 MiB by default. The sender fills it while the worker
#: hashes and writes the last burst. So both work less often, but longer at once (decision 0004).
BURST = 7 * MiB // 2

Observer = Callable[[bytes], None]
Check = Callable[[], None]


@dataclass(frozen=True)
class StoredObject:
    """One committed object of a store."""

    key: str
    #: Bytes, as the store itself reports them.
    size: int
    #: ``sha256:HEX`` if it is known. The manifest always has it.
    digest: str | None = None
    #: Seconds since the epoch.
    modified: float = 0.0


@dataclass(frozen=True)
class Owner:
    """The writer of a part: its job and its fencing token. They distinguish abandoned parts from parts in use."""

    job_id: str = "local"
    token: int = 0


@dataclass(frozen=True)
class StoreUsage:
    """Space of a store in bytes. None: the store cannot know it."""

    total: int | None
    used: int | None
    free: int | None


class Source(Protocol):
    """Producer of the bytes of one object."""

    @property
    def name(self) -> str:
        """Return a name without credentials, for logs and errors."""

    @property
    def size(self) -> int | None:
        """Return the bytes on the wire, or None. The size is known with the first chunk or never."""

    @property
    def resumable(self) -> bool:
        """Return whether ``open`` accepts an offset. The value is valid after the first open."""

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks from *offset* on. They belong to the *same* object that the first open returned.

        Raises SourceChanged if the object has changed. Raises SourceUnavailable if the bytes end early or stall.
        """


class Sink(Protocol):
    """Consumer of the bytes of one object.

    A sink is a context manager. Leaving it aborts, unless it was committed or suspended.
    """

    key: str
    #: Bytes of an earlier attempt that the sink keeps, if the writer was asked to resume. ``write`` appends to them.
    offset: int

    def write(self, chunk: bytes) -> None: ...

    def resumed(self) -> Iterator[bytes]:
        """Yield the chunks of the first ``offset`` bytes, so that the caller can hash them. May yield nothing."""

    def commit(self) -> StoredObject:
        """Make the object visible under its key, complete and durable. Read its size back from the store."""

    def abort(self) -> None:
        """Remove everything that was written.

        May be repeated, and several threads may call it. After a commit it does nothing.
        """

    def suspend(self) -> None:
        """Keep the written bytes for a later attempt if the store can do so, else abort."""

    def sync(self) -> int:
        """Make written bytes durable. Return how many of the first bytes a later attempt will find after a crash.

        Another thread than the writing one may call it. Returns 0 if the store keeps nothing of an incomplete object.
        """

    def __enter__(self) -> Sink: ...

    def __exit__(self, *exc: object) -> None: ...


class LeavingAborts:
    """Base of sinks whose ``with`` block aborts at its end. After a commit or suspend, ``abort`` does nothing."""

    key: str

    @abstractmethod
    def abort(self) -> None:
        """Remove everything that was written. Several threads may call it at once."""

    def sync(self) -> int:
        """Return 0: no bytes are durable before the commit."""
        return 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Abort. An error of the abort never replaces an error of the block."""
        try:
            self.abort()
        except Exception as failed:
            if exc[1] is None:
                raise
            _log.warning("%s: the abort failed too, the next sweep removes the rest: %s", self.key, failed)


class CannotResume(LeavingAborts):
    """Base of sinks that start at the first byte. They keep no unfinished bytes."""

    offset = 0

    def resumed(self) -> Iterator[bytes]:
        """Yield nothing."""
        return iter(())

    def suspend(self) -> None:
        """Abort, because the sink cannot keep the bytes."""
        self.abort()


@runtime_checkable
class HoldsForeign(Protocol):
    """A store that may have objects with keys that this program does not use. CloudStack's Java agent writes some."""

    def foreign(self, prefix: str = "") -> Iterator[StoredObject]:
        """Yield the objects below *prefix* that ``list`` omits, in any order."""

    def delete_foreign(self, key: str) -> None:
        """Delete such an object. A missing object is no error."""

    def lenient(self) -> Store:
        """Return the same store with the rule of ``layout.check_foreign_key``: it lists and takes such keys too."""


class Store(Protocol):
    """Image store.

    ``layout.check_key`` checks the keys. The conformance suite (tests/contracts/store.py) defines the behaviour.
    """

    #: The name in the settings.
    name: str
    #: Without credentials, for logs and errors.
    url: str
    #: Whether a writer that is asked to resume can find bytes of an earlier attempt.
    resumable: bool
    #: The largest chunk in bytes that suits the sinks of this store: BURST, or CHUNK if they hold many chunks.
    chunk_size: int

    def writer(
        self,
        key: str,
        size_hint: int | None = None,
        *,
        owner: Owner,
        resume: bool = False,
        max_bytes: int | None = None,
        copy_from: Store | None = None,
    ) -> Sink:
        """Return a sink for *key*.

        *size_hint* (bytes) determines the size of S3 parts. Raises StoreFull if it exceeds the free space.
        With *resume* the sink keeps the bytes that an earlier attempt of the job left of this object. It keeps at most
        *max_bytes* of them if it is given: only so many are known to be durable (see Sink.sync).
        *copy_from* holds the same object under the same key. A server that has both stores may then copy the data
        itself instead of receiving it.
        """

    def reader(self, key: str) -> Source:
        """Return a resumable source. Its ``open`` raises ObjectNotFound if there is no such object."""

    def stat(self, key: str) -> StoredObject:
        """Return size and time of an object, or raise ObjectNotFound."""

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """Yield the committed objects below *prefix*, sorted by key.

        The prefix is a complete path component: ``a/2`` does not list ``a/20/x``.
        """

    def delete(self, key: str) -> None:
        """Delete one object. A missing object is no error."""

    def sweep(self, older_than_s: float, prefix: str = "", *, spare: str = "") -> int:
        """Remove uncommitted writes below *prefix* that were not touched for *older_than_s* seconds.

        Keeps writes of the job id *spare*. Returns the number of removed writes.
        """

    def leftovers(self, prefix: str = "") -> Iterator[StoredObject]:
        """Yield uncommitted writes below *prefix*, including writes in progress.

        Each has the key of the final object, the bytes so far and the time of the last change. A sweep by age removes
        these writes. A small object may have no uncommitted write before its commit.
        """

    def usage(self) -> StoreUsage: ...
