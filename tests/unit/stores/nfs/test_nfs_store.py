"""A store on an export that is mounted when it is first used, here on memory that is mounted under its name.

A real server and a real kernel's client have tests of their own in a small VM: ``make test-nfs``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssvm_worker.errors import StoreAway, StoreUnavailable
from ssvm_worker.stores.nfs.commands import sudo_rule
from ssvm_worker.stores.nfs.mountinfo import mounts
from ssvm_worker.stores.nfs.store import NfsSettings, NfsStore
from tests.contracts.resumable_store import ResumableStoreContract
from tests.contracts.store import get, keys, put
from tests.servers.exports import ADDRESS, MemoryExports, memory_exports
from tests.waiting import PATIENCE_S

URL = f"nfs://{ADDRESS}/export"


@pytest.fixture
def exports(tmp_path: Path) -> Iterator[MemoryExports]:
    with memory_exports(tmp_path / "exports") as given:
        yield given


def open_store(exports: MemoryExports, url: str = URL) -> NfsStore:
    """A store of its own, as another process would have it."""
    root = exports.root.parent / "mounts"
    return NfsStore("primary", url, NfsSettings(root, mount_s=1.0, probe_s=PATIENCE_S), exports)


@pytest.fixture
def store(exports: MemoryExports) -> NfsStore:
    return open_store(exports)


def is_mounted(store: NfsStore) -> bool:
    """Whether anything is mounted at its mountpoint."""
    return str(store.mounted.paths.point) in {each.point for each in mounts()}


def bare(store: NfsStore) -> list[str]:
    """What lies in the directory under the mount."""
    assert not is_mounted(store)
    return os.listdir(store.mounted.paths.point)


class TestNfsStore(ResumableStoreContract):
    @pytest.fixture
    def store(self, exports: MemoryExports) -> NfsStore:
        return open_store(exports)


def test_mounted_on_first_use(store: NfsStore, exports: MemoryExports) -> None:
    """Nothing is mounted until the store is used; then once, for all that follows and for all stores of the host."""
    assert not exports.mounted
    put(store, "a/object", b"1")
    assert get(store, "a/object") == b"1"
    assert get(open_store(exports), "a/object") == b"1"
    assert len(exports.mounted) == 1


def test_older_version(store: NfsStore, exports: MemoryExports) -> None:
    """A server that speaks only an older version is mounted by that."""
    exports.speaks = ("3",)
    put(store, "a/object", b"1")
    assert "vers=3" in exports.mounted[0][1]


def test_version_that_was_asked_for(exports: MemoryExports) -> None:
    """A version that the URL names is not given up for another, and nothing is left of the try."""
    exports.speaks = ("3",)
    store = open_store(exports, f"{URL}?vers=4.2")
    with pytest.raises(StoreUnavailable, match="not supported"):
        put(store, "a/object", b"1")
    assert bare(store) == []
    assert not store.mounted.unmount_unused()


def test_mount_of_somebody_else(store: NfsStore, exports: MemoryExports, tmp_path: Path) -> None:
    """A mount of the same export that is there already is used, and left where it is."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    exports.mount(f"{ADDRESS}:/export", str(theirs), "vers=4.2", os.open(tmp_path, os.O_RDONLY))
    put(store, "object", b"1")
    assert (theirs / "object").read_bytes() == b"1"
    store.mounted.release()
    assert not store.mounted.unmount_unused()
    assert theirs.is_mount()


def test_mount_of_a_longer_name(store: NfsStore, exports: MemoryExports, tmp_path: Path) -> None:
    """A mount whose source only begins like ours is another export."""
    other = tmp_path / "other"
    other.mkdir()
    exports.mount(f"{ADDRESS}:/export2", str(other), "vers=4.2", os.open(tmp_path, os.O_RDONLY))
    put(store, "object", b"1")
    assert not (other / "object").exists()


def test_never_the_bare_directory(store: NfsStore) -> None:
    """An export that somebody unmounts under us is found or mounted again; not a byte goes below the mountpoint."""
    put(store, "a/one", b"1")
    subprocess.run(["umount", "-l", str(store.mounted.paths.point)], check=True)
    put(store, "a/two", b"2")
    assert list(keys(store)) == ["a/one", "a/two"]
    assert bare(store) == []


def test_something_over_it(store: NfsStore) -> None:
    """What somebody mounts over the export is not written to, though it looks like an empty one."""
    put(store, "a/one", b"1")
    subprocess.run(["mount", "-t", "tmpfs", "foreign", str(store.mounted.paths.point)], check=True)
    put(store, "a/two", b"2")
    assert list(keys(store)) == ["a/one", "a/two"]
    subprocess.run(["umount", "-l", str(store.mounted.paths.point)], check=True)
    assert os.listdir(store.mounted.paths.point) == []


def test_mount_that_did_not_take(store: NfsStore, exports: MemoryExports) -> None:
    """A mount command that says all is well when something else lies there is not believed."""
    exports.covers = True
    with pytest.raises(StoreUnavailable, match="is not mounted"):
        put(store, "a/one", b"1")
    assert os.listdir(store.mounted.paths.point) == []


def test_the_wrong_export(store: NfsStore, exports: MemoryExports) -> None:
    """An export without the marker that this host has seen, or with another, is refused; so it never looks empty."""
    put(store, "a/one", b"1")
    marker = exports.root / f"{ADDRESS}:_export" / ".ssvm-store"
    kept = marker.read_bytes()
    for text in (None, b"{}", b'{"id": "another"}'):
        marker.unlink()
        if text:
            marker.write_bytes(text)
        with pytest.raises(StoreAway, match="Not the export that this host knows"):
            keys(open_store(exports))
        assert bare(store) == []  # so that the right one is mounted when it is back
        marker.write_bytes(kept)
    assert list(keys(open_store(exports))) == ["a/one"]


def test_marker_is_no_object(store: NfsStore) -> None:
    """The marker is there from the first use on, and no listing, sweep or search for leftovers shows it."""
    assert list(keys(store)) == []
    assert (store.mounted.paths.point / ".ssvm-store").exists()
    assert store.sweep(0) == 0
    assert list(store.leftovers()) == []


def test_users_are_counted(store: NfsStore, exports: MemoryExports) -> None:
    """It stays mounted while any process uses it, is unmounted when none has for long, and mounted when one does."""
    code = (
        "import fcntl, os, sys\n"
        "handle = os.open(sys.argv[1], os.O_RDWR)\n"
        "fcntl.flock(handle, fcntl.LOCK_SH)\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    put(store, "object", b"1")
    assert not store.mounted.unmount_unused()
    users = str(store.mounted.paths.file("users"))
    with subprocess.Popen(
        [sys.executable, "-c", code, users], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as another:
        assert another.stdout
        another.stdout.readline()
        store.mounted.release()
        assert not store.mounted.unmount_unused()
        another.kill()
        another.wait()
    assert not store.mounted.unmount_unused(idle_s=3600)
    assert is_mounted(store)
    assert store.mounted.unmount_unused()
    assert bare(store) == []
    assert get(open_store(exports), "object") == b"1"


def test_a_store_that_is_gone_is_no_user(store: NfsStore, exports: MemoryExports) -> None:
    """Who forgets its store no longer uses it."""
    another = open_store(exports)
    put(another, "object", b"1")
    del another
    assert store.mounted.unmount_unused()


def test_mounted_twice(store: NfsStore, exports: MemoryExports) -> None:
    """A mount that a dying worker's mount.nfs has put over the first does no harm, and goes with it."""
    put(store, "object", b"1")
    with open(store.mounted.paths.file("lock"), "rb") as held:
        exports.mount(f"{ADDRESS}:/export", str(store.mounted.paths.point), "vers=4.2", held.fileno())
    assert get(store, "object") == b"1"
    store.mounted.release()
    assert store.mounted.unmount_unused()
    assert bare(store) == []


def test_a_mount_under_way(store: NfsStore) -> None:
    """While another process mounts, ours waits for a while and says then what it waited for."""
    places = store.mounted.paths
    places.root.mkdir()
    command = ["flock", str(places.file("lock")), "sh", "-c", "echo; cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(StoreAway, match="Another process mounts"):
            keys(store)
        other.communicate()


def test_sudo_rule(store: NfsStore, tmp_path: Path) -> None:
    """The rule for a worker that is not root names each command to the letter, and sudo understands it."""
    rule = sudo_rule("ssvm", store.mounted.commands())
    assert rule.count(f"mount.nfs {ADDRESS}\\:/export ") == 3
    assert "vers\\=4.2\\,port\\=2049\\,retry\\=0" in rule
    assert "*" not in rule
    if shutil.which("visudo"):
        (tmp_path / "rule").write_text(rule)
        subprocess.run(["visudo", "-c", "-f", str(tmp_path / "rule")], check=True)
