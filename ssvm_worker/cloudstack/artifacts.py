"""The templates and volumes of a store as a management server knows them: by its names, in every layout.

A worker of this program writes ``manifest.json``, last. An artifact for a management server has the fact
``unique_name``. All others belong to other users of the store. They are never listed, because a server deletes what it
does not know.

The Java agent writes ``template.properties`` or ``volume.properties`` on NFS. On S3 it writes one object, whose key has
the name: ``template/tmpl/ACCOUNT/ID/NAME/FILE`` or ``volumes/ACCOUNT/ID/FILE``.

**Every function returns all artifacts or raises.** A server downloads again, or forgets, what is missing from a list.
A volume that another command moves during a walk may be missing from it. So volumes are walked again until two walks
agree, and no move has begun meanwhile: two moves could hide a volume from both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from ssvm_worker.artifacts.layout import MANIFEST, Artifact
from ssvm_worker.artifacts.manifest import Manifest, read_manifest
from ssvm_worker.errors import InvalidRequest, ObjectNotFound, StoreUnavailable
from ssvm_worker.jobs.cloudstack_properties import parse_properties
from ssvm_worker.streaming.interfaces import HoldsForeign, Store, StoredObject
from ssvm_worker.streaming.pipeline import read_bytes

from .transfer_objects import TemplateProp

#: The fact of a manifest with the server's name of the artifact.
UNIQUE_NAME = "unique_name"
#: The formats of CloudStack, by which the keys of a properties file begin.
_FORMATS = ("qcow2", "raw", "vhd", "iso", "vmdk", "vdi", "ova", "vhdx", "bareMetal", "TAR", "zip", "dir")
#: Parallel reads of small objects. S3 needs some milliseconds for each.
_READERS = 8
#: The most walks over the volumes. Each new download adds a directory, once.
_MAX_WALKS = 6


@dataclass(frozen=True)
class Family:
    """Templates or volumes: where they are, and what CloudStack writes next to them."""

    root: str
    #: The number of components of an artifact's prefix.
    depth: int
    properties: str
    #: Whether a command moves artifacts inside their store: MoveVolumeCommand.
    moves: bool


TEMPLATES = Family("template/tmpl", 4, "template.properties", moves=False)
VOLUMES = Family("volumes", 3, "volume.properties", moves=True)


@dataclass(frozen=True)
class FoundArtifact:
    """One artifact of a management server."""

    unique_name: str
    id: int
    #: The key of the image. For an OVA, the key that the package would have.
    path: str
    virtual_size: int
    physical_size: int
    is_public: bool = True
    #: The digests of the file as its source offered it, as ``sha512:HEX``. Empty for the Java agent's.
    digests: tuple[str, ...] = ()

    def prop(self) -> TemplateProp:
        """Return the entry of a list."""
        return TemplateProp(
            template_name=self.unique_name,
            install_path=self.path,
            size=self.virtual_size,
            physical_size=self.physical_size,
            id=self.id,
            is_public=self.is_public,
            is_corrupted=self.physical_size <= 0 or self.virtual_size <= 0,
        )


def find_artifacts(
    store: Store, family: Family, *, is_s3: bool, moves: Callable[[], int] = lambda: 0
) -> list[FoundArtifact]:
    """Return all artifacts of a family. Raises every error of the store, and CorruptImage for a broken manifest.

    *moves* returns how many moves inside the store have begun so far.
    """
    begun, groups = moves(), _walk(store, family)
    for _ in range(_MAX_WALKS):
        with ThreadPoolExecutor(_READERS) as readers:
            found = list(readers.map(partial(_in_group, store, family, is_s3), groups, groups.values()))
        if not family.moves:
            break
        before, groups = (begun, groups.keys()), _walk(store, family)
        begun = moves()
        if (begun, groups.keys()) == before:
            break
    else:
        what = f"The directories have changed during each of {_MAX_WALKS} walks"
        raise StoreUnavailable(what, f"{store.name}:{family.root}", "Ask again when no volume is moved")
    return [artifact for each in found for artifact in each]


def _walk(store: Store, family: Family) -> dict[str, dict[str, StoredObject]]:
    """Return the objects by the directory of their artifact, and by their path in it."""
    groups: dict[str, dict[str, StoredObject]] = {}
    for each in all_objects(store, family.root):
        parts = each.key.split("/")
        prefix, rest = "/".join(parts[: family.depth]), "/".join(parts[family.depth :])
        if rest:
            groups.setdefault(prefix, {})[rest] = each
    return groups


def all_objects(store: Store, prefix: str) -> list[StoredObject]:
    """Return all objects below a prefix, also those with names that this program never uses."""
    foreign = list(store.foreign(prefix)) if isinstance(store, HoldsForeign) else []
    return [*store.list(prefix), *foreign]


def find_artifact(store: Store, artifact: Artifact) -> FoundArtifact | None:
    """Return an artifact that a worker of this program has written, or None."""
    try:
        return of_manifest(read_manifest(store, artifact))
    except ObjectNotFound:
        return None


def _in_group(
    store: Store, family: Family, is_s3: bool, prefix: str, objects: Mapping[str, StoredObject]
) -> list[FoundArtifact]:
    if MANIFEST in objects:
        try:
            artifact = Artifact.of_prefix(prefix)
        except InvalidRequest:
            return []
        try:
            found = of_manifest(read_manifest(store, artifact))
        except ObjectNotFound:  # deleted since the list was read
            return []
        return [found] if found else []
    if family.properties in objects:
        try:
            data = read_bytes(store, f"{prefix}/{family.properties}")
        except ObjectNotFound:
            return []
        found = _of_properties(prefix, parse_properties(data))
        return [found] if found else []
    return list(_of_keys(family, objects)) if is_s3 else []


def of_manifest(manifest: Manifest) -> FoundArtifact | None:
    """Return the artifact of a manifest, or None if the artifact is not for a management server."""
    name = manifest.facts.get(UNIQUE_NAME)
    if not isinstance(name, str) or not name:
        return None
    artifact, image = manifest.artifact, manifest.entries[0]
    file_name, size = image.name, image.size
    if image.facts["format"] == "ova":
        file_name, size = f"{artifact.id}.ova", int(manifest.source.get("size", manifest.size))
    return FoundArtifact(
        unique_name=name,
        id=_number(artifact.id),
        path=artifact.key(file_name),
        virtual_size=image.facts["virtual_size"],
        physical_size=size,
        digests=tuple(manifest.source.get("digests", ())),
    )


def _of_properties(prefix: str, values: Mapping[str, str]) -> FoundArtifact | None:
    """Return the artifact of the Java agent's properties. None: its download has not ended.

    The Java agent uses the same rules: ``uniquename``, ``virtualsize``, and a format with a file name.
    """
    formats = [each for each in _FORMATS if each in values and values.get(f"{each}.filename")]
    if "uniquename" not in values or "virtualsize" not in values or not formats:
        return None
    if values["uniquename"] == "-".join(prefix.split("/")[-2:]):
        # An artifact of an ordinary job, whose manifest is not written yet, or is deleted already.
        return None
    of = formats[-1]
    return FoundArtifact(
        unique_name=values["uniquename"],
        id=_number(values.get("id", "")),
        path=f"{prefix}/{values.get('filename') or values[f'{of}.filename']}",
        virtual_size=_number(values.get(f"{of}.virtualsize", "")),
        physical_size=_number(values.get(f"{of}.size", "")),
        is_public=values.get("public") == "true",
    )


def _of_keys(family: Family, objects: Mapping[str, StoredObject]) -> Iterator[FoundArtifact]:
    """Yield the artifacts of the Java agent on S3. Their keys say all that it stores."""
    for rest, each in sorted(objects.items()):
        parts = each.key.split("/")
        name = parts[-2]
        if rest.count("/") == (1 if family is TEMPLATES else 0):
            yield FoundArtifact(name, _number(parts[family.depth - 1]), each.key, each.size, each.size)


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0
