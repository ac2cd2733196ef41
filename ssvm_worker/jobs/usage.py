"""Count what accounts store, and reserve quota for jobs that write."""

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

_NOT_COUNTED = "usage of account %s is not counted until `ssvm verify`: %s"


@contextmanager
def reserve_quota(attempt: Attempt, account: str, limit: str | None, copies: int) -> Iterator[None]:
    """Reserve quota for *copies* copies of what ``attempt.held`` observes while the block runs.

    *limit* replaces the limit of the settings. Without any limit this function does not ask the ledger.
    Raises QuotaExceeded at once if the account has no bytes left.
    """
    max_bytes = attempt.settings.quota.of(account) if limit is None else parse_size(limit)
    with (
        nullcontext() if max_bytes is None else attempt.services.quota.hold(account, attempt.job_id, max_bytes) as grow
    ):
        if grow:
            grow(0)
        attempt.held = Held(grow, copies)
        try:
            yield
        finally:
            attempt.held = UNLIMITED


def record_usage(attempt: Attempt, store: Store, manifest: Manifest) -> None:
    """Count a complete artifact of a store. Log an error of the ledger."""
    artifact = manifest.artifact
    try:
        attempt.services.quota.note(artifact.account, store.name, artifact.prefix, manifest.size, attempt.job_id)
    except NOT_THERE as error:
        attempt.log.info(_NOT_COUNTED, artifact.account, error)
    else:
        record_pack_usage(attempt, store, artifact)


def forget_usage(attempt: Attempt, store: Store, artifact: Artifact) -> None:
    """Stop counting a deleted artifact. Log an error of the ledger."""
    try:
        attempt.services.quota.forget(artifact.account, store.name, artifact.prefix)
    except NOT_THERE as error:
        attempt.log.info(_NOT_COUNTED, artifact.account, error)


def record_pack_usage(attempt: Attempt, store: Store, artifact: Artifact) -> None:
    """Count the packs of a backup's volume, which all its incremental backups share. Log an error of the ledger."""
    if artifact.kind != "backup":
        return
    place = f"{artifact.family}/{PACKS}"
    try:
        size = sum(each.size for each in store.list(place))
        if size:
            attempt.services.quota.note(artifact.account, store.name, place, size, attempt.job_id)
        else:
            attempt.services.quota.forget(artifact.account, store.name, place)
    except NOT_THERE as error:
        attempt.log.info(_NOT_COUNTED, artifact.account, error)
