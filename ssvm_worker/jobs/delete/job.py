"""Delete an artifact from image stores. A missing artifact is not an error."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ssvm_worker.artifacts.layout import MANIFEST, Artifact
from ssvm_worker.errors import NOT_THERE
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.backup.incremental import sweep_packs
from ssvm_worker.jobs.request import ArtifactRequest
from ssvm_worker.jobs.usage import forget_usage, record_pack_usage
from ssvm_worker.jobs.verify.screenshots import remove_screenshot
from ssvm_worker.streaming.interfaces import Store


class Request(ArtifactRequest):
    """The artifact to delete, and the stores."""

    stores: list[str] = Field(["primary"], min_length=1, description="The stores of the artifact")


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
    deleted = {name: _delete(attempt.store(name), artifact, attempt) for name in request.stores}
    result: dict[str, Any] = {"prefix": artifact.prefix, "deleted": deleted}
    if artifact.kind == "backup":
        result["packs"] = {name: sweep_packs(attempt.store(name), artifact, attempt) for name in request.stores}
        for name in request.stores:
            record_pack_usage(attempt, attempt.store(name), artifact)
        remove_screenshot(attempt, artifact)
    return result


def _delete(store: Store, artifact: Artifact, attempt: Attempt) -> int:
    """Delete the artifact's objects. Return their number.

    Each deletion confirms the claim. Otherwise a worker that was frozen here could delete objects stored since then.
    """
    keys = [each.key for each in store.list(artifact.prefix)]
    for key in (artifact.key(MANIFEST), *keys):
        attempt.confirm()
        store.delete(key)
    attempt.confirm()
    store.sweep(0, artifact.prefix)
    try:
        attempt.services.scrub_results.forget(store.name, artifact.prefix)
    except NOT_THERE as error:  # the next scrub of all artifacts deletes the result
        attempt.log.info("the verification result of %s is not deleted: %s", artifact.prefix, error)
    forget_usage(attempt, store, artifact)
    return len(keys)
