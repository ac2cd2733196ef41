"""Read and write manifests. A manifest lists every object of one artifact with size and digest.

It is written last, so an artifact with a manifest is *complete*. A *draft* manifest has the same fields and lists the
objects that are committed so far. A later attempt continues from the draft. Writing the manifest deletes the draft.
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
    """Facts of a manifest. Reading a missing one raises CorruptImage."""

    def __missing__(self, name: str) -> Any:
        raise CorruptImage(
            f"The manifest lacks the fact {name!r}", "", "Verify the artifact, then restore or delete it"
        )


@dataclass(frozen=True)
class Entry:
    """One object of an artifact."""

    #: The last part of its key.
    name: str
    #: Stored bytes.
    size: int
    #: ``sha256:HEX`` of the stored bytes.
    digest: str
    #: image | disk | descriptor | checksums | properties | config
    role: str = "image"
    #: Further facts: format, virtual_size (bytes), disk key, grade of verification, …
    facts: dict[str, Any] = field(default_factory=dict)
    #: Unknown fields, which a newer version with the same major version has written. They are kept.
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """List of all objects of one artifact."""

    artifact: Artifact
    job_id: str
    entries: tuple[Entry, ...] = ()
    #: The origin: url, etag, checksum; or vCenter, VM, snapshot. Never a secret.
    source: dict[str, Any] = field(default_factory=dict)
    #: Facts about the artifact: format, virtual_size (bytes), quiesced, …
    facts: dict[str, Any] = field(default_factory=dict)
    #: ISO 8601, UTC.
    created: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    version: int = VERSION
    #: Unknown fields, as in an entry.
    more: dict[str, Any] = field(default_factory=dict)

    def entry(self, name: str) -> Entry | None:
        """Return the entry of that name, or None."""
        return next((each for each in self.entries if each.name == name), None)

    def with_entry(self, entry: Entry) -> Manifest:
        """Return a copy with *entry*, which replaces an entry of the same name."""
        kept = tuple(each for each in self.entries if each.name != entry.name)
        return dataclasses.replace(self, entries=(*kept, entry))

    @property
    def size(self) -> int:
        """Return the bytes of all objects."""
        return sum(each.size for each in self.entries)

    def to_json(self) -> bytes:
        """Return indented JSON with a newline at the end.

        The fields of the artifact come first, then ``objects`` with key, size and digest of each.
        """
        own = {name: getattr(self, name) for name in ("version", "job_id", "created", "source", "facts")}
        objects = []
        for each in self.entries:
            values = dataclasses.asdict(each)
            objects.append({"key": self.artifact.key(each.name)} | values.pop("more") | values)
        values = self.more | dataclasses.asdict(self.artifact) | own | {"objects": objects}
        # A lone surrogate has no UTF-8 form. Its backslash escape is valid JSON.
        return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")

    @classmethod
    def from_json(cls, data: bytes, location: str, artifact: Artifact | None = None) -> Manifest:
        """Parse the output of ``to_json``.

        Raises CorruptImage for malformed data, a newer major version, or a manifest of another artifact.
        """
        try:
            fields = _checked(json.loads(data), {"version": int})
            if fields["version"] > VERSION:
                what = f"A newer ssvm-worker has written this manifest (version {fields['version']})"
                raise CorruptImage(what, location, "Upgrade this worker. The artifact may be complete")
            _checked(fields, _FIELDS)
            owner = Artifact(*(fields.pop(name) for name in ("kind", "account", "id", "volume")))
            entries = tuple(map(_entry, fields.pop("objects")))
            found = cls(owner, entries=entries, **_known_and_more(fields, cls))
            prefix = owner.prefix
            datetime.fromisoformat(found.created)
            if len({each.name for each in entries}) < len(entries):
                raise ValueError("two objects have one name")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidRequest) as error:
            reason = error.what if isinstance(error, InvalidRequest) else str(error)
            what = f"The manifest cannot be read: {type(error).__name__}: {reason[:200]}"
            raise CorruptImage(what, location, "Restore or delete it") from error
        if artifact is not None and prefix != artifact.prefix:
            what = f"The manifest belongs to another artifact, {prefix}"
            raise CorruptImage(what, location, "Restore it from another store")
        return found


def read_manifest(store: Store, artifact: Artifact) -> Manifest:
    """Return the manifest of an artifact. Raise ObjectNotFound if the artifact does not exist or is incomplete.

    Raises CorruptImage for an invalid manifest, and for one without objects.
    """
    key = f"{artifact.prefix}/{MANIFEST}"
    location = f"{store.name}:{key}"
    try:
        found = Manifest.from_json(read_bytes(store, key), location, artifact)
        if not found.entries:
            raise CorruptImage("The manifest lists no object", location, "Restore or delete it")
        return found
    except TooLarge as error:
        raise CorruptImage(f"This is no manifest: {error.what}", location, "Restore or delete it") from error
    except ObjectNotFound as error:
        what = f"There is no complete {artifact.kind} there"
        raise ObjectNotFound(what, f"{store.name}:{artifact.prefix}", "`ssvm list` shows all artifacts") from error


def find_manifest(store: Store, artifact: Artifact) -> Manifest | None:
    """Return the manifest, or None if the artifact does not exist."""
    try:
        return read_manifest(store, artifact)
    except ObjectNotFound:
        return None


def artifacts_below(store: Store, prefix: str = "") -> Iterator[Artifact]:
    """Yield all complete artifacts below a prefix, sorted by prefix. Ignore manifests outside the layout."""
    for each in store.list(prefix):
        directory, _, name = each.key.rpartition("/")
        if name == MANIFEST:
            with contextlib.suppress(InvalidRequest):
                yield Artifact.of_prefix(directory)


def write_manifest(
    store: Store, manifest: Manifest, owner: Owner, confirm: Callable[[], None] = lambda: None
) -> StoredObject:
    """Write the manifest, which makes the artifact exist, and delete the draft.

    Call this function after all objects are committed. *confirm*: see ``put_bytes``.
    """
    stored = put_bytes(store, f"{manifest.artifact.prefix}/{MANIFEST}", manifest.to_json(), owner, confirm)
    store.delete(f"{manifest.artifact.prefix}/{DRAFT}")
    return stored


def read_draft(store: Store, artifact: Artifact) -> Manifest | None:
    """Return the draft of an earlier attempt, or None. Ignore an invalid draft."""
    key = f"{artifact.prefix}/{DRAFT}"
    try:
        return Manifest.from_json(read_bytes(store, key), key, artifact)
    except (ObjectNotFound, CorruptImage, TooLarge):
        return None


def write_draft(store: Store, draft: Manifest, owner: Owner, confirm: Callable[[], None] = lambda: None) -> None:
    """Write the draft, which lists the objects committed so far. *confirm*: see ``put_bytes``."""
    put_bytes(store, f"{draft.artifact.prefix}/{DRAFT}", draft.to_json(), owner, confirm)


def discard(store: Store, artifact: Artifact, confirm: Callable[[], None] = lambda: None) -> None:
    """Remove all data of an incomplete artifact: parts, committed objects, the draft.

    A complete artifact is kept, except for its parts. So is an artifact of CloudStack's Java agent in the same
    directory, which has other names and no manifest. *confirm* is called before each removal. It must raise if another
    worker may own the data by now.
    """
    confirm()
    store.sweep(0, artifact.prefix)
    if find_manifest(store, artifact) is None:
        for name in _own_names(artifact, [each.key for each in store.list(artifact.prefix)]):
            confirm()
            store.delete(f"{artifact.prefix}/{name}")


def _own_names(artifact: Artifact, keys: list[str]) -> list[str]:
    """Return the names of the objects that a job on the artifact has written."""
    names = [key.removeprefix(f"{artifact.prefix}/") for key in keys]
    names = [name for name in names if "/" not in name]
    if artifact.kind == "backup":
        return names
    own = [
        name for name in names if name in (MANIFEST, DRAFT) or name.startswith((f"{artifact.id}.", f"{artifact.id}-"))
    ]
    properties = [name for name in names if name.endswith(".properties")]
    return own + properties if len(own) + len(properties) == len(names) else own


#: The required fields of a manifest, with their types.
_FIELDS: dict[str, type] = {
    **dict.fromkeys(("kind", "account", "id", "volume", "job_id", "created"), str),
    "version": int,
    "objects": list,
    "source": dict,
    "facts": dict,
}
#: Facts with a fixed type, because readers compute with them.
_KNOWN_FACTS: dict[str, type] = {"virtual_size": int, "populated": int, "format": str, "name": str}
#: The required fields of an object in a manifest, with their types.
_OBJECT: dict[str, type] = {"key": str, "name": str, "size": int, "digest": str, "role": str, "facts": dict}


def _checked(values: Any, types: dict[str, type]) -> dict[str, Any]:
    """Return a JSON object if its fields have these types. Raise TypeError or KeyError if they do not."""
    if not isinstance(values, dict):
        raise TypeError("it is not an object")
    for name, expected in types.items():
        if type(values[name]) is not expected:
            raise TypeError(f"{name} has a wrong type")
    facts = values.get("facts", {})
    for name, expected in _KNOWN_FACTS.items():
        if name in facts and type(facts[name]) is not expected:
            raise TypeError(f"the fact {name} has a wrong type")
    for name in ("size", "virtual_size", "populated"):
        number = values.get(name, facts.get(name, 0))
        if type(number) is int and not 0 <= number < 1 << 63:  # Image formats have no place for more.
            raise ValueError(f"{name} is not a number of bytes")
    return values


def _entry(values: Any) -> Entry:
    fields = _checked(values, _OBJECT)
    fields.pop("key")
    check_name(fields["name"])
    return Entry(**_known_and_more(fields, Entry))


def _known_and_more(fields: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Return the fields of the dataclass *kind*, and all other fields as ``more``."""
    names = {each.name for each in dataclasses.fields(kind)} - {"more"}
    known = {name: _Facts(value) if type(value) is dict else value for name, value in fields.items() if name in names}
    return known | {"more": {name: value for name, value in fields.items() if name not in names}}
