"""DeleteCommand and DeleteSnapshotsDirCommand. A worker deletes, and the answer follows when nothing is left.

A snapshot has one of these paths:

- ``snapshots/ACCOUNT/VOLUME/NAME``: a file, perhaps with an extension, that a hypervisor or the Java agent has written.
  If it is a directory, the Java agent deletes nothing and answers with success. So does this agent.
- ``snapshots/ACCOUNT/VOLUME/ID/ID``: a backup with several files in a directory.

The Java agent deletes all files whose name contains the name of the snapshot. This agent deletes the files that have
the name alone or with an extension.

A backup of KVM (4.23) is one file and perhaps a screenshot, below a directory of their own. A missing file is no error.
"""

from __future__ import annotations

import contextlib
from typing import Any

from ssvm_worker.artifacts.layout import Artifact, check_foreign_key, check_name
from ssvm_worker.cloudstack.artifacts import all_objects
from ssvm_worker.cloudstack.jobs_to_end import BY, job_id_of, start_job, wait_for_job
from ssvm_worker.cloudstack.keys import key_of
from ssvm_worker.cloudstack.messages import Answer, BackupDeleteAnswer, DeleteCommand, DeleteSnapshotsDirCommand
from ssvm_worker.cloudstack.services import Services
from ssvm_worker.cloudstack.transfer_objects import BackupDeltaTO, SnapshotObjectTO, TemplateObjectTO, VolumeObjectTO
from ssvm_worker.errors import InvalidRequest, WorkerError
from ssvm_worker.ledger.record import QUEUED, RUNNING
from ssvm_worker.streaming.interfaces import HoldsForeign, Store

#: Time limit in seconds of a deletion. The server waits for an hour.
_DELETE_S = 1200.0
#: Time limit in seconds of a list.
_LIST_S = 60.0
#: The directories of everything but backups of KVM.
_ROOTS = ("template", "volumes", "snapshots")
#: The number of running downloads that a deletion looks at.
_MAX_DOWNLOADS = 1000


def delete(command: DeleteCommand, services: Services) -> Answer:
    """Delete a template, volume or snapshot. A missing one, and one without a path, are no errors."""
    data = command.data
    if isinstance(data, BackupDeltaTO):
        return _delete_backup(data, services)
    if data is None:
        raise InvalidRequest("The command names no object", "data")
    if not data.path:
        return Answer(result=True)
    store = data.store or (data.image_store if isinstance(data, SnapshotObjectTO) else None)
    name = services.stores.find(store).name
    if request := _request(data, data.path):
        _run(services, name, [request])
    return Answer(result=True)


def delete_snapshots(command: DeleteSnapshotsDirCommand, services: Services) -> Answer:
    """Delete all snapshots of a volume. A missing directory is no error."""
    store = services.stores.find(command.store)
    parts = _parts(command.directory)
    if len(parts) != 3 or parts[0] != "snapshots":
        raise InvalidRequest("The path is not one of a volume's snapshots", command.directory)
    _, account, volume = parts
    found = services.stores.call(store, lambda each: all_objects(each, "/".join(parts)), _LIST_S)
    names = [each.key.split("/")[3:] for each in found]
    backups = sorted({name[0] for name in names if len(name) > 1})
    shared = {"kind": "backup", "account": account, "volume": volume}
    requests = [shared | {"id": each} for each in backups if each != "_packs"]
    if any(len(name) == 1 for name in names):
        requests.append(shared | {"id": "all", "files": "*"})
    _run(services, store.name, requests)
    return Answer(result=True)


def _delete_backup(data: BackupDeltaTO, services: Services) -> Answer:
    """Delete the file, the screenshot, and the directories that are empty then. A failure names the backup."""
    try:
        keys = [key_of(each, check_foreign_key) for each in (data.path, data.screenshot_path) if each]
        for key in keys:
            if key.split("/")[0] in _ROOTS:
                raise InvalidRequest("This is not the path of a backup", key, "Send the object with its own class")
        services.stores.call(services.stores.find(data.store), lambda store: _delete_files(store, keys), _LIST_S)
    except WorkerError as error:
        return BackupDeleteAnswer(result=False, details=str(error), backup_id=data.id or 0)
    return Answer(result=True)


def _delete_files(store: Store, keys: list[str]) -> None:
    lenient = store.lenient() if isinstance(store, HoldsForeign) else store
    for key in keys:
        lenient.delete(key)


def _request(data: TemplateObjectTO | VolumeObjectTO | SnapshotObjectTO, path: str) -> dict[str, Any] | None:
    """Return the request of the job, or None if there is nothing to delete. Raise InvalidRequest for a hostile path."""
    parts = _parts(path)
    if isinstance(data, SnapshotObjectTO):
        if parts[0] != "snapshots" or not 3 <= len(parts) <= 5:
            raise InvalidRequest("The path is not one of a snapshot", path)
        if len(parts) == 3:  # the directory of the volume
            return None
        account, volume, id_ = (check_name(each) for each in parts[1:4])
        found = {"kind": "backup", "account": account, "volume": volume, "id": id_}
        name = parts[-1]
        return found if len(parts) == 5 and name == id_ else found | {"files": check_name(name)}
    is_volume = isinstance(data, VolumeObjectTO)
    artifact = Artifact.of_prefix("/".join(parts[: 3 if is_volume else 4]))
    if artifact.kind != ("volume" if is_volume else "template") or len(parts) > 6:
        raise InvalidRequest(f"The path is not one of a {'volume' if is_volume else 'template'}", path)
    return {"kind": artifact.kind, "account": artifact.account, "id": artifact.id}


def _parts(path: str) -> list[str]:
    parts = [each for each in path.split("/") if each]
    if not parts or any(each in (".", "..") or not each.isprintable() for each in parts):
        raise InvalidRequest("The path leaves the store, or has control characters", path)
    return parts


def _run(services: Services, store: str, requests: list[dict[str, Any]]) -> None:
    """Delete all artifacts, at once as far as workers are free, and wait for the end."""
    started = []
    for each in requests:
        artifact = Artifact(each["kind"], each["account"], each["id"], each.get("volume", ""))
        _cancel_downloads(services, store, artifact)
        request = each | {"stores": [store]}
        job_id = job_id_of("delete", store, artifact.prefix, each.get("files", ""))
        started.append(start_job(services, "delete", job_id, request))
    problems = []
    for job_id in started:
        try:
            wait_for_job(services, job_id, _DELETE_S)
        except WorkerError as error:
            problems.append(error)
    if problems:
        raise problems[0]


def _cancel_downloads(services: Services, store: str, artifact: Artifact) -> None:
    """Cancel the downloads of the artifact. A deletion would wait for their end."""
    if artifact.kind == "backup":
        return
    for state in (QUEUED, RUNNING):
        for record in services.jobs.jobs(state=state, zone=services.settings.zone, limit=_MAX_DOWNLOADS):
            its_stores = record.request.get("stores", ["primary"])  # the record omits the default
            if (record.job, record.resource) == ("download", artifact.prefix) and store in its_stores:
                with contextlib.suppress(InvalidRequest):  # it has ended meanwhile
                    services.jobs.cancel(record.job_id, by=BY)
