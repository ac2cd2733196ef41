"""Delete an artifact from image stores; that it is not there is fine."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ssvm_worker.keys import MANIFEST
from ssvm_worker.stream import Store

from .attempt import Attempt
from .request import ArtifactRequest


class Request(ArtifactRequest):
    """The artifact to delete, and where."""

    stores: list[str] = Field(["primary"], min_length=1)


def resource(request: Request) -> str:
    """Nobody may write an artifact while it is deleted."""
    return request.artifact.prefix


def discard(request: Request, attempt: Attempt) -> None:
    """What is deleted stays deleted."""


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Delete the manifest first, so that the artifact is gone at once; then all that lies below its prefix."""
    deleted = {name: _delete(attempt.store(name), request.artifact.prefix, attempt) for name in request.stores}
    return {"prefix": request.artifact.prefix, "deleted": deleted}


def _delete(store: Store, prefix: str, attempt: Attempt) -> int:
    attempt.confirm()
    keys = [each.key for each in store.list(prefix)]
    store.delete(f"{prefix}/{MANIFEST}")
    for key in keys:
        store.delete(key)
    store.sweep(0, prefix)
    return len(keys)
