"""What the settings and the request say about a source, beside its URL; and what a download needs of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ssvm_worker.errors import InvalidRequest
from ssvm_worker.streaming.interfaces import Check, Source

from .http.request import HttpSettings


class VersionedSource(Source, Protocol):
    """A source that may be able to say which version of the object it gives."""

    @property
    def validator(self) -> Any:
        """A dataclass that tells this version from any other, or None; known after the first open."""


def _no_store(url: str) -> Source:
    raise InvalidRequest("Objects of image stores cannot be had here", url)


@dataclass(frozen=True)
class SourceOptions:
    """How a source may be reached. Plain values: no settings, no files to look for."""

    http: HttpSettings = field(default_factory=HttpSettings)
    #: Sent to the URL's own origin.
    headers: Mapping[str, str] = field(default_factory=dict)
    check: Check = lambda: None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    #: file:// URLs may name what lies below these.
    directories: tuple[Path, ...] = ()
    #: Host keys that sftp:// believes, in the form of OpenSSH's known_hosts.
    known_hosts: str | None = None
    #: A private key for sftp://, as a file.
    private_key: str | None = None
    #: The reader of an object in S3 or in one of our own stores; raises InvalidRequest.
    stored: Callable[[str], Source] = _no_store
