"""The index of a volume's grains: which pack holds the grain of a digest. Made anew from the packs for each backup."""

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

from .pack import MOST_GRAINS, Pack, PackIndex, find_index

#: KiB of pages that SQLite keeps in memory; the rest of the index is a temporary file of its own (SQLITE_TMPDIR).
_CACHE_KIB = 48 * 1024
#: Packs whose indexes are read at once: each is one small request, and S3 answers in some 10 ms.
_READERS = 8
#: Packs whose indexes are held at once: 2 MiB as a rule.
_BATCH = 64
_PUT = "INSERT OR REPLACE INTO grains VALUES (?, ?)"
_PACK_ID = re.compile(r"[0-9a-f]{32}")


#: Key and size of each pack, by its name.
Listing = dict[str, tuple[str, int]]


def list_packs(store: Store, family: str) -> Listing:
    """The packs of a volume that a store has."""
    found = {each.key.rpartition("/")[2]: (each.key, each.size) for each in store.list(f"{family}/{PACKS}")}
    return {pack_id: it for pack_id, it in found.items() if _PACK_ID.fullmatch(pack_id)}


class Index:
    """The grains that can be had on every one of some stores; several threads may use it at once. A context manager.

    A pack counts if it lies whole on all of them: so a store that missed an earlier backup, or is new, gets what it
    lacks with the next one. Packs that nobody refers to count too: what a dead attempt has stored is not stored again.
    Bytes: 48 MiB in memory, 45 a grain on disk, 200 a pack in memory; see docs/incremental.md.
    """

    def __init__(self, check: Check = lambda: None) -> None:
        self._check = check
        self._lock = threading.Lock()
        #: By number, which is part of a place; None for those of streams that have not ended, or have failed.
        self._packs: list[Pack | None] = []
        self._known: dict[str, int] = {}
        #: By number, packs of streams that have not ended, and the stream's mark: their grains are there for it alone.
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
        """Bytes of the database, on disk beyond the first 48 MiB."""
        with self._lock:
            pages, size = (self._db.execute(f"PRAGMA {each}").fetchone()[0] for each in ("page_count", "page_size"))
        return int(pages * size)

    def sync(self, store: Store, listings: Sequence[Listing]) -> list[str]:
        """Take in the packs that are in each of the *listings*; returns what is wrong with those that cannot be used.

        Their indexes are read from *store*, which is to be one of those that were listed.
        """
        listed = {id_: found for id_, found in listings[0].items() if all(each.get(id_) == found for each in listings)}
        wanted = [(key, size) for pack_id, (key, size) in listed.items() if pack_id not in self._known]
        wrong: list[str] = []
        with ThreadPoolExecutor(_READERS) as pool:
            for at in range(0, len(wanted), _BATCH):
                self._check()
                for found in pool.map(partial(_read, store), wanted[at : at + _BATCH]):
                    if isinstance(found, str):
                        wrong.append(found)
                    else:
                        self._take_in(*found)
        return wrong

    def _take_in(self, pack: Pack, index: PackIndex) -> None:
        with self._lock:
            if pack.id in self._known:
                return
            number = self._known[pack.id] = len(self._packs)
            self._packs.append(pack)
            rows = ((index.digest(each), _place(number, each)) for each in range(len(index)))
            self._db.execute("BEGIN")
            self._db.executemany(_PUT, rows)
            self._db.execute("COMMIT")

    def find(self, digest: bytes, mark: object) -> tuple[str, int] | None:
        """Pack and number of a grain, if it is stored, or has gone by in the stream with that mark."""
        with self._lock:
            row = self._db.execute("SELECT place FROM grains WHERE digest = ?", (digest,)).fetchone()
            if row is None:
                return None
            number, grain = divmod(row[0], MOST_GRAINS)
            if pack := self._packs[number]:
                return pack.id, grain
            pack_id, owner = self._growing.get(number, ("", None))
            return (pack_id, grain) if owner is mark and pack_id else None

    def grow(self, pack_id: str, mark: object) -> int:
        """The number of a new pack of a stream."""
        with self._lock:
            self._packs.append(None)
            self._growing[len(self._packs) - 1] = (pack_id, mark)
            return len(self._packs) - 1

    def add(self, number: int, grain: int, digest: bytes) -> None:
        """A grain went into a pack that grows."""
        with self._lock:
            self._db.execute(_PUT, (digest, _place(number, grain)))

    def settle(self, mark: object, packs: Mapping[str, Pack]) -> None:
        """The stream with that mark has ended: *packs* are stored, others of its packs are forgotten."""
        with self._lock:
            for number, (pack_id, owner) in list(self._growing.items()):
                if owner is mark:
                    del self._growing[number]
                    self._packs[number] = packs.get(pack_id)
                    if pack_id in packs:
                        self._known[pack_id] = number

    def pack(self, pack_id: str) -> Pack:
        """A pack that ``find`` has named, and that is settled."""
        found = self._packs[self._known[pack_id]]
        assert found is not None
        return found


def _read(store: Store, wanted: tuple[str, int]) -> tuple[Pack, PackIndex] | str:
    key, size = wanted
    try:
        return find_index(store, key, size)
    except (CorruptImage, ObjectNotFound) as error:
        return f"A pack is left aside, its grains are stored anew: {error}"


def _place(pack: int, grain: int) -> int:
    return pack * MOST_GRAINS + grain
