"""Download links: the server chooses a path below ``/userdata/`` and builds the URL. The agent makes the path valid.

`ssvm serve` answers the path from the ledger. With ``cloudstack.web_root``, the agent also makes a symbolic link for
the Apache of a system VM. It is where the Java agent makes it: ``WEB_ROOT/userdata/DIRECTORY/NAME``.

The answers are those of the Java agent, which the recorded conversations have. An unsafe path is refused here, and the
Java agent passes it to a shell. A VMware volume of OVF and VMDK becomes an OVA with all files that its OVF names. The
Java agent packs only the OVF and the first disk.
"""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from urllib.parse import unquote

from ssvm_worker.artifacts.layout import Artifact, check_key
from ssvm_worker.artifacts.manifest import find_manifest
from ssvm_worker.cloudstack.apache import ApacheFiles
from ssvm_worker.cloudstack.artifacts import all_objects
from ssvm_worker.cloudstack.image_stores import NamedStore
from ssvm_worker.cloudstack.jobs_to_end import job_id_of, limit_of, run_job, start_job
from ssvm_worker.cloudstack.keys import parts_of
from ssvm_worker.cloudstack.messages import (
    Answer,
    CreateEntityDownloadURLAnswer,
    CreateEntityDownloadURLCommand,
    DeleteEntityDownloadURLCommand,
)
from ssvm_worker.cloudstack.services import Services
from ssvm_worker.errors import InvalidRequest, ObjectNotFound, WorkerError
from ssvm_worker.ledger.cloudstack_web import USERDATA, PublishedLink, check_path
from ssvm_worker.streaming.interfaces import HoldsForeign, Store

_log = logging.getLogger("ssvm.cloudstack")
#: Seconds for the check of the object.
_CHECK_S = 20.0


def create_link(command: CreateEntityDownloadURLCommand, services: Services) -> CreateEntityDownloadURLAnswer:
    """Make a link to an object of a directory store.

    Raise ObjectNotFound, which becomes ``result: false``, if there is no such file.
    """
    directory = command.filepath_in_extract_url
    parts = (directory.get_secret_value() if directory else "", command.filename_in_extract_url.get_secret_value())
    path = check_path("/".join(part.strip("/") for part in parts if part))
    store = _store_of(command, services)
    path_of_object = check_key(command.install_path.strip("/"))
    try:
        key = _packed(services, store, path_of_object, command.wait)
        until = int(time.time() + services.settings.cloudstack.link_s)
        services.web.publish(PublishedLink(path, store.name, key, until))
        if root := services.settings.cloudstack.web_root:
            apache = ApacheFiles(root)
            apache.make_link(path, services.stores.call(store, lambda opened: _file_of(opened, key), _CHECK_S))
            _remove_expired(apache, services)
    except WorkerError as error:
        return CreateEntityDownloadURLAnswer(result=False, details=str(error))
    _log.info("made a download link to %s:%s", store.name, key)
    return CreateEntityDownloadURLAnswer(result=True, details="")


def _packed(services: Services, store: NamedStore, path: str, wait: int | None) -> str:
    """Return the key of the object at a path. A VMware volume of OVF and VMDK is packed into an OVA first.

    Its path is a directory, ``volumes/ACCOUNT/ID/NAME`` with ``NAME/NAME.ovf``, or that of the OVA next to the OVF.
    """

    def look(opened: Store) -> tuple[str, str]:
        name = path.rpartition("/")[2]
        for key in (path, f"{path}/{name}.ova"):
            with contextlib.suppress(ObjectNotFound):
                return opened.stat(key).key, ""
        stem = path.removesuffix(".ova") if path.endswith(".ova") else f"{path}/{name}"
        if path.startswith("volumes/") and not find_manifest(opened, Artifact.of_prefix("/".join(path.split("/")[:3]))):
            with contextlib.suppress(ObjectNotFound):
                return f"{stem}.ova", opened.stat(f"{stem}.ovf").key
        raise ObjectNotFound("There is no such object", f"{store.name}:{path}", "Check that it is on this image store")

    key, descriptor = services.stores.call(store, look, _CHECK_S)
    if descriptor:
        request = {"source": store.name, "key": descriptor, "store": store.name, "to": key, "pack": True}
        run_job(services, "transfer", request, limit_of(wait))
    return key


def delete_link(command: DeleteEntityDownloadURLCommand, services: Services) -> Answer:
    """Remove a link. If it is a volume's, also remove the file, which the server has copied for the download.

    A link that does not exist is no error: the server repeats this command after an error.
    """
    if command.extract_url and (path := _path_of(command.extract_url.get_secret_value())):
        services.web.revoke(path)
        if root := services.settings.cloudstack.web_root:
            ApacheFiles(root).remove_link(path)
            _remove_expired(ApacheFiles(root), services)
    if command.type == "VOLUME" and command.path:
        key = check_key(command.path.strip("/"))
        if not key.startswith("volumes/"):
            raise InvalidRequest("The path is not one of a volume", key, "Only the copy of a volume is deleted")
        name = services.web.store_of_directory(command.parent_path or "")
        _delete_volume(services, services.stores.named(name), key)
    return Answer(result=True, details="")


def _store_of(command: CreateEntityDownloadURLCommand, services: Services) -> NamedStore:
    """Return the store of the object. Short forms of the command name only the directory of the store, or nothing."""
    if command.data and command.data.store:
        return services.stores.find(command.data.store)
    name = services.web.store_of_directory(command.parent or "")
    if not name:
        what = "The command names no image store that this agent knows"
        raise InvalidRequest(what, command.parent or "", "Let the management server set up the agent again")
    return services.stores.named(name)


def _path_of(url: str) -> str:
    """Return the path of a link below /userdata/, or "" for another URL. Raise InvalidRequest for an unsafe path."""
    _, found, path = parts_of(url).path.partition(f"/{USERDATA}/")
    return check_path(unquote(path)) if found else ""


def _delete_volume(services: Services, store: NamedStore, key: str) -> None:
    """Delete the copy of a volume. A worker deletes what one has written, and the answer does not wait for it."""

    def delete_file(opened: Store) -> bool:
        with contextlib.suppress(InvalidRequest):
            if find_manifest(opened, Artifact.of_prefix(key.rpartition("/")[0])):
                return False
        try:
            files = [opened.stat(key).key]
        except ObjectNotFound:  # a VMware volume is a directory below that of the artifact
            files = [each.key for each in all_objects(opened, key)] if key.count("/") > 2 else []
        lenient = opened.lenient() if isinstance(opened, HoldsForeign) else opened
        for each in files:
            lenient.delete(each)
        return True

    if not services.stores.call(store, delete_file, _CHECK_S):
        artifact = Artifact.of_prefix(key.rpartition("/")[0])
        request = {"kind": artifact.kind, "account": artifact.account, "id": artifact.id, "stores": [store.name]}
        start_job(services, "delete", job_id_of("delete", store.name, artifact.prefix, ""), request)


def _file_of(store: Store, key: str) -> Path:
    """Return the path of a regular file that is reached without a symbolic link."""
    file = getattr(store, "file", None)
    if file is None:
        raise InvalidRequest("Apache cannot serve files of this image store", store.name, "Use an NFS export")
    found: Path = file(key)
    return found


def _remove_expired(apache: ApacheFiles, services: Services) -> None:
    """Remove the links of Apache whose time is over: the server has forgotten them, or deleted them elsewhere."""
    for path in services.web.take_expired():
        apache.remove_link(path)
