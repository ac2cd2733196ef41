"""What jobs tell of the room that accounts use, and what they hold of it while they write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from ssvm_worker.artifacts.layout import PACKS, Artifact
from ssvm_worker.artifacts.manifest import Manifest
from ssvm_worker.errors import NOT_THERE
from ssvm_worker.ledger.quota import UNLIMITED, Held
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.units import parse_size

from .attempt import Attempt


@contextmanager
def holding(attempt: Attempt, account: str, limit: str | None, copies: int) -> Iterator[None]:
    """Within, ``attempt.held`` holds what is stored for the account against *limit*, or against that of the settings.

    Without any limit nobody is asked. Raises QuotaExceeded at once where the account has no room at all.
    """
    most = attempt.quotas.of(account) if limit is None else parse_size(limit)
    with nullcontext() if most is None else attempt.quota.hold(account, attempt.job_id, most) as grow:
        if grow:
            grow(0)
        attempt.held = Held(grow, copies)
        try:
            yield
        finally:
            attempt.held = UNLIMITED


def count(attempt: Attempt, store: Store, manifest: Manifest) -> None:
    """Note what an artifact takes on a store, now that it stands there."""
    it = manifest.artifact
    try:
        attempt.quota.note(it.account, store.name, it.prefix, manifest.size, attempt.job_id)
    except NOT_THERE as error:
        attempt.log.info("usage of account %s is not counted until `ssvm verify`: %s", it.account, error)
    else:
        count_packs(attempt, store, it)


def uncount(attempt: Attempt, store: Store, artifact: Artifact) -> None:
    """Note that it is gone."""
    try:
        attempt.quota.forget(artifact.account, store.name, artifact.prefix)
    except NOT_THERE as error:
        attempt.log.info("usage of account %s is not counted until `ssvm verify`: %s", artifact.account, error)


def count_packs(attempt: Attempt, store: Store, artifact: Artifact) -> None:
    """Note what the packs of a backup's volume take; they belong to all its incremental backups together."""
    if artifact.kind != "backup":
        return
    place = f"{artifact.family}/{PACKS}"
    try:
        size = sum(each.size for each in store.list(place))
        if size:
            attempt.quota.note(artifact.account, store.name, place, size, attempt.job_id)
        else:
            attempt.quota.forget(artifact.account, store.name, place)
    except NOT_THERE as error:
        attempt.log.info("usage of account %s is not counted until `ssvm verify`: %s", artifact.account, error)
