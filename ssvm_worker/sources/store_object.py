"""An object in an image store or in S3, as the source of a download: the reader of it, with a source's errors."""

from __future__ import annotations

from collections.abc import Generator

from ssvm_worker.errors import (
    ObjectNotFound,
    SourceDenied,
    SourceNotFound,
    SourceUnavailable,
    StoreDenied,
    StoreUnavailable,
)
from ssvm_worker.streaming.interfaces import Source

from .options import SourceOptions

_SAID_OTHERWISE = {ObjectNotFound: SourceNotFound, StoreDenied: SourceDenied, StoreUnavailable: SourceUnavailable}


class StoredSource:
    """A ``Source`` of ``s3://BUCKET/KEY`` or ``store:NAME/KEY``."""

    #: Readers know which version they read, but not how to tell another attempt.
    validator = None

    def __init__(self, url: str, access: SourceOptions) -> None:
        """Raises InvalidRequest for a store that is not allowed or a key that cannot be; touches nothing."""
        self._reader: Source = access.stored(url)
        self.name = self._reader.name

    @property
    def size(self) -> int | None:
        """Bytes."""
        return self._reader.size

    @property
    def resumable(self) -> bool:
        """Within this attempt."""
        return self._reader.resumable

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks from *offset* on; SourceNotFound, SourceDenied, SourceUnavailable, SourceChanged."""
        try:
            yield from self._reader.open(offset)
        except tuple(_SAID_OTHERWISE) as error:
            raise _SAID_OTHERWISE[type(error)](*error.args) from error
