"""An image store in memory: small demonstrations, and the double of a store in every test."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

from ssvm_worker.artifacts.layout import check_key
from ssvm_worker.errors import Cancelled, ObjectNotFound, SourceChanged, StoreFull
from ssvm_worker.streaming.interfaces import CHUNK, LeavingAborts, Owner, Store, StoredObject, StoreUsage
from ssvm_worker.units import human_size

from .sorted_listing import below


@dataclass(eq=False)
class _Part:
    """Uncommitted bytes, and whose they are."""

    owner: Owner
    chunks: list[bytes] = field(default_factory=list)
    touched: float = field(default_factory=time.time)


@dataclass(frozen=True)
class _Object:
    data: bytes
    when: float


class MemoryStore:
    """Keeps objects and parts in dictionaries; several threads may use it at once."""

    def __init__(self, name: str = "memory", *, resumable: bool = True, capacity: int | None = None) -> None:
        self.name = name
        self.url = f"memory:///{name}"
        self.resumable = resumable
        #: Bytes that fit in; None for no limit.
        self.capacity = capacity
        self._objects: dict[str, _Object] = {}
        self._parts: dict[str, list[_Part]] = {}
        self._lock = threading.RLock()

    def writer(
        self,
        key: str,
        size_hint: int | None = None,
        *,
        owner: Owner,
        resume: bool = False,
        max_bytes: int | None = None,
        copy_from: Store | None = None,  # noqa: ARG002
    ) -> MemorySink:
        """See Store."""
        check_key(key)
        self.make_room(key, size_hint or 0)
        with self._lock:
            mine = [part for part in self._parts.get(key, []) if part.owner.job_id == owner.job_id]
            if any(part.owner.token > owner.token for part in mine):
                raise Cancelled("fenced")
            left = max(mine, key=lambda part: part.owner.token).chunks if mine and resume and self.resumable else []
            for part in mine:
                self._parts[key].remove(part)
            part = _Part(owner, list(left) if max_bytes is None else _first(left, max_bytes))
            self._parts.setdefault(key, []).append(part)
        return MemorySink(self, key, part)

    def reader(self, key: str) -> MemoryReader:
        """See Store."""
        return MemoryReader(self, check_key(key))

    def stat(self, key: str) -> StoredObject:
        """See Store."""
        found = self.find(key)
        return StoredObject(key, len(found.data), modified=found.when)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See Store."""
        start = below(prefix)
        for key in sorted(self._objects):
            if key.startswith(start) and (found := self._objects.get(key)):
                yield StoredObject(key, len(found.data), modified=found.when)

    def delete(self, key: str) -> None:
        """See Store."""
        self._objects.pop(check_key(key), None)

    def sweep(self, older_than_s: float, prefix: str = "", *, spare: str = "") -> int:
        """See Store."""
        start, limit, swept = below(prefix), time.time() - older_than_s, 0
        with self._lock:
            for parts in (parts for key, parts in list(self._parts.items()) if key.startswith(start)):
                old = [part for part in parts if part.owner.job_id != spare and part.touched <= limit]
                swept += len(old)
                parts[:] = [part for part in parts if part not in old]
        return swept

    def leftovers(self, prefix: str = "") -> Iterator[StoredObject]:
        """See Store."""
        start = below(prefix)
        for key in [each for each in list(self._parts) if each.startswith(start)]:
            for part in list(self._parts[key]):
                yield StoredObject(key, sum(map(len, part.chunks)), modified=part.touched)

    def usage(self) -> StoreUsage:
        """See Store."""
        used = sum(len(each.data) for each in list(self._objects.values()))
        return StoreUsage(self.capacity, used, None if self.capacity is None else self.capacity - used)

    def uncommitted(self) -> set[str]:
        """The keys that have parts: what a sweep would find."""
        return {key for key, parts in list(self._parts.items()) if parts}

    # For the sink and the reader.

    def find(self, key: str) -> _Object:
        """The object, or ObjectNotFound."""
        try:
            return self._objects[check_key(key)]
        except KeyError as error:
            raise ObjectNotFound(
                "There is no such object", f"{self.name}:{key}", "`ssvm list` tells what is"
            ) from error

    def make_room(self, key: str, size: int) -> None:
        """Raise StoreFull unless *size* more bytes fit."""
        free = self.usage().free
        if free is not None and size > free:
            raise StoreFull(
                f"{human_size(size)} do not fit: {human_size(free)} are free", f"{self.name}:{key}", "Make room"
            )

    def take(self, key: str, part: _Part) -> None:
        """Forget a part; Cancelled if somebody else has taken it."""
        with self._lock:
            try:
                self._parts[key].remove(part)
            except (KeyError, ValueError) as error:
                raise Cancelled("fenced") from error

    def put(self, key: str, part: _Part) -> StoredObject:
        """Turn a part into the object."""
        with self._lock:
            self.take(key, part)
            self._objects[key] = _Object(b"".join(part.chunks), time.time())
            return self.stat(key)


class MemorySink(LeavingAborts):
    """See Sink; holds the whole object."""

    def __init__(self, store: MemoryStore, key: str, part: _Part) -> None:
        self.key = key
        self.offset = sum(map(len, part.chunks))
        self._store = store
        self._part = part
        self._left = list(part.chunks)
        self._size = self.offset
        self._lock = threading.Lock()
        self._open = True

    def write(self, chunk: bytes) -> None:
        """See Sink."""
        self._size += len(chunk)
        self._store.make_room(self.key, self._size)
        self._part.chunks.append(chunk)
        self._part.touched = time.time()

    def resumed(self) -> Iterator[bytes]:
        """See Sink."""
        return iter(self._left)

    def sync(self) -> int:
        """See Sink."""
        return self._size if self._store.resumable else 0

    def commit(self) -> StoredObject:
        """See Sink."""
        stored = self._store.put(self.key, self._part)
        self._open = False
        return stored

    def abort(self) -> None:
        """See Sink."""
        with self._lock:
            was_open, self._open = self._open, False
        if was_open:
            self._size = 0
            with contextlib.suppress(Cancelled):  # fenced off: the part is another writer's now
                self._store.take(self.key, self._part)

    def suspend(self) -> None:
        """See Sink."""
        if self._store.resumable:
            self._open = False
        else:
            self.abort()


def _first(chunks: Sequence[bytes], size: int) -> list[bytes]:
    """Chunks of their first *size* bytes."""
    data = b"".join(chunks)[:size]
    return [data] if data else []


class MemoryReader:
    """See Source."""

    resumable = True

    def __init__(self, store: MemoryStore, key: str) -> None:
        self.name = f"{store.name}:{key}"
        self.size: int | None = None
        self._store = store
        self._key = key
        self._first: bytes | None = None

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """See Source."""
        data = self._store.find(self._key).data
        if self._first is not None and data is not self._first:
            raise SourceChanged("The object was overwritten while it was read", self.name, "Ask again")
        self._first, self.size = data, len(data)
        for start in range(offset, len(data), CHUNK):
            yield data[start : start + CHUNK]
