"""The index of a volume's grains: which pack holds the grain of a digest. Made anew from the packs for each backup."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ssvm_worker.errors import CorruptImage, ObjectNotFound, StoreUnavailable
from ssvm_worker.keys import PACKS
from ssvm_worker.stream import Check, Store

from .pack import MOST_GRAINS, Pack, PackIndex, find_index

#: KiB of pages that SQLite keeps in memory; the rest of the index is a temporary file of its own (SQLITE_TMPDIR).
_CACHE_KIB = 48 * 1024
#: Packs whose indexes are read at once: each is one small request, and S3 answers in some 10 ms.
_READERS = 8
_PACK_ID = re.compile(r"[0-9a-f]{32}")


class Index:
    """The grains that can be had on every one of some stores; several threads may use it at once. A context manager.

    A pack counts if it lies whole on all of them: so a store that missed an earlier backup, or is new, gets what it
    lacks with the next one. Packs that nobody refers to count too: what a dead attempt has stored is not stored again.
    Bytes: 48 MiB in memory, 45 a grain on disk, 200 a pack in memory; see docs/incremental.md.
    """

    def __init__(self, family: str, check: Check = lambda: None) -> None:
        self._family = family
        self._check = check
        self._lock = threading.Lock()
        #: By number, which is part of a place; None for those that are no longer to be had.
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

    def sync(self, stores: Sequence[Store]) -> list[str]:
        """Take in what all of these stores have now; returns what is wrong with packs that cannot be used.

        The indexes of the packs are read from the first.
        """
        listed = self._listed(stores)
        with self._lock:
            for pack_id in [each for each in self._known if each not in listed]:
                self._packs[self._known.pop(pack_id)] = None
        wanted = [(key, size) for pack_id, (key, size) in listed.items() if pack_id not in self._known]
        wrong = []
        with ThreadPoolExecutor(_READERS) as pool:
            for found in pool.map(partial(_read, stores[0]), wanted):
                self._check()
                if isinstance(found, str):
                    wrong.append(found)
                else:
                    self._take_in(*found)
        return wrong

    def _listed(self, stores: Sequence[Store]) -> dict[str, tuple[str, int]]:
        """Key and size of each pack that is the same on all stores."""
        common: dict[str, tuple[str, int]] | None = None
        for store in stores:
            each = {one.key: one.size for one in store.list(f"{self._family}/{PACKS}")}
            here = {key.rpartition("/")[2]: (key, size) for key, size in each.items()}
            common = here if common is None else {k: v for k, v in common.items() if here.get(k) == v}
        return {pack_id: found for pack_id, found in (common or {}).items() if _PACK_ID.fullmatch(pack_id)}

    def _take_in(self, pack: Pack, index: PackIndex) -> None:
        with self._lock:
            number = len(self._packs)
            self._packs.append(pack)
            self._known[pack.id] = number
            self._put((index.digest(each), _place(number, each)) for each in range(len(index)))

    def _put(self, rows: Iterable[tuple[bytes, int]]) -> None:
        self._db.execute("BEGIN")
        self._db.executemany("INSERT OR REPLACE INTO grains VALUES (?, ?)", rows)
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
            self._db.execute("INSERT OR REPLACE INTO grains VALUES (?, ?)", (digest, _place(number, grain)))

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
        """A pack that ``find`` has named, and that is settled; StoreUnavailable if it has gone meanwhile."""
        found = self._packs[self._known[pack_id]] if pack_id in self._known else None
        if found is None:
            raise StoreUnavailable(f"The pack {pack_id} is gone", self._family, "Try again: its grains are stored anew")
        return found


def _read(store: Store, wanted: tuple[str, int]) -> tuple[Pack, PackIndex] | str:
    key, size = wanted
    try:
        return find_index(store, key, size)
    except (CorruptImage, ObjectNotFound) as error:
        return f"A pack is left aside, its grains are stored anew: {error}"


def _place(pack: int, grain: int) -> int:
    return pack * MOST_GRAINS + grain
