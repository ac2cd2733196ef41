"""An image store in memory, for demonstrations and tests."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from ssvm_worker.artifacts.layout import check_key
from ssvm_worker.errors import Cancelled, ObjectNotFound, SourceChanged, StoreFull
from ssvm_worker.streaming.interfaces import CHUNK, LeavingAborts, Owner, Store, StoredObject, StoreUsage
from ssvm_worker.units import human_size

from .sorted_listing import below


@dataclass(eq=False)
class _Part:
    """Uncommitted bytes and their writer."""

    owner: Owner
    chunks: list[bytes] = field(default_factory=list)
    touched: float = field(default_factory=time.time)


@dataclass(frozen=True)
class _Object:
    data: bytes
    modified: float


class MemoryStore:
    """A store that holds objects and parts in dictionaries. Thread-safe."""

    chunk_size = CHUNK

    def __init__(self, name: str = "memory", *, resumable: bool = True, capacity: int | None = None) -> None:
        self.name = name
        self.url = f"memory:///{name}"
        self.resumable = resumable
        #: The capacity in bytes; None for no limit.
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
        self.check_room(key, size_hint or 0)
        with self._lock:
            earlier = [part for part in self._parts.get(key, []) if part.owner.job_id == owner.job_id]
            if any(part.owner.token > owner.token for part in earlier):
                raise Cancelled("fenced")
            kept: list[bytes] = []
            if earlier and resume and self.resumable:
                kept = list(max(earlier, key=lambda part: part.owner.token).chunks)
            if max_bytes is not None and kept:
                kept = [b"".join(kept)[:max_bytes]] if max_bytes else []
            for part in earlier:
                self._parts[key].remove(part)
            part = _Part(owner, kept)
            self._parts.setdefault(key, []).append(part)
        return MemorySink(self, key, part)

    def reader(self, key: str) -> MemoryReader:
        """See Store."""
        return MemoryReader(self, check_key(key))

    def stat(self, key: str) -> StoredObject:
        """See Store."""
        found = self.find(key)
        return StoredObject(key, len(found.data), modified=found.modified)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See Store."""
        start = below(prefix)
        for key in sorted(self._objects):
            if key.startswith(start) and (found := self._objects.get(key)):
                yield StoredObject(key, len(found.data), modified=found.modified)

    def delete(self, key: str) -> None:
        """See Store."""
        self._objects.pop(check_key(key), None)

    def rename(self, key: str, to: str) -> None:
        """Rename an object at once, and replace an object of the new name. Raise ObjectNotFound if it is missing."""
        with self._lock:
            self._objects[check_key(to)] = self.find(key)
            self.delete(key)

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
        """Return the keys that have parts. A sweep removes these parts."""
        return {key for key, parts in list(self._parts.items()) if parts}

    # For the sink and the reader.

    def find(self, key: str) -> _Object:
        """Return the object, or raise ObjectNotFound."""
        try:
            return self._objects[check_key(key)]
        except KeyError as error:
            remedy = "`ssvm list` shows the objects of a store"
            raise ObjectNotFound("The object does not exist", f"{self.name}:{key}", remedy) from error

    def check_room(self, key: str, size: int) -> None:
        """Raise StoreFull unless *size* more bytes fit."""
        free = self.usage().free
        if free is not None and size > free:
            what = f"The store is full: {human_size(size)} do not fit into {human_size(free)} of free space"
            raise StoreFull(what, f"{self.name}:{key}", "Delete objects, or raise the capacity")

    def remove_part(self, key: str, part: _Part) -> None:
        """Remove a part. Raise Cancelled if another writer has removed it."""
        with self._lock:
            try:
                self._parts[key].remove(part)
            except (KeyError, ValueError) as error:
                raise Cancelled("fenced") from error

    def put(self, key: str, part: _Part) -> StoredObject:
        """Turn a part into the object."""
        with self._lock:
            self.remove_part(key, part)
            self._objects[key] = _Object(b"".join(part.chunks), time.time())
            return self.stat(key)


class MemorySink(LeavingAborts):
    """See Sink. Holds all bytes of the object."""

    def __init__(self, store: MemoryStore, key: str, part: _Part) -> None:
        self.key = key
        self.offset = sum(map(len, part.chunks))
        self._store = store
        self._part = part
        self._resumed = list(part.chunks)
        self._size = self.offset
        self._lock = threading.Lock()
        self._open = True

    def write(self, chunk: bytes) -> None:
        """See Sink."""
        self._size += len(chunk)
        self._store.check_room(self.key, self._size)
        self._part.chunks.append(chunk)
        self._part.touched = time.time()

    def resumed(self) -> Iterator[bytes]:
        """See Sink."""
        return iter(self._resumed)

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
            with contextlib.suppress(Cancelled):  # another writer has the part
                self._store.remove_part(self.key, self._part)

    def suspend(self) -> None:
        """See Sink."""
        if self._store.resumable:
            self._open = False
        else:
            self.abort()


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
            raise SourceChanged("The object was overwritten while it was read", self.name, "Read it again")
        self._first, self.size = data, len(data)
        for start in range(offset, len(data), CHUNK):
            yield data[start : start + CHUNK]
