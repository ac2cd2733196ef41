"""Move an object inside its store, or copy it to another key."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.errors import CorruptImage, ObjectNotFound
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import store_stream, tap

from .attempt import Attempt


@runtime_checkable
class Renames(Protocol):
    """A store that can rename objects. Other stores copy them and delete the source."""

    def rename(self, key: str, to: str) -> None:
        """Rename an object at once, and replace an object of the new name. Raise ObjectNotFound if it is missing."""


def copy_object(
    attempt: Attempt, source: Store, key: str, target: Store, to: str, *, digest: str | None = None
) -> tuple[int, str]:
    """Copy an object, and replace an object at the target. Return its bytes and its digest.

    Raises CorruptImage before the commit if the bytes differ from *digest*, or from the size that the source reports.
    """
    size, hasher = source.stat(key).size, Hasher()

    def verify() -> None:
        if hasher.size != size or digest not in (None, str(hasher.digest())):
            what = f"The object has {hasher.size} bytes and {hasher.digest()}, not {size} and {digest or 'any digest'}"
            raise CorruptImage(what, f"{source.name}:{key}", "Restore it from another store")
        attempt.confirm()

    with target.writer(to, size, owner=attempt.owner, copy_from=source if to == key else None) as sink:
        chunks = tap(attempt.resuming(source.reader(key)), attempt.progress.observe)
        store_stream(chunks, {"target": sink}, [hasher], verify=verify, check=attempt.check)
    return hasher.size, str(hasher.digest())


def move_object(attempt: Attempt, store: Store, key: str, to: str) -> None:
    """Move an object inside its store. May be repeated: an object that is at its new place already is left there."""
    attempt.check()
    attempt.confirm()
    try:
        if isinstance(store, Renames):
            store.rename(key, to)
            return
        copy_object(attempt, store, key, store, to)
        store.delete(key)
    except ObjectNotFound:
        store.stat(to)
