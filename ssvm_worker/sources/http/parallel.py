"""One object over several connections, handed on in order: ranges are fetched ahead into a bounded window.

    start            head                          end of the window                 end
      | handed on    | being read | read | being read | not yet asked for             |

What lies below sees one stream, so hashing, inspection and multipart uploads stay in the one pass. A range is tried
again, never the file; a connection that holds up the others is replaced. The first connection has an answer that
reaches to the end of the object. It reads on in order until another one has given bytes: a server whose ranges cannot
be used is read by that answer alone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from ssvm_worker.errors import SourceChanged, SourceUnavailable, WorkerError
from ssvm_worker.net.sockets import TICK
from ssvm_worker.streaming.interfaces import Check
from ssvm_worker.units import MiB

#: Failures of a connection in a row, without a byte in between, after which it is given up.
_TRIES = 3
#: Seconds before the second of them; it doubles.
_DELAY_S = 0.25
#: How much slower than a usual range the one may be that all others wait for.
_PATIENCE = 4.0
#: Seconds that the threads get to see the stop flag, which they look at once a TICK; a name lookup may take longer.
_JOIN_S = 2.0


class RangeConnection(Protocol):
    """One connection."""

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Yield just those bytes; SourceUnavailable or SourceChanged where a second try may help."""

    @property
    def rest(self) -> int | None:
        """Where its answer goes on that reaches to the end of the object; None if it has no such answer."""

    def close(self) -> None:
        """Close it; safe to repeat."""


#: Opens a connection for the range that begins there; its waits end with what the check raises.
Open = Callable[[int, Check], RangeConnection]


@dataclass(frozen=True)
class ConnectionPolicy:
    """When a second connection is worth it, and how many there may be."""

    #: One: never.
    connections: int = 1
    #: Bytes of one range; for every two connections there are three ranges at the most that are not handed on yet.
    range_size: int = 4 * MiB
    #: Bytes a second of one connection that are enough: a gigabit line is full.
    enough: float = 100.0 * MiB
    #: Seconds of waiting after which it is judged, again and again: a burst at the start must not count for ever.
    judge_s: float = 0.1


class ConnectionSpeed:
    """How fast one connection is, by the time in which it had nothing for us.

    Where the reader is what is slow, as on a machine that is busy, its bytes are there before it asks, and more
    connections would only cost more.
    """

    def __init__(self, many: ConnectionPolicy) -> None:
        self.slow = False
        self._many = many
        self._bytes, self._since = 0, 0.0

    def judge(self, size: int, starved: float) -> None:
        """So many more bytes have come; *starved*: seconds that reads have waited since the connection was made."""
        self._bytes += size
        if (waited := starved - self._since) >= self._many.judge_s:
            self.slow = self._bytes < self._many.enough * waited
            self._bytes, self._since = 0, starved


class _Stopped(Exception):
    """Nobody wants the bytes any more."""


class _Replaced(Exception):
    """Another connection has taken over this range."""


@dataclass
class _Range:
    position: int
    end: int
    owner: _Worker | None = None
    #: When its owner began, by the monotonic clock, and with which byte.
    since: float = 0.0
    origin: int = 0
    chunks: deque[bytes] = field(default_factory=deque)

    @property
    def whole(self) -> bool:
        return self.position == self.end


class ParallelDownload:
    """Fetches once. Holds at most three ranges for two connections."""

    def __init__(self, many: ConnectionPolicy, check: Check) -> None:
        self._connections = many.connections
        self._size = many.range_size
        self._check = check
        self._state = threading.Condition()
        self._stop = threading.Event()
        self._window: deque[_Range] = deque()
        self._next = self._end = 0
        self._alive = many.connections
        #: Whether a connection other than the first has given bytes.
        self._proven = False
        self._error: BaseException | None = None
        #: Bytes and seconds of the ranges that were read whole.
        self._read, self._spent = 0, 1e-9

    def fetch(self, open_line: Open, start: int, end: int) -> Generator[bytes, None, None]:
        """Yield the bytes from *start* to *end* in their order.

        Raises the error of the last connection when none is left, and what the check raises.
        """
        self._next, self._end = start, end
        threads = [
            threading.Thread(target=self._work, args=(open_line,), name=f"range-{number}", daemon=True)
            for number in range(self._connections)
        ]
        try:
            for each in threads:
                each.start()
            while chunk := self._take_chunk():
                yield chunk
        finally:
            self._stop.set()
            with self._state:
                self._state.notify_all()
            until = time.monotonic() + _JOIN_S
            for each in threads:
                each.join(max(0.0, until - time.monotonic()))

    # Of the one who reads

    def _take_chunk(self) -> bytes:
        while True:
            with self._state:
                while self._window and self._window[0].whole and not self._window[0].chunks:
                    self._window.popleft()
                    self._state.notify_all()
                if self._window and self._window[0].chunks:
                    return self._window[0].chunks.popleft()
                if not self._window and self._next == self._end:
                    return b""
                if self._error is not None:
                    raise self._error
                self._state.wait(TICK)
            self._check()

    # Of the connections' threads

    def _work(self, open_line: Open) -> None:
        worker = _Worker(open_line, self._stop)
        try:
            while piece := self._take_range(worker):
                self._try(worker, piece)
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - handed over to the thread that reads
            self._fail(error)
        finally:
            worker.drop()

    def _try(self, worker: _Worker, piece: _Range) -> None:
        try:
            for chunk in worker.read(piece.position, piece.end):
                self._put(worker, piece, chunk)
        except _Replaced:
            worker.drop()
        except WorkerError as error:
            worker.drop()
            self._give_back(worker, piece)
            worker.failures += 1
            # Another node behind the same name has another ETag; the next connection may lead to the right one.
            if not isinstance(error, SourceUnavailable | SourceChanged) or worker.failures >= _TRIES:
                raise
            self._stop.wait(_DELAY_S * 2 ** (worker.failures - 1))

    def _take_range(self, worker: _Worker) -> _Range | None:
        with self._state:
            while not self._stop.is_set():
                if piece := self._range_for(worker):
                    piece.owner, piece.since, piece.origin = worker, time.monotonic(), piece.position
                    worker.piece = piece
                    return piece
                self._state.wait(TICK)
        return None

    def _range_for(self, worker: _Worker) -> _Range | None:
        if self._proven or worker.rest is None:
            return self._free_range() or self._late_range()
        head = next((piece for piece in self._window if not piece.whole), None)
        if head is None:
            return self._free_range()
        return head if head.owner is None else self._late_range()

    def _free_range(self) -> _Range | None:
        """One that was given back, or the next one if the window has room for it."""
        for piece in self._window:
            if piece.owner is None and not piece.whole:
                return piece
        if self._next == self._end or len(self._window) >= self._connections * 3 // 2:
            return None
        piece = _Range(self._next, min(self._end, self._next + self._size))
        self._next = piece.end
        self._window.append(piece)
        return piece

    def _late_range(self) -> _Range | None:
        """The first one, if it is far slower than the others were, and nothing else is left to do."""
        head = self._window[0] if self._window else None
        if head is None or head.whole or not self._read:
            return None
        if not self._proven and head.owner is not None and head.owner.rest is not None:
            return None
        waited, usual = time.monotonic() - head.since, self._spent / self._read
        late = waited > TICK and waited > _PATIENCE * usual * max(head.position - head.origin, self._size // 8)
        return head if late else None

    def _put(self, worker: _Worker, piece: _Range, chunk: bytes) -> None:
        worker.failures = 0
        worker.check()
        with self._state:
            if piece.owner is not worker:
                raise _Replaced
            self._proven = self._proven or worker.rest is None
            piece.chunks.append(chunk)
            piece.position += len(chunk)
            if piece.whole:
                self._read += piece.end - piece.origin
                self._spent += time.monotonic() - piece.since
            self._state.notify_all()

    def _give_back(self, worker: _Worker, piece: _Range) -> None:
        with self._state:
            if piece.owner is worker:
                piece.owner = None
                self._state.notify_all()

    def _fail(self, error: BaseException) -> None:
        """Count one connection less; when it was the last, all has failed."""
        with self._state:
            self._alive -= 1
            if not self._alive or not isinstance(error, WorkerError):
                self._error = self._error or error
            self._state.notify_all()


class _Worker:
    """One thread's connection."""

    def __init__(self, open_line: Open, stop: threading.Event) -> None:
        self.failures = 0
        self.piece: _Range | None = None
        self._open = open_line
        self._stop = stop
        self._line: RangeConnection | None = None

    @property
    def rest(self) -> int | None:
        """Where the answer of its connection goes on that reaches to the end of the object."""
        line = self._line
        return line.rest if line is not None else None

    def check(self) -> None:
        """Called in every wait of the connection."""
        if self._stop.is_set():
            raise _Stopped
        if self.piece is not None and self.piece.owner is not self:
            raise _Replaced

    def read(self, start: int, end: int) -> Iterator[bytes]:
        if self._line is None:
            self._line = self._open(start, self.check)
        return self._line.read(start, end)

    def drop(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None
