"""Copy or move files between keys or image stores as they are, with or without a manifest.

Hypervisors and CloudStack's Java agent write artifacts without a manifest. ``copy`` needs one. So this job copies all
objects below a key. The file that makes them an artifact is written last: the manifest, or CloudStack's properties.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from ssvm_worker.artifacts.layout import DRAFT, MANIFEST, Artifact, check_foreign_key
from ssvm_worker.artifacts.manifest import Manifest, find_manifest, write_manifest
from ssvm_worker.errors import InvalidRequest, ObjectNotFound, WorkerError
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.moving import copy_object, move_object
from ssvm_worker.jobs.request import JobRequest, Privacy
from ssvm_worker.jobs.usage import forget_usage, record_usage
from ssvm_worker.streaming.interfaces import HoldsForeign, Store, StoredObject

from .packing import pack

#: The files that make the other files of a directory an artifact, in the order in which they are written.
_MARKS = ("template.properties", "volume.properties", MANIFEST)


def _key(value: str) -> str:
    try:
        return check_foreign_key(value)
    except WorkerError as error:
        raise ValueError(str(error)) from error


Key = Annotated[str, Privacy.PUBLIC, AfterValidator(_key)]


class Request(JobRequest):
    """The object or directory to transfer, and its new place."""

    source: str = Field(description="The store that has the files")
    key: Key = Field(description="The key of an object, or the directory of several")
    store: str = Field(description="The target store")
    to: Annotated[str, Privacy.PUBLIC] = Field(
        "", description="The new key of the object or directory; the same when absent"
    )
    move: bool = Field(False, description="Move the files inside their store instead of copying them")
    pack: bool = Field(False, description="Write the files of an OVF, the key, as one OVA at the new key")

    @model_validator(mode="after")
    def _consistent(self) -> Request:
        to = _key(self.to) if self.to else self.key
        if self.move and self.source != self.store:
            raise ValueError("move works inside one store; copy the files, and delete the artifact at the source")
        if self.pack:
            inside = self.source == self.store and _place_of(to) == _place_of(self.key)
            if self.move or not inside or not self.key.endswith(".ovf") or not to.endswith(".ova"):
                raise ValueError("pack makes an .ova of an .ovf in the directory of the same artifact, without move")
        if self.source == self.store and (f"{to}/".startswith(f"{self.key}/") or f"{self.key}/".startswith(f"{to}/")):
            raise ValueError("the new place is the old one, or one of them is inside the other")
        return self

    @property
    def place(self) -> str:
        """Return the new key."""
        return self.to or self.key

    def uses(self, zone: str) -> tuple[str, ...]:
        """Return the shared resources: both stores."""
        return tuple(f"store:{zone}/{name}" for name in dict.fromkeys((self.source, self.store)))


def resource(request: Request) -> str:
    """Return the artifact that the job changes: the moved one, or the copy."""
    return _place_of(request.key if request.move else request.place)


def discard(request: Request, attempt: Attempt) -> None:
    """Remove what failed attempts left of a copy. The files of a move are complete at one of both places."""
    if not request.move:
        _sweep(request, attempt)
    if not request.move and not request.pack:
        _remove_leftovers(attempt, _lenient(attempt.store(request.store)), request.place)


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Transfer all files, or raise.

    Raises ObjectNotFound if there is no file, and InvalidRequest if the new place has another artifact.
    """
    _sweep(request, attempt)
    source, target = (_lenient(attempt.store(name)) for name in (request.source, request.store))
    return _Transfer(attempt, request, source, target).run()


def _lenient(store: Store) -> Store:
    """Return the store with keys that only other programs use: the Java agent keeps the names of files in an OVA."""
    return store.lenient() if isinstance(store, HoldsForeign) else store


def _sweep(request: Request, attempt: Attempt) -> None:
    """Remove unfinished writes of earlier attempts at the target. This job holds the lock of the whole directory."""
    attempt.confirm()
    attempt.store(request.store).sweep(0, _place_of(request.place))


def _place_of(key: str) -> str:
    """Return the directory of the artifact with that key. For a snapshot, return the directory of its volume."""
    names = key.split("/")
    return "/".join(names[: 4 if names[0] == "template" else 3])


@dataclass
class _Transfer:
    attempt: Attempt
    request: Request
    source: Store
    target: Store
    bytes: int = 0

    def run(self) -> dict[str, Any]:
        found, request = self._find(), self.request
        if request.pack:
            return self._result([self._pack()])
        if not found:
            objects = [each.key for each in self._there()]
        elif found[0].key == request.key:
            objects = self._transfer_one(found[0])
        else:
            objects = self._transfer_tree(found)
        return self._result(objects)

    def _result(self, objects: list[str]) -> dict[str, Any]:
        request = self.request
        result = {"source": request.source, "store": request.store, "key": request.place, "objects": objects}
        return result | {"bytes": self.bytes, "moved": request.move}

    def _pack(self) -> str:
        artifact = Artifact.of_prefix(_place_of(self.request.place))
        self.bytes = pack(self.attempt, self.target, artifact, self.request.key, self.request.place)
        return self.request.place

    def _find(self) -> list[StoredObject]:
        """Return the object, or the objects below the key. Return nothing for a move that has ended."""
        key, source = self.request.key, self.source
        try:
            return [source.stat(key)]
        except ObjectNotFound:
            found = list(source.list(key))
        if not found and not (self.request.move and self._there()):
            raise ObjectNotFound("There is no such object or directory", f"{source.name}:{key}", "Check the key")
        return found

    def _there(self) -> list[StoredObject]:
        """Return the objects at the new place."""
        try:
            return [self.target.stat(self.request.place)]
        except ObjectNotFound:
            return list(self.target.list(self.request.place))

    def _transfer_one(self, found: StoredObject) -> list[str]:
        to = self.request.place
        self.attempt.progress.start(f"transfer to {self.target.name}", found.size)
        if self.request.move:
            if any(each.size != found.size for each in self._there()):
                raise _occupied(self.target, to)
            move_object(self.attempt, self.source, found.key, to)
        else:
            copy_object(self.attempt, self.source, found.key, self.target, to)
        self.bytes = found.size
        return [to]

    def _transfer_tree(self, found: list[StoredObject]) -> list[str]:
        request, attempt = self.request, self.attempt
        manifest = self._manifest(found)
        named = {each.key[len(request.key) + 1 :]: each for each in found}
        named.pop(DRAFT, None)
        objects = sorted(named, key=lambda name: (_MARKS.index(name) if name in _MARKS else -1, name))
        keys = [f"{request.place}/{name}" for name in objects]
        if self._has_it(named):
            return keys
        attempt.progress.start(f"transfer to {self.target.name}", sum(each.size for each in named.values()))
        for name in objects:
            if name == MANIFEST:
                continue
            key, to = f"{request.key}/{name}", f"{request.place}/{name}"
            if request.move:
                move_object(attempt, self.source, key, to)
                self.bytes += named[name].size
            else:
                entry = manifest.entry(name) if manifest else None
                digest = entry.digest if entry else None
                self.bytes += copy_object(attempt, self.source, key, self.target, to, digest=digest)[0]
        if manifest:
            self._publish(manifest)
        return keys

    def _manifest(self, found: list[StoredObject]) -> Manifest | None:
        """Return the manifest of the directory, with its new place."""
        if f"{self.request.key}/{MANIFEST}" not in {each.key for each in found}:
            return None
        manifest = find_manifest(self.source, Artifact.of_prefix(self.request.key))
        if manifest is None:
            return None
        if manifest.artifact.kind == "backup":
            what = "The directory is a backup, which may share packs with other backups of its volume"
            raise InvalidRequest(what, f"{self.source.name}:{self.request.key}", "Use the job copy")
        return replace(manifest, artifact=_moved(manifest.artifact, self.request.place))

    def _has_it(self, named: dict[str, StoredObject]) -> bool:
        """Return whether the target has the same files. Remove leftovers of an earlier attempt.

        Raise InvalidRequest if the target has another artifact.
        """
        place = self.request.place
        there = {each.key[len(place) + 1 :]: each.size for each in self.target.list(place)}
        if not any(name in there for name in _MARKS):
            if not self.request.move:
                _remove_leftovers(self.attempt, self.target, place)
            return False
        sizes = {name: each.size for name, each in named.items()}
        if self.request.move:
            if sizes.keys() - {MANIFEST}:
                raise _occupied(self.target, place)
            return not sizes
        is_listed = there.pop(MANIFEST, None) is not None  # its size depends on the place
        needs_manifest = sizes.pop(MANIFEST, None) is not None
        if there != sizes:
            raise _occupied(self.target, place)
        return is_listed or not needs_manifest

    def _publish(self, manifest: Manifest) -> None:
        """Write the manifest of the new place. After a move, delete the manifest of the old place."""
        attempt, request = self.attempt, self.request
        write_manifest(self.target, manifest, attempt.owner, attempt.confirm)
        record_usage(attempt, self.target, manifest)
        if request.move:
            attempt.confirm()
            self.source.delete(f"{request.key}/{MANIFEST}")
            forget_usage(attempt, self.source, Artifact.of_prefix(request.key))


def _moved(artifact: Artifact, place: str) -> Artifact:
    """Return the artifact with the account and id of another place."""
    new = Artifact.of_prefix(place)
    if new.prefix.split("/")[0] != artifact.prefix.split("/")[0]:
        what = f"A {artifact.kind} does not belong there"
        raise InvalidRequest(what, place, "Give a directory of the same kind")
    return replace(artifact, account=new.account, id=new.id)


def _occupied(store: Store, place: str) -> InvalidRequest:
    return InvalidRequest("There is another artifact in its place", f"{store.name}:{place}", "Delete it there first")


def _remove_leftovers(attempt: Attempt, store: Store, place: str) -> None:
    """Remove the files of a directory, if no file makes them an artifact.

    A directory of a snapshot has no such file. Its files stay, and another attempt replaces them.
    """
    if place.startswith("snapshots/"):
        return
    there = [each.key for each in store.list(place)]
    if any(each.rpartition("/")[2] in _MARKS for each in there):
        return
    for each in there:
        attempt.confirm()
        store.delete(each)
