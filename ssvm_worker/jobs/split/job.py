"""Make a template of one disk of an OVA template, as CloudStack needs it for VMware.

CloudStack turns an OVA with several disks into one template for each disk. The template of the boot disk is the OVA's
own: its OVF lists only this disk afterwards. Each other disk moves to the template of another id. All of them have:

    NAME.ovf             the OVF with this disk only
    NAME.ovf.orig        the OVF with all disks
    ID.ova.meta          the files of a package of this template
    template.properties, manifest.json

The package itself, NAME.ova, stays in the OVA's template, unchanged. An ISO image of the OVA becomes a template with
this image and its properties only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from ssvm_worker.artifacts.checksums import Digest, digest_of
from ssvm_worker.artifacts.layout import Artifact, check_name
from ssvm_worker.artifacts.manifest import (
    Entry,
    Manifest,
    find_manifest,
    read_draft,
    write_draft,
    write_manifest,
)
from ssvm_worker.errors import InvalidRequest, ObjectNotFound, WorkerError
from ssvm_worker.formats import ova
from ssvm_worker.formats.ovf_disks import PackageDisk, keep_disk, read_disks
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.cloudstack_properties import package_name, properties
from ssvm_worker.jobs.moving import move_object
from ssvm_worker.jobs.request import ArtifactRequest
from ssvm_worker.jobs.store_set import add_small_objects
from ssvm_worker.jobs.usage import record_usage
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import put_bytes, read_bytes

_ORIGINAL = ".orig"


def _name(value: str) -> str:
    try:
        return check_name(value)
    except WorkerError as error:
        raise ValueError(str(error)) from error


Name = Annotated[str, AfterValidator(_name)]


class Request(ArtifactRequest):
    """The OVA template, one of its disks, and the template to make of it."""

    kind: Literal["template"] = Field("template", description="The kind of the artifact")
    disk: Name = Field(description="The file of the disk in the directory of the OVA template")
    template: Name = Field(description="The id of the template to make. The same id for the boot disk")
    unique_name: str = Field("", max_length=255, description="The management server's name of the template to make")
    store: str = Field("primary", description="The store of the OVA template")

    @property
    def made(self) -> Artifact:
        """Return the template to make."""
        return Artifact("template", self.account, self.template)


def resource(request: Request) -> str:
    """Return the OVA template: the job changes its OVF, and takes a disk from it."""
    return request.artifact.resource


def discard(request: Request, attempt: Attempt) -> None:
    """Do nothing: a moved disk is in one of both templates, and a retry continues."""


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Make the template, or return what an earlier attempt made.

    Raises ObjectNotFound if the OVA template or its disk is missing. Raises UnsafeImage for a hostile OVF.
    """
    store = attempt.store(request.store)
    for artifact in (request.artifact, request.made):
        store.sweep(0, artifact.prefix)
    found = find_descriptor(store, request.artifact.prefix)
    original = _keep_original(store, found, attempt)
    disk = next((each for each in read_disks(original, found) if each.file == request.disk), None)
    if disk is None:
        what = f"The OVF has no disk {request.disk[:80]!a}"
        raise ObjectNotFound(what, f"{store.name}:{found}", "Name a disk of this OVF")
    if disk.is_iso and request.made == request.artifact:
        raise InvalidRequest("An ISO image needs a separate template", request.template, "Give another id")
    text = b"" if disk.is_iso else keep_disk(original, request.disk, f"{store.name}:{found}")
    return _Split(request, attempt, store, found.rpartition("/")[2], original, text, disk).run()


def find_descriptor(store: Store, prefix: str) -> str:
    """Return the key of the OVF in a directory. Raise ObjectNotFound if there is none."""
    keys = [each.key for each in store.list(prefix) if ova.is_descriptor(each.key)]
    if not keys:
        what = "There is no OVF next to the package"
        raise ObjectNotFound(what, f"{store.name}:{prefix}", "Delete the template, and register it again")
    return keys[0]


def _keep_original(store: Store, key: str, attempt: Attempt) -> bytes:
    """Return the OVF with all disks. The first split keeps a copy of it."""
    try:
        return read_bytes(store, key + _ORIGINAL, ova.MAX_TEXT)
    except ObjectNotFound:
        data = read_bytes(store, key, ova.MAX_TEXT)
    ova.read_descriptor(data, key)
    put_bytes(store, key + _ORIGINAL, data, attempt.owner, attempt.confirm)
    return data


@dataclass
class _Split:
    request: Request
    attempt: Attempt
    store: Store
    #: The name of the OVF.
    ovf: str
    #: The OVF with all disks, and with this disk only.
    original: bytes
    text: bytes
    disk: PackageDisk

    def run(self) -> dict[str, Any]:
        made, store, attempt = self.request.made, self.store, self.attempt
        source = find_manifest(store, self.request.artifact)
        earlier = find_manifest(store, made) or read_draft(store, made)
        entry = self._find_disk(source, earlier)
        if made != self.request.artifact:
            self._move_disk(source, earlier, entry)
        manifest = self._manifest(source, entry)
        small = self._small_objects(source, entry, manifest)
        for name, data in small.items():
            put_bytes(store, made.key(name), data, attempt.owner, attempt.confirm)
        if entry.digest:
            manifest = add_small_objects(manifest, {name: small[name] for name in small if name != self.ovf}, "config")
            write_manifest(store, manifest, attempt.owner, attempt.confirm)
            record_usage(attempt, store, manifest)
        return {
            "prefix": made.prefix,
            "package": made.key(entry.name if self.disk.is_iso else package_name(manifest)),
            "key": made.key(entry.name),
            "size": entry.size,
            "virtual_size": entry.facts["virtual_size"],
            "store": store.name,
        }

    def _find_disk(self, source: Manifest | None, earlier: Manifest | None) -> Entry:
        """Return the entry of the disk. Without a manifest it has no digest, and no manifest is written."""
        for manifest in (source, earlier):
            if manifest and (entry := manifest.entry(self.request.disk)):
                return replace(entry, facts=entry.facts | self._iso_facts(entry.size))
        for artifact in (self.request.artifact, self.request.made):
            with contextlib.suppress(ObjectNotFound):
                size = self.store.stat(artifact.key(self.request.disk)).size
                facts = {"format": "vmdk", "virtual_size": self.disk.capacity}
                return Entry(self.request.disk, size, "", "disk", self._iso_facts(size) or facts)
        what = f"The OVA template lacks a disk that its OVF names: {self.request.disk!a}"
        raise ObjectNotFound(what, f"{self.store.name}:{self.request.artifact.prefix}", "Register the template again")

    def _iso_facts(self, size: int) -> dict[str, Any]:
        return {"format": "iso", "virtual_size": size} if self.disk.is_iso else {}

    def _move_disk(self, source: Manifest | None, earlier: Manifest | None, entry: Entry) -> None:
        """Move the disk to the new template. Each step may be repeated.

        The draft of the new template has the entry before the manifest of the OVA template loses it.
        """
        request, made, attempt = self.request, self.request.made, self.attempt
        if earlier is None and entry.digest:
            write_draft(self.store, Manifest(made, attempt.job_id, (entry,)), attempt.owner, attempt.confirm)
        if source and source.entry(request.disk):
            changed = replace(source, entries=tuple(each for each in source.entries if each.name != request.disk))
            write_manifest(self.store, changed, attempt.owner, attempt.confirm)
            record_usage(attempt, self.store, changed)
        move_object(attempt, self.store, request.artifact.key(request.disk), made.key(request.disk))

    def _manifest(self, source: Manifest | None, entry: Entry) -> Manifest:
        """Return the manifest of the new template, without its small objects."""
        request, made = self.request, self.request.made
        facts: dict[str, Any] = {"name": request.unique_name}
        facts |= {"unique_name": request.unique_name} if request.unique_name else {}
        if self.disk.is_iso:
            return Manifest(made, self.attempt.job_id, (replace(entry, role="image"),), {}, facts)
        of_ovf = {"format": "ova", "virtual_size": entry.facts["virtual_size"], "disks": 1}
        descriptor = Entry(self.ovf, len(self.text), str(digest_of(self.text)), "descriptor", of_ovf)
        if source and made == request.artifact:
            others = [each for each in source.entries if each.name not in (self.ovf, entry.name)]
            return replace(source, entries=(descriptor, entry, *others), facts=source.facts | facts)
        packages = [each for each in self.store.list(made.prefix) if each.key.endswith(".ova")]
        found = [Entry(each.key.rpartition("/")[2], each.size, "", "package") for each in packages[:1]]
        size = found[0].size if found else entry.size
        origin = {"ova": request.artifact.prefix, "size": size, "digests": [entry.digest] if not found else [""]}
        return Manifest(made, self.attempt.job_id, (descriptor, entry, *found), origin, facts)

    def _small_objects(self, source: Manifest | None, disk: Entry, manifest: Manifest) -> dict[str, bytes]:
        """Return the small objects of the new template by name, the properties last."""
        if self.disk.is_iso:
            return properties(self.request, manifest)
        small = {self.ovf: self.text, f"{self.ovf}{_ORIGINAL}": self.original}
        package = package_name(manifest)
        small[f"{package}.meta"] = _meta(package, self.ovf, disk)
        sums = f"{self.ovf.rpartition('.')[0]}.mf"
        if source and source.entry(sums):  # of a worker's own OVA. It must match the new OVF
            digests = {self.ovf: digest_of(self.text), disk.name: Digest(*disk.digest.split(":"))}
            small[sums] = ova.write_checksums(digests)
        return small | properties(self.request, manifest)


def _meta(package: str, ovf: str, disk: Entry) -> bytes:
    """Return the file with which CloudStack packs an OVA of unpacked files."""
    lines: Mapping[str, object] = {
        "ova.filename": package,
        "version": "1.0",
        "ovf": ovf,
        "numDisks": 1,
        "disk1.name": disk.name,
        "disk1.size": disk.size,
    }
    return "".join(f"{name}={value}\n" for name, value in lines.items()).encode()
