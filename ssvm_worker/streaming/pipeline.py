"""Move one object: resume its source where it breaks, limit its size, and let observers see each chunk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing

from ssvm_worker.errors import SourceUnavailable, TooLarge
from ssvm_worker.units import MiB, human_size

from .interfaces import Observer, Owner, Source, Store, StoredObject

_log = logging.getLogger("ssvm.stream")


def tap(chunks: Iterable[bytes], *observers: Observer) -> Iterator[bytes]:
    """Pass every chunk on after each observer has seen it; for cheap observers, in the caller's thread."""
    for chunk in chunks:
        for observe in observers:
            observe(chunk)
        yield chunk


def limit(chunks: Iterable[bytes], most: int, where: str) -> Iterator[bytes]:
    """Pass the chunks on, and raise TooLarge in place of the one that goes beyond *most* bytes."""
    seen = 0
    for chunk in chunks:
        seen += len(chunk)
        if seen > most:
            raise TooLarge(f"More than the {human_size(most)} ({most} bytes) that are allowed", where, RAISE_LIMIT)
        yield chunk


RAISE_LIMIT = "Raise max_bytes in the request, or download.max_bytes in the settings"


#: Bytes between two breaks that make it worth while to go on with a source.
WORTH_IT = MiB
#: Seconds that a source may have us wait within an attempt; the next attempt waits for the rest.
_LONGEST_WAIT_S = 60.0


class Resuming:
    """Yields the bytes of a source exactly once, reopening it at the byte where it broke.

    The one byte-level retry in the house. State lives downstream, so nobody else knows that there was a failure.
    A source that is not resumable is tried again only while nothing has come of it. The tries start anew when
    WORTH_IT bytes have come since the last break: one that gives a little and stalls must not hold a job for ever.
    """

    def __init__(
        self, source: Source, wait: Callable[[float], None], *, offset: int = 0, tries: int = 5, delay_s: float = 1.0
    ) -> None:
        self.source = source
        #: How often the stream was taken up again, after a break or from an earlier attempt's bytes.
        self.resumptions = 1 if offset else 0
        self._wait = wait
        self._offset = offset
        self._tries = tries
        self._delay_s = delay_s

    def __iter__(self) -> Iterator[bytes]:
        failures, since = 0, self._offset
        while True:
            try:
                with closing(self.source.open(self._offset)) as chunks:
                    for chunk in chunks:
                        self._offset += len(chunk)
                        yield chunk
                return
            except SourceUnavailable as error:
                wanted = min(_LONGEST_WAIT_S, error.after_s)
                failures = 1 if self._offset - since >= WORTH_IT else failures + 1
                since = self._offset
                if failures > self._tries or (self._offset and not self.source.resumable):
                    raise
            self.resumptions += bool(self._offset)
            self._wait(max(wanted, min(30.0, self._delay_s * 2 ** (failures - 1))))


def put_bytes(
    store: Store, key: str, data: bytes, owner: Owner, confirm: Callable[[], None] = lambda: None
) -> StoredObject:
    """Store a small object, whole or not at all.

    *confirm* is called before the commit, when what is written can be seen: whoever takes the job over after that
    finds it, and takes it away.
    """
    with store.writer(key, len(data), owner=owner) as sink:
        if data:
            sink.write(data)
        confirm()
        return sink.commit()


def read_bytes(store: Store, key: str, most: int = 16 * MiB) -> bytes:
    """Read a small object; TooLarge above *most* bytes."""
    return b"".join(limit(store.reader(key).open(), most, key))
