"""The database of a simulated zone: image stores, templates and volumes, hosts, and a readable log.

Several simulated management servers may share a zone, as real ones share a database.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

_NFS, _S3 = "com.cloud.agent.api.to.NfsTO", "com.cloud.agent.api.to.S3TO"
_OBJECTS = "org.apache.cloudstack.storage.to."


@dataclass
class ImageStoreRow:
    """A row of image_store: an NFS export, or an S3 bucket if *s3* has the fields of an S3TO."""

    url: str
    role: str = "Image"
    nfs_version: str | None = None
    readonly: bool = False
    s3: dict[str, Any] | None = None
    #: What the agent's SecStorageSetupAnswer has named.
    parent: str = ""
    used: int | None = None
    capacity: int | None = None

    def transfer_object(self) -> dict[str, Any]:
        """Return the DataStoreTO with its class."""
        if self.s3 is not None:
            return {_S3: self.s3}
        return {_NFS: {"_url": self.url, "_role": self.role, "nfsVersion": self.nfs_version}}

    @property
    def secondary_url(self) -> str | None:
        """Return the field secUrl of a command. Commands for S3 do not have it."""
        return None if self.s3 is not None else self.url


@dataclass
class Entity:
    """A template or a volume, and its row for one image store."""

    id: int
    kind: str
    unique_name: str
    url: str | None
    format: str
    store: ImageStoreRow
    account: int = 1
    description: str = ""
    checksum: str | None = None
    hypervisor: str = "KVM"
    public: bool = False
    deploy_as_is: bool = False
    #: The user and the password of a zone copy.
    auth: dict[str, str] | None = None
    #: Stop the download at so many bytes, as a resource limit of 4.23 does.
    limit: int | None = None
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    state: str = "NOT_DOWNLOADED"
    #: The server offers it to users.
    ready: bool = False
    error: str = ""
    job_id: str | None = None
    install_path: str = ""
    size: int = 0
    physical_size: int = 0
    percent: int = 0
    #: Each status that an agent has reported, without repetitions.
    reports: list[str] = field(default_factory=list)
    #: The templates of the data disks of an OVA.
    children: list[Entity] = field(default_factory=list)

    @property
    def directory(self) -> str:
        """Return the path that the server chooses."""
        if self.kind == "VOLUME":
            return f"volumes/{self.account}/{self.id}"
        path = f"template/tmpl/{self.account}/{self.id}"
        return path if self.store.s3 is None else f"{path}/{self.unique_name}"

    def transfer_object(self) -> dict[str, Any]:
        """Return the TemplateObjectTO or VolumeObjectTO with its class."""
        shared = {
            "path": self.install_path or self.directory,
            "uuid": self.uuid,
            "id": self.id,
            "format": self.format,
            "accountId": self.account,
            "name": self.unique_name,
            "size": self.size or None,
            "hypervisorType": self.hypervisor,
            "directDownload": False,
            "deployAsIs": self.deploy_as_is,
            "followRedirects": False,
        }
        store = self.store.transfer_object()
        if self.kind == "VOLUME":
            return {f"{_OBJECTS}VolumeObjectTO": shared | {"dataStore": store, "volumeId": self.id}}
        template = {"origUrl": self.url, "checksum": self.checksum, "hvm": True, "displayText": self.description}
        names = {"imageDataStore": store, "uniqueName": self.unique_name, "bootable": False}
        return {f"{_OBJECTS}TemplateObjectTO": shared | template | names}

    def reported(self, status: str) -> None:
        """Record a status of an agent's answer."""
        if not self.reports or self.reports[-1] != status:
            self.reports.append(status)


@dataclass
class HostRow:
    """A row of host: one agent."""

    id: int
    name: str
    guid: str
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    state: str = "Creating"
    states: list[str] = field(default_factory=list)
    #: The database lock that a server holds while it sets up the agent.
    join_lock: threading.Lock = field(default_factory=threading.Lock)
    #: Its AgentConnection while it has one; this module is below that class.
    connection: Any = None
    #: The connection that a server sets up. It stays here if it ends, until the server stops waiting.
    joining: Any = None
    startup: dict[str, Any] = field(default_factory=dict)


@dataclass
class SystemVmRow:
    """A row of secondary_storage_vm. The server sends setup commands only to an agent with such a row."""

    name: str
    public_address: str


class SimulatedZone:
    """One zone and all that the servers know about it."""

    def __init__(self, zone_id: str = "1", name: str = "Sandbox", say: Callable[[str], None] | None = None) -> None:
        """*say* gets each line of the log."""
        self.id, self.name = zone_id, name
        self.stores: list[ImageStoreRow] = []
        self.entities: dict[int, Entity] = {}
        self.hosts: list[HostRow] = []
        self.system_vms: list[SystemVmRow] = []
        self.upload_key = secrets.token_urlsafe(64)
        self.copy_password = secrets.token_urlsafe(9)
        self.allowed_internal_sites: list[str] = []
        self.log: list[str] = []
        #: What an agent did against the protocol.
        self.problems: list[str] = []
        self.lock = threading.RLock()
        self._say = say
        self._ids = itertools.count(201)
        self._started = time.monotonic()

    def add_store(self, url: str, **columns: Any) -> ImageStoreRow:
        """Add an image store, as addImageStore does."""
        self.stores.append(ImageStoreRow(url, **columns))
        return self.stores[-1]

    def add_system_vm(self, name: str, public_address: str) -> None:
        """Add the row of a running system VM."""
        self.system_vms.append(SystemVmRow(name, public_address))

    def add_entity(self, kind: str, url: str | None, image_format: str, store: ImageStoreRow, **columns: Any) -> Entity:
        """Add a template or a volume in state NOT_DOWNLOADED."""
        number = next(self._ids)
        account = columns.get("account", 1)
        name = f"{number}-{account}-{uuid.uuid3(uuid.NAMESPACE_URL, str(number))}"
        entity = Entity(number, kind, name, url, image_format, store, **columns)
        with self.lock:
            self.entities[number] = entity
        return entity

    def of_store(self, kind: str, store: ImageStoreRow) -> list[Entity]:
        """Return the templates or the volumes of one store."""
        with self.lock:
            return [each for each in self.entities.values() if each.kind == kind and each.store is store]

    def find_host(self, startup: dict[str, Any]) -> HostRow:
        """Return the row of an agent by its GUID, with or without the name of the resource. Create it if necessary."""
        with self.lock:
            guid = startup["guid"]
            for host in self.hosts:
                if guid == host.guid or _short(guid) == _short(host.guid):
                    return host
            self.hosts.append(HostRow(len(self.hosts) + 1, startup["name"], guid))
            return self.hosts[-1]

    def system_vm(self, name: str) -> SystemVmRow | None:
        """Return the row of a system VM by its name."""
        return next((each for each in self.system_vms if each.name == name), None)

    def set_state(self, host: HostRow, state: str, why: str) -> None:
        """Change the state of a host and write it to the log."""
        with self.lock:
            host.state = state
            host.states.append(state)
        self.write(f"host {host.name} is {state}: {why}")

    def set_ready(self, entity: Entity, *, ready: bool) -> None:
        """Offer an entity to users, or do not."""
        entity.ready = ready
        self.write(f"{entity.kind.lower()} {entity.id} is {'ready' if ready else 'not ready'}")

    def write(self, text: str) -> None:
        """Add a line to the log."""
        line = f"{time.monotonic() - self._started:8.3f}  {text}"
        self.log.append(line)
        if self._say:
            self._say(line)

    def problem(self, text: str) -> None:
        """Add a line to the log, and to the problems."""
        self.problems.append(text)
        self.write(f"PROTOCOL: {text}")

    def up_hosts(self) -> Iterator[HostRow]:
        """Yield the hosts that can get commands."""
        yield from (each for each in list(self.hosts) if each.state == "Up" and each.connection)


def _short(guid: str) -> str:
    """Return a GUID without the name of the resource: s-1-VM of s-1-VM-NfsSecondaryStorageResource."""
    return guid.rpartition("-")[0] if guid.endswith("Resource") else guid
