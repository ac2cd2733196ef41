"""MoveVolumeCommand: move a volume to the directory of another account, inside its store.

Differences from the Java agent: the command is a job, so a repeated or interrupted move continues. Both paths must be
below ``volumes/``. A bucket is allowed.
"""

from __future__ import annotations

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.cloudstack.jobs_to_end import limit_of, run_job
from ssvm_worker.cloudstack.keys import key_of
from ssvm_worker.cloudstack.messages import Answer, MoveVolumeCommand
from ssvm_worker.cloudstack.services import Services
from ssvm_worker.cloudstack.transfer_objects import NfsTO
from ssvm_worker.errors import InvalidRequest


def move_volume(command: MoveVolumeCommand, services: Services) -> Answer:
    """Move the directory or the file of a volume."""
    key, to = key_of(command.src_path), key_of(command.dest_path)
    for each in (key, to):
        _check_volume(each)
    # The command has the URL of the store only. It is that of an NFS export in every version of CloudStack.
    store = services.stores.find(NfsTO(url=command.datastore_uri))
    request = {"source": store.name, "key": key, "store": store.name, "to": to, "move": True}
    services.names.note_move(store.name)
    run_job(services, "transfer", request, limit_of(command.wait))
    name = command.volume_name or command.volume_uuid or ""
    return Answer(result=True, details=f"Moved volume {name} from {key} to {to}.")


def _check_volume(key: str) -> None:
    try:
        if Artifact.of_prefix("/".join(key.split("/")[:3])).kind == "volume" and key.count("/") < 4:
            return
    except InvalidRequest:
        pass
    raise InvalidRequest("This is not the path of a volume", key, "Give volumes/ACCOUNT/ID")
