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
from datetime import datetime
from typing import Any

from ssvm_worker.errors import CorruptImage, InvalidRequest, ObjectNotFound, TooLarge
from ssvm_worker.streaming.interfaces import Owner, Store, StoredObject
from ssvm_worker.streaming.pipeline import put_bytes, read_bytes

from .layout import DRAFT, MANIFEST, Artifact, check_name

VERSION = 1


class _Facts(dict[str, Any]):
    """Facts that were read from a manifest; CorruptImage for one that is missing."""

    def __missing__(self, name: str) -> Any:
        raise CorruptImage(f"The manifest lacks the fact {name!r}", "", "Verify the artifact; restore or delete it")


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
    #: Fields that a newer version of the same major version has written; they are kept.
    more: dict[str, Any] = field(default_factory=dict)


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
    #: As an entry has it.
    more: dict[str, Any] = field(default_factory=dict)

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
        objects = []
        for each in self.entries:
            values = dataclasses.asdict(each)
            objects.append({"key": self.artifact.key(each.name)} | values.pop("more") | values)
        values = self.more | dataclasses.asdict(self.artifact) | own | {"objects": objects}
        # A lone surrogate has no UTF-8; its escape is JSON.
        return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")

    @classmethod
    def from_json(cls, data: bytes, where: str, artifact: Artifact | None = None) -> Manifest:
        """Read what ``to_json`` wrote.

        Raises CorruptImage for anything else, for a manifest of a newer major version, and for one that does not
        belong to *artifact*, at whose place it was found.
        """
        try:
            fields = _typed(json.loads(data), {"version": int})
            if fields["version"] > VERSION:
                what = f"A newer ssvm-worker has written this (manifest version {fields['version']})"
                raise CorruptImage(what, where, "Upgrade this worker; the artifact may be complete")
            _typed(fields, _FIELDS)
            whose = Artifact(*(fields.pop(name) for name in ("kind", "account", "id", "volume")))
            entries = tuple(map(_entry, fields.pop("objects")))
            found = cls(whose, entries=entries, more=_others(fields, cls), **_own(fields, cls))
            place = whose.prefix
            datetime.fromisoformat(found.created)
            if len({each.name for each in entries}) < len(entries):
                raise ValueError("two objects have one name")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidRequest) as error:
            said = error.what if isinstance(error, InvalidRequest) else str(error)
            what = f"The manifest cannot be read: {type(error).__name__}: {said[:200]}"
            raise CorruptImage(what, where, "Restore or delete it") from error
        if artifact is not None and place != artifact.prefix:
            what = f"The manifest belongs to another artifact, {place}"
            raise CorruptImage(what, where, "Restore it from another store")
        return found


def read_manifest(store: Store, artifact: Artifact) -> Manifest:
    """The manifest of an artifact; ObjectNotFound when the artifact does not exist (or is not complete)."""
    key = f"{artifact.prefix}/{MANIFEST}"
    try:
        found = Manifest.from_json(read_bytes(store, key), f"{store.name}:{key}", artifact)
        if not found.entries:
            raise CorruptImage("The manifest lists no object", f"{store.name}:{key}", "Restore or delete it")
        return found
    except TooLarge as error:
        what = f"This is no manifest: {error.what}"
        raise CorruptImage(what, f"{store.name}:{key}", "Restore or delete it") from error
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
        return Manifest.from_json(read_bytes(store, key), key, artifact)
    except (ObjectNotFound, CorruptImage, TooLarge):
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


#: The fields that a manifest, and an object in it, must have, with their types.
_FIELDS: dict[str, type] = {
    **dict.fromkeys(("kind", "account", "id", "volume", "job_id", "created"), str),
    "version": int,
    "objects": list,
    "source": dict,
    "facts": dict,
}
#: Facts that readers compute with.
_KNOWN_FACTS: dict[str, type] = {"virtual_size": int, "populated": int, "format": str, "name": str}
_OBJECT: dict[str, type] = {"key": str, "name": str, "size": int, "digest": str, "role": str, "facts": dict}


def _typed(values: Any, types: dict[str, type]) -> dict[str, Any]:
    """A JSON object whose fields have these types; TypeError, KeyError."""
    if not isinstance(values, dict):
        raise TypeError("it is not an object")
    for name, its in types.items():
        if type(values[name]) is not its:
            raise TypeError(f"{name} is of a wrong type")
    facts = values.get("facts", {})
    for name, its in _KNOWN_FACTS.items():
        if name in facts and type(facts[name]) is not its:
            raise TypeError(f"the fact {name} is of a wrong type")
    return values


def _entry(values: Any) -> Entry:
    fields = _typed(values, _OBJECT)
    fields.pop("key")
    if fields["size"] < 0:
        raise ValueError("a size is negative")
    check_name(fields["name"])
    return Entry(more=_others(fields, Entry), **_own(fields, Entry))


def _own(fields: dict[str, Any], kind: Any) -> dict[str, Any]:
    known = {each.name for each in dataclasses.fields(kind)} - {"more"}
    return {name: _Facts(value) if type(value) is dict else value for name, value in fields.items() if name in known}


def _others(fields: dict[str, Any], kind: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _own(fields, kind)}
