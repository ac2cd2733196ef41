"""Delete an artifact from image stores; that it is not there is fine."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ssvm_worker.artifacts.layout import MANIFEST, Artifact
from ssvm_worker.errors import NOT_THERE
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.backup.incremental import sweep_packs
from ssvm_worker.jobs.request import ArtifactRequest
from ssvm_worker.jobs.usage import count_packs, uncount
from ssvm_worker.jobs.verify.screenshots import drop_screen
from ssvm_worker.streaming.interfaces import Store


class Request(ArtifactRequest):
    """The artifact to delete, and where."""

    stores: list[str] = Field(["primary"], min_length=1)


def resource(request: Request) -> str:
    """Nobody may write an artifact while it is deleted."""
    return request.artifact.resource


def discard(request: Request, attempt: Attempt) -> None:
    """What is deleted stays deleted."""


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Delete the manifest first, so that the artifact is gone at once; then all that lies below its prefix.

    Of an incremental backup those packs go too that no other backup of the volume needs.
    """
    artifact = request.artifact
    deleted = {name: _delete(attempt.store(name), artifact.prefix, attempt) for name in request.stores}
    result: dict[str, Any] = {"prefix": artifact.prefix, "deleted": deleted}
    if artifact.kind == "backup":
        result["packs"] = {name: sweep_packs(attempt.store(name), artifact, attempt) for name in request.stores}
        for name in request.stores:
            count_packs(attempt, attempt.store(name), artifact)
        drop_screen(attempt, artifact)
    return result


def _delete(store: Store, prefix: str, attempt: Attempt) -> int:
    """Each removal is confirmed: whoever was frozen in the middle must not remove what was stored there since."""
    keys = [each.key for each in store.list(prefix)]
    for key in (f"{prefix}/{MANIFEST}", *keys):
        attempt.confirm()
        store.delete(key)
    attempt.confirm()
    store.sweep(0, prefix)
    _forget(store, prefix, attempt)
    uncount(attempt, store, Artifact.of_prefix(prefix))
    return len(keys)


def _forget(store: Store, prefix: str, attempt: Attempt) -> None:
    """What was found there once is of no use; the next scrub of all drops what cannot be dropped now."""
    try:
        attempt.verdicts.forget(store.name, prefix)
    except NOT_THERE as error:
        attempt.log.info("what verifying %s has found stays noted: %s", prefix, error)
