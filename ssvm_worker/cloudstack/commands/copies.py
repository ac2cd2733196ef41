"""CopyCommand: copy a template, volume or snapshot between image stores, or make a template of a snapshot.

| source | target | job |
|---|---|---|
| template, volume on a store | the same on another store | `copy`, or `transfer` if it has no manifest |
| snapshot on a store | the same on another store | `copy` if a worker wrote it, else `transfer` |
| snapshot on a store | template on a store | `download` from the store |

A store is an NFS export or a bucket, with the role Image or ImageCache. The answer comes when the job has ended.

Differences from the Java agent:

- It copies only NFS to NFS, S3 to a cache on NFS, and such a cache to S3. This agent copies between any two stores.
- A copy is compared with its manifest, and it is complete or absent. The Java agent leaves what it has written.
- A snapshot that becomes a template is examined: it may not depend on another file. Its file is named by the template.
- ``size`` of a copy from S3 is the virtual size if it is known. The Java agent sends the size of the file.
- The path in the answer names the image, also if the command names its directory.
- The seven commands for VMware are refused, each by its name. Swift is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from ssvm_worker.artifacts.layout import Artifact, check_foreign_key
from ssvm_worker.artifacts.manifest import Manifest, find_manifest
from ssvm_worker.cloudstack.artifacts import of_manifest
from ssvm_worker.cloudstack.image_stores import NamedStore
from ssvm_worker.cloudstack.jobs_to_end import job_id_of, limit_of, run_job
from ssvm_worker.cloudstack.keys import key_of
from ssvm_worker.cloudstack.messages import CopyCmdAnswer, CopyCommand
from ssvm_worker.cloudstack.services import Services
from ssvm_worker.cloudstack.transfer_objects import (
    PrimaryDataStoreTO,
    SnapshotObjectTO,
    StoreRole,
    TemplateObjectTO,
    VolumeObjectTO,
)
from ssvm_worker.errors import InvalidRequest, ObjectNotFound
from ssvm_worker.formats.ova import is_descriptor
from ssvm_worker.jobs.cloudstack_properties import parse_properties
from ssvm_worker.streaming.interfaces import HoldsForeign, Store, StoredObject
from ssvm_worker.streaming.pipeline import read_bytes

DataObject = TemplateObjectTO | VolumeObjectTO | SnapshotObjectTO
#: What CloudStack may append to the path of a file, in the order in which its agent tries it.
_EXTENSIONS = ("", ".qcow2", ".vhd", ".ova", ".vmdk")
#: The formats of CloudStack by the extension of a file. Other formats are called by their extension.
_FORMATS = {"img": "RAW"}
_EXTENSIONS_OF_IMAGES = ("qcow2", "vhd", "vhdx", "ova", "vmdk", "iso", "vdi", "raw", "img")
_PROPERTIES = ("template.properties", "volume.properties")
#: Time limit in seconds of a look at a store.
_LOOK_S = 20.0
#: The end of the name of a snapshot that a hypervisor has converted for one command only.
_TEMPORARY = "_temp"
#: The seven commands for VMware. A key has the kinds of source and target, each with whether it is on primary storage.
VMWARE = {
    ("snapshot", True, "snapshot", False): "backupSnapshot",
    ("snapshot", False, "template", False): "createTemplateFromSnapshot",
    ("snapshot", False, "volume", True): "createVolumeFromSnapshot",
    ("volume", True, "template", False): "createTemplateFromVolume",
    ("volume", True, "volume", False): "copyVolumeFromPrimaryToSecondary",
    ("volume", False, "volume", True): "copyVolumeFromImageCacheToPrimary",
    ("template", False, "template", True): "copyTemplateToPrimaryStorage",
    ("template", False, "volume", True): "copyTemplateToPrimaryStorage",
}
_KINDS: dict[type, str] = {TemplateObjectTO: "template", VolumeObjectTO: "volume", SnapshotObjectTO: "snapshot"}


@dataclass(frozen=True)
class LocatedData:
    """The data of a command on its store."""

    #: The directory, without the file.
    directory: str
    #: The name of the image; "" if only the directory is known.
    file: str
    #: Bytes of the image, or of all files if the image is unknown.
    size: int
    #: Bytes as the guest sees them; 0 if unknown.
    virtual_size: int = 0
    manifest: Manifest | None = None
    #: Whether the image is a file. The package of a template of one disk is not: only its files are stored.
    is_stored: bool = True

    @property
    def key(self) -> str:
        """Return the key of the image."""
        return f"{self.directory}/{self.file}"


def copy(command: CopyCommand, services: Services) -> CopyCmdAnswer:
    """Copy the data, and answer with its new place."""
    source, target = command.src, command.dest
    kinds = _KINDS.get(type(source)), _KINDS.get(type(target))
    if source is None or target is None or None in kinds:
        raise InvalidRequest("The command copies nothing that this agent knows", f"{kinds[0]} to {kinds[1]}")
    _refuse_vmware(command, kinds)
    work = _Copy(command, services, services.stores.find(source.store), services.stores.find(target.store))
    if kinds == ("snapshot", "template"):
        return work.template_of_snapshot()
    if kinds[0] != kinds[1]:
        raise InvalidRequest(f"This agent does not copy a {kinds[0]} to a {kinds[1]}", source.path or "")
    return work.snapshot() if kinds[0] == "snapshot" else work.image()


def _refuse_vmware(command: CopyCommand, kinds: tuple[str | None, str | None]) -> None:
    """Raise InvalidRequest for a command that needs VMware or a primary storage."""
    stores = [getattr(each, "store", None) for each in (command.src, command.dest)]
    on_primary = [
        isinstance(each, PrimaryDataStoreTO) or getattr(each, "role", None) == StoreRole.PRIMARY for each in stores
    ]
    context = command.context_map or {}
    hypervisor = context["hypervisor"].get_secret_value() if "hypervisor" in context else ""
    hypervisor = hypervisor or str(getattr(command.src, "hypervisor_type", None) or "")
    name = VMWARE.get((kinds[0] or "", on_primary[0], kinds[1] or "", on_primary[1]))
    if name and hypervisor.lower() == "vmware":
        places = ["primary storage" if each else "an image store" for each in on_primary]
        what = f"This agent does not run {name}: {kinds[0]} on {places[0]} to {kinds[1]} on {places[1]}, for VMware"
        raise InvalidRequest(
            what, "CopyCommand", "Another SSVM of this zone, with CloudStack's own agent, must serve it"
        )
    if any(on_primary):
        what = f"Only a hypervisor copies a {kinds[0]} to a {kinds[1]} on primary storage"
        raise InvalidRequest(what, "CopyCommand", "Send it to the agent of a hypervisor")


@dataclass(frozen=True)
class _Copy:
    command: CopyCommand
    services: Services
    source: NamedStore
    target: NamedStore

    def image(self) -> CopyCmdAnswer:
        """Copy a template or volume: its directory, or on the way to or from the Java agent's S3 its file."""
        src: Any = self.command.src
        found = self._look(partial(_locate_image, key=key_of(src.path, check_foreign_key)))
        to = self._directory(("template", "iso") if isinstance(src, TemplateObjectTO) else ("volume",))
        if found.manifest and to == found.directory:
            self._copy_artifact(found.manifest.artifact)
        elif found.is_stored and not found.manifest and (self.source.is_s3 or self.target.is_s3):
            self._transfer(found.key, f"{to}/{found.file}")
        else:
            self._transfer(found.directory, to)
        path = f"{to}/{found.file}".rstrip("/")
        size = found.virtual_size or src.size or found.size
        if isinstance(src, VolumeObjectTO):
            return _answer(VolumeObjectTO.new(path=path, size=size))
        extension = found.file.rpartition(".")[2].lower()
        form = _FORMATS.get(extension, extension.upper()) if extension in _EXTENSIONS_OF_IMAGES else src.format
        return _answer(TemplateObjectTO.new(path=path, size=size, physical_size=found.size, format=form))

    def snapshot(self) -> CopyCmdAnswer:
        """Copy a snapshot: the file of KVM or XenServer, or the directory of an OVF."""
        src: Any = self.command.src
        found = self._look(partial(_locate_snapshot, key=key_of(src.path, check_foreign_key)))
        to = key_of(self.command.dest.path)  # type: ignore[union-attr]
        if to.split("/")[0] != "snapshots" or to.count("/") != 2:
            raise InvalidRequest("This is not the directory of a volume's snapshots", to, "Give snapshots/ACCOUNT/ID")
        if found.file:
            path = f"{to}/{found.file}"
            self._transfer(found.key, path)
        else:
            name = found.directory.rpartition("/")[2]
            path = f"{to}/{name}/{name}"
            if found.manifest and found.directory == f"{to}/{name}":
                self._copy_artifact(found.manifest.artifact)
            else:
                self._transfer(found.directory, f"{to}/{name}")
        return _answer(SnapshotObjectTO.new(path=path, physical_size=found.size))

    def template_of_snapshot(self) -> CopyCmdAnswer:
        """Store the file of a snapshot as a template. Delete it if a hypervisor has converted it for this command."""
        src: Any = self.command.src
        dest: Any = self.command.dest
        found = self._look(partial(_locate_snapshot, key=key_of(src.path, check_foreign_key)))
        if not found.file:
            what = "The snapshot is an OVF, which only a VMware zone makes a template of"
            raise InvalidRequest(what, found.directory, "Another SSVM of this zone must serve it")
        artifact = Artifact.of_prefix(self._directory(("template",)))
        form = _format_of_snapshot(src, found.file)
        request = {
            "url": f"store:{self.source.name}/{found.key}",
            "kind": "template",
            "account": artifact.account,
            "id": artifact.id,
            "format": form,
            "unique_name": dest.name or dest.unique_name or artifact.id,
            "stores": [self.target.name],
        }
        request["credentials"] = self._allow(request)
        result = run_job(self.services, "download", request, limit_of(self.command.wait))
        if found.file.endswith(_TEMPORARY):
            self.services.stores.call(self.source, lambda store: store.delete(found.key), _LOOK_S)
        return _answer(
            TemplateObjectTO.new(
                path=result["key"],
                name=request["unique_name"],
                format=form.upper(),
                size=result["virtual_size"],
                physical_size=result["size"],
            )
        )

    def _allow(self, request: dict[str, Any]) -> str:
        """Let the download of the agent read the source. Return the name of the permission."""
        name = job_id_of("from", request)
        values: dict[str, Any] = {
            "credentials": {},
            "proxy": None,
            "follow_redirects": False,
            "allow_stores": [self.source.name],
        }
        self.services.names.put_connection(name, values, self.services.settings.ledger.keep_days * 86400)
        return name

    def _look(self, locate: Callable[[Store], LocatedData]) -> LocatedData:
        """Look at the source, also at files with names of other programs: those of an OVA that the Java agent keeps."""

        def look(store: Store) -> LocatedData:
            return locate(store.lenient() if isinstance(store, HoldsForeign) else store)

        return self.services.stores.call(self.source, look, _LOOK_S)

    def _directory(self, kinds: tuple[str, ...]) -> str:
        """Return the directory of the target. Its path may also name a file in it. Raise InvalidRequest for others."""
        path = key_of(self.command.dest.path)  # type: ignore[union-attr]
        with suppress(InvalidRequest):
            artifact = Artifact.of_prefix("/".join(path.split("/")[: 3 if kinds == ("volume",) else 4]))
            if artifact.kind in kinds:
                return artifact.prefix
        raise InvalidRequest(f"This is not the place of a {kinds[0]}", path, "Give a directory of CloudStack's layout")

    def _copy_artifact(self, artifact: Artifact) -> None:
        names = {"kind": artifact.kind, "account": artifact.account, "id": artifact.id, "volume": artifact.volume}
        request = names | {"source": self.source.name, "stores": [self.target.name]}
        self._run("copy", request)

    def _transfer(self, key: str, to: str) -> None:
        self._run("transfer", {"source": self.source.name, "key": key, "store": self.target.name, "to": to})

    def _run(self, job: str, request: dict[str, Any]) -> None:
        if self.source.name == self.target.name and request.get("key") == request.get("to"):
            return  # both transfer objects mean one store, and the data is there
        run_job(self.services, job, request, limit_of(self.command.wait))


def _answer(data: DataObject) -> CopyCmdAnswer:
    return CopyCmdAnswer(result=True, new_data=data)


def _format_of_snapshot(src: SnapshotObjectTO, file: str) -> str:
    """Return the format of a snapshot's file: by its extension, else that of its volume, else that of KVM."""
    extension = file.rpartition(".")[2].lower()
    if extension in ("qcow2", "vhd", "raw"):
        return extension
    if str(src.hypervisor_type or "").lower() == "xenserver":
        return "vhd"
    return ((src.volume.format if src.volume else None) or "QCOW2").lower()


def _locate_image(store: Store, key: str) -> LocatedData:
    """Find a template or volume by its directory or its file. Raise ObjectNotFound if there is none."""
    file = _find_file(store, key)
    directory, name = file.key.rpartition("/")[::2] if file else (key, "")
    parent = key.rpartition("/")[0]
    if file is None and key.endswith(".ova") and any(is_descriptor(each.key) for each in store.list(parent)):
        directory, _, name = key.rpartition("/")  # a template of one disk has only the files of its package
    manifest = _manifest(store, directory)
    values = {} if manifest else _read_properties(store, directory)
    if not name:
        listed = of_manifest(manifest) if manifest else None
        name = listed.path.rpartition("/")[2] if listed else values.get("filename", "")
        file = _find_file(store, f"{directory}/{name}") if name else None
    objects = list(store.list(directory))
    if not objects:
        raise ObjectNotFound("There is no such data", f"{store.name}:{key}")
    virtual = int(manifest.entries[0].facts.get("virtual_size", 0)) if manifest else _number(values.get("virtualsize"))
    size = file.size if file else sum(each.size for each in objects)
    return LocatedData(directory, name, size, virtual, manifest, is_stored=file is not None)


def _locate_snapshot(store: Store, key: str) -> LocatedData:
    """Find a snapshot: the file of this path, or the directory of an OVF, ``DIRECTORY/NAME/NAME``."""
    if file := _find_file(store, key):
        directory, _, name = file.key.rpartition("/")
        return LocatedData(directory, name, file.size)
    directory, _, name = key.rpartition("/")
    objects = list(store.list(directory))
    if directory.count("/") != 3 or not any(each.key.startswith(f"{directory}/{name}") for each in objects):
        raise ObjectNotFound("There is no such snapshot", f"{store.name}:{key}")
    return LocatedData(directory, "", sum(each.size for each in objects), manifest=_manifest(store, directory))


def _find_file(store: Store, key: str) -> StoredObject | None:
    """Return the object of a path to which CloudStack may have to append an extension."""
    for extension in _EXTENSIONS:
        with suppress(ObjectNotFound):
            return store.stat(key + extension)
    return None


def _manifest(store: Store, directory: str) -> Manifest | None:
    try:
        artifact = Artifact.of_prefix(directory)
    except InvalidRequest:
        return None
    return find_manifest(store, artifact)


def _read_properties(store: Store, directory: str) -> dict[str, str]:
    for name in _PROPERTIES:
        with suppress(ObjectNotFound):
            return parse_properties(read_bytes(store, f"{directory}/{name}"))
    return {}


def _number(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < 19 else 0
