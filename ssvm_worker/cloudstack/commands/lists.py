"""ListTemplateCommand, ListVolumeCommand and ListDataStoreObjectsCommand.

**A list must never destroy data.** The server downloads again, or forgets, what is missing from a list. So each answer
has all artifacts, or ``result: false`` with the reason. The server then changes nothing.

The Java agent skips what it cannot read. It lists each object of S3 below the name of its directory. This agent lists
those too, if no worker of this program wrote them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from ssvm_worker.cloudstack.artifacts import TEMPLATES, VOLUMES, Family, FoundArtifact, all_objects, find_artifacts
from ssvm_worker.cloudstack.image_stores import NamedStore
from ssvm_worker.cloudstack.messages import (
    ListDataStoreObjectsAnswer,
    ListDataStoreObjectsCommand,
    ListTemplateAnswer,
    ListTemplateCommand,
    ListVolumeAnswer,
    ListVolumeCommand,
)
from ssvm_worker.cloudstack.services import Services
from ssvm_worker.cloudstack.transfer_objects import S3TO, NfsTO, Wire
from ssvm_worker.errors import InvalidRequest
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.file.tree import translating
from ssvm_worker.stores.nfs.export_id import prove
from ssvm_worker.stores.nfs.store import NfsStore
from ssvm_worker.stores.sorted_listing import check_prefix
from ssvm_worker.streaming.interfaces import Store, StoredObject

T = TypeVar("T")
#: Time limit in seconds of a list. A store that does not answer fails earlier.
LIST_S = 60.0


def list_templates(command: ListTemplateCommand, services: Services) -> ListTemplateAnswer:
    """Answer with all templates and ISOs of a store, by their unique names."""
    found = _find(services, services.stores.find(command.store, command.nfs_version), TEMPLATES)
    infos = {each.unique_name: each.prop() for each in found}
    return ListTemplateAnswer(details="success", result=True, sec_url=_url(command.store), template_infos=infos)


def list_volumes(command: ListVolumeCommand, services: Services) -> ListVolumeAnswer:
    """Answer with all volumes of a store, by their ids."""
    found = _find(services, services.stores.find(command.store), VOLUMES)
    infos = {str(each.id): each.prop() for each in found}
    return ListVolumeAnswer(details="success", result=True, sec_url=_url(command.store), template_infos=infos)


def list_objects(command: ListDataStoreObjectsCommand, services: Services) -> ListDataStoreObjectsAnswer:
    """Answer with one page of a directory. Paths begin with a slash, as those of the Java agent do."""
    store = services.stores.find(command.store)
    prefix = check_prefix(command.path)
    objects = services.stores.call(store, _proved(services, lambda each: all_objects(each, prefix)), LIST_S)
    entries = _entries(prefix, objects)
    if command.start_index < 0 or command.page_size < 0:
        raise InvalidRequest("A page has a negative number", "startIndex, pageSize")
    end = command.start_index + command.page_size if command.page_size else None
    page = entries[command.start_index : end]
    paths = [f"/{prefix}/{name}" if prefix else f"/{name}" for name, _, _ in page]
    return ListDataStoreObjectsAnswer(
        result=True,
        path_exists=bool(entries) or not prefix,
        count=len(entries),
        names=[name for name, _, _ in page],
        paths=paths,
        abs_paths=paths,
        is_dirs=[each is None for _, each, _ in page],
        sizes=[each.size if each else 0 for _, each, _ in page],
        last_modified=[round(modified * 1000) for _, _, modified in page],
    )


def _entries(prefix: str, objects: list[StoredObject]) -> list[tuple[str, StoredObject | None, float]]:
    """Return the entries of a directory, sorted: name, object or None for a directory, time of the last change."""
    found: dict[str, tuple[StoredObject | None, float]] = {}
    for each in objects:
        name, slash, _ = each.key.removeprefix(f"{prefix}/" if prefix else "").partition("/")
        modified = max(each.modified, found.get(name, (None, 0.0))[1])
        found[name] = (None if slash else each, modified)
    return [(name, *found[name]) for name in sorted(found)]


def _find(services: Services, store: NamedStore, family: Family) -> list[FoundArtifact]:
    def moves() -> int:
        return services.names.moves(store.name) if family.moves else 0

    act = _proved(services, lambda each: find_artifacts(each, family, is_s3=store.is_s3, moves=moves))
    return services.stores.call(store, act, LIST_S)


def _proved(services: Services, act: Callable[[Store], T]) -> Callable[[Store], T]:
    """Return *act* with a check that a directory is the one of the first list. An unmounted one would be empty."""

    def checked(store: Store) -> T:
        if isinstance(store, FileStore) and not isinstance(store, NfsStore):  # an NFS store checks itself
            services.state_dir.mkdir(parents=True, exist_ok=True)
            with translating(store.url):
                root = os.open(unquote(urlsplit(store.url).path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    prove(root, services.state_dir / f"marker-{store.name}", store.url)
                finally:
                    os.close(root)
        return act(store)

    return checked


def _url(store: Wire | None) -> str | None:
    if isinstance(store, NfsTO):
        return store.url
    return store.bucket_name if isinstance(store, S3TO) else None
