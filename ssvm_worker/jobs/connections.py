"""Define how jobs reach everything outside the image stores. The wiring package implements ``Connections``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ssvm_worker.artifacts.checksums import Digest
from ssvm_worker.streaming.interfaces import CHUNK, Check, Owner, Sink, Source


@dataclass(frozen=True)
class SourceRequest:
    """One object that a job wants to read."""

    #: All URLs name the same object. Headers and credentials are sent to the origin of the first URL only.
    urls: Sequence[str]
    #: Called in every wait. An exception that it raises ends the transfer.
    check: Check
    headers: Mapping[str, str] = field(default_factory=dict)
    #: The name of credentials in the settings.
    credentials: str | None = None
    #: Bytes of two URLs are combined only if a checksum will be compared.
    checksum: Digest | None = None
    #: The version that an earlier attempt has read: ``RemoteSource.validator`` as a dict.
    validator: dict[str, Any] | None = None
    #: The largest chunk in bytes that suits all stores (``Store.chunk_size``).
    chunk_size: int = CHUNK


@dataclass(frozen=True)
class DestinationRequest:
    """One place outside the image stores to which a job wants to write."""

    #: s3://bucket/key, or an http(s) URL that accepts a PUT.
    url: str
    check: Check
    #: The name of credentials in the settings.
    credentials: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class RemoteSource(Source, Protocol):
    """A source outside the image stores."""

    @property
    def validator(self) -> Any:
        """Return a dataclass that identifies this version of the object, or None. Valid after the first open."""

    @property
    def digests(self) -> Sequence[Digest]:
        """Return the checksums of the offered file that came with the URL, for example in a metalink."""


class Connections(Protocol):
    """Opens everything outside the image stores. Each method raises InvalidRequest for a forbidden URL."""

    def source(self, request: SourceRequest) -> RemoteSource:
        """Return the object behind the URLs of the request. The source tries the URLs in order."""

    def text(self, url: str, check: Check) -> str:
        """Return a small text file, such as SHA256SUMS."""

    def destination(self, request: DestinationRequest, size: int, owner: Owner) -> Sink:
        """Return the sink of an upload of *size* bytes."""

    def sweep_destination(self, request: DestinationRequest) -> None:
        """Abort the uploads to exactly this destination that earlier attempts left open."""

    def vcenter(self, name: str, check: Check) -> Any:
        """Return a session with the vCenter of that name in the settings; see vmware.session."""
