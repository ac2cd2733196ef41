"""Upload a stored object to S3 or to an HTTP(S) URL that accepts a PUT. Verify its digest on the way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.artifacts.layout import Artifact, check_key, check_name
from ssvm_worker.artifacts.manifest import Entry, read_manifest
from ssvm_worker.errors import ChecksumMismatch, InvalidRequest, ObjectNotFound, WorkerError
from ssvm_worker.grain_store.map import ROLE as GRAIN_MAP
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.connections import DestinationRequest
from ssvm_worker.jobs.request import (
    OPTIONAL_NAME_FORM,
    Headers,
    JobRequest,
    Privacy,
    check_url,
    fingerprint,
    safe_url,
    url_form,
)
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import store_stream, tap

from .ova_export import plan_ova


class Request(JobRequest):
    """The object to upload, named by its key or as the image of an artifact, and the destination."""

    OTHER_NAMES: ClassVar[dict[str, str]] = {"destination": "url", "fmt": "format"}

    key: Annotated[str | None, Privacy.PUBLIC] = Field(
        None, description="The object's key. Or give kind, account and id"
    )
    kind: Literal["template", "iso", "volume", "backup"] | None = Field(None, description="The kind of the artifact")
    account: str | None = Field(
        None, description="The account that owns the artifact", json_schema_extra=OPTIONAL_NAME_FORM
    )
    id: str | None = Field(
        None, description="The artifact's id within its account (and volume)", json_schema_extra=OPTIONAL_NAME_FORM
    )
    volume: str = Field(
        "", description="Backups only: the volume or VM of the snapshot", json_schema_extra=OPTIONAL_NAME_FORM
    )
    format: Literal["", "ova"] = Field("", description="ova: a whole backup as one file. Empty: one object as it is")
    store: str = Field("primary", description="The store that has the object")
    url: Annotated[str, Privacy.URL] = Field(
        description="s3://bucket/key, or an http(s) URL that accepts a PUT (presigned or plain)",
        json_schema_extra=url_form("s3", "http", "https"),
    )
    credentials: Annotated[str | None, Privacy.PUBLIC] = Field(
        None, description="Name of credentials in the settings. Required for s3://"
    )
    headers: Headers = Field(default_factory=dict, description="HTTP headers of the PUT")

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
            raise ValueError("only a backup can become an ova: give kind backup, account, volume and id")
        return self

    @property
    def artifact(self) -> Artifact:
        """Return the artifact of the object or the OVA. Invalid for a request with a key."""
        return Artifact(self.kind or "", self.account or "", self.id or "", self.volume)


def resource(request: Request) -> str:
    """Return the destination: only one job at a time may write it."""
    return f"upload:{fingerprint(request.url)}"


def discard(request: Request, attempt: Attempt) -> None:
    """Abort the uploads that failed attempts left open at the destination."""
    attempt.services.connections.sweep_destination(_destination(request, attempt))


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Upload the complete object or OVA, or leave nothing at the destination."""
    store = attempt.store(request.store)
    if request.format:
        export = plan_ova(attempt, store, request.artifact)
        outgoing = _Outgoing(export.artifact.key(export.name), export.size, export.chunks())
    else:
        key, entry = _find_object(request, store)
        if (size := store.stat(key).size) != entry.size:
            raise _damaged(f"{size} bytes instead of {entry.size}", f"{store.name}:{key}")
        outgoing = _Outgoing(key, entry.size, attempt.resuming(store.reader(key)), entry.digest)
    hasher = _send(request, attempt, outgoing)
    try:
        discard(request, attempt)
    except WorkerError as error:  # the upload is complete in spite of that
        attempt.log.warning("uploads of earlier attempts may remain open at the destination: %s", error)
    return {
        "key": outgoing.key,
        "url": safe_url(request.url),
        "size": hasher.size,
        "digest": str(hasher.digest()),
    }


@dataclass(frozen=True)
class _Outgoing:
    """The bytes to upload."""

    key: str
    size: int
    chunks: Iterable[bytes]
    #: The expected digest. None: the generator of the chunks verifies them.
    digest: str | None = None


def _destination(request: Request, attempt: Attempt) -> DestinationRequest:
    return DestinationRequest(request.url, attempt.check, request.credentials, request.headers)


def _send(request: Request, attempt: Attempt, outgoing: _Outgoing) -> Hasher:
    hasher = Hasher()

    def verify() -> None:
        attempt.progress.start("committing", outgoing.size, hasher.size)
        if hasher.size != outgoing.size:
            raise _damaged(f"{hasher.size} bytes instead of {outgoing.size}", f"{request.store}:{outgoing.key}")
        if outgoing.digest not in (None, str(hasher.digest())):
            raise _damaged(f"{hasher.digest()} instead of {outgoing.digest}", f"{request.store}:{outgoing.key}")
        attempt.confirm()

    attempt.progress.start("upload", outgoing.size)
    with attempt.services.connections.destination(_destination(request, attempt), outgoing.size, attempt.owner) as sink:
        chunks = tap(outgoing.chunks, attempt.progress.observe)
        sinks, keep = {"destination": sink}, attempt.will_resume
        store_stream(chunks, sinks, [hasher], verify=verify, check=attempt.check, keep=keep)
    return hasher


def read_entry(store: Store, key: str) -> Entry:
    """Return the manifest entry of an object that a client may read.

    Raises ObjectNotFound if no manifest lists the object. Raises InvalidRequest for a disk of an incremental backup:
    its bytes are in packs.
    """
    prefix, _, name = key.rpartition("/")
    try:
        artifact = Artifact.of_prefix(prefix)
    except InvalidRequest as error:
        raise ObjectNotFound("No artifact has such a key", key, "`ssvm stat` lists an artifact's objects") from error
    entry = read_manifest(store, artifact).entry(name)
    if entry is None:
        raise ObjectNotFound("The artifact has no such object", f"{store.name}:{key}", "`ssvm stat` lists its objects")
    if entry.role == GRAIN_MAP:
        what = "A disk of an incremental backup is stored in packs, not in one object"
        raise InvalidRequest(what, f"{store.name}:{key}", "Restore it to a store first (`ssvm submit restore`)")
    return entry


def _find_object(request: Request, store: Store) -> tuple[str, Entry]:
    """Return the key of the object and its manifest entry."""
    if request.key:
        return request.key, read_entry(store, request.key)
    artifact = request.artifact
    manifest = read_manifest(store, artifact)
    images = [each for each in manifest.entries if each.role in ("image", "disk")]
    if len(images) != 1:
        names = ", ".join(artifact.key(each.name) for each in manifest.entries)
        raise InvalidRequest(
            "The artifact has several objects", f"{store.name}:{artifact.prefix}", f"Give a key: {names}"
        )
    return artifact.key(images[0].name), images[0]


def _damaged(what: str, location: str) -> ChecksumMismatch:
    what = f"The stored object is damaged: {what}"
    return ChecksumMismatch(what, location, "Nothing was uploaded; see `ssvm verify`")
