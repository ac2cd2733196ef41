"""Stores and sources that fail on purpose: wrappers of our own interfaces, so that any job runs under any fault.

    stores = {"primary": store_failing(MemoryStore(), after=MiB, error=StoreUnavailable("by request"))}

What is not part of the fault goes to the wrapped store untouched. Bytes are counted over each sink, or each source.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from ssvm_worker.errors import SourceUnavailable, StoreFull, StoreUnavailable, WorkerError
from ssvm_worker.streaming.interfaces import Owner, Sink, Source, Store, StoredObject
from tests.waiting import PATIENCE_S

#: Whether a fault befalls that key.
Chosen = Callable[[str], bool]


def every(key: str) -> bool:
    """All keys."""
    return True


def images(key: str) -> bool:
    """All but the small things beside an image: manifests, drafts, properties."""
    return not key.endswith((".json", ".properties"))


class Spoiled:
    """A sink around another; *spoil* gets the bytes so far and a chunk, and gives what is written in its place."""

    def __init__(self, inner: Sink, spoil: Callable[[int, bytes], bytes], commit: Callable[[], None]) -> None:
        self.key = inner.key
        self.offset = inner.offset
        self._inner = inner
        self._spoil = spoil
        self._before_commit = commit
        self._seen = 0

    def write(self, chunk: bytes) -> None:
        spoilt = self._spoil(self._seen, chunk)
        self._seen += len(chunk)
        if spoilt:
            self._inner.write(spoilt)

    def resumed(self) -> Iterator[bytes]:
        return self._inner.resumed()

    def commit(self) -> StoredObject:
        self._before_commit()
        return self._inner.commit()

    def abort(self) -> None:
        self._inner.abort()

    def suspend(self) -> None:
        self._inner.suspend()

    def sync(self) -> int:
        return self._inner.sync()

    def __enter__(self) -> Spoiled:
        return self

    def __exit__(self, *exc: object) -> None:
        self._inner.__exit__(*exc)


def _nothing() -> None:
    return None


@dataclass
class SpoiledStore:
    """A store around another, whose sinks for the chosen keys are spoiled."""

    inner: Store
    spoil: Callable[[int, bytes], bytes] = lambda _, chunk: chunk
    commit: Callable[[], None] = _nothing
    chosen: Chosen = every
    #: Sinks that are still to be spoiled; the next ones work.
    times: int = 1 << 30

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
        sink = self.inner.writer(key, size_hint, owner=owner, resume=resume, max_bytes=max_bytes)
        if not self.chosen(key) or self.times <= 0:
            return sink
        self.times -= 1
        return Spoiled(sink, self.spoil, self.commit)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def store_failing(
    store: Store, after: int, error: WorkerError | None = None, *, chosen: Chosen = every, times: int = 1 << 30
) -> Store:
    """The write of the chunk that goes beyond *after* bytes fails."""
    failure = error or StoreUnavailable("The store fails by request", store.name, "None")

    def fail(seen: int, chunk: bytes) -> bytes:
        if seen + len(chunk) > after:
            raise failure
        return chunk

    return _spoiled(store, spoil=fail, chosen=chosen, times=times)


def store_full(store: Store, after: int, *, chosen: Chosen = every) -> Store:
    """The store is full after so many bytes."""
    return store_failing(store, after, StoreFull("The store is full by request", store.name, "None"), chosen=chosen)


def store_failing_commit(
    store: Store, error: WorkerError | None = None, *, chosen: Chosen = every, times: int = 1 << 30
) -> Store:
    """All is taken, and the commit fails."""
    failure = error or StoreUnavailable("The commit fails by request", store.name, "None")

    def fail() -> None:
        raise failure

    return _spoiled(store, commit=fail, chosen=chosen, times=times)


def store_corrupting(store: Store, at: int, *, chosen: Chosen = images) -> Store:
    """The bit of weight 1 of the byte *at* is flipped on its way into the store, which notices nothing."""

    def flip(seen: int, chunk: bytes) -> bytes:
        place = at - seen
        if not 0 <= place < len(chunk):
            return chunk
        return chunk[:place] + bytes([chunk[place] ^ 1]) + chunk[place + 1 :]

    return _spoiled(store, spoil=flip, chosen=chosen)


def store_short(store: Store, after: int, *, chosen: Chosen = images) -> Store:
    """What comes after so many bytes is lost, and the store says that all is well."""
    return _spoiled(store, spoil=lambda seen, chunk: chunk[: max(0, after - seen)], chosen=chosen)


def store_stalling(store: Store, after: int, *, chosen: Chosen = images) -> tuple[Store, Stall]:
    """Writes hang once *after* bytes have been taken, until the stall is released."""
    stall = Stall()

    def wait(seen: int, chunk: bytes) -> bytes:
        if seen + len(chunk) > after:
            stall.wait()
        return chunk

    return _spoiled(store, spoil=wait, chosen=chosen), stall


@dataclass
class Stall:
    """Where somebody hangs, until a test lets go; nobody hangs for more than a minute."""

    #: Set when somebody hangs here.
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """Hang."""
        self.reached.set()
        self.released.wait(PATIENCE_S)


def _spoiled(store: Store, **how: Any) -> Store:
    spoiled: Any = SpoiledStore(store, **how)
    found: Store = spoiled
    return found


@dataclass
class SpoiledSource:
    """A source around another that breaks after so many bytes, so many times."""

    inner: Source
    after: int
    times: int = 1 << 30
    error: WorkerError | None = None
    #: The offsets at which it was opened.
    opened: list[int] = field(default_factory=list)

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        self.opened.append(offset)
        left = self.after
        for chunk in self.inner.open(offset):
            if self.times > 0 and left < len(chunk):
                self.times -= 1
                if left:
                    yield chunk[:left]
                raise self.error or SourceUnavailable("The source breaks by request", self.inner.name, "None")
            left -= len(chunk)
            yield chunk

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def source_failing(source: Source, after: int, times: int = 1 << 30, error: WorkerError | None = None) -> SpoiledSource:
    """Each of the first *times* opens breaks *after* bytes, with SourceUnavailable or the given error."""
    return SpoiledSource(source, after, times, error)


@dataclass
class UnreachableStore:
    """A store around another, of which one method cannot be reached."""

    inner: Store
    method: str

    def __getattr__(self, name: str) -> Any:
        if name != self.method:
            return getattr(self.inner, name)

        def fail(*_: object, **__: object) -> None:
            raise StoreUnavailable("The store is away by request", self.inner.name, "None")

        return fail


def store_unreachable(store: Store, method: str) -> Any:
    """A store that cannot be reached by that one method."""
    return UnreachableStore(store, method)
