"""Upload a stored object to S3 or to an HTTP(S) URL that takes a PUT, its digest checked on the way out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.artifacts.layout import Artifact, check_key, check_name
from ssvm_worker.artifacts.manifest import Entry, read_manifest
from ssvm_worker.errors import ChecksumMismatch, InvalidRequest, WorkerError
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.request import Headers, JobRequest, Privacy, check_url, fingerprint, safe_url
from ssvm_worker.jobs.served_objects import member
from ssvm_worker.streaming.fan_out import store_stream
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import tap

from .ova_export import package


class Request(JobRequest):
    """One object, named by its key or as the main object of an artifact."""

    key: Annotated[str | None, Privacy.PUBLIC] = Field(
        None, description="The object's key; or give kind, account and id"
    )
    kind: Literal["template", "iso", "volume", "backup"] | None = None
    account: str | None = None
    id: str | None = None
    volume: str = Field("", description="Backups only")
    format: Literal["", "ova"] = Field("", description="ova: all of a backup as one package; else one object as it is")
    store: str = Field("primary", description="Where the object is")
    url: Annotated[str, Privacy.URL] = Field(
        description="s3://bucket/key, or an http(s) URL that takes a PUT (presigned or plain)"
    )
    credentials: Annotated[str | None, Privacy.PUBLIC] = Field(
        None, description="Name of credentials in the settings; s3:// needs some"
    )
    headers: Headers = Field(default_factory=dict, description="Sent with an HTTP PUT")

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, values: Any) -> Any:
        for other, name in (("destination", "url"), ("fmt", "format")):
            if isinstance(values, dict) and other in values and name not in values:
                values = {key: value for key, value in values.items() if key != other} | {name: values[other]}
        return values

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        return check_url(value, ("s3", "http", "https"))

    @field_validator("key", "account", "id", "volume")
    @classmethod
    def _safe(cls, value: str | None, info: Any) -> str | None:
        if value:
            try:
                if info.field_name == "key":
                    Artifact.of_prefix(check_key(value).rpartition("/")[0])
                else:
                    check_name(value, info.field_name)
            except WorkerError as error:
                raise ValueError(str(error)) from error
        return value

    @model_validator(mode="after")
    def _names_an_object(self) -> Request:
        if not self.key and not (self.kind and self.account and self.id):
            raise ValueError("give key, or kind, account and id")
        if self.format and (self.key or self.kind != "backup"):
            raise ValueError("an ova is made of a backup: give kind backup, account, volume and id")
        return self

    @property
    def artifact(self) -> Artifact:
        """The artifact that the object, or the package, is of; of no use with a key."""
        return Artifact(self.kind or "", self.account or "", self.id or "", self.volume)


def resource(request: Request) -> str:
    """Only one job at a time writes a destination."""
    return f"upload:{fingerprint(request.url)}"


def discard(request: Request, attempt: Attempt) -> None:
    """Abort what failed attempts have left open at the destination."""
    attempt.doors.sweep_destination(request.url, credentials=request.credentials, check=attempt.check)


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Send the object, or the package, whole, or leave nothing at the destination."""
    store = attempt.store(request.store)
    if request.format:
        made = package(attempt, store, request.artifact)
        outgoing = _Outgoing(made.artifact.key(made.name), made.size, made.chunks())
    else:
        key, entry = _object(request, store)
        _refuse_other_size(store.stat(key).size, entry, f"{store.name}:{key}")
        outgoing = _Outgoing(key, entry.size, attempt.resuming(store.reader(key)), entry.digest)
    hasher = _send(request, attempt, outgoing)
    _tidy(request, attempt)
    return {
        "key": outgoing.key,
        "url": safe_url(request.url),
        "size": hasher.size,
        "digest": str(hasher.digest()),
    }


def _tidy(request: Request, attempt: Attempt) -> None:
    """What an earlier attempt has begun and this one had no use for goes; that it stays does not undo the upload."""
    try:
        discard(request, attempt)
    except WorkerError as error:
        attempt.log.warning("what an earlier attempt may have left open at the destination stays: %s", error)


@dataclass(frozen=True)
class _Outgoing:
    """What is sent."""

    key: str
    size: int
    chunks: Iterable[bytes]
    #: What the whole must have; None where whoever makes the chunks sees to that.
    digest: str | None = None


def _send(request: Request, attempt: Attempt, outgoing: _Outgoing) -> Hasher:
    hasher = Hasher()

    def verify() -> None:
        attempt.progress.start("committing", outgoing.size, hasher.size)
        if hasher.size != outgoing.size:
            raise _damaged(f"{hasher.size} bytes in place of {outgoing.size}", f"{request.store}:{outgoing.key}")
        if outgoing.digest not in (None, str(hasher.digest())):
            raise _damaged(f"{hasher.digest()} in place of {outgoing.digest}", f"{request.store}:{outgoing.key}")
        attempt.confirm()

    attempt.progress.start("upload", outgoing.size)
    with attempt.doors.destination(
        request.url, size=outgoing.size, credentials=request.credentials, headers=request.headers, attempt=attempt
    ) as sink:
        chunks = tap(outgoing.chunks, attempt.progress.saw)
        sinks, keep = {"destination": sink}, attempt.will_resume
        store_stream(chunks, sinks, [hasher], verify=verify, check=attempt.check, keep=keep)
    return hasher


def _object(request: Request, store: Store) -> tuple[str, Entry]:
    """The key of the object and what its artifact's manifest says of it."""
    if request.key:
        return request.key, member(store, request.key)
    artifact = request.artifact
    manifest = read_manifest(store, artifact)
    images = [each for each in manifest.entries if each.role in ("image", "disk")]
    if len(images) != 1:
        names = ", ".join(artifact.key(each.name) for each in manifest.entries)
        raise InvalidRequest(
            "The artifact has several objects", f"{store.name}:{artifact.prefix}", f"Give a key: {names}"
        )
    return artifact.key(images[0].name), images[0]


def _refuse_other_size(size: int, entry: Entry, where: str) -> None:
    if size != entry.size:
        raise _damaged(f"{size} bytes in place of {entry.size}", where)


def _damaged(what: str, where: str) -> ChecksumMismatch:
    return ChecksumMismatch(f"The stored object is damaged: {what}", where, "Nothing was uploaded; see `ssvm verify`")
