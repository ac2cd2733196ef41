"""Delete an artifact from image stores. A missing artifact is not an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field

from ssvm_worker.artifacts.layout import MANIFEST, MAX_NAME, Artifact
from ssvm_worker.errors import NOT_THERE, InvalidRequest
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.backup.incremental import sweep_packs
from ssvm_worker.jobs.request import ArtifactRequest
from ssvm_worker.jobs.usage import forget_usage
from ssvm_worker.jobs.verify.screenshots import remove_screenshot
from ssvm_worker.streaming.interfaces import HoldsForeign, Store


class Request(ArtifactRequest):
    """The artifact to delete, and the stores."""

    stores: list[str] = Field(["primary"], min_length=1, description="The stores of the artifact")
    files: str = Field(
        "",
        max_length=MAX_NAME,
        description="Backups only: delete files with this name and any extension, or * for all files, instead of a "
        "backup. They are in the directory of the volume, or in that of id if the name is not the id",
    )


def resource(request: Request) -> str:
    """Return the resource of the artifact: no other job may write the artifact while it is deleted."""
    return request.artifact.resource


def discard(request: Request, attempt: Attempt) -> None:
    """Do nothing: deleted objects stay deleted."""


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Delete the manifest first, so that the artifact no longer exists. Then delete everything below its prefix.

    For an incremental backup, also delete the packs that no other backup of the volume needs.
    """
    artifact = request.artifact
    if request.files:
        if artifact.kind != "backup":
            raise InvalidRequest("Only files of backups can be deleted by name", artifact.prefix, "Omit files")
        found = {name: _delete_files(attempt.store(name), request, attempt) for name in request.stores}
        return {"prefix": artifact.prefix, "deleted": found}
    deleted = {name: _delete(attempt.store(name), artifact, attempt) for name in request.stores}
    result: dict[str, Any] = {"prefix": artifact.prefix, "deleted": deleted}
    if artifact.kind == "backup":
        result["packs"] = {name: sweep_packs(attempt.store(name), artifact, attempt) for name in request.stores}
        remove_screenshot(attempt, artifact)
    return result


def _delete(store: Store, artifact: Artifact, attempt: Attempt) -> int:
    """Delete the artifact's objects. Return their number.

    Each deletion confirms the claim. Otherwise a worker that was frozen here could delete objects stored since then.
    """
    keys = [each.key for each in store.list(artifact.prefix)]
    # Without its properties file the artifact is not in a list of CloudStack's Java agent.
    keys.sort(key=lambda key: not key.endswith(".properties"))
    for key in (artifact.key(MANIFEST), *keys):
        attempt.confirm()
        store.delete(key)
    keys += _delete_foreign(store, artifact.prefix, attempt, lambda _: True)
    attempt.confirm()
    store.sweep(0, artifact.prefix)
    try:
        attempt.services.scrub_results.forget(store.name, artifact.prefix)
    except NOT_THERE as error:  # the next scrub of all artifacts deletes the result
        attempt.log.info("the verification result of %s is not deleted: %s", artifact.prefix, error)
    forget_usage(attempt, store, artifact)
    return len(keys)


def _delete_files(store: Store, request: Request, attempt: Attempt) -> int:
    """Delete files that CloudStack's Java agent or a hypervisor has written. Return their number."""
    artifact, wanted = request.artifact, request.files
    directory = artifact.family if wanted in (artifact.id, "*") else artifact.prefix

    def is_wanted(key: str) -> bool:
        folder, _, name = key.rpartition("/")
        return folder == directory and (wanted in ("*", name) or name.startswith(f"{wanted}."))

    keys = [each.key for each in store.list(artifact.family) if is_wanted(each.key)]
    for key in keys:
        attempt.confirm()
        store.delete(key)
    return len(keys) + len(_delete_foreign(store, artifact.family, attempt, is_wanted))


def _delete_foreign(store: Store, prefix: str, attempt: Attempt, is_wanted: Callable[[str], bool]) -> list[str]:
    """Delete objects with keys that this program does not use. Return their keys."""
    if not isinstance(store, HoldsForeign):
        return []
    keys = [each.key for each in store.foreign(prefix) if is_wanted(each.key)]
    for key in keys:
        attempt.confirm()
        store.delete_foreign(key)
    return keys
