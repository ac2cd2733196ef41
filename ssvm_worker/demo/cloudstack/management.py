"""A simulated management server: what users and operators of a cloud do with secondary storage."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from . import downloads
from .authority import RootAuthority
from .downloads import DownloadServer
from .server import AgentAnswer, AgentConnection, ServerTimes
from .zone import Entity, HostRow, ImageStoreRow, SimulatedZone

_OBJECTS = "org.apache.cloudstack.storage.to."


@dataclass(frozen=True)
class DownloadLink:
    """A link that the server has given to a user."""

    entity: Entity
    url: str
    path: str


@dataclass(frozen=True)
class UploadTicket:
    """What getUploadParamsForTemplate returns to a browser."""

    entity: Entity
    url: str
    metadata: str
    expires: str
    signature: str

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers of the POST."""
        return {"X-signature": self.signature, "X-metadata": self.metadata, "X-expires": self.expires}


class ManagementServer(DownloadServer):
    """A management server with stores, templates, volumes, links, uploads and copies."""

    def prepare(self, connection: AgentConnection, host: HostRow) -> None:
        """Send the setup commands of a system VM, then compare all lists."""
        row = self.zone.system_vm(host.name)
        if row is None:
            self.zone.write(f"Secondary storage VM [{host.name}] does not exist.")
        else:
            for store in [each for each in self.zone.stores if each.s3 is None]:
                fields = {"store": store.transfer_object(), "secUrl": store.url, "postUploadKey": self.zone.upload_key}
                answer = connection.send("SecStorageSetupCommand", fields | {"nfsVersion": store.nfs_version})
                if answer.ok:
                    store.parent = answer.fields["_dir"]
                else:
                    self.zone.write(f"setup of {store.url} failed: {answer.details}")
            self._open_firewall(connection, host, row.public_address)
            fields = {"allowedInternalSites": self.zone.allowed_internal_sites, "copyUserName": "cloud"}
            connection.send("SecStorageVMSetupCommand", fields | {"copyPassword": self.zone.copy_password})
        for store in [each for each in self.zone.stores if not each.readonly]:
            downloads.sync_volumes(self, connection, store)
        for store in [each for each in self.zone.stores if not each.readonly]:
            downloads.sync_templates(self, connection, store)

    def _open_firewall(self, connection: AgentConnection, host: HostRow, address: str) -> None:
        """Allow the system VMs to fetch copies from each other."""
        others = [each for each in self.zone.up_hosts() if each is not host and self.zone.system_vm(each.name)]
        for other in others:
            if other.connection:
                port = {"add": True, "sourceIp": address, "port": "443", "intf": "eth2"}
                other.connection.send("SecStorageFirewallCfgCommand", {"portConfigs": [port], "isAppendAIp": True})
        rows = [row for each in others if (row := self.zone.system_vm(each.name))]
        ports = [{"add": True, "sourceIp": row.public_address, "port": "443", "intf": "eth2"} for row in rows]
        connection.send("SecStorageFirewallCfgCommand", {"portConfigs": ports or None, "isAppendAIp": False})

    # Hosts

    def wait_up(self, host_name: str | None = None, timeout: float = 120) -> AgentConnection:
        """Wait until an agent is Up, and return its connection. Raise TimeoutError with the log."""
        self.wait(lambda: self._is_up(host_name), f"an agent is Up ({host_name or 'any'})", timeout)
        return self.connection(host_name)

    def _is_up(self, host_name: str | None) -> bool:
        with contextlib.suppress(LookupError):
            return not self.connection(host_name).closed.is_set()
        return False

    def wait(self, true: Any, what: str, timeout: float = 120) -> None:
        """Wait until *true* returns True. Raise TimeoutError with the log."""
        deadline = time.monotonic() + timeout
        while not true():
            if time.monotonic() > deadline:
                raise TimeoutError(f"never came true: {what}\n" + "\n".join(self.log))
            time.sleep(0.02)

    def host_row(self, host_name: str) -> HostRow:
        """Return the row of an agent."""
        return next(each for each in self.zone.hosts if each.name == host_name)

    def migrate(self, servers: list[str], *, avoid: list[str]) -> list[AgentAnswer]:
        """Move all agents to *servers*, as prepareForMaintenance does from 4.21 on. Return the answers."""
        answers = []
        lists = {"msList": servers, "avoidMsList": avoid, "lbAlgorithm": self.algorithm, "lbCheckInterval": 0}
        for host in list(self.zone.up_hosts()):
            if host.connection and host.connection.server is self:
                host.connection.send("SetupMSListCommand", lists | {"triggerHostLb": False})
                answers.append(host.connection.send("MigrateAgentConnectionCommand", lists))
        return answers

    def renew_certificate(self, *addresses: str) -> AgentAnswer:
        """Send a new certificate to the agent. A real server does so before the old one expires."""
        connection = self.connection()
        issued = self.authority.issue(*addresses)
        files = {"certificate": issued.certificate, "privateKey": issued.key, "caCertificates": issued.ca}
        fields: dict[str, Any] = {name: path.read_text() for name, path in files.items()}
        return connection.send("SetupCertificateCommand", fields | {"handleByAgent": True})

    # Templates and volumes

    def register_template(
        self, url: str, image_format: str = "QCOW2", *, store: ImageStoreRow | None = None, **columns: Any
    ) -> Entity:
        """Register a template and start its download. Return it at once."""
        template = self.zone.add_entity("TEMPLATE", url, image_format, store or self.zone.stores[0], **columns)
        self.zone.write(f"user registers template {template.id}: {url}")
        self.download(template)
        return template

    def register_volume(
        self, url: str, image_format: str = "QCOW2", *, store: ImageStoreRow | None = None, **columns: Any
    ) -> Entity:
        """Register a volume by its URL (uploadVolume)."""
        volume = self.zone.add_entity("VOLUME", url, image_format, store or self.zone.stores[0], **columns)
        self.zone.write(f"user registers volume {volume.id}: {url}")
        self.download(volume)
        return volume

    def template(self, number: int) -> Entity:
        """Return a template or a volume by its id."""
        return self.zone.entities[number]

    def wait_ready(self, entity: Entity, timeout: float = 120) -> Entity:
        """Wait until a template or a volume is ready. Raise TimeoutError with the log."""
        self.wait(lambda: entity.ready, f"{entity.kind} {entity.id} is ready", timeout)
        return entity

    def delete(self, entity: Entity) -> AgentAnswer:
        """Delete a template with its children, or a volume."""
        for child in list(entity.children):
            self.delete(child)
        answer = self.connection().send("DeleteCommand", {"data": entity.transfer_object(), "deleteChain": False})
        if answer.ok:
            self.zone.entities.pop(entity.id, None)
        return answer

    def copy_template(self, template: Entity, to: ManagementServer, store: ImageStoreRow | None = None) -> Entity:
        """Copy a template to the zone of another server: its agent downloads from the agent of this zone."""
        name = self.connection().host_row.name  # type: ignore[union-attr]
        row = self.zone.system_vm(name)
        if row is None or not template.store.parent:
            raise LookupError(f"{name} has no row in secondary_storage_vm, or its store has no parent")
        url = f"http://{row.public_address}/copy/SecStorage/{template.store.parent}/{template.install_path}"
        auth = {"userName": "cloud", "password": self.zone.copy_password}
        return to.register_template(
            url, template.format, store=store, auth=auth, hypervisor=template.hypervisor, deploy_as_is=True
        )

    def move_to_store(self, entity: Entity, store: ImageStoreRow) -> AgentAnswer:
        """Copy an entity to another store and delete it on the first (migrateSecondaryStorageData)."""
        source = entity.transfer_object()
        target = Entity(**{**vars(entity), "store": store, "install_path": ""}).transfer_object()
        fields = {"srcTO": source, "destTO": target, "executeInSequence": False, "options": {}, "options2": {}}
        answer = self.connection().send("CopyCommand", fields | {"wait": 1800000}, wait=self.times.wait)
        if answer.ok:
            self.connection().send("DeleteCommand", {"data": source, "deleteChain": False})
            data = next(iter(answer.fields["newData"].values()))
            entity.store, entity.install_path = store, data["path"]
        return answer

    # Links

    def extract(self, entity: Entity) -> DownloadLink:
        """Create a download link (extractTemplate). Raise LookupError with the agent's reason if it refuses."""
        connection = self.connection()
        extension, folder = entity.install_path.rpartition(".")[2], str(uuid.uuid4())
        name = f"{entity.unique_name}.{extension}"
        fields = {
            "installPath": entity.install_path,
            "parent": entity.store.parent,
            "filenameInExtractURL": name,
            "filepathInExtractURL": folder,
            "data": entity.transfer_object(),
            "accountId": 0,
        }
        answer = connection.send("CreateEntityDownloadURLCommand", fields)
        if not answer.ok:
            raise LookupError(answer.details)
        assert connection.host_row
        row = self.zone.system_vm(connection.host_row.name)
        address = row.public_address if row else connection.address
        link = DownloadLink(entity, f"http://{address}/userdata/{folder}/{name}", entity.install_path)
        self.zone.write(f"user gets the link {link.url}")
        return link

    def expire(self, link: DownloadLink) -> AgentAnswer:
        """Delete a link, as the clean-up thread does after its expiry."""
        fields = {"path": link.path, "extractUrl": link.url, "type": link.entity.kind, "accountId": 0}
        return self.connection().send(
            "DeleteEntityDownloadURLCommand", fields | {"parentPath": link.entity.store.parent, "contextMap": {}}
        )

    # Uploads

    def upload_ticket(
        self, image_format: str = "QCOW2", *, address: str | None = None, valid_s: float = 3600, **columns: Any
    ) -> UploadTicket:
        """Create a template for an upload by a browser, and return what the browser needs (getUploadParams)."""
        connection = self.connection()
        store = columns.pop("store", None) or self.zone.stores[0]
        entity = self.zone.add_entity("TEMPLATE", None, image_format, store, **columns)
        entity.state = "NOT_UPLOADED"
        assert connection.host_row
        row = self.zone.system_vm(connection.host_row.name)
        host = address or (row.public_address if row else connection.address)
        url = f"https://{host}/upload/{entity.uuid}"
        text = json.dumps(self._upload_metadata(entity), separators=(",", ":"))
        key, nonce = hashlib.sha256(self.zone.upload_key.encode()).digest(), os.urandom(12)
        metadata = base64.b64encode(nonce + AESGCM(key).encrypt(nonce, text.encode(), b"")).decode()
        ends = datetime.now(UTC) + timedelta(seconds=valid_s)
        expires = ends.strftime("%Y-%m-%dT%H:%M:%S.") + f"{ends.microsecond // 1000:03d}Z"
        signed = hmac.new(self.zone.upload_key.encode(), f"{metadata}{url}{expires}".encode(), hashlib.sha1)
        threading.Thread(target=self._watch_upload, args=(connection, entity), daemon=True).start()
        return UploadTicket(entity, url, metadata, expires, base64.b64encode(signed.digest()).decode())

    def _upload_metadata(self, entity: Entity) -> dict[str, Any]:
        return {
            "entityId": entity.id,
            "entityUUID": entity.uuid,
            "absolutePath": entity.directory,
            **({"checksum": entity.checksum} if entity.checksum else {}),
            "type": entity.kind,
            "name": entity.unique_name,
            "requiresHvm": False,
            "imageFormat": entity.format,
            "dataTo": entity.store.url,
            "dataToRole": "Image",
            "remoteEndPoint": "127.0.0.1",
            "maxUploadSize": "50",
            "description": entity.description,
            "defaultMaxSecondaryStorageInGB": -1,
            "processTimeout": 3600,
            "accountId": entity.account,
            "zoneId": 1,
        }

    def _watch_upload(self, connection: AgentConnection, entity: Entity) -> None:
        """Poll UploadStatusCommand until the upload has ended, on any connection of the agent."""
        fields = {"entityUuid": entity.uuid, "entityType": entity.kind.capitalize()}
        while not self.stopping.wait(self.times.upload_poll) and entity.id in self.zone.entities:
            try:
                connection = self.connection()
            except LookupError:
                continue
            answer = connection.send("UploadStatusCommand", fields)
            status = str(answer.fields.get("status"))
            if answer.name != "UploadStatusAnswer":
                continue
            entity.reported(status)
            entity.percent = int(answer.fields.get("downloadPercent") or 0)
            if status == "COMPLETED":
                entity.state, entity.size = "UPLOADED", answer.fields["virtualSize"]
                entity.physical_size = answer.fields["physicalSize"]
                entity.install_path = answer.fields["installPath"]
                self.finish(connection, entity)
                return
            if status == "ERROR":
                entity.state, entity.error = "UPLOAD_ERROR", answer.details
                return

    # Other commands

    def collect_stats(self) -> Iterator[tuple[ImageStoreRow, AgentAnswer]]:
        """Ask for the capacity of each store, as StatsCollector does, and yield the answers."""
        for store in self.zone.stores:
            answer = self.connection().send("GetStorageStatsCommand", {"store": store.transfer_object()})
            if answer.ok:
                store.used, store.capacity = answer.fields["usedBytes"], answer.fields["capacityBytes"]
            yield store, answer

    def browse(self, store: ImageStoreRow, path: str) -> AgentAnswer:
        """List a directory of a store (listImageStoreObjects)."""
        fields = {"store": store.transfer_object(), "path": path, "startIndex": 0, "pageSize": 500, "wait": 15}
        return self.connection().send("ListDataStoreObjectsCommand", fields)

    def checksum(self, entity: Entity, algorithm: str = "SHA-512") -> AgentAnswer:
        """Compute the checksum of a file on a store."""
        fields = {"store": entity.store.transfer_object(), "templatePath": entity.install_path, "algorithm": algorithm}
        return self.connection().send("ComputeChecksumCommand", fields | {"secUrl": entity.store.secondary_url})


def make_management_server(directory: Path, **given: Any) -> ManagementServer:
    """Return a server with a new zone and a new authority in *directory*. It does not listen yet."""
    say = given.pop("say", None)
    times = given.pop("times", None) or ServerTimes(poll=1, upload_poll=1)
    directory.mkdir(exist_ok=True)
    return ManagementServer(SimulatedZone(say=say), RootAuthority(directory), times=times, **given)
