"""The list of every object of one artifact with size and digest: written last, and its presence means *complete*.

A *draft* manifest has the same shape and names what is committed so far; it is the journal from which a second attempt
goes on, and it is deleted when the manifest stands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .errors import CorruptImage, InvalidRequest, ObjectNotFound
from .keys import DRAFT, MANIFEST, Artifact
from .stream import Owner, Store, StoredObject, put_bytes, read_bytes

VERSION = 1


@dataclass(frozen=True)
class Entry:
    """One object of the artifact."""

    #: The last part of its key.
    name: str
    #: Bytes as stored.
    size: int
    #: ``sha256:HEX`` of the bytes as stored.
    digest: str
    #: image | disk | descriptor | checksums | properties | config
    role: str = "image"
    #: What else is known: format, virtual_size (bytes), disk key, grade of verification, …
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """All that one artifact consists of."""

    artifact: Artifact
    job_id: str
    entries: tuple[Entry, ...] = ()
    #: Where it came from: url, etag, checksum; vCenter, VM, snapshot. Never a secret.
    source: dict[str, Any] = field(default_factory=dict)
    #: What is known of the whole: format, virtual_size (bytes), quiesced, …
    facts: dict[str, Any] = field(default_factory=dict)
    #: ISO 8601, UTC.
    created: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    version: int = VERSION

    def entry(self, name: str) -> Entry | None:
        """The entry of that name."""
        return next((each for each in self.entries if each.name == name), None)

    def with_entry(self, entry: Entry) -> Manifest:
        """A copy that also lists *entry*, in place of one of the same name."""
        kept = tuple(each for each in self.entries if each.name != entry.name)
        return dataclasses.replace(self, entries=(*kept, entry))

    @property
    def size(self) -> int:
        """Bytes of all objects."""
        return sum(each.size for each in self.entries)

    def to_json(self) -> bytes:
        """Readable JSON, ending in a newline: what the artifact is, then ``objects`` with key, size and digest each."""
        own = {name: getattr(self, name) for name in ("version", "job_id", "created", "source", "facts")}
        objects = [{"key": self.artifact.key(each.name), **dataclasses.asdict(each)} for each in self.entries]
        values = dataclasses.asdict(self.artifact) | own | {"objects": objects}
        return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Manifest:
        """Read what ``to_json`` wrote; CorruptImage when it is anything else."""
        try:
            fields = json.loads(data)
            artifact = Artifact(*(fields.pop(name) for name in ("kind", "account", "id", "volume")))
            objects = fields.pop("objects")
            for each in objects:
                each.pop("key")
            return cls(artifact, entries=tuple(Entry(**each) for each in objects), **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"The manifest cannot be read: {type(error).__name__}: {error}"
            raise CorruptImage(what, where, "Restore or delete it") from error


def read_manifest(store: Store, artifact: Artifact) -> Manifest:
    """The manifest of an artifact; ObjectNotFound when the artifact does not exist (or is not complete)."""
    key = f"{artifact.prefix}/{MANIFEST}"
    try:
        return Manifest.from_json(read_bytes(store, key), f"{store.name}:{key}")
    except ObjectNotFound as error:
        raise ObjectNotFound(
            f"There is no complete {artifact.kind} there",
            f"{store.name}:{artifact.prefix}",
            "`ssvm list` tells what is",
        ) from error


def find_manifest(store: Store, artifact: Artifact) -> Manifest | None:
    """The manifest, or None where the artifact does not exist."""
    try:
        return read_manifest(store, artifact)
    except ObjectNotFound:
        return None


def artifacts_below(store: Store, prefix: str = "") -> Iterator[Artifact]:
    """All complete artifacts below a prefix, in the order of their places; manifests outside the layout are others'."""
    for each in store.list(prefix):
        place, _, name = each.key.rpartition("/")
        if name == MANIFEST:
            with contextlib.suppress(InvalidRequest):
                yield Artifact.of_prefix(place)


def write_manifest(
    store: Store, manifest: Manifest, owner: Owner, confirm: Callable[[], None] = lambda: None
) -> StoredObject:
    """Make the artifact exist; call it after every other object is committed. The draft goes. See ``put_bytes``."""
    stored = put_bytes(store, f"{manifest.artifact.prefix}/{MANIFEST}", manifest.to_json(), owner, confirm)
    store.delete(f"{manifest.artifact.prefix}/{DRAFT}")
    return stored


def read_draft(store: Store, artifact: Artifact) -> Manifest | None:
    """What an earlier attempt has committed, or None. A draft that cannot be read counts as none."""
    key = f"{artifact.prefix}/{DRAFT}"
    try:
        return Manifest.from_json(read_bytes(store, key), key)
    except (ObjectNotFound, CorruptImage):
        return None


def write_draft(store: Store, draft: Manifest, owner: Owner, confirm: Callable[[], None] = lambda: None) -> None:
    """Note what is committed so far. See ``put_bytes``."""
    put_bytes(store, f"{draft.artifact.prefix}/{DRAFT}", draft.to_json(), owner, confirm)


def discard(store: Store, artifact: Artifact, confirm: Callable[[], None] = lambda: None) -> None:
    """Remove all that an unfinished artifact has left: parts, committed objects, the draft. A complete one is kept.

    *confirm* is called before each removal, and raises when all of that may be another worker's.
    """
    confirm()
    store.sweep(0, artifact.prefix)
    if find_manifest(store, artifact) is None:
        for each in list(store.list(artifact.prefix)):
            confirm()
            store.delete(each.key)
