"""Download links: the server chooses a path below ``/userdata/`` and builds the URL. The agent makes the path valid.

`ssvm serve` answers the path from the ledger. With ``cloudstack.web_root``, the agent also makes a symbolic link for
the Apache of a system VM. It is where the Java agent makes it: ``WEB_ROOT/userdata/DIRECTORY/NAME``.

The answers are those of the Java agent, which the recorded conversations have. One thing differs: an unsafe path is
refused here, and the Java agent passes it to a shell.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ssvm_worker.artifacts.layout import check_key
from ssvm_worker.cloudstack.image_stores import NamedStore
from ssvm_worker.cloudstack.messages import (
    Answer,
    CreateEntityDownloadURLAnswer,
    CreateEntityDownloadURLCommand,
    DeleteEntityDownloadURLCommand,
)
from ssvm_worker.cloudstack.services import Services
from ssvm_worker.errors import InvalidRequest, ObjectNotFound, WorkerError
from ssvm_worker.ledger.cloudstack_web import USERDATA, PublishedLink, check_path
from ssvm_worker.streaming.interfaces import Store

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
    key = check_key(command.install_path.strip("/"))
    try:
        services.stores.call(store, lambda opened: opened.stat(key), _CHECK_S)
        until = int(time.time() + services.settings.cloudstack.link_s)
        services.web.publish(PublishedLink(path, store.name, key, until))
        if root := services.settings.cloudstack.web_root:
            services.stores.call(store, lambda opened: _make_symlink(root, path, opened, key), _CHECK_S)
            _remove_expired(root, services)
    except WorkerError as error:
        return CreateEntityDownloadURLAnswer(result=False, details=str(error))
    _log.info("made a download link to %s:%s", store.name, key)
    return CreateEntityDownloadURLAnswer(result=True, details="")


def delete_link(command: DeleteEntityDownloadURLCommand, services: Services) -> Answer:
    """Remove a link. Of a volume, also remove the file, which the server has copied for the download.

    A link that does not exist is no error: the server repeats this command after an error.
    """
    if command.extract_url and (path := _path_of(command.extract_url.get_secret_value())):
        services.web.revoke(path)
        if root := services.settings.cloudstack.web_root:
            _remove_symlink(root, path)
            _remove_expired(root, services)
    if command.type == "VOLUME" and command.path:
        name = services.web.store_of_directory(command.parent_path or "")
        store, key = services.stores.named(name), check_key(command.path.strip("/"))
        services.stores.call(store, lambda opened: _delete_file(opened, key), _CHECK_S)
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
    _, found, path = urlsplit(url).path.partition(f"/{USERDATA}/")
    return check_path(unquote(path)) if found else ""


def _delete_file(store: Store, key: str) -> None:
    with contextlib.suppress(ObjectNotFound):
        store.stat(key)
        store.delete(key)


def _make_symlink(root: Path, path: str, store: Store, key: str) -> None:
    """Make the link of Apache. Its target is a regular file that is reached without another symbolic link."""
    file = getattr(store, "file", None)
    if file is None:
        raise InvalidRequest("Apache cannot serve files of this image store", store.name, "Use an NFS export")
    link = root / USERDATA / path
    link.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = link.with_name(f".{link.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(file(key))
    new.replace(link)


def _remove_symlink(root: Path, path: str) -> None:
    """Remove a link of Apache and its directory. Leave everything else alone."""
    link = root / USERDATA / path
    with contextlib.suppress(OSError):
        if link.is_symlink():
            link.unlink()
        if link.parent != root / USERDATA:
            link.parent.rmdir()


def _remove_expired(root: Path, services: Services) -> None:
    """Remove the links of Apache whose time is over: the server has forgotten them, or deleted them elsewhere."""
    for path in services.web.take_expired():
        _remove_symlink(root, path)
