"""A sink's thread keeps the order, bounds its queue, and limits how long a put blocks."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from ssvm_worker.errors import Cancelled, StoreUnavailable
from ssvm_worker.streaming.interfaces import BURST, CHUNK
from ssvm_worker.streaming.pipeline import QUEUE_SIZE, SinkThread
from tests.waiting import PATIENCE_S

#: The number of small chunks that a queue holds.
DEPTH = QUEUE_SIZE // CHUNK


def nothing() -> None:
    """Return no reason to stop."""


def cancel() -> None:
    """Return a reason to stop."""
    raise Cancelled("user")


class Stuck:
    """A consumer that hangs in its first chunk until the test ends."""

    def __init__(self) -> None:
        self.taken = threading.Event()
        self.let_go = threading.Event()
        self.seen: list[bytes] = []

    def __call__(self, chunk: bytes) -> None:
        self.seen.append(chunk)
        self.taken.set()
        self.let_go.wait()


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    """Return a hanging consumer that is released at the end."""
    consumer = Stuck()
    yield consumer
    consumer.let_go.set()


def fill(lane: SinkThread, consumer: Stuck) -> None:
    """Put until the queue is full: the consumer has one chunk, and DEPTH wait."""
    lane.put(b"first", nothing)
    assert consumer.taken.wait(PATIENCE_S)
    for _ in range(DEPTH):
        lane.put(b"waits", nothing)


def broken(error: Exception) -> SinkThread:
    """Return a lane whose consumer failed with its first chunk."""

    def consume(chunk: bytes) -> None:
        failed.set()
        raise error

    failed = threading.Event()
    lane = SinkThread("broken", consume)
    lane.put(b"x", nothing)
    assert failed.wait(PATIENCE_S)
    return lane


def test_order() -> None:
    """Every chunk arrives once, in order, before finish returns."""
    seen: list[bytes] = []
    lane = SinkThread("disk", seen.append)
    chunks = [b"%d" % number for number in range(50)]
    for chunk in chunks:
        lane.put(chunk, nothing)
    lane.finish(nothing)
    assert seen == chunks


def test_error_is_raised_at_finish() -> None:
    """The consumer's error at the last chunk is raised by finish."""
    lane = broken(StoreUnavailable("gone"))
    with pytest.raises(StoreUnavailable, match="gone"):
        lane.finish(nothing)


def test_dead_consumer_blocks_nobody() -> None:
    """After an error, each put returns at once and raises it."""
    lane = broken(StoreUnavailable("gone"))
    raised = 0
    for _ in range(3 * DEPTH):
        try:
            lane.put(b"x", nothing)
        except StoreUnavailable:
            raised += 1
    assert raised >= 3 * DEPTH - 1
    assert lane.stop()


def test_bounded(stuck: Stuck) -> None:
    """At most DEPTH chunks wait, and the next put checks the stop flag."""
    lane = SinkThread("disk", stuck)
    fill(lane, stuck)
    with pytest.raises(Cancelled):
        lane.put(b"one too many", cancel)


@pytest.mark.parametrize(
    "sizes", [[BURST, BURST], [BURST, CHUNK, CHUNK, CHUNK], [1] * DEPTH], ids=["bursts", "mixed", "tiny"]
)
def test_bounded_in_bytes(stuck: Stuck, sizes: list[int]) -> None:
    """A queue holds QUEUE_SIZE bytes, and at most DEPTH chunks of any size."""
    lane = SinkThread("disk", stuck)
    lane.put(b"first", nothing)
    assert stuck.taken.wait(PATIENCE_S)
    for size in sizes:
        lane.put(bytes(size), nothing)
    with pytest.raises(Cancelled):
        lane.put(b"one too many", cancel)


def test_stalled_consumer(stuck: Stuck) -> None:
    """A consumer that takes nothing for the stall time is StoreUnavailable with the store's name."""
    lane = SinkThread("archive", stuck, stall_s=0.0)
    fill(lane, stuck)
    with pytest.raises(StoreUnavailable, match="archive"):
        lane.put(b"one too many", nothing)


def test_stalled_at_the_end(stuck: Stuck) -> None:
    """A stall is also detected during the wait for the last chunks."""
    lane = SinkThread("archive", stuck, stall_s=0.0)
    lane.put(b"first", nothing)
    with pytest.raises(StoreUnavailable, match="archive"):
        lane.finish(nothing)


def test_cancel_at_the_end(stuck: Stuck) -> None:
    """A cancel ends the wait for the last chunks."""
    lane = SinkThread("archive", stuck)
    lane.put(b"first", nothing)
    with pytest.raises(Cancelled):
        lane.finish(cancel)


def test_stop_discards(stuck: Stuck) -> None:
    """Waiting chunks of a stopped thread are never consumed."""
    lane = SinkThread("disk", stuck)
    fill(lane, stuck)
    threading.Timer(0.05, stuck.let_go.set).start()
    assert lane.stop()
    assert stuck.seen == [b"first"]


def test_stop_with_drain(stuck: Stuck) -> None:
    """With *drain*, a stopped thread consumes the waiting chunks, if its consumer is fast enough."""
    lane = SinkThread("disk", stuck)
    fill(lane, stuck)
    threading.Timer(0.05, stuck.let_go.set).start()
    assert lane.stop(PATIENCE_S, drain=True)
    assert len(stuck.seen) == DEPTH + 1


def test_stop_has_a_time_limit(stuck: Stuck) -> None:
    """stop returns without a hanging consumer, and reports that."""
    lane = SinkThread("disk", stuck)
    fill(lane, stuck)
    assert not lane.stop(timeout_s=0.01)


def test_stop_twice() -> None:
    """stop may be called twice, and after the end."""
    lane = SinkThread("disk", lambda chunk: None)
    lane.finish(nothing)
    assert lane.stop()
    assert lane.stop()
