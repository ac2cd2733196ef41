"""Two hosts on one export: each sees the other's commits at its next access, and neither damages the other's work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ssvm_worker.errors import Cancelled, ObjectNotFound, SourceUnavailable
from ssvm_worker.stores.nfs.store import NfsSettings, NfsStore
from ssvm_worker.streaming.interfaces import CHUNK, Owner, Sink, StoredObject
from tests.contracts.store import BIG, ME, SOME, fill, get, keys, put
from tests.nfs.hosts import Host, on_client
from tests.nfs.server import FOR_BETA, Export, Server
from tests.waiting import PATIENCE_S

KEY = "a/b/object"


@pytest.fixture(scope="module")
def beta() -> Iterator[Host]:
    """Return the other host."""
    host = on_client("beta")
    yield host
    host.close()


@pytest.fixture
def export(server: Server, request: pytest.FixtureRequest) -> Export:
    return server.export(request.node.name.removeprefix("test_"))


#: Beta's state between two calls.
_stores: dict[str, NfsStore] = {}
_sinks: dict[str, Sink] = {}
_readers: dict[str, Iterator[bytes]] = {}


def _store(name: str) -> NfsStore:
    settings = NfsSettings(Path("/run/scratch/beta"), mount_s=PATIENCE_S, probe_s=PATIENCE_S)
    return _stores.setdefault(name, NfsStore("primary", f"nfs://{FOR_BETA}/{name}", settings))


def keys_of(name: str) -> list[str]:
    return keys(_store(name))


def stat_of(name: str, key: str) -> StoredObject:
    return _store(name).stat(key)


def get_of(name: str, key: str) -> bytes:
    return get(_store(name), key)


def put_of(name: str, key: str, data: bytes) -> None:
    put(_store(name), key, data, owner=Owner("beta's", 1))


def begin_of(name: str, owner: Owner, data: bytes) -> int:
    _sinks[name] = _store(name).writer(KEY, owner=owner, resume=True)
    offset = _sinks[name].offset
    fill(_sinks[name], data[offset:])
    return offset


def commit_of(name: str) -> None:
    _sinks.pop(name).commit()


def read_some_of(name: str) -> bytes:
    _readers[name] = _store(name).reader(KEY).open()
    return next(_readers[name])


def read_on_of(name: str) -> bytes:
    return b"".join(_readers.pop(name))


def test_close_to_open(export: Export, beta: Host) -> None:
    """A host's commits, overwrites and deletions are visible to the other at once."""
    store, name = export.store(), export.name
    for round_ in range(3):
        data = bytes([round_]) * (round_ * 1000 + 1)
        assert beta.run(keys_of, name) == []
        with pytest.raises(ObjectNotFound):
            beta.run(stat_of, name, KEY)
        put(store, KEY, data)
        assert beta.run(stat_of, name, KEY).size == len(data)
        assert beta.run(get_of, name, KEY) == data
        assert beta.run(keys_of, name) == [KEY]
        beta.run(put_of, name, KEY, data * 2)
        assert store.stat(KEY).size == 2 * len(data)
        assert get(store, KEY) == data * 2
        put(store, KEY, data[::-1] * 2)  # as long as before
        assert beta.run(get_of, name, KEY) == data[::-1] * 2
        store.delete(KEY)


def test_mounted_by_both(export: Export, server: Server, beta: Host) -> None:
    """The server sees two clients, so the tests do not only see one kernel's cache."""
    put(export.store(), KEY, b"1")
    beta.run(get_of, export.name, KEY)
    names = " ".join(server.clients())
    assert "alpha" in names
    assert "beta" in names


def test_taken_over_by_the_other(export: Export, beta: Host) -> None:
    """The next attempt on another host resumes the first one's bytes, and the first's commit is refused."""
    zombie = fill(export.store().writer(KEY, owner=ME), BIG[: 3 * CHUNK])
    assert beta.run(begin_of, export.name, Owner(ME.job_id, 2), BIG) <= 3 * CHUNK
    with pytest.raises(Cancelled, match="Another worker"):
        zombie.commit()
    zombie.abort()
    beta.run(commit_of, export.name)
    assert get(export.store(), KEY) == BIG
    assert export.files() == [KEY]


@pytest.mark.parametrize("how", ["deleted", "overwritten"])
def test_reader_on_the_other(server: Server, beta: Host, how: str) -> None:
    """An object that the other host replaces is read to its end, or its reader raises an error."""
    export = server.export(f"read-{how}")
    store = export.store()
    put(store, KEY, BIG)
    head = beta.run(read_some_of, export.name)
    if how == "deleted":
        store.delete(KEY)
    else:
        put(store, KEY, BIG[::-1])
    try:
        tail = beta.run(read_on_of, export.name)
    except SourceUnavailable:
        return
    assert head + tail == BIG


def test_silly_renames(export: Export) -> None:
    """A file that is deleted during a read is kept under an unlisted name, and then deleted."""
    store = export.store()
    put(store, KEY, BIG)
    chunks = store.reader(KEY).open()
    head = next(chunks)
    store.delete(KEY)
    [silly] = export.files()
    assert silly.startswith("a/b/.nfs")
    assert keys(store) == []
    assert [each.key for each in store.leftovers()] == [silly]
    assert store.sweep(0) == 0, "it is open"
    assert head + b"".join(chunks) == BIG
    assert export.files() == []


def test_silly_renames_of_a_client_that_crashed(export: Export) -> None:
    """Such a file of a crashed client is swept by its age, and no object with it."""
    store = export.store()
    put(store, KEY, SOME)
    chunks = store.reader(KEY).open()
    next(chunks)
    store.delete(KEY)
    [silly] = export.files()
    left = silly[:-1] + ("0" if silly[-1] != "0" else "1")
    export.put(left, b"as a client that lost its power leaves it")
    put(store, KEY, SOME)
    chunks.close()
    assert export.files() == sorted([left, KEY])
    assert keys(store) == [KEY]
    assert store.sweep(3600) == 0
    assert store.sweep(0) == 1
    assert export.files() == [KEY]
