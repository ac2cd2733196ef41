"""QuerySnapshotZoneCopyCommand: list the files of a snapshot that another zone will fetch.

Differences from the Java agent: a directory that cannot be read is a failure, not an empty list. The worker's own
manifests are not listed. The list is sorted.
"""

from __future__ import annotations

from ssvm_worker.artifacts.layout import DRAFT, MANIFEST
from ssvm_worker.cloudstack.artifacts import all_objects
from ssvm_worker.cloudstack.keys import key_of
from ssvm_worker.cloudstack.messages import QuerySnapshotZoneCopyAnswer, QuerySnapshotZoneCopyCommand
from ssvm_worker.cloudstack.services import Services
from ssvm_worker.errors import InvalidRequest, ObjectNotFound
from ssvm_worker.streaming.interfaces import Store

#: Time limit in seconds of the list.
_LIST_S = 20.0


def query_snapshot(command: QuerySnapshotZoneCopyCommand, services: Services) -> QuerySnapshotZoneCopyAnswer:
    """Answer with the file of a snapshot, or with all files next to it: those of an OVF."""
    snapshot = command.snapshot
    if snapshot is None:
        raise InvalidRequest("The command has no snapshot", "snapshot")
    key = key_of(snapshot.path)
    if not key.startswith("snapshots/") or key.count("/") < 3:
        raise InvalidRequest("This is not the path of a snapshot", key, "Give snapshots/ACCOUNT/VOLUME/NAME")
    store = services.stores.find(snapshot.store)
    files = services.stores.call(store, lambda each: _files(each, key), _LIST_S)
    return QuerySnapshotZoneCopyAnswer(result=True, files=files)


def _files(store: Store, key: str) -> list[str]:
    """Return the keys. Raise ObjectNotFound if there is none."""
    try:
        return [store.stat(key).key]
    except ObjectNotFound:
        directory = key.rpartition("/")[0]
    found = [each.key for each in all_objects(store, directory) if each.key.rpartition("/")[0] == directory]
    files = sorted(each for each in found if each.rpartition("/")[2] not in (MANIFEST, DRAFT))
    if not files:
        raise ObjectNotFound("There is no such snapshot", f"{store.name}:{key}")
    return files
