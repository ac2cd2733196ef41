"""Define a source's options, the URLs of one object, a source with versions, and the check of a complete body."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ssvm_worker.artifacts.checksums import Digest
from ssvm_worker.errors import InvalidRequest, SourceNotFound, SourceUnavailable
from ssvm_worker.net.http import HttpOptions
from ssvm_worker.streaming.interfaces import CHUNK, Check, Source
from ssvm_worker.units import MiB

from .http.parallel import ConnectionPolicy


@dataclass(frozen=True)
class HttpSettings(HttpOptions):
    """Settings of HTTP downloads."""

    max_redirects: int = 5
    #: When to use several connections, and how many.
    parallel: ConnectionPolicy = field(default_factory=ConnectionPolicy)
    #: The largest chunk in bytes.
    chunk_size: int = CHUNK

    def without_client_certificate(self) -> HttpSettings:
        """Return the settings for any origin other than the caller's."""
        return replace(self, origin_ca_file=None, certificate=None)


class VersionedSource(Source, Protocol):
    """Source that may know the version of its object."""

    @property
    def validator(self) -> Any:
        """Return a dataclass that identifies the version, or None. The value is valid after the first open."""


def _no_store(url: str) -> Source:
    raise InvalidRequest("This command cannot read objects of image stores", url)


@dataclass(frozen=True)
class SourceOptions:
    """Options of a source: plain values from the settings and from the request."""

    http: HttpSettings = field(default_factory=HttpSettings)
    #: Sent to the origin of the URL only.
    headers: Mapping[str, str] = field(default_factory=dict)
    #: Called in every wait. An exception that it raises ends the transfer.
    check: Check = lambda: None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    #: A file:// URL must name a file below one of these directories.
    directories: tuple[Path, ...] = ()
    #: Trusted host keys for sftp://, in the format of OpenSSH's known_hosts.
    known_hosts: str | None = None
    #: Path of a private key for sftp://.
    private_key: str | None = None
    #: Returns the reader of an object in S3 or in a configured store. Raises InvalidRequest.
    stored: Callable[[str], Source] = _no_store


@dataclass(frozen=True)
class Offer:
    """URLs of one object, and what is known before its first byte."""

    #: The best URL first.
    urls: tuple[str, ...]
    #: Checksums that came with the URLs.
    digests: tuple[Digest, ...] = ()
    size: int | None = None
    #: Whether a checksum is compared at the end. Without a checksum, bytes of two mirrors are never combined.
    verified: bool = False
    #: A mirror with fewer bytes per second is slow. The rate is judged after *judge_s* seconds of waiting.
    slow: float = 1.0 * MiB
    judge_s: float = 10.0


def require_complete_body(position: int, size: int | None, name: str) -> int:
    """Return *position*, the number of bytes received, if it equals the announced *size* or no size was announced.

    Raises SourceUnavailable if bytes are missing. Raises SourceNotFound if there are no bytes.
    """
    if size is not None and position != size:
        raise SourceUnavailable(
            f"The bytes ended at {position} of {size}", name, "Retry later. If this repeats, check the server"
        )
    if not position:
        raise empty_file(name)
    return position


def empty_file(name: str) -> SourceNotFound:
    """Return the error for a file without bytes: an empty file is never the wanted file."""
    return SourceNotFound("The file is empty", name, "Check the URL and the file on the server")
