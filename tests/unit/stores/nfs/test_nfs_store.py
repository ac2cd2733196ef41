"""A store on an export that is mounted at first use; here a tmpfs is mounted under its name.

Tests with a real server and the kernel's own client run in a small VM: ``make test-nfs``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssvm_worker.errors import ConfigError, StoreAway, StoreDenied, StoreUnavailable
from ssvm_worker.stores.nfs.commands import mount_error, sudo_rule
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
    """Return a separate store, as another process would have it."""
    root = exports.root.parent / "mounts"
    return NfsStore("primary", url, NfsSettings(root, mount_s=1.0, probe_s=PATIENCE_S), exports)


@pytest.fixture
def store(exports: MemoryExports) -> NfsStore:
    return open_store(exports)


def is_mounted(store: NfsStore) -> bool:
    """Return whether a file system is mounted at its mountpoint."""
    return str(store.mounted.paths.point) in {each.point for each in mounts()}


def bare(store: NfsStore) -> list[str]:
    """Return the content of the directory under the mount."""
    assert not is_mounted(store)
    return os.listdir(store.mounted.paths.point)


class TestNfsStore(ResumableStoreContract):
    @pytest.fixture
    def store(self, exports: MemoryExports) -> NfsStore:
        return open_store(exports)


def test_mounted_on_first_use(store: NfsStore, exports: MemoryExports) -> None:
    """The export is mounted once at first use, for all later calls and all stores of the host."""
    assert not exports.mounted
    put(store, "a/object", b"1")
    assert get(store, "a/object") == b"1"
    assert get(open_store(exports), "a/object") == b"1"
    assert len(exports.mounted) == 1


def test_older_version(store: NfsStore, exports: MemoryExports) -> None:
    """A server with only an older version is mounted by that version."""
    exports.speaks = ("3",)
    put(store, "a/object", b"1")
    assert "vers=3" in exports.mounted[0][1]


def test_version_that_was_asked_for(exports: MemoryExports) -> None:
    """A version in the URL is not replaced by another, and the failed try leaves nothing."""
    exports.speaks = ("3",)
    store = open_store(exports, f"{URL}?vers=4.2")
    with pytest.raises(StoreDenied, match="not supported"):
        put(store, "a/object", b"1")
    assert bare(store) == []
    assert not store.mounted.unmount_unused()


def test_host_without_nfs(exports: MemoryExports, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose kernel has no NFS client is named as the cause, and not the server."""

    def mount(*_: object) -> None:
        raise mount_error("mount.nfs: No such device", URL)

    monkeypatch.setattr(exports, "mount", mount)
    with pytest.raises(ConfigError, match="its kernel has no NFS client"):
        put(open_store(exports, URL), "a/object", b"1")


def test_mount_of_somebody_else(store: NfsStore, exports: MemoryExports, tmp_path: Path) -> None:
    """An existing mount of the export is used, and is not unmounted."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    exports.mount(f"{ADDRESS}:/export", str(theirs), "vers=4.2", os.open(tmp_path, os.O_RDONLY))
    put(store, "object", b"1")
    assert (theirs / "object").read_bytes() == b"1"
    store.mounted.release()
    assert not store.mounted.unmount_unused()
    assert theirs.is_mount()


def test_mount_of_a_longer_name(store: NfsStore, exports: MemoryExports, tmp_path: Path) -> None:
    """A mount whose source only starts with the same text is another export."""
    other = tmp_path / "other"
    other.mkdir()
    exports.mount(f"{ADDRESS}:/export2", str(other), "vers=4.2", os.open(tmp_path, os.O_RDONLY))
    put(store, "object", b"1")
    assert not (other / "object").exists()


def test_never_the_bare_directory(store: NfsStore) -> None:
    """If the export is unmounted by another program, it is mounted again, and no byte goes below the mountpoint."""
    put(store, "a/one", b"1")
    subprocess.run(["umount", "-l", str(store.mounted.paths.point)], check=True)
    put(store, "a/two", b"2")
    assert list(keys(store)) == ["a/one", "a/two"]
    assert bare(store) == []


def test_something_over_it(store: NfsStore) -> None:
    """A file system that another program mounts over the export gets no data, even if it is empty."""
    put(store, "a/one", b"1")
    subprocess.run(["mount", "-t", "tmpfs", "foreign", str(store.mounted.paths.point)], check=True)
    put(store, "a/two", b"2")
    assert list(keys(store)) == ["a/one", "a/two"]
    subprocess.run(["umount", "-l", str(store.mounted.paths.point)], check=True)
    assert os.listdir(store.mounted.paths.point) == []


def test_mount_that_did_not_take(store: NfsStore, exports: MemoryExports) -> None:
    """A successful mount command is not trusted if another file system is at the mountpoint."""
    exports.covers = True
    with pytest.raises(StoreUnavailable, match="is not mounted"):
        put(store, "a/one", b"1")
    assert os.listdir(store.mounted.paths.point) == []


def test_the_wrong_export(store: NfsStore, exports: MemoryExports) -> None:
    """An export without the known marker, or with another one, is refused, so it never looks empty."""
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
    """The marker exists from the first use, and no listing, sweep or search for leftovers shows it."""
    assert list(keys(store)) == []
    assert (store.mounted.paths.point / ".ssvm-store").exists()
    assert store.sweep(0) == 0
    assert list(store.leftovers()) == []


def test_users_are_counted(store: NfsStore, exports: MemoryExports) -> None:
    """The export stays mounted while any process uses it, and is unmounted when it is idle."""
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
    """A store object that was deleted no longer counts as a user."""
    another = open_store(exports)
    put(another, "object", b"1")
    del another
    assert store.mounted.unmount_unused()


def test_mounted_twice(store: NfsStore, exports: MemoryExports) -> None:
    """A second mount over the first, by a killed worker's mount.nfs, does no harm and is removed too."""
    put(store, "object", b"1")
    with open(store.mounted.paths.file("lock"), "rb") as held:
        exports.mount(f"{ADDRESS}:/export", str(store.mounted.paths.point), "vers=4.2", held.fileno())
    assert get(store, "object") == b"1"
    store.mounted.release()
    assert store.mounted.unmount_unused()
    assert bare(store) == []


def test_a_mount_under_way(store: NfsStore) -> None:
    """While another process mounts, this one waits for a while, and its error then gives the reason."""
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
    """The rule for a worker without root names each command exactly, and sudo accepts it."""
    rule = sudo_rule("ssvm", store.mounted.commands())
    assert rule.count(f"mount.nfs {ADDRESS}\\:/export ") == 3
    assert "vers\\=4.2\\,port\\=2049\\,retry\\=0" in rule
    assert "*" not in rule
    if shutil.which("visudo"):
        (tmp_path / "rule").write_text(rule)
        subprocess.run(["visudo", "-c", "-f", str(tmp_path / "rule")], check=True)
