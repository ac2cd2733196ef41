"""Open the image stores of the settings. The SDK of a store is imported when it is opened."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

from pydantic import SecretStr

from ssvm_worker.config.findings import suggestion
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import Cancelled, InvalidRequest, StoreUnavailable, misused
from ssvm_worker.stores import open_store
from ssvm_worker.stores.nfs.probe import HUNG, probe
from ssvm_worker.streaming.interfaces import Check, Store

#: Seconds that a person waits for the answer of one store.
_ANSWER_S = 10.0


def _unchecked() -> None:
    """Do nothing: the caller cannot be cancelled."""


class Stores(Mapping[str, Store]):
    """Image stores of the settings by name. Each is opened at its first use."""

    def __init__(self, settings: Settings, check: Check = _unchecked, *, answering: bool = False) -> None:
        """Stores call *check* while they wait for their server. It must raise if the caller must stop.

        *answering*: a person waits. The first use of a store that hangs raises StoreUnavailable.
        """
        self._settings = settings
        self._check = check
        self._answering = answering
        self._opened: dict[str, Store] = {}

    def checked(self, check: Check) -> Stores:
        """Return the same stores with another *check*. They are opened again."""
        return Stores(self._settings, check, answering=self._answering)

    def __getitem__(self, name: str) -> Store:
        if name not in self._opened:
            store = _open(name, self._settings, self._check)
            if self._answering:
                _require_answer(store)
            self._opened[name] = store
        return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings.stores)

    def __len__(self) -> int:
        return len(self._settings.stores)

    def __contains__(self, name: object) -> bool:
        return name in self._settings.stores


def open_store_named(settings: Settings, name: str, check: Check = _unchecked) -> Store:
    """Return the image store of that name. Raise InvalidRequest with all known names if there is none."""
    stores = Stores(settings, check)
    if name not in stores:
        what = f"There is no image store named {name!r}{suggestion(name, stores)}"
        raise misused(InvalidRequest(what, "stores", f"The settings have: {', '.join(stores) or 'none'}"))
    return stores[name]


def open_answering_store(settings: Settings, name: str, check: Check = _unchecked) -> Store:
    """Open a store for a person who waits. Raise StoreUnavailable if the file system of a directory does not answer."""
    store = open_store_named(settings, name, check)
    _require_answer(store)
    return store


def _require_answer(store: Store) -> None:
    """Raise StoreUnavailable if the file system of a directory does not answer.

    Nothing ends a call to a file system that hangs, so a child process makes the first one. The other kinds of stores
    have timeouts.
    """
    if store.url.startswith("file://") and probe(store.url.removeprefix("file://"), _ANSWER_S).state == HUNG:
        raise _silent(store.url, "Check the mount of this directory and its server. Jobs for the store wait for it")


def _silent(url: str, remedy: str) -> StoreUnavailable:
    return StoreUnavailable(f"The store has not answered within {_ANSWER_S:g} s", url, remedy)


@contextlib.contextmanager
def store_to_examine(settings: Settings, name: str) -> Iterator[Store]:
    """Open a store for one look at it. Raise StoreUnavailable if it waits too long for its server."""
    deadline = time.monotonic() + _ANSWER_S

    def check() -> None:
        if time.monotonic() > deadline:
            raise Cancelled("deadline")

    try:
        yield open_answering_store(settings, name, check)
    except Cancelled as error:
        remedy = "Check its server and the network. A mount that hangs ends after nfs.mount_s"
        raise _silent(settings.stores[name].url, remedy) from error


def _open(name: str, settings: Settings, check: Check) -> Store:
    store = settings.stores[name]
    if store.url.startswith("nfs://"):
        nfs = {key: value for key, value in settings.nfs if value is not None}
        values = {**nfs, "mount_root": settings.mount_root, "shared": store.shared}
        return open_store(name, store.url, **values, check=check)
    values = {
        key: value.get_secret_value() if isinstance(value, SecretStr) else value
        for key, value in store
        if key not in ("url", "backup_mode")
    }
    return open_store(name, store.url, notes_dir=settings.state_dir / "s3", check=check, **values)
