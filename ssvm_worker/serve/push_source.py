"""The source of an upload: bytes that somebody sends us, in place of bytes that we fetch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ssvm_worker.artifacts.checksums import Digest
from ssvm_worker.errors import SourceChanged, SourceUnavailable
from ssvm_worker.jobs.attempt import Attempt, Connections
from ssvm_worker.streaming.interfaces import Check, Sink

#: Chunks of 1 MiB at the most that wait for the pipeline.
_DEPTH = 4
#: Seconds between two looks whether all was given up.
_LOOK_S = 0.25


@dataclass(frozen=True)
class SentVersion:
    """Tells one upload from another: a sender that goes on must be sending the same file."""

    link: str
    length: int


class Sender:
    """``RemoteSource`` of the bytes that ``give`` is given, from *offset* on. One thread gives, one takes."""

    #: What is sent bears no checksum of its own.
    digests: Sequence[Digest] = ()

    def __init__(self, name: str, size: int | None, offset: int = 0, version: SentVersion | None = None) -> None:
        self.name = name
        self.size = size
        #: Known if the sender can come back for the rest.
        self.validator = version
        #: Bytes that were taken from the sender.
        self.received = offset
        self._from = offset
        self._chunks: queue.Queue[bytes | None] = queue.Queue(_DEPTH)
        self._gone = threading.Event()
        self._over = threading.Event()
        #: Whether it sends what lies behind the bytes of an earlier attempt; else all, and it may be another file.
        self.goes_on = False
        #: Stops the taker; set by whoever runs the job.
        self.check: Check = lambda: None

    @property
    def resumable(self) -> bool:
        """Whether the sender can come back for the rest."""
        return self.validator is not None

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield what is given, until all has come; SourceUnavailable when the sender goes, or would have to go back."""
        if offset != self._from:
            if not self.goes_on:
                raise SourceChanged("The sender begins again", self.name)
            raise SourceUnavailable(f"The sender must go on at byte {offset}", self.name, "Ask where to go on")
        while self._from != self.size and (chunk := self._take()) is not None:
            self._from += len(chunk)
            yield chunk
        if self.size not in (None, self._from):
            raise SourceUnavailable(f"The upload ended at {self._from} of {self.size}", self.name, "Send it again")

    def give(self, chunk: bytes | None) -> bool:
        """Hand on one chunk, or None for the end, when there is room; False if nobody takes it any more."""
        while not self._over.is_set():
            try:
                self._chunks.put(chunk, timeout=_LOOK_S)
            except queue.Full:
                continue
            self.received += len(chunk or b"")
            return True
        return False

    def leave(self) -> None:
        """The sender has gone; what it gave is still taken."""
        self._gone.set()

    def finish(self) -> None:
        """Nobody takes any more."""
        self._over.set()

    def _take(self) -> bytes | None:
        while True:
            self.check()
            try:
                return self._chunks.get(timeout=_LOOK_S)
            except queue.Empty:
                if self._gone.is_set():
                    where = f"{self._from} of {self.size or 'unknown'} bytes"
                    raise SourceUnavailable(f"The sender went away at {where}", self.name, "Go on, or retry") from None


@dataclass(frozen=True)
class SenderDoors:
    """The doors of an attempt, of which the source is a sender."""

    doors: Connections
    sender: Sender

    def source(
        self,
        urls: Sequence[str],  # noqa: ARG002 - there is one source
        *,
        headers: Mapping[str, str],  # noqa: ARG002
        credentials: str | None,  # noqa: ARG002
        checksum: Digest | None,  # noqa: ARG002
        check: Check,
        validator: dict[str, Any] | None,
    ) -> Sender:
        """The sender, which goes on only where it left what lies there itself."""
        own = asdict(self.sender.validator) if self.sender.validator else None
        self.sender.goes_on = validator == own
        self.sender.check = check
        return self.sender

    def text(self, url: str, *, check: Check) -> str:
        """A checksum file, from wherever it is."""
        return self.doors.text(url, check=check)

    def destination(
        self, url: str, *, size: int, credentials: str | None, headers: Mapping[str, str], attempt: Attempt
    ) -> Sink:
        """As for any job."""
        return self.doors.destination(url, size=size, credentials=credentials, headers=headers, attempt=attempt)

    def sweep_destination(self, url: str, *, credentials: str | None, check: Check) -> None:
        """As for any job."""
        self.doors.sweep_destination(url, credentials=credentials, check=check)

    def vcenter(self, name: str, *, check: Check) -> Any:
        """As for any job."""
        return self.doors.vcenter(name, check=check)
