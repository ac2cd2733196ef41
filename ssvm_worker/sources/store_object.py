"""Read an object of an image store or of S3 as the source of a download."""

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

_SOURCE_ERRORS = {ObjectNotFound: SourceNotFound, StoreDenied: SourceDenied, StoreUnavailable: SourceUnavailable}


class StoredSource:
    """``Source`` of ``s3://BUCKET/KEY`` or ``store:NAME/KEY``. It raises errors of a source, not of a store."""

    #: A reader cannot describe its version to a later attempt.
    validator = None

    def __init__(self, url: str, options: SourceOptions) -> None:
        """Create the reader without a request. Raises InvalidRequest for a forbidden store or an invalid key."""
        self._reader: Source = options.stored(url)
        self.name = self._reader.name

    @property
    def size(self) -> int | None:
        """Return the bytes of the object."""
        return self._reader.size

    @property
    def resumable(self) -> bool:
        """Return whether this attempt can resume the object."""
        return self._reader.resumable

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks from *offset* on.

        Raises SourceNotFound, SourceDenied, SourceUnavailable or SourceChanged.
        """
        try:
            yield from self._reader.open(offset)
        except tuple(_SOURCE_ERRORS) as error:
            raise _SOURCE_ERRORS[type(error)](*error.args) from error
