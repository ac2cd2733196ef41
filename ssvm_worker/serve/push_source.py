"""The source of an upload: bytes that a client sends, instead of bytes that the worker fetches."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass

from ssvm_worker.artifacts.checksums import Digest
from ssvm_worker.errors import SourceChanged, SourceUnavailable
from ssvm_worker.jobs.connections import SourceRequest
from ssvm_worker.streaming.interfaces import Check
from ssvm_worker.wiring.connections import ConfiguredConnections

#: Chunks, each at most 1 MiB, that wait for the pipeline.
_MAX_CHUNKS = 4
#: Seconds between two checks for a cancelled job or an ended client.
_CHECK_S = 0.25


@dataclass(frozen=True)
class SentVersion:
    """Identifies an upload: a client that resumes must send the same file."""

    link: str
    length: int


class Sender:
    """``RemoteSource`` of the bytes that are passed to ``put``, from *offset* on.

    One thread calls ``put``, another reads.
    """

    #: The client sends no checksum.
    digests: Sequence[Digest] = ()

    def __init__(self, name: str, size: int | None, offset: int = 0, version: SentVersion | None = None) -> None:
        self.name = name
        self.size = size
        #: None if the client cannot resume.
        self.validator = version
        #: Bytes that the client has sent.
        self.received = offset
        self._offset = offset
        self._chunks: queue.Queue[bytes | None] = queue.Queue(_MAX_CHUNKS)
        self._disconnected = threading.Event()
        self._closed = threading.Event()
        #: Whether the client continues after the bytes of an earlier attempt. Else it sends a complete file, which may
        #: be another file.
        self.continues = False
        #: Called regularly while the source waits; raises to stop the reader. The job's runner sets it.
        self.check: Check = lambda: None

    @property
    def resumable(self) -> bool:
        """Return whether the client can resume."""
        return self.validator is not None

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks until the upload is complete.

        Raises SourceUnavailable if the client disconnects or would have to go back. Raises SourceChanged if the client
        starts again at its first byte.
        """
        if offset != self._offset:
            if not self.continues:
                raise SourceChanged("The client restarted the upload", self.name)
            raise SourceUnavailable(f"The upload must continue at byte {offset}", self.name, "Query the offset (HEAD)")
        while self._offset != self.size and (chunk := self._next_chunk()) is not None:
            self._offset += len(chunk)
            yield chunk
        if self.size not in (None, self._offset):
            what = f"The upload ended after {self._offset} of {self.size} bytes"
            raise SourceUnavailable(what, self.name, "Send the file again")

    def put(self, chunk: bytes | None) -> bool:
        """Pass on one chunk, or None for the end. Wait while the queue is full. Return False if the job has ended."""
        while not self._closed.is_set():
            try:
                self._chunks.put(chunk, timeout=_CHECK_S)
            except queue.Full:
                continue
            self.received += len(chunk or b"")
            return True
        return False

    def disconnect(self) -> None:
        """Record that the client disconnected. The reader still gets the queued chunks."""
        self._disconnected.set()

    def close(self) -> None:
        """Record that the job has ended and reads no more chunks."""
        self._closed.set()

    def _next_chunk(self) -> bytes | None:
        while True:
            self.check()
            try:
                return self._chunks.get(timeout=_CHECK_S)
            except queue.Empty:
                if self._disconnected.is_set():
                    what = f"The client disconnected after {self._offset} of {self.size or 'unknown'} bytes"
                    raise SourceUnavailable(what, self.name, "Resume the upload, or send it again") from None


@dataclass(frozen=True)
class SenderConnections(ConfiguredConnections):
    """The connections of an attempt, with a sender as the source."""

    sender: Sender

    def source(self, request: SourceRequest) -> Sender:
        """Return the sender. It continues an earlier attempt only if the request names the same upload."""
        own = asdict(self.sender.validator) if self.sender.validator else None
        self.sender.continues = request.validator == own
        self.sender.check = request.check
        return self.sender
