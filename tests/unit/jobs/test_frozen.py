"""An attempt that is frozen at any point, while another finishes its job, changes nothing after it resumes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.errors import Cancelled
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.copy import job as copy
from ssvm_worker.jobs.delete import job as delete
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.verify import job as verify
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Store
from tests import images
from tests.attempts import attempt
from tests.servers.http import HttpServer

IMAGE = images.mbr(3 << 20)
NAMES: dict[str, Any] = {"account": "2", "id": "7"}
#: Runs the tested job in an attempt with that claim and token.
Run = Callable[[Callable[[], None], int], object]


class Freezer:
    """The claim of an attempt that freezes at its *at*-th confirmation; *others* act meanwhile."""

    def __init__(self, at: int, others: Callable[[], object], after: bool) -> None:
        self.thawed = False
        self._at, self._others, self._after = at, others, after
        self._running = threading.Lock()

    def confirm(self) -> None:
        """Confirm the claim, as the heartbeat does. All threads of a frozen attempt are frozen."""
        with self._running:
            self._at -= 1
            frozen = not self._at
            if frozen and not self._after:
                self._freeze()
            if self.thawed:
                raise Cancelled("fenced")
            if frozen and self._after:
                self._freeze()

    def _freeze(self) -> None:
        self._others()
        self.thawed = True


def freeze(
    run: Run,
    others: Callable[[], object],
    check: Callable[[], object],
    prepare: Callable[[], object],
    *,
    after: bool = True,
) -> None:
    """Freeze *run* at each confirmation of its claim, let *others* act, and *check* the final state.

    *after* freezes after the confirmation, otherwise right before it. A file that is deleted directly after a
    confirmation stays deleted, because no file system can prevent this.
    """
    for at in itertools.count(1):
        prepare()
        freezer = Freezer(at, others, after)
        try:
            run(freezer.confirm, 1)
        except Cancelled:
            assert freezer.thawed
        if not freezer.thawed:
            assert at > 2
            return
        check()


class Place:
    """A directory store with at most one template."""

    def __init__(self, server: HttpServer, directory: Path) -> None:
        self.directory, self.store = directory, FileStore("primary", directory)
        self.request = download.Request(url=server.serve("image", IMAGE), **NAMES)

    def download(self, confirm: Callable[[], None] = lambda: None, token: int = 1) -> None:
        download.run(self.request, self._attempt(self.store, confirm=confirm, token=token))

    def delete(self, confirm: Callable[[], None] = lambda: None, token: int = 1) -> None:
        delete.run(delete.Request(**NAMES), self._attempt(self.store, confirm=confirm, token=token))

    def _attempt(self, *stores: Store, **given: Any) -> Attempt:
        return attempt(*stores, **given)

    def assert_whole(self) -> None:
        """Check that exactly the template exists."""
        verify.run(verify.Request(**NAMES), attempt(self.store))
        assert sorted(self._files()) == ["7.raw", "manifest.json", "template.properties"]

    def assert_absent(self) -> None:
        """Check that no part of the template exists."""
        assert self._files() == []

    def _files(self) -> list[str]:
        """Return all files, including hidden ones."""
        return [each.name for each in self.directory.rglob("*") if each.is_file()]


@pytest.fixture
def place(http_server: HttpServer, tmp_path: Path) -> Place:
    """Return an empty store."""
    return Place(http_server, tmp_path)


def test_download(place: Place) -> None:
    """An artifact that another attempt has stored meanwhile stays unchanged."""
    freeze(place.download, lambda: place.download(token=2), place.assert_whole, place.delete)


def test_download_of_what_was_deleted(place: Place) -> None:
    """An artifact that another attempt stored, and that was then deleted, does not return."""

    def others() -> None:
        place.download(token=2)
        place.delete()

    freeze(place.download, others, place.assert_absent, place.delete)


def test_delete(place: Place) -> None:
    """An artifact that was stored after another attempt's deletion is not deleted."""

    def others() -> None:
        place.delete(token=2)
        place.download()

    freeze(place.delete, others, place.assert_whole, place.download, after=False)


def test_discard(place: Place) -> None:
    """The clean-up of a failed attempt does not delete a later attempt's artifact."""

    def prepare() -> None:
        place.delete()
        place.download()
        (place.directory / "template/tmpl/2/7/manifest.json").unlink()

    def discard(confirm: Callable[[], None], token: int) -> None:
        download.discard(place.request, attempt(place.store, confirm=confirm, token=token))

    freeze(discard, lambda: place.download(token=2), place.assert_whole, prepare, after=False)


def test_copy(place: Place) -> None:
    """A copy does not bring a deleted artifact back either."""
    source = MemoryStore("source")
    asked = download.Request(url=place.request.url, stores=["source"], **NAMES)
    download.run(asked, attempt(source))
    request = copy.Request(source="source", stores=["primary"], **NAMES)

    def run(confirm: Callable[[], None], token: int) -> None:
        copy.run(request, attempt(source, place.store, confirm=confirm, token=token))

    def others() -> None:
        run(lambda: None, 2)
        place.delete()

    freeze(run, others, place.assert_absent, place.delete)
