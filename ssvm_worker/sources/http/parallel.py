"""Read one object over several connections, and yield it in order. Ranges are fetched ahead into a bounded window.

    start            head                          end of the window                 end
      | yielded      | being read | read | being read | not requested yet             |

The caller sees one stream, so hashing, inspection and multipart uploads stay in the same pass. After an error only the
range is requested again, not the file. A connection that delays all others is replaced.

The first connection has an answer that reaches the end of the object. It reads in order until another connection has
yielded bytes. So this answer alone reads an object whose server does not support ranges.
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

#: Failures of a connection in a row, without a byte in between, after which its thread ends.
_MAX_FAILURES = 3
#: Seconds before the second try. The delay doubles with each failure.
_DELAY_S = 0.25
#: The first range is reassigned if it takes this many times longer than an average range.
_LATE_FACTOR = 4.0
#: Seconds that the threads have to see the stop flag. They read it once per TICK, but a name lookup may take longer.
_JOIN_S = 2.0


class RangeConnection(Protocol):
    """One connection to the object."""

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Yield exactly these bytes. Raises SourceUnavailable or SourceChanged if a second try may help."""

    @property
    def rest(self) -> int | None:
        """Return the position of the answer that reaches the end of the object, or None without such an answer."""

    def close(self) -> None:
        """Close the connection. Further calls have no effect."""


#: Opens a connection for the range that starts at this position. Exceptions of the check end its waits.
Connect = Callable[[int, Check], RangeConnection]


@dataclass(frozen=True)
class ConnectionPolicy:
    """Number of connections, and the conditions for more than one."""

    #: 1: never use a second connection.
    connections: int = 1
    #: Bytes of one range. The window holds at most three ranges for every two connections.
    range_size: int = 4 * MiB
    #: Bytes per second of one connection that need no second one: a gigabit line is full.
    enough_rate: float = 100.0 * MiB
    #: Seconds of waiting between two judgements. They repeat, so that a burst at the start does not decide.
    judge_s: float = 0.1


class ConnectionSpeed:
    """Speed of one connection during the time that the reader waits for it.

    If the reader is the bottleneck, for example on a busy machine, more connections do not help: the bytes are there
    before it reads them.
    """

    def __init__(self, policy: ConnectionPolicy) -> None:
        self.slow = False
        self._policy = policy
        self._bytes, self._since = 0, 0.0

    def add(self, size: int, starved: float) -> None:
        """Count *size* more bytes. *starved*: seconds that reads have waited since the connection was made."""
        self._bytes += size
        if (waited := starved - self._since) >= self._policy.judge_s:
            self.slow = self._bytes < self._policy.enough_rate * waited
            self._bytes, self._since = 0, starved


class _Stopped(Exception):
    """The download has ended."""


class _Replaced(Exception):
    """Another connection has taken over the range."""


@dataclass
class _Range:
    position: int
    end: int
    owner: _Fetcher | None = None
    #: When the owner began, by the monotonic clock, and its first byte.
    since: float = 0.0
    origin: int = 0
    chunks: deque[bytes] = field(default_factory=deque)

    @property
    def is_read(self) -> bool:
        return self.position == self.end


class ParallelDownload:
    """One download over several connections. Memory: at most three ranges for every two connections."""

    def __init__(self, policy: ConnectionPolicy, check: Check) -> None:
        self._connections = policy.connections
        self._size = policy.range_size
        self._check = check
        self._state = threading.Condition()
        self._stop = threading.Event()
        self._window: deque[_Range] = deque()
        self._next = self._end = 0
        self._alive = policy.connections
        #: Whether a connection other than the first has yielded bytes.
        self._ranges_work = False
        self._error: BaseException | None = None
        #: Bytes and seconds of the completed ranges.
        self._read, self._spent = 0, 1e-9

    def fetch(self, connect: Connect, start: int, end: int) -> Generator[bytes, None, None]:
        """Yield the bytes from *start* to *end* in order. Call this once.

        When all connections have failed, the error of the last one is raised. Errors of the check are raised too.
        """
        self._next, self._end = start, end
        threads = [
            threading.Thread(target=self._run_fetcher, args=(connect,), name=f"range-{number}", daemon=True)
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
            deadline = time.monotonic() + _JOIN_S
            for each in threads:
                each.join(max(0.0, deadline - time.monotonic()))

    # Called by the reader's thread
    # Of the one who reads

    def _take_chunk(self) -> bytes:
        while True:
            with self._state:
                while self._window and self._window[0].is_read and not self._window[0].chunks:
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

    # Called by the connections' threads

    def _run_fetcher(self, connect: Connect) -> None:
        fetcher = _Fetcher(connect, self._stop)
        try:
            while piece := self._next_range(fetcher):
                self._fetch_range(fetcher, piece)
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - the reader's thread raises it
            with self._state:
                self._alive -= 1
                if not self._alive or not isinstance(error, WorkerError):
                    self._error = self._error or error
                self._state.notify_all()
        finally:
            fetcher.close()

    def _fetch_range(self, fetcher: _Fetcher, piece: _Range) -> None:
        """Read one range into the window. After an error that may pass, give the range back and wait."""
        try:
            for chunk in fetcher.read(piece.position, piece.end):
                self._put(fetcher, piece, chunk)
        except _Replaced:
            fetcher.close()
        except WorkerError as error:
            fetcher.close()
            with self._state:
                if piece.owner is fetcher:
                    piece.owner = None
                    self._state.notify_all()
            fetcher.failures += 1
            # Another node behind the same name has another ETag. The next connection may reach the right node.
            if not isinstance(error, SourceUnavailable | SourceChanged) or fetcher.failures >= _MAX_FAILURES:
                raise
            self._stop.wait(_DELAY_S * 2 ** (fetcher.failures - 1))

    def _next_range(self, fetcher: _Fetcher) -> _Range | None:
        """Assign a range to the fetcher. Wait for one, or return None when the download ends."""
        with self._state:
            while not self._stop.is_set():
                if piece := self._range_for(fetcher):
                    piece.owner, piece.since, piece.origin = fetcher, time.monotonic(), piece.position
                    fetcher.piece = piece
                    return piece
                self._state.wait(TICK)
        return None

    def _range_for(self, fetcher: _Fetcher) -> _Range | None:
        if self._ranges_work or fetcher.rest is None:
            return self._free_range() or self._late_range()
        head = next((piece for piece in self._window if not piece.is_read), None)
        if head is None:
            return self._free_range()
        return head if head.owner is None else self._late_range()

    def _free_range(self) -> _Range | None:
        """Return a range that a fetcher gave back, or the next one if the window has room."""
        for piece in self._window:
            if piece.owner is None and not piece.is_read:
                return piece
        if self._next == self._end or len(self._window) >= self._connections * 3 // 2:
            return None
        piece = _Range(self._next, min(self._end, self._next + self._size))
        self._next = piece.end
        self._window.append(piece)
        return piece

    def _late_range(self) -> _Range | None:
        """Return the first range if it is far slower than the others were, else None."""
        head = self._window[0] if self._window else None
        if head is None or head.is_read or not self._read:
            return None
        if not self._ranges_work and head.owner is not None and head.owner.rest is not None:
            return None
        waited, seconds_per_byte = time.monotonic() - head.since, self._spent / self._read
        usual = seconds_per_byte * max(head.position - head.origin, self._size // 8)
        return head if waited > TICK and waited > _LATE_FACTOR * usual else None

    def _put(self, fetcher: _Fetcher, piece: _Range, chunk: bytes) -> None:
        fetcher.failures = 0
        fetcher.check()
        with self._state:
            if piece.owner is not fetcher:
                raise _Replaced
            self._ranges_work = self._ranges_work or fetcher.rest is None
            piece.chunks.append(chunk)
            piece.position += len(chunk)
            if piece.is_read:
                self._read += piece.end - piece.origin
                self._spent += time.monotonic() - piece.since
            self._state.notify_all()


class _Fetcher:
    """The connection of one thread."""

    def __init__(self, connect: Connect, stop: threading.Event) -> None:
        self.failures = 0
        self.piece: _Range | None = None
        self._connect = connect
        self._stop = stop
        self._connection: RangeConnection | None = None

    @property
    def rest(self) -> int | None:
        """Return the ``rest`` of the connection, or None without a connection."""
        connection = self._connection
        return connection.rest if connection is not None else None

    def check(self) -> None:
        """Raise an exception if the connection must end. The connection calls this in every wait."""
        if self._stop.is_set():
            raise _Stopped
        if self.piece is not None and self.piece.owner is not self:
            raise _Replaced

    def read(self, start: int, end: int) -> Iterator[bytes]:
        if self._connection is None:
            self._connection = self._connect(start, self.check)
        return self._connection.read(start, end)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
