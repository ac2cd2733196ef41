"""What every image store promises. A new store's test file gives the ``store`` fixture, and gets all of this.

class TestOurStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store: ...
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ssvm_worker.errors import Cancelled, InvalidRequest, ObjectNotFound, SourceChanged, StoreUnavailable
from ssvm_worker.streaming.interfaces import CHUNK, Owner, Sink, Store
from ssvm_worker.streaming.pipeline import put_bytes, read_bytes
from tests.waiting import PATIENCE_S, until

ME = Owner("job-me", 1)
OTHER = Owner("job-other", 1)
#: Random, so that a misplaced chunk or part is detected; three parts on S3 with the smallest part size.
BIG = random.Random(2).randbytes(10 * CHUNK + 12345)
#: Several chunks, for tests in which the size does not matter.
SOME = BIG[: 2 * CHUNK + 99]

BAD_KEYS = [
    pytest.param("", id="empty"),
    pytest.param("/etc/passwd", id="absolute"),
    pytest.param("a/", id="ends in a slash"),
    pytest.param("a//b", id="empty component"),
    pytest.param("../a", id="climbs out at once"),
    pytest.param("a/../../b", id="climbs out later"),
    pytest.param("a/./b", id="a dot"),
    pytest.param("a/.hidden", id="hidden, as parts are"),
    pytest.param("a\0b", id="NUL"),
    pytest.param("a\nb", id="line break"),
    pytest.param("a b", id="blank"),
    pytest.param("a\\b", id="backslash"),
    pytest.param("ä/b", id="not ASCII"),
    pytest.param("a" * 300, id="300 characters"),
]


def chunks_of(data: bytes) -> Iterator[bytes]:
    """Return the data in chunks of different allowed sizes."""
    start, sizes = 0, (CHUNK, CHUNK - 1, 70_001)
    for number in range(len(data)):
        if start >= len(data):
            return
        size = sizes[number % 3]
        yield data[start : start + size]
        start += size


def fill(sink: Sink, data: bytes) -> Sink:
    """Write all of it."""
    for chunk in chunks_of(data):
        sink.write(chunk)
    return sink


def put(store: Store, key: str, data: bytes, size_hint: int | None = None, owner: Owner = ME) -> None:
    """Store an object as a stream does."""
    with store.writer(key, size_hint, owner=owner) as sink:
        fill(sink, data).commit()


def get(store: Store, key: str, offset: int = 0) -> bytes:
    """Return all bytes from *offset*."""
    return b"".join(store.reader(key).open(offset))


def keys(store: Store, prefix: str = "") -> list[str]:
    """Return the listed keys in their order."""
    return [each.key for each in store.list(prefix)]


class StoreContract:
    """The contract of Store, Sink and its Source."""

    #: So many uncommitted bytes always leave an entry for the sweep.
    unfinished = BIG[: 6 * CHUNK]

    # Writing and committing

    @pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, len(BIG)])
    def test_committed_bytes_are_read_back(self, store: Store, size: int) -> None:
        """Committed bytes of any size are read back unchanged."""
        put(store, "a/b/object", BIG[:size], size)
        assert get(store, "a/b/object") == BIG[:size]

    @pytest.mark.parametrize(
        "hint",
        [
            pytest.param(None, id="unknown"),
            pytest.param(0, id="nothing"),
            pytest.param(10, id="too small"),
            pytest.param(3 * len(BIG), id="too large"),
        ],
    )
    def test_size_hint_is_only_a_hint(self, store: Store, hint: int | None) -> None:
        """A wrong size hint does not affect the object."""
        put(store, "hinted", BIG, hint)
        assert get(store, "hinted") == BIG

    def test_commit_tells_key_and_size(self, store: Store) -> None:
        """Commit returns the object as the store reports it."""
        with store.writer("a/object", owner=ME) as sink:
            stored = fill(sink, BIG[:1000]).commit()
        assert (stored.key, stored.size) == ("a/object", 1000)

    def test_sink_knows_its_key_and_starts_at_zero(self, store: Store) -> None:
        """A new sink has its key, no offset, and no earlier bytes."""
        with store.writer("a/object", owner=ME) as sink:
            assert (sink.key, sink.offset, list(sink.resumed())) == ("a/object", 0, [])

    def test_stat_tells_size_and_time(self, store: Store) -> None:
        """Stat returns the size, and a time during the test, within the clock's resolution."""
        before = time.time()
        put(store, "a/object", b"four")
        seen = store.stat("a/object")
        assert (seen.key, seen.size) == ("a/object", 4)
        assert before - 2 <= seen.modified <= time.time() + 2

    def test_uncommitted_is_invisible(self, store: Store) -> None:
        """Until the commit the object cannot be listed, examined or read."""
        with store.writer("a/object", owner=ME) as sink:
            fill(sink, SOME)
            assert keys(store) == []
            with pytest.raises(ObjectNotFound):
                store.stat("a/object")
            with pytest.raises(ObjectNotFound):
                get(store, "a/object")

    def test_leaving_without_commit_stores_nothing(self, store: Store) -> None:
        """A sink that is closed uncommitted leaves no object and nothing to sweep."""
        with store.writer("a/object", owner=ME) as sink:
            fill(sink, self.unfinished)
        assert keys(store) == []
        assert store.sweep(0) == 0

    def test_an_error_in_the_block_stores_nothing(self, store: Store) -> None:
        """An error in the block is raised unchanged, and no object is stored."""
        with pytest.raises(ZeroDivisionError), store.writer("a/object", owner=ME) as sink:
            sink.write(fill(sink, self.unfinished) and bytes(1 // 0))
        assert (keys(store), store.sweep(0)) == ([], 0)

    def test_abort_may_be_repeated(self, store: Store) -> None:
        """A second abort has no effect."""
        sink = fill(store.writer("a/object", owner=ME), self.unfinished)
        sink.abort()
        sink.abort()
        assert (keys(store), store.sweep(0)) == ([], 0)

    def test_abort_from_two_threads(self, store: Store) -> None:
        """Several threads may abort one sink: none gets an error, no handle is closed twice, nothing stays."""
        for _ in range(5):
            sink, start = fill(store.writer("a/object", owner=ME), SOME[:CHUNK]), threading.Barrier(4)
            with ThreadPoolExecutor(4) as threads:

                def abort(sink: Sink = sink, start: threading.Barrier = start) -> None:
                    start.wait()
                    sink.abort()

                for each in [threads.submit(abort) for _ in range(4)]:
                    each.result()
        assert (keys(store), store.sweep(0)) == ([], 0)

    def test_abort_after_commit_keeps_the_object(self, store: Store) -> None:
        """An abort does not undo a commit."""
        with store.writer("a/object", owner=ME) as sink:
            fill(sink, SOME).commit()
            sink.abort()
        assert get(store, "a/object") == SOME

    def test_overwriting_shows_at_the_commit(self, store: Store) -> None:
        """The old object exists until the new one is committed."""
        put(store, "a/object", b"old")
        with store.writer("a/object", owner=ME) as sink:
            fill(sink, SOME)
            assert get(store, "a/object") == b"old"
            sink.commit()
        assert get(store, "a/object") == SOME

    def test_aborted_overwrite_keeps_the_old(self, store: Store) -> None:
        """A failed overwrite keeps the old object."""
        put(store, "a/object", b"old")
        fill(store.writer("a/object", owner=ME), self.unfinished).abort()
        assert get(store, "a/object") == b"old"

    def test_last_commit_of_two_writers_wins(self, store: Store) -> None:
        """Two writers of one key do not mix their bytes."""
        first, second = store.writer("a/object", owner=ME), store.writer("a/object", owner=OTHER)
        for one, two in zip(chunks_of(SOME), chunks_of(SOME[::-1]), strict=True):
            first.write(one)
            second.write(two)
        first.commit()
        assert get(store, "a/object") == SOME
        second.commit()
        assert get(store, "a/object") == SOME[::-1]

    def test_writers_in_several_threads(self, store: Store) -> None:
        """Threads may write different objects of one store in parallel."""
        names = [f"a/{number}" for number in range(4)]
        threads = [threading.Thread(target=put, args=(store, name, BIG[: 2 * CHUNK])) for name in names]
        for each in threads:
            each.start()
        for each in threads:
            each.join(PATIENCE_S)
        assert [get(store, name) == BIG[: 2 * CHUNK] for name in names] == [True] * 4

    # Reading

    @pytest.mark.parametrize("offset", [0, 1, CHUNK, len(SOME) - 1, len(SOME)])
    def test_reading_from_an_offset(self, store: Store, offset: int) -> None:
        """A new reader at an offset gives exactly the rest, also none."""
        put(store, "a/object", SOME)
        assert get(store, "a/object", offset) == SOME[offset:]

    def test_chunks_are_small_and_never_empty(self, store: Store) -> None:
        """A chunk has 1 byte to 1 MiB, and is immutable."""
        put(store, "a/object", SOME)
        for chunk in store.reader("a/object").open():
            assert isinstance(chunk, bytes)
            assert 0 < len(chunk) <= CHUNK

    def test_reader_tells_its_size(self, store: Store) -> None:
        """The size is known after the first chunk, and the source is resumable."""
        put(store, "a/object", SOME)
        source = store.reader("a/object")
        next(source.open())
        assert (source.size, source.resumable) == (len(SOME), True)
        assert "a/object" in source.name

    def test_reader_goes_on_where_it_was_left(self, store: Store) -> None:
        """A reader that is opened again at a byte continues the same object."""
        put(store, "a/object", SOME)
        source = store.reader("a/object")
        chunks = source.open()
        head = next(chunks)
        chunks.close()
        assert head + b"".join(source.open(len(head))) == SOME

    def test_reader_refuses_another_object(self, store: Store) -> None:
        """A reader that is opened again after an overwrite fails and does not mix old and new bytes."""
        put(store, "a/object", SOME)
        source = store.reader("a/object")
        source_chunks = source.open()
        next(source_chunks)
        source_chunks.close()
        put(store, "a/object", SOME[::-1])
        with pytest.raises(SourceChanged):
            next(source.open(CHUNK))

    def test_several_readers_at_once(self, store: Store) -> None:
        """Readers of one object do not disturb each other."""
        put(store, "a/object", SOME)
        pairs = zip(store.reader("a/object").open(), store.reader("a/object").open(), strict=True)
        assert b"".join(one for one, two in pairs if one == two) == SOME

    def test_missing_object(self, store: Store) -> None:
        """stat and read of a missing object raise an error that names it."""
        with pytest.raises(ObjectNotFound, match="a/object"):
            store.stat("a/object")
        with pytest.raises(ObjectNotFound, match="a/object"):
            get(store, "a/object")

    # Listing and deleting

    def test_list_takes_whole_components(self, store: Store) -> None:
        """The prefix is a path: a key with only the same first letters is not below it."""
        for key in ("a/2/x", "a/20/x", "a/201/x", "b/2/x"):
            put_bytes(store, key, b"1", ME)
        assert keys(store, "a/2") == ["a/2/x"]
        assert keys(store, "a/20/") == ["a/20/x"]

    def test_list_is_sorted_by_key(self, store: Store) -> None:
        """Keys are sorted by their characters across directories."""
        names = ["a-b/x", "a.b", "a/x", "a/y/z", "a0/x", "b"]
        for key in reversed(names):
            put_bytes(store, key, b"1", ME)
        assert keys(store) == sorted(names)

    def test_list_tells_sizes(self, store: Store) -> None:
        """A listing gives the same data as a stat of each object."""
        put_bytes(store, "a/object", b"seven b", ME)
        assert [(each.key, each.size) for each in store.list("a")] == [("a/object", 7)]

    @pytest.mark.parametrize("prefix", ["nowhere", "a/nowhere", "a/object"])
    def test_list_of_nothing_is_empty(self, store: Store, prefix: str) -> None:
        """A missing directory and an object have no keys below them."""
        put_bytes(store, "a/other", b"1", ME)
        assert keys(store, prefix) == []

    def test_delete(self, store: Store) -> None:
        """A deleted object is gone, and its neighbours stay."""
        put_bytes(store, "a/object", b"1", ME)
        put_bytes(store, "a/object2", b"2", ME)
        store.delete("a/object")
        assert keys(store) == ["a/object2"]

    def test_delete_of_nothing_is_fine(self, store: Store) -> None:
        """The deletion of a missing object is no error."""
        store.delete("a/never")
        put_bytes(store, "a/object", b"1", ME)
        store.delete("a/object")
        store.delete("a/object")
        assert keys(store) == []

    def test_a_key_can_be_used_again(self, store: Store) -> None:
        """After a deletion the same key accepts a new object."""
        put_bytes(store, "a/b/object", b"1", ME)
        store.delete("a/b/object")
        put_bytes(store, "a/b/object", b"2", ME)
        assert read_bytes(store, "a/b/object") == b"2"

    # Keys

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_bad_keys_are_refused(self, store: Store, key: str) -> None:
        """Every method refuses a key that is not a plain path."""
        with pytest.raises(InvalidRequest):
            store.writer(key, owner=ME)
        with pytest.raises(InvalidRequest):
            get(store, key)
        with pytest.raises(InvalidRequest):
            store.stat(key)
        with pytest.raises(InvalidRequest):
            store.delete(key)

    @pytest.mark.parametrize("prefix", ["..", "a/../b", ".hidden", "a\0b", "a" * 300])
    def test_bad_prefixes_are_refused(self, store: Store, prefix: str) -> None:
        """A prefix obeys the rules of keys."""
        with pytest.raises(InvalidRequest):
            keys(store, prefix)
        with pytest.raises(InvalidRequest):
            store.sweep(0, prefix)

    def test_longest_key_takes_any_job(self, store: Store) -> None:
        """A component of 180 characters leaves room for the store's own additions."""
        put(store, "a/" + "n" * 180, b"1", owner=Owner("../job with/any\0letters" * 20, 10**15))
        assert keys(store) == ["a/" + "n" * 180]

    # Sweeping

    def test_sweep_removes_what_was_abandoned(self, store: Store) -> None:
        """A sweep counts and deletes uncommitted writes, which cannot commit later, and keeps objects."""
        put(store, "a/done", b"1")
        sink = fill(store.writer("a/object", owner=OTHER), self.unfinished)
        # A part that arrives during the abort keeps the upload on some S3 servers. Then the next sweep removes it.
        until(lambda: any(each.size for each in store.leftovers()), "the server has a part")
        assert (store.sweep(0), store.sweep(0)) == (1, 0)
        with pytest.raises((Cancelled, StoreUnavailable)):
            sink.commit()
        sink.abort()
        assert keys(store) == ["a/done"]

    def test_sweep_spares_the_young(self, store: Store) -> None:
        """A recent write is spared, and can be committed."""
        with store.writer("a/object", owner=OTHER) as sink:
            fill(sink, self.unfinished)
            assert abs(next(store.leftovers()).modified - time.time()) < 3600
            assert store.sweep(3600) == 0
            sink.commit()
        assert get(store, "a/object") == self.unfinished

    def test_sweep_spares_a_job(self, store: Store) -> None:
        """A sweep spares the writes of the given job, and no others."""
        with store.writer("a/mine", owner=ME) as mine, store.writer("a/theirs", owner=OTHER) as theirs:
            fill(mine, self.unfinished)
            fill(theirs, self.unfinished)
            assert store.sweep(0, spare=ME.job_id) == 1
            mine.commit()
        assert keys(store) == ["a/mine"]

    def test_sweep_takes_whole_components(self, store: Store) -> None:
        """A sweep below a/2, and its dry list, do not affect a/20."""
        with store.writer("a/2/object", owner=ME) as below, store.writer("a/20/object", owner=ME) as beside:
            fill(below, self.unfinished)
            fill(beside, self.unfinished)
            assert [each.key for each in store.leftovers("a/2")] == ["a/2/object"]
            assert store.sweep(0, "a/2") == 1
            below.abort()  # on NFS an open file stays for a while under another name
            assert [each.key for each in store.leftovers()] == ["a/20/object"]
            beside.commit()
        assert keys(store) == ["a/20/object"]

    # The store itself

    def test_usage_is_never_negative(self, store: Store) -> None:
        """Usage is not negative, or None if the store cannot know it."""
        usage = store.usage()
        assert all(each is None or each >= 0 for each in (usage.total, usage.used, usage.free))

    def test_names_are_safe_to_log(self, store: Store) -> None:
        """A store has a name and a URL without credentials."""
        assert store.name
        assert "://" in store.url
        assert "@" not in store.url

    def test_suspended_is_invisible(self, store: Store) -> None:
        """A suspended write is invisible, may be closed, and is deleted by a sweep."""
        with store.writer("a/object", owner=ME) as sink:
            fill(sink, self.unfinished)
            sink.suspend()
        assert keys(store) == []
        assert store.sweep(0) >= (1 if store.resumable else 0)
        assert store.sweep(0) == 0

    def test_resume_where_nothing_was_left(self, store: Store) -> None:
        """If no part exists, a resuming writer starts at the first byte."""
        with store.writer("a/object", owner=ME, resume=True) as sink:
            assert (sink.offset, list(sink.resumed())) == (0, [])
            fill(sink, SOME).commit()
        assert get(store, "a/object") == SOME
