"""How a management server follows a download, and how it compares its database with the lists of a store."""

from __future__ import annotations

import threading
from typing import Any

from .server import AgentAnswer, AgentConnection, AgentServer
from .zone import Entity, ImageStoreRow

_ENDED = ("DOWNLOADED", "DOWNLOAD_ERROR", "ABANDONED", "UNKNOWN", "LIMIT_REACHED")
_GIB = 1 << 30


class DownloadServer(AgentServer):
    """A server that follows downloads."""

    def download(self, entity: Entity, connection: AgentConnection | None = None) -> None:
        """Start a download, or attach to it by its job id."""
        DownloadListener(self, connection or self.connection(), entity).start()

    def finish(self, connection: AgentConnection, entity: Entity) -> None:
        """Make the entity ready: an OVA for VMware needs the templates of its disks before."""
        split = entity.kind == "TEMPLATE" and entity.format == "OVA" and entity.hypervisor == "VMware"
        if not split or entity.deploy_as_is or make_data_disks(self, connection, entity):
            self.zone.set_ready(entity, ready=True)


class DownloadListener:
    """Sends DownloadCommand for one entity and polls until its end. One thread runs it."""

    def __init__(self, server: DownloadServer, connection: AgentConnection, entity: Entity) -> None:
        self._server, self._connection, self._entity = server, connection, entity
        #: All requests of a listener repeat its first command (seen): PURGE has the user's checksum, if any.
        self.fields = self._command()

    def start(self) -> None:
        """Follow the download in a thread."""
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        """Send the command, poll, and end with PURGE, as CloudStack's state machine does."""
        entity, first = self._entity, True
        if entity.job_id is None:
            answer = self._connection.send("DownloadCommand", self.fields)
        else:
            answer = self._progress("GET_OR_RESTART")
        while self._take(answer, first=first):
            first = False
            self._connection.closed.wait(self._server.times.poll)
            answer = self._progress("GET_STATUS")
        if entity.state == "DOWNLOADED":
            self._server.finish(self._connection, entity)
            purged = self._progress("PURGE")
            entity.physical_size = purged.fields.get("templatePhySicalSize") or entity.physical_size
        elif entity.state == "LIMIT_REACHED":
            self._progress("PURGE")

    def _progress(self, request: str) -> AgentAnswer:
        fields = {"jobId": self._entity.job_id, "request": request} | self.fields
        return self._connection.send("DownloadProgressCommand", fields)

    def _command(self) -> dict[str, Any]:
        entity = self._entity
        return {
            "hvm": entity.kind == "TEMPLATE",
            "description": entity.description or None,
            "checksum": entity.checksum,
            "auth": entity.auth,
            "maxDownloadSizeInBytes": 50 * _GIB,
            "id": entity.id,
            "resourceType": entity.kind,
            "installPath": entity.directory,
            "_store": entity.store.transfer_object(),
            "followRedirects": False,
            "url": entity.url,
            "format": entity.format,
            "accountId": entity.account,
            "name": entity.unique_name,
            "secUrl": entity.store.secondary_url,
            "nfsVersion": entity.store.nfs_version,
        }

    def _take(self, answer: AgentAnswer, *, first: bool) -> bool:
        """Write an answer to the database. Return whether the download continues."""
        entity, fields = self._entity, answer.fields
        if answer.name != "DownloadAnswer":
            return self._failed(answer)
        if not first and fields.get("jobId") != entity.job_id:
            self._server.zone.write(f"answer for the job {fields.get('jobId')} ignored; {entity.job_id} is known")
            return True
        entity.job_id = fields.get("jobId") or entity.job_id
        entity.state = str(fields.get("downloadStatus"))
        entity.reported(entity.state)
        entity.percent = int(fields.get("downloadPct") or 0)
        entity.error = str(fields.get("errorString") or "").strip()
        if entity.limit and (fields.get("templatePhySicalSize") or 0) > entity.limit:
            entity.state = "LIMIT_REACHED"
        if entity.state == "DOWNLOADED":
            entity.size = int(fields["templateSize"])
            entity.physical_size = int(fields["templatePhySicalSize"])
            entity.install_path = str(fields["installPath"])
            entity.checksum = fields.get("checkSum") or entity.checksum  # seen: overwrites that of the user
            entity.error = ""
        if entity.state not in _ENDED:
            return True
        self._server.zone.write(f"{entity.kind.lower()} {entity.id}: {entity.state} {entity.error}".rstrip())
        return False

    def _failed(self, answer: AgentAnswer) -> bool:
        """Set the error that the server sets if no answer comes. A server that has died sets nothing."""
        if not self._server.stopping.is_set():
            disconnected = "Storage agent or storage VM disconnected" if self._connection.closed.is_set() else ""
            silent = "" if answer.name else "Timeout waiting for response from storage host"
            self._entity.state, self._entity.error = "DOWNLOAD_ERROR", disconnected or silent or answer.details
            self._server.zone.write(f"download of {self._entity.id}: {self._entity.error}")
        return False


def sync_volumes(server: DownloadServer, connection: AgentConnection, store: ImageStoreRow) -> None:
    """Compare the volumes of a store with its ListVolumeAnswer."""
    fields = {"store": store.transfer_object(), "secUrl": store.secondary_url}
    answer = connection.send("ListVolumeCommand", fields)
    infos = _infos(server, answer)
    if infos is None:
        return
    for volume in server.zone.of_store("VOLUME", store):
        if str(volume.id) in infos:
            volume.state = "DOWNLOADED"
        elif volume.state == "DOWNLOADED" and volume.url:
            server.zone.write(f"volume {volume.id} is not in the list of {store.url}: it will be downloaded again")
            volume.state, volume.ready, volume.job_id = "NOT_DOWNLOADED", False, None
            server.download(volume, connection)
    known = {str(each.id) for each in server.zone.of_store("VOLUME", store)}
    for number in sorted(set(infos) - known):
        _delete_unknown(server, connection, store, infos[number])


def sync_templates(server: DownloadServer, connection: AgentConnection, store: ImageStoreRow) -> None:
    """Compare the templates of a store with its ListTemplateAnswer, and act as TemplateServiceImpl does.

    What the list does not contain is downloaded again. What the database does not contain is deleted.
    """
    infos = _list_templates(server, connection, store)
    if infos is None:
        return
    for template in server.zone.of_store("TEMPLATE", store):
        info = infos.get(template.unique_name)
        if info is None:
            _download_again(server, connection, store, template)
        elif info.get("isCorrupted"):
            template.state, template.ready, template.job_id = "DOWNLOAD_ERROR", False, None
            server.zone.write(f"template {template.id} is corrupted")
        else:
            template.state, template.install_path = "DOWNLOADED", info["installPath"]
            template.size, template.physical_size = info["size"], info["physicalSize"]
            server.zone.set_ready(template, ready=True)
    known = {each.unique_name for each in server.zone.of_store("TEMPLATE", store)}
    for name in sorted(set(infos) - known):
        _delete_unknown(server, connection, store, infos[name])


def _download_again(
    server: DownloadServer, connection: AgentConnection, store: ImageStoreRow, template: Entity
) -> None:
    if template.state == "DOWNLOADED":
        server.zone.write(f"Removing leftover template {template.id} entry from template store table")
        template.job_id = None
    template.state, template.ready = "NOT_DOWNLOADED", False
    if template.url is None:
        server.zone.write(f"template {template.id} is lost: it has no URL")
        return
    server.download(template, connection)
    _list_templates(server, connection, store)  # seen: one more list for each download


def _list_templates(
    server: DownloadServer, connection: AgentConnection, store: ImageStoreRow
) -> dict[str, dict[str, Any]] | None:
    fields = {"store": store.transfer_object(), "nfsVersion": store.nfs_version}
    return _infos(server, connection.send("ListTemplateCommand", fields))


def _infos(server: DownloadServer, answer: AgentAnswer) -> dict[str, dict[str, Any]] | None:
    """Return the entries of a list, or None if the answer does not allow to draw conclusions."""
    infos = answer.fields.get("templateInfos")
    if not answer.ok or infos is None:
        server.zone.write(f"the list is not used: {answer.details}")
        return None
    return dict(infos)


def _delete_unknown(
    server: DownloadServer, connection: AgentConnection, store: ImageStoreRow, info: dict[str, Any]
) -> None:
    path = info["installPath"]
    server.zone.write(f"{path} is not in the database: it will be deleted")
    kind = "VolumeObjectTO" if path.startswith("volumes/") else "TemplateObjectTO"
    where = "dataStore" if kind == "VolumeObjectTO" else "imageDataStore"
    data = {"path": path, "id": info.get("id"), "accountId": 0, where: store.transfer_object()}
    connection.send("DeleteCommand", {"data": {f"org.apache.cloudstack.storage.to.{kind}": data}, "deleteChain": False})


def make_data_disks(server: DownloadServer, connection: AgentConnection, template: Entity) -> bool:
    """Create the templates of an OVA's disks. Return whether the template can become ready.

    Without them, the template of a VMware zone never leaves the state Allocated (seen).
    """
    answer = connection.send("GetDatadisksCommand", {"data": template.transfer_object()})
    disks = answer.fields.get("dataDiskDetails")
    if answer.name != "GetDatadisksAnswer" or not answer.ok or disks is None:
        server.zone.write(f"template {template.id} stays Allocated: {answer.details or answer.name}")
        return False
    for number, disk in enumerate(disks):
        target = template if disk.get("bootable") else _child(server, template, disk, number)
        if not _make_disk(server, connection, target, disk):
            return False
    return True


def _child(server: DownloadServer, template: Entity, disk: dict[str, Any], number: int) -> Entity:
    shared = {"account": template.account, "hypervisor": template.hypervisor, "public": template.public}
    child = server.zone.add_entity("TEMPLATE", template.url, template.format, template.store, **shared)
    child.description = f"{template.description}-DataDiskTemplate-{number}"
    child.size = disk["virtualSize"]
    template.children.append(child)
    return child


def _make_disk(server: DownloadServer, connection: AgentConnection, target: Entity, disk: dict[str, Any]) -> bool:
    """Send one CreateDatadiskTemplateCommand. Return False if the server cannot use the answer."""
    fields = {
        "dataDiskTemplate": target.transfer_object(),
        "path": disk["path"],
        "fileSize": disk["fileSize"],
        "bootable": disk["bootable"],
        "diskId": disk["diskId"],
    }
    answer = connection.send("CreateDatadiskTemplateCommand", fields)
    made = answer.fields.get("dataDiskTemplate") or {}
    if not answer.ok or made.get("id") != target.id:
        # Seen: NullPointerException in TemplateObject.processEvent, and the row is deleted.
        server.zone.problem(f"no data disk template of id {target.id} in {answer.name}: {answer.details or made}")
        server.zone.entities.pop(target.id, None)
        return False
    target.install_path, target.size = made["path"], made["size"]
    target.physical_size, target.state = made.get("physicalSize", 0), "DOWNLOADED"
    target.ready = bool(target.ready or not disk["bootable"])
    return True
