"""What can go wrong, said in three ways to the layer above: try again, never, or stopped.

    WorkerError
    ├── Retryable     SourceUnavailable, StoreUnavailable (StoreAway), LeaseLost, ResourceBusy
    ├── Permanent     InvalidRequest, SourceNotFound, SourceDenied, SourceChanged, ChecksumMismatch,
    │                 ImageError (UnknownFormat, AmbiguousFormat, UnsafeImage, TooLarge, CorruptImage),
    │                 ObjectNotFound, StoreDenied, StoreFull, QuotaExceeded, IncompleteBackup, ConfigError
    └── Cancelled     reason: user | shutdown | deadline | fenced

Adapters translate at the call that failed: ``raise StoreUnavailable(what, where, remedy) from error``.
Only ``streaming.pipeline.Resuming`` and ``runner.run`` decide on a retry. Arguments are positional, and all of them are
in ``args``, because Celery's JSON and pickle round trips rebuild an exception from ``args`` alone.
"""

from __future__ import annotations

from .units import printable

EXIT_PERMANENT = 1
EXIT_USAGE = 2
EXIT_RETRYABLE = 75  # EX_TEMPFAIL of sysexits.h
EXIT_CANCELLED = 130  # what a shell reports for SIGINT


class WorkerError(Exception):
    """An error raised on purpose; its text is fit for a user and never holds a secret."""

    exit_code = EXIT_PERMANENT
    retryable = False
    #: Seconds after which the peer wants to be asked again; 0: it does not say.
    after_s = 0.0
    #: What was done nevertheless: by a job of many parts, or with a backup short of a disk.
    result: dict[str, object] | None = None

    def __init__(self, what: str, where: str = "", remedy: str = "") -> None:
        """Keep each text as one line; a peer's words in it move no cursor and begin no line of a log."""
        what, where, remedy = printable(what), printable(where), printable(remedy)
        super().__init__(what, where, remedy)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.what} [{self.where}]" if self.where else self.what
        if self.remedy:
            text += f"{'' if text.endswith('?') else '.'} {self.remedy}"
        return text

    def as_dict(self) -> dict[str, object]:
        """The error object of the job record and of ``--json``."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "remedy": self.remedy,
            "retryable": self.retryable,
            "message": str(self),
        }


class Retryable(WorkerError):
    """The same request may succeed later."""

    exit_code = EXIT_RETRYABLE
    retryable = True


class SourceUnavailable(Retryable):
    """The source cannot be reached now, broke off, stalled, or answered 429 or 5xx."""


class StoreUnavailable(Retryable):
    """The store cannot be reached now, or asked to slow down."""


class StoreAway(StoreUnavailable):
    """The store is unavailable. The job waits for it, and the attempt is not counted."""


class LeaseLost(Retryable):
    """A vSphere NFC lease expired or was taken away under us."""


class ResourceBusy(Retryable):
    """Somebody else is using what this job needs."""


class Permanent(WorkerError):
    """It never will succeed as it was asked."""


class InvalidRequest(Permanent):
    """The request itself is wrong; nothing was touched."""


def misused(error: InvalidRequest) -> InvalidRequest:
    """The same error, for a command that lacks what it needs or has what it does not know: the shell gets 2, not 1."""
    error.exit_code = EXIT_USAGE
    return error


class SourceNotFound(Permanent):
    """There is nothing at that URL, inventory path or id."""


class SourceDenied(Permanent):
    """The source refuses us, or our own rules refuse the source."""


class SourceChanged(Permanent):
    """The object is no longer the one that the first bytes came from."""


class ChecksumMismatch(Permanent):
    """The digest of what arrived is not the checksum that was asked for."""


class ImageError(Permanent):
    """The bytes are whole, but they are no image that we take."""


class UnknownFormat(ImageError):
    """No known format, or not the one that was asked for."""


class AmbiguousFormat(ImageError):
    """Two formats at once: the smell of an attack."""


class UnsafeImage(ImageError):
    """The image names files outside itself, or hides something."""


class TooLarge(ImageError):
    """Larger than the request or the settings allow."""


class CorruptImage(ImageError):
    """The structure of the image is broken or cut short."""


class ObjectNotFound(Permanent):
    """The store has no such object or artifact."""


class StoreDenied(Permanent):
    """The store refuses our credentials or the operation."""


class StoreFull(Permanent):
    """The object does not fit into the store."""


class QuotaExceeded(Permanent):
    """The account may not store that much; nothing of it was stored."""


class IncompleteBackup(Permanent):
    """The backup is stored, but short of a disk that was wanted."""


class ConfigError(Permanent):
    """A setting is missing, unknown or of the wrong type."""

    exit_code = EXIT_USAGE


class Cancelled(WorkerError):
    """The job was stopped: by its user, by a shutdown, by a deadline, or fenced off by a newer claim."""

    exit_code = EXIT_CANCELLED

    def __init__(self, reason: str) -> None:
        super().__init__(_REASONS.get(reason, f"Stopped: {reason}"))
        self.args = (reason,)
        self.reason = reason


#: What a ledger that a foreground run can do without may raise.
NOT_THERE = (StoreUnavailable, StoreDenied, ConfigError)

_REASONS = {
    "user": "Stopped by a user",
    "shutdown": "The worker is shutting down",
    "deadline": "The deadline has passed",
    "fenced": "Another worker holds the claim now",
}
