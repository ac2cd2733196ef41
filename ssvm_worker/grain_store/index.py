"""The index of a volume's grains: it finds the pack of a digest.

The worker builds the index from the packs for each backup.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ssvm_worker.artifacts.layout import PACKS
from ssvm_worker.errors import CorruptImage, ObjectNotFound
from ssvm_worker.streaming.interfaces import Check, Store

from .pack import MAX_GRAINS, Pack, PackIndex, find_index

#: KiB of pages that SQLite holds in memory. SQLite holds the rest in a temporary file (SQLITE_TMPDIR).
_CACHE_KIB = 48 * 1024
#: The number of pack indexes to read in parallel. Each is one small request, and S3 answers in about 10 ms.
_READERS = 8
#: The number of pack indexes in memory: usually 2 MiB.
_BATCH = 64
_PUT = "INSERT OR REPLACE INTO grains VALUES (?, ?)"
_PACK_ID = re.compile(r"[0-9a-f]{32}")


#: The key and size of each pack, by its id.
Listing = dict[str, tuple[str, int]]


def list_packs(store: Store, family: str) -> Listing:
    """Return the packs of a volume on a store."""
    found = {each.key.rpartition("/")[2]: (each.key, each.size) for each in store.list(f"{family}/{PACKS}")}
    return {pack_id: pack for pack_id, pack in found.items() if _PACK_ID.fullmatch(pack_id)}


class Index:
    """The grains that are stored on all of some stores. Thread-safe. A context manager.

    A pack counts only if it is complete on all these stores. A new store, or a store that missed a backup, gets the
    missing grains with the next backup. Packs without a reference count, too, so a failed attempt's packs are reused.
    Size: 48 MiB in memory, 45 bytes of disk for each grain, 200 bytes of memory for each pack.
    See docs/explanation/incremental.md.
    """

    def __init__(self, check: Check = lambda: None) -> None:
        self._check = check
        self._lock = threading.Lock()
        #: Packs by their number. The value is None while the pack's stream runs, and after the stream failed.
        self._packs: list[Pack | None] = []
        self._known: dict[str, int] = {}
        #: The id and the stream of each unfinished pack, by number. Only that stream may refer to the pack's grains.
        self._growing: dict[int, tuple[str, object]] = {}
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("CREATE TABLE grains (digest BLOB PRIMARY KEY, place INTEGER) WITHOUT ROWID")

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *exc: object) -> None:
        self._db.close()

    def __len__(self) -> int:
        with self._lock:
            count: int = self._db.execute("SELECT count(*) FROM grains").fetchone()[0]
        return count

    @property
    def size(self) -> int:
        """Bytes of the database. Bytes beyond the first 48 MiB are on disk."""
        with self._lock:
            pages, size = (self._db.execute(f"PRAGMA {each}").fetchone()[0] for each in ("page_count", "page_size"))
        return int(pages * size)

    def sync(self, store: Store, listings: Sequence[Listing]) -> list[str]:
        """Add the packs that are in all *listings*. Return a message for each pack that cannot be used.

        The function reads the pack indexes from *store*, which must be one of the listed stores.
        """
        common = {id_: pack for id_, pack in listings[0].items() if all(each.get(id_) == pack for each in listings)}
        wanted = [(key, size) for pack_id, (key, size) in common.items() if pack_id not in self._known]
        unusable: list[str] = []
        with ThreadPoolExecutor(_READERS) as pool:
            for at in range(0, len(wanted), _BATCH):
                self._check()
                for found in pool.map(partial(_read, store), wanted[at : at + _BATCH]):
                    if isinstance(found, str):
                        unusable.append(found)
                    else:
                        self._add_pack(*found)
        return unusable

    def _add_pack(self, pack: Pack, index: PackIndex) -> None:
        with self._lock:
            if pack.id in self._known:
                return
            number = self._known[pack.id] = len(self._packs)
            self._packs.append(pack)
            rows = ((index.digest(each), number * MAX_GRAINS + each) for each in range(len(index)))
            self._db.execute("BEGIN")
            self._db.executemany(_PUT, rows)
            self._db.execute("COMMIT")

    def find(self, digest: bytes, stream: object) -> tuple[str, int] | None:
        """Return the pack id and number of a grain that is stored, or that the same *stream* has added.

        Returns None for a grain that is neither.
        """
        with self._lock:
            row = self._db.execute("SELECT place FROM grains WHERE digest = ?", (digest,)).fetchone()
            if row is None:
                return None
            number, grain = divmod(row[0], MAX_GRAINS)
            if pack := self._packs[number]:
                return pack.id, grain
            pack_id, owner = self._growing.get(number, ("", None))
            return (pack_id, grain) if owner is stream and pack_id else None

    def begin_pack(self, pack_id: str, stream: object) -> int:
        """Register a new pack of a stream, and return the pack's number."""
        with self._lock:
            self._packs.append(None)
            self._growing[len(self._packs) - 1] = (pack_id, stream)
            return len(self._packs) - 1

    def add(self, number: int, grain: int, digest: bytes) -> None:
        """Add a grain of the unfinished pack *number*."""
        with self._lock:
            self._db.execute(_PUT, (digest, number * MAX_GRAINS + grain))

    def end_stream(self, stream: object, packs: Mapping[str, Pack]) -> None:
        """End a stream: *packs* are stored, and the index forgets the stream's other packs."""
        with self._lock:
            for number, (pack_id, owner) in list(self._growing.items()):
                if owner is stream:
                    del self._growing[number]
                    self._packs[number] = packs.get(pack_id)
                    if pack_id in packs:
                        self._known[pack_id] = number

    def pack(self, pack_id: str) -> Pack:
        """Return a stored pack whose id ``find`` has returned."""
        found = self._packs[self._known[pack_id]]
        assert found is not None
        return found


def _read(store: Store, pack: tuple[str, int]) -> tuple[Pack, PackIndex] | str:
    key, size = pack
    try:
        return find_index(store, key, size)
    except (CorruptImage, ObjectNotFound) as error:
        return f"The backup ignores a pack and stores its grains again: {error}"
