"""Stores and sources that fail on request: wrappers of the worker's interfaces. Any job can run with any fault.

    stores = {"primary": store_failing(MemoryStore(), after=MiB, error=StoreUnavailable("by request"))}

All other calls go to the wrapped store unchanged. Each sink, or each source, counts its own bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from ssvm_worker.errors import SourceUnavailable, StoreFull, StoreUnavailable, WorkerError
from ssvm_worker.streaming.interfaces import Owner, Sink, Source, Store, StoredObject
from tests.waiting import PATIENCE_S

#: A function of a key: whether the fault affects it.
Chosen = Callable[[str], bool]


def every(key: str) -> bool:
    """Match every key."""
    return True


def images(key: str) -> bool:
    """Match all keys except the small objects beside an image: manifests, drafts, properties."""
    return not key.endswith((".json", ".properties"))


class Spoiled:
    """A sink around another. *spoil* gets the bytes so far and a chunk, and returns the bytes to write."""

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
    """A store around another. The sinks of the chosen keys have a fault."""

    inner: Store
    spoil: Callable[[int, bytes], bytes] = lambda _, chunk: chunk
    commit: Callable[[], None] = _nothing
    chosen: Chosen = every
    #: The number of sinks that still get the fault. Later sinks have none.
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
    """Let the write of the chunk fail that exceeds *after* bytes."""
    failure = error or StoreUnavailable("The store fails by request", store.name, "None")

    def fail(seen: int, chunk: bytes) -> bytes:
        if seen + len(chunk) > after:
            raise failure
        return chunk

    return _spoiled(store, spoil=fail, chosen=chosen, times=times)


def store_full(store: Store, after: int, *, chosen: Chosen = every) -> Store:
    """Let the store be full after so many bytes."""
    return store_failing(store, after, StoreFull("The store is full by request", store.name, "None"), chosen=chosen)


def store_failing_commit(
    store: Store, error: WorkerError | None = None, *, chosen: Chosen = every, times: int = 1 << 30
) -> Store:
    """Accept all bytes, and let the commit fail."""
    failure = error or StoreUnavailable("The commit fails by request", store.name, "None")

    def fail() -> None:
        raise failure

    return _spoiled(store, commit=fail, chosen=chosen, times=times)


def store_corrupting(store: Store, at: int, *, chosen: Chosen = images) -> Store:
    """Flip one bit of the byte *at* on its way into the store. The store reports no error."""

    def flip(seen: int, chunk: bytes) -> bytes:
        place = at - seen
        if not 0 <= place < len(chunk):
            return chunk
        return chunk[:place] + bytes([chunk[place] ^ 1]) + chunk[place + 1 :]

    return _spoiled(store, spoil=flip, chosen=chosen)


def store_short(store: Store, after: int, *, chosen: Chosen = images) -> Store:
    """Lose all later bytes after so many. The store reports no error."""
    return _spoiled(store, spoil=lambda seen, chunk: chunk[: max(0, after - seen)], chosen=chosen)


def store_stalling(store: Store, after: int, *, chosen: Chosen = images) -> tuple[Store, Stall]:
    """Let writes hang after *after* bytes, until the stall is released."""
    stall = Stall()

    def wait(seen: int, chunk: bytes) -> bytes:
        if seen + len(chunk) > after:
            stall.wait()
        return chunk

    return _spoiled(store, spoil=wait, chosen=chosen), stall


@dataclass
class Stall:
    """A place where a thread hangs until a test releases it, or for at most a minute."""

    #: Set when a thread hangs here.
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
    """A source around another. It breaks after so many bytes, so many times."""

    inner: Source
    after: int
    times: int = 1 << 30
    error: WorkerError | None = None
    #: The offsets of its opens.
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
    """Let each of the first *times* opens break after *after* bytes, with SourceUnavailable or the given error."""
    return SpoiledSource(source, after, times, error)


@dataclass
class UnreachableStore:
    """A store around another. One of its methods fails."""

    inner: Store
    method: str

    def __getattr__(self, name: str) -> Any:
        if name != self.method:
            return getattr(self.inner, name)

        def fail(*_: object, **__: object) -> None:
            raise StoreUnavailable("The store is away by request", self.inner.name, "None")

        return fail


def store_unreachable(store: Store, method: str) -> Any:
    """Return a store of which that one method fails."""
    return UnreachableStore(store, method)
