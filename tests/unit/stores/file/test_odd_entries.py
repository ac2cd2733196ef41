"""One odd entry of any kind in a directory ends no listing, clean-up or scrub of the others."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ssvm_worker.errors import CorruptImage, ObjectNotFound, StoreDenied
from ssvm_worker.jobs.cleanup import job as cleanup
from ssvm_worker.jobs.verify import job as verify
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.file.tree import translated
from ssvm_worker.streaming.pipeline import put_bytes
from tests.attempts import attempt
from tests.contracts.store import ME, get, keys
from tests.privileges import unprivileged
from tests.unit.jobs.copy.test_migration_jobs import fill


def bind(path: str) -> None:
    """Make a socket of the file system."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)


def deep(path: str) -> None:
    """Make more nested directories than Python's recursion allows."""
    here = os.open(os.path.dirname(path), os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


#: Entries that may be beside objects, by the function that makes each at a given path.
BESIDE: dict[str, tuple[str, Callable[[str], object]]] = {
    "a link": ("link", lambda path: os.symlink("/etc/passwd", path)),
    "a link to its own directory": ("loop", lambda path: os.symlink(".", path)),
    "a broken link": ("broken", lambda path: os.symlink("nowhere", path)),
    "a pipe": ("pipe", os.mkfifo),
    "a socket": ("socket", bind),
    "a device": ("null", lambda path: os.mknod(path, 0o20600, os.makedev(1, 3))),
    "a name that is no UTF-8": ("\udcff\udcfe", lambda path: Path(path).write_bytes(b"1")),
    "a directory that is no UTF-8": ("\udcff", lambda path: (os.mkdir(path), Path(path, "x").write_bytes(b"1"))),
    "control characters": ("a\n\x1b[31mb", lambda path: Path(path).write_bytes(b"1")),
    "a part of an odd name": (".\udcff\n.job.1.part", lambda path: Path(path).write_bytes(b"1")),
    "a part with a long token": (f".x.job.{'9' * 200}.part", lambda path: Path(path).write_bytes(b"1")),
    "a deep tree": ("d", deep),
}


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    """Return a store with artifacts of all kinds."""
    (tmp_path / "store").mkdir()
    store = FileStore("primary", tmp_path / "store")
    fill(store)
    cleanup.run(cleanup.Request(older_than="0"), attempt(store))  # half an artifact, which does not matter here
    return store


@pytest.mark.parametrize("odd", BESIDE)
def test_beside(store: FileStore, tmp_path: Path, odd: str) -> None:
    """Every listing skips an entry beside objects that is no object, and it stays."""
    before, name = keys(store), BESIDE[odd]
    place = str(tmp_path / "store/template" / name[0])
    name[1](place)
    try:
        judge_beside(store, before)
        assert os.path.lexists(place) or "token" in odd
    finally:
        subprocess.run(["rm", "-rf", place], check=True)  # pytest itself cannot delete such a deep tree


def judge_beside(store: FileStore, before: list[str]) -> None:
    """Check that every function of the store ignores the entry."""
    assert keys(store) == before
    assert [each.key for each in store.leftovers()] in ([], ["template/x"])
    verify.run(verify.Request(all=True, prefix="template", stores=["primary"]), attempt(store))
    assert cleanup.run(cleanup.Request(older_than="0"), attempt(store))["failed"] == {}
    assert keys(store) == before


INSTEAD = ("a link", "a broken link", "a link to its own directory", "a pipe", "a socket", "a device")


@pytest.mark.parametrize("odd", [*INSTEAD, "a directory", "nothing"])
def test_instead(store: FileStore, tmp_path: Path, odd: str) -> None:
    """An entry in an object's place is a finding of its artifact, and all others are still read."""
    victim = next(key for key in keys(store) if key.startswith("template/") and not key.endswith(".json"))
    path = str(tmp_path / "store" / victim)
    os.unlink(path)
    if odd == "a directory":
        os.mkdir(path)
    elif odd != "nothing":
        BESIDE[odd][1](path)
    for door in (store.stat, lambda key: get(store, key)):
        with pytest.raises(ObjectNotFound, match=victim):
            door(victim)
    with pytest.raises(CorruptImage) as found:
        verify.run(verify.Request(all=True, prefix="template", stores=["primary"]), attempt(store))
    read = len({key.rpartition("/")[0] for key in keys(store, "template")})
    assert read > 1
    assert found.value.what.startswith(f"1 artifact is damaged, of {read} that were read")


def test_read_only() -> None:
    """The remedy for a read-only directory names the systemd unit, which may protect it."""
    assert "ReadWritePaths" in translated(OSError(errno.EROFS, "x"), "a").remedy
    assert "Give the worker's user the right" in translated(OSError(errno.EACCES, "x"), "a").remedy


def test_directory_that_may_not_be_read(public_root: Path) -> None:
    """An unreadable directory is an error of the listing after all other directories."""
    store = FileStore("local", public_root)
    for key in ("a/object", "b/object", "c/object"):
        put_bytes(store, key, b"1", ME)
    (public_root / "b").chmod(0)
    shown = []
    with unprivileged(), pytest.raises(StoreDenied):
        shown.extend(each.key for each in _noting(store, shown))
    (public_root / "b").chmod(0o750)
    assert shown == ["a/object", "c/object"]


def _noting(store: FileStore, shown: list[str]) -> list[object]:
    for each in store.list():
        shown.append(each.key)
    return []
