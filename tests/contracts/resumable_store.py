"""The contract of a store that keeps suspended writes for the next attempt, in addition to every store's contract."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ssvm_worker.errors import Cancelled, StoreUnavailable, WorkerError
from ssvm_worker.streaming.interfaces import CHUNK, Owner, Sink, Store
from tests.contracts.store import BIG, ME, OTHER, SOME, StoreContract, fill, get, keys, put
from tests.waiting import PATIENCE_S


class ResumableStoreContract(StoreContract):
    """The contract of a store that keeps suspended writes, and of its fence."""

    def left_by(self, store: Store, owner: Owner, size: int = 3 * CHUNK + 17) -> None:
        """Let an attempt break off after *size* bytes."""
        with store.writer("a/object", owner=owner) as sink:
            fill(sink, BIG[:size]).suspend()

    def test_next_attempt_goes_on(self, store: Store) -> None:
        """The next attempt of the job finds the bytes, passes them to the hashes, and adds the rest."""
        self.left_by(store, ME)
        with store.writer("a/object", len(BIG), owner=Owner(ME.job_id, 2), resume=True) as sink:
            head = list(sink.resumed())
            assert sink.offset == len(b"".join(head))
            fill(sink, BIG[sink.offset :]).commit()
        assert b"".join(head) == BIG[: 3 * CHUNK + 17]
        assert all(0 < len(chunk) <= CHUNK for chunk in head)
        assert (get(store, "a/object"), store.sweep(0)) == (BIG, 0)

    def test_the_newest_bytes_are_taken(self, store: Store) -> None:
        """If several attempts left parts, the newest is resumed, and none remains."""
        self.left_by(store, ME)
        with store.writer("a/object", owner=Owner(ME.job_id, 2), resume=True) as sink:
            fill(sink, BIG[sink.offset : 5 * CHUNK]).suspend()
        with store.writer("a/object", owner=Owner(ME.job_id, 3), resume=True) as sink:
            assert sink.offset == 5 * CHUNK
        assert store.sweep(0) == 0

    def test_only_what_is_settled_is_taken(self, store: Store) -> None:
        """With a number of reliable bytes, the next attempt continues after those, or after all if fewer exist."""
        self.left_by(store, ME)
        for most, taken in ((2 * CHUNK + 5, 2 * CHUNK + 5), (1 << 40, 2 * CHUNK + 5)):
            with store.writer("a/object", owner=ME, resume=True, max_bytes=most) as sink:
                assert (sink.offset, b"".join(sink.resumed())) == (taken, BIG[:taken])
                sink.suspend()
        with store.writer("a/object", owner=ME, resume=True, max_bytes=0) as sink:
            assert (sink.offset, list(sink.resumed())) == (0, [])
            fill(sink, BIG).commit()
        assert (get(store, "a/object"), store.sweep(0)) == (BIG, 0)

    def test_settles_while_it_is_written(self, store: Store) -> None:
        """The settled bytes are known at any time: all after a suspend, none after an abort."""
        with store.writer("a/object", owner=ME) as sink:
            fill(sink, BIG[: 2 * CHUNK])
            assert sink.sync() == 2 * CHUNK
            fill(sink, BIG[2 * CHUNK : 3 * CHUNK])
            sink.suspend()
            assert sink.sync() == 3 * CHUNK
        with store.writer("a/object", owner=ME, resume=True, max_bytes=3 * CHUNK) as sink:
            sink.abort()
            assert sink.sync() == 0

    def test_same_attempt_goes_on(self, store: Store) -> None:
        """An equal token resumes too."""
        self.left_by(store, ME)
        with store.writer("a/object", owner=ME, resume=True) as sink:
            assert sink.offset == 3 * CHUNK + 17

    def test_another_job_starts_anew(self, store: Store) -> None:
        """Bytes of one job are never used for another, and stay."""
        self.left_by(store, ME)
        with store.writer("a/object", owner=OTHER, resume=True) as sink:
            assert sink.offset == 0
        assert store.sweep(0) == 1

    def test_not_asked_to_resume_starts_anew(self, store: Store) -> None:
        """Without resume, the job's old bytes are deleted."""
        self.left_by(store, ME)
        put(store, "a/object", b"new", owner=Owner(ME.job_id, 2))
        assert (get(store, "a/object"), store.sweep(0)) == (b"new", 0)

    def test_abort_drops_resumed_bytes(self, store: Store) -> None:
        """An abort also deletes an earlier attempt's bytes."""
        self.left_by(store, ME)
        store.writer("a/object", owner=Owner(ME.job_id, 2), resume=True).abort()
        assert (keys(store), store.sweep(0)) == ([], 0)

    def test_sweep_spares_a_suspended_job(self, store: Store) -> None:
        """A sweep that spares a job keeps its part for the next attempt."""
        self.left_by(store, ME)
        assert store.sweep(0, spare=ME.job_id) == 0
        assert store.sweep(0, spare=OTHER.job_id) == 1

    @pytest.mark.parametrize(
        ("token", "resume"),
        [
            pytest.param(2, False, id="newer token, from the start"),
            pytest.param(2, True, id="newer token, resuming"),
            pytest.param(1, False, id="same token, from the start"),
        ],
    )
    def test_taken_over_writer_cannot_commit(self, store: Store, resume: bool, token: int) -> None:
        """After a later writer's takeover, the earlier one's commit is refused, and its abort has no effect."""
        zombie = fill(store.writer("a/object", owner=ME), BIG[:CHUNK])
        with store.writer("a/object", owner=Owner(ME.job_id, token), resume=resume) as heir:
            with pytest.raises(Cancelled, match="Another worker"):
                zombie.commit()
            zombie.abort()
            fill(heir, BIG[heir.offset :]).commit()
        assert get(store, "a/object") == BIG

    def test_older_token_cannot_open(self, store: Store) -> None:
        """A writer with an older token is refused at once, and deletes nothing."""
        with store.writer("a/object", owner=Owner(ME.job_id, 2)) as sink:
            fill(sink, BIG)
            with pytest.raises(Cancelled):
                store.writer("a/object", owner=ME)
            sink.commit()
        assert get(store, "a/object") == BIG

    def test_zombie_cannot_spoil_a_fresh_start(self, store: Store) -> None:
        """Bytes that a refused writer still writes do not reach its successor's object."""
        zombie = store.writer("a/object", owner=ME)
        with store.writer("a/object", owner=Owner(ME.job_id, 2)) as heir:
            fill(zombie, b"x" * CHUNK)
            fill(heir, BIG).commit()
        assert get(store, "a/object") == BIG

    def test_abort_beside_a_write(self, store: Store) -> None:
        """An abort ends the writes of another thread with a WorkerError, and none of their bytes stays."""
        for _ in range(5):
            sink, written = store.writer("a/object", owner=ME), threading.Event()
            with ThreadPoolExecutor(1) as threads:

                def write(sink: Sink = sink, written: threading.Event = written) -> None:
                    for _ in range(100):
                        sink.write(SOME[:CHUNK])
                        written.set()

                writing = threads.submit(write)
                assert written.wait(PATIENCE_S)
                sink.abort()
                assert isinstance(writing.exception() or StoreUnavailable("none"), WorkerError)
        assert (keys(store), store.sweep(0)) == ([], 0)
