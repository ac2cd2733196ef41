"""Define the errors: retryable, permanent, or cancelled.

``WorkerError`` has three subclasses:

- ``Retryable``: SourceUnavailable, StoreUnavailable (StoreAway), LeaseLost, ResourceBusy
- ``Permanent``: InvalidRequest, SourceNotFound, SourceDenied, SourceChanged, ChecksumMismatch,
  ImageError (UnknownFormat, AmbiguousFormat, UnsafeImage, TooLarge, CorruptImage),
  ObjectNotFound, StoreDenied, StoreFull, QuotaExceeded, IncompleteBackup, ConfigError
- ``Cancelled``, with the reason user, shutdown, deadline or fenced

Adapters translate exceptions at the failing call: ``raise StoreUnavailable(what, where, remedy) from error``.
Only ``streaming.pipeline.Resuming`` and ``runner.run`` decide about a retry. All arguments are positional and stored in
``args``. Celery rebuilds an exception from ``args`` alone, with JSON and with pickle.
"""

from __future__ import annotations

from .units import printable

EXIT_PERMANENT = 1
EXIT_USAGE = 2
EXIT_RETRYABLE = 75  # EX_TEMPFAIL of sysexits.h
EXIT_CANCELLED = 130  # the exit status of a shell after SIGINT


class WorkerError(Exception):
    """An expected error. Its text is for users and never contains a secret."""

    exit_code = EXIT_PERMANENT
    retryable = False
    #: Seconds after which the peer allows a retry (Retry-After). 0: unknown.
    after_s = 0.0
    #: The partial result: of a job with several parts, or of a backup without one of its disks.
    result: dict[str, object] | None = None

    def __init__(self, what: str, where: str = "", remedy: str = "") -> None:
        """Store the problem, its location and the remedy.

        Each becomes one printable line. So text of a peer cannot control a terminal or fake a line of a log.
        """
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
        """Return the error object of the job record and of ``--json``."""
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
    """The source is unreachable, broke off, stalled, or returned 429 or 5xx."""


class StoreUnavailable(Retryable):
    """The store is unreachable, or asked the worker to slow down."""


class StoreAway(StoreUnavailable):
    """The store is unavailable. The job waits for it, and the attempt does not count."""


class LeaseLost(Retryable):
    """An NFC lease of vSphere has expired or was aborted."""


class ResourceBusy(Retryable):
    """Another job or process uses a resource that this job needs."""


class Permanent(WorkerError):
    """The same request will never succeed."""


class InvalidRequest(Permanent):
    """The request is invalid. The worker changed nothing."""


def misused(error: InvalidRequest) -> InvalidRequest:
    """Return the error with exit status 2 (usage) instead of 1, for wrong or missing arguments of a command."""
    error.exit_code = EXIT_USAGE
    return error


class SourceNotFound(Permanent):
    """There is no object with that URL, inventory path or id."""


class SourceDenied(Permanent):
    """The source denies access, or the rules of the worker forbid the source."""


class SourceChanged(Permanent):
    """The object at the source has changed since the first bytes were read."""


class ChecksumMismatch(Permanent):
    """The digest of the received bytes differs from the checksum."""


class ImageError(Permanent):
    """The bytes are complete, but the worker does not accept this image."""


class UnknownFormat(ImageError):
    """The format is unknown, or differs from the requested one."""


class AmbiguousFormat(ImageError):
    """The image matches two formats at once. This can be an attack."""


class UnsafeImage(ImageError):
    """The image refers to other files, or contains hidden data."""


class TooLarge(ImageError):
    """The object is larger than the request or the settings allow."""


class CorruptImage(ImageError):
    """The structure of the image is broken or truncated."""


class ObjectNotFound(Permanent):
    """The store has no such object or artifact."""


class StoreDenied(Permanent):
    """The store refuses the credentials or the operation."""


class StoreFull(Permanent):
    """The object does not fit into the store."""


class QuotaExceeded(Permanent):
    """The quota of the account does not allow so many bytes. Nothing was stored."""


class IncompleteBackup(Permanent):
    """The backup is stored, but a requested disk is missing."""


class ConfigError(Permanent):
    """A setting is missing, unknown or of the wrong type."""

    exit_code = EXIT_USAGE
    #: Each problem of the settings, with its key. ``what`` has all of them in one line, for logs.
    problems: tuple[str, ...] = ()


def extra_missing(what: str, where: str, extra: str) -> ConfigError:
    """Return the error for libraries that only an extra of this package installs."""
    return ConfigError(what, where, installation(extra))


def installation(extra: str) -> str:
    """Return the remedy for missing extras. *extra* may name several: ``a,b``."""
    return f"Install it: pip install 'ssvm-worker[{extra}]'"


class Cancelled(WorkerError):
    """The job was stopped: by its user, by a shutdown, by a deadline, or because a newer claim fenced it."""

    exit_code = EXIT_CANCELLED

    def __init__(self, reason: str) -> None:
        super().__init__(_REASONS.get(reason, f"Stopped: {reason}"))
        self.args = (reason,)
        self.reason = reason


#: Errors of opening the ledger that a foreground run ignores, because it works without a ledger.
NOT_THERE = (StoreUnavailable, StoreDenied, ConfigError)

#: Classes of errors that lie in the request or in the bytes. No repair elsewhere removes them, so a retry fails again.
LASTING = {InvalidRequest.__name__, ChecksumMismatch.__name__} | {each.__name__ for each in ImageError.__subclasses__()}

_REASONS = {
    "user": "Stopped by a user",
    "shutdown": "The worker is shutting down",
    "deadline": "The deadline has passed",
    "fenced": "Another worker holds the claim now",
}
