"""Download the files of a snapshot as they are: all of them, or none.

A snapshot may depend on other snapshots, so `download` would refuse it. CloudStack copies snapshots
between zones in this way. Its hypervisors write no manifest, and this job writes none.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.artifacts.layout import check_key
from ssvm_worker.errors import TooLarge, WorkerError
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.connections import SourceRequest
from ssvm_worker.jobs.request import Bytes, JobRequest, Privacy, check_url, safe_url
from ssvm_worker.streaming.interfaces import CHUNK
from ssvm_worker.streaming.pipeline import RAISE_LIMIT, first_bytes, limit, paced, store_stream, tap

#: The number of components of the directory of a volume's snapshots: snapshots/ACCOUNT/VOLUME.
_FAMILY = 3


class Request(JobRequest):
    """The files of one snapshot, and their keys."""

    urls: Annotated[list[str], Privacy.URL] = Field(
        min_length=1, max_length=200, description="The http(s) URLs of the files. Without a password"
    )
    keys: Annotated[list[str], Privacy.PUBLIC] = Field(
        description="The key of each file: snapshots/ACCOUNT/VOLUME/NAME, or a file in one more directory"
    )
    store: str = Field(description="The target store")
    credentials: Annotated[str | None, Privacy.PUBLIC] = Field(
        None, description="Name of credentials in the settings. Sent only to the origin of the first URL"
    )
    max_bytes: Bytes = Field(
        None, gt=0, description="Refuse more bytes of all files: bytes, or 10GiB. The settings' limit if absent"
    )

    @field_validator("urls")
    @classmethod
    def _http(cls, value: list[str]) -> list[str]:
        return [check_url(url, ("http", "https")) for url in value]

    @field_validator("keys")
    @classmethod
    def _of_snapshots(cls, value: list[str]) -> list[str]:
        for key in value:
            try:
                parts = check_key(key).split("/")
            except WorkerError as error:
                raise ValueError(str(error)) from error
            if parts[0] != "snapshots" or not _FAMILY < len(parts) <= _FAMILY + 2:
                raise ValueError(f"{key} is not the key of a snapshot's file")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Request:
        if len(self.urls) != len(self.keys) or len(set(self.keys)) < len(self.keys):
            raise ValueError("give one key for each URL, and no key twice")
        if len({_family(key) for key in self.keys}) > 1:
            raise ValueError("all keys must be in the directory of one volume's snapshots")
        return self


def resource(request: Request) -> str:
    """Return the directory of the volume's snapshots: only one job at a time may write there."""
    return _family(request.keys[0])


def discard(request: Request, attempt: Attempt) -> None:
    """Remove uncommitted bytes. ``run`` has removed the files that it committed."""
    attempt.confirm()
    attempt.store(request.store).sweep(0, _family(request.keys[0]))


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Store all files, and replace files with these keys. After an error, remove what this attempt has stored."""
    store, committed, size = attempt.store(request.store), list[str](), 0
    try:
        for url, key in zip(request.urls, request.keys, strict=True):
            size += _fetch(request, attempt, url, key, size)
            committed.append(key)
    except BaseException:
        for key in committed:
            with suppress(WorkerError):
                attempt.for_cleanup().confirm()
                store.delete(key)
        raise
    return {"store": request.store, "objects": request.keys, "bytes": size}


def _fetch(request: Request, attempt: Attempt, url: str, key: str, before: int) -> int:
    """Store one file. Return its size. *before*: the bytes of the files before it."""
    settings, location = attempt.settings.download, safe_url(url)
    max_bytes = min(request.max_bytes or settings.max_bytes, settings.max_bytes) - before
    attempt.progress.start("connecting")
    source = attempt.services.connections.source(
        SourceRequest([url], attempt.check, {}, request.credentials, None, None)
    )
    stream = attempt.resuming(source)
    _, chunks = first_bytes(stream, CHUNK)
    if source.size is not None and source.size > max_bytes:
        raise TooLarge(f"The file has {source.size} bytes; {max_bytes} are left", location, RAISE_LIMIT)
    attempt.progress.start("download", source.size)
    rates = [(attempt.services.rate_limit, float(settings.max_rate))] if settings.max_rate else []
    chunks = tap(limit(paced(chunks, rates, attempt.wait), max_bytes, location), attempt.progress.observe)
    store, hasher = attempt.store(request.store), Hasher()
    with store.writer(key, source.size, owner=attempt.owner) as sink:
        store_stream(chunks, {store.name: sink}, [hasher], verify=attempt.confirm, check=attempt.check)
    return hasher.size


def _family(key: str) -> str:
    return "/".join(key.split("/")[:_FAMILY])
