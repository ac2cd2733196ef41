"""A store with artifacts of every kind, and a copy of all of them."""

from __future__ import annotations

from typing import Any

import pytest

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.errors import WorkerError
from ssvm_worker.jobs.copy import job as copy
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Store
from tests.attempts import attempt
from tests.contracts.store import put
from tests.copies import content, store_artifact
from tests.documents import check_document
from tests.grain_bench import back_up, changed, disk

PLACES = [Artifact("template", "2", str(each)) for each in range(6)] + [Artifact("volume", "3", "v1")]
SIZE = 3000


def fill(store: Any) -> Any:
    """Store seven artifacts, two incremental backups that share packs, and files of other programs."""
    for number, place in enumerate(PLACES):
        store_artifact(store, {f"{place.id}.raw": bytes([number]) * SIZE, "template.properties": b"id\n"}, place)
    back_up(store, "b1", disk(12))
    back_up(store, "b2", changed(disk(12), 3))
    put(store, "elsewhere/x", b"of somebody else")
    put(store, "template/tmpl/2/half/half.raw", b"without a manifest")
    return store


@pytest.fixture
def source() -> MemoryStore:
    """Return a store with nine artifacts."""
    store: MemoryStore = fill(MemoryStore("primary"))
    return store


def run(*stores: Store, how: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """Copy everything from primary to archive. *fields* may change the request."""
    request = parse_request(copy.Request, {"all": True, "stores": ["archive"]} | fields, "copy")
    result = copy.run(request, attempt(*stores, **(how or {})))
    check_document("copy.result", result)
    return result


def outcomes(result: dict[str, Any]) -> dict[str, str]:
    """Return the result of each artifact."""
    return {each["artifact"]: each["outcome"] for each in result["artifacts"]}


def result_of(error: WorkerError) -> Any:
    """Return the results that are not errors."""
    return error.result


def theirs(store: Store) -> dict[str, bytes]:
    """Return all objects of the store that belong to complete artifacts."""
    return {key: data for key, data in content(store).items() if "/half/" not in key and "elsewhere" not in key}
