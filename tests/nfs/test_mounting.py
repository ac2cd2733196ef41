"""An export is mounted by the settings, shared, unmounted by its owner, and never mistaken for another."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from ssvm_worker.errors import StoreAway, StoreDenied
from ssvm_worker.stores.nfs.mountinfo import Mount, mounts
from ssvm_worker.stores.nfs.store import NfsSettings, NfsStore
from tests.contracts.store import get, keys, put
from tests.nfs.hosts import command
from tests.nfs.server import ADDRESS, MOUNTS, Export, Server
from tests.waiting import until


def mounted(export: Export) -> list[Mount]:
    """Return alpha's mounts of that export, by any path and version."""
    return [each for each in mounts() if each.fstype in ("nfs", "nfs4") and each.source.endswith(f"/{export.name}")]


def test_as_wanted(server: Server) -> None:
    """The first use mounts by 4.2 with the options of docs/how-to/nfs.md, and later uses share the mount."""
    export = server.export("wanted")
    store = export.store()
    assert mounted(export) == []
    put(store, "a/object", b"1")
    assert get(export.store(), "a/object") == b"1"
    [mount] = mounted(export)
    assert (mount.fstype, mount.source, mount.point) == (
        "nfs4",
        f"{ADDRESS}:/wanted",
        str(store.mounted.paths.point),
    )
    given = {"vers": "4.2", "hard": "", "timeo": "600", "retrans": "2", "nconnect": "4", "lookupcache": "pos"}
    assert given.items() <= mount.options.items()
    assert {"acdirmin", "acdirmax"} <= mount.options.keys() or "noac" in mount.options
    assert export.read("a/object") == b"1"


def test_options_of_the_url(server: Server) -> None:
    """A URL's options override the defaults."""
    export = server.export("options")
    put(export.store("?vers=4.1&nconnect=2&timeo=100&rsize=65536"), "object", b"1")
    [mount] = mounted(export)
    assert {"vers": "4.1", "nconnect": "2", "timeo": "100", "rsize": "65536"}.items() <= mount.options.items()


def test_path_of_version_3(server: Server) -> None:
    """A path that the server has only in version 3 is mounted by that, without locks."""
    export = server.export("three")
    store = NfsStore("primary", f"nfs://{ADDRESS}{export.directory}", NfsSettings(MOUNTS))
    put(store, "object", b"1")
    [mount] = mounted(export)
    assert (mount.fstype, mount.options["vers"], "nolock" in mount.options) == ("nfs", "3", True)
    assert export.read("object") == b"1"


def test_unmounted_by_whom_it_was_mounted(server: Server, tmp_path: Path) -> None:
    """The worker's own mount is removed when it is idle, and an administrator's mount stays."""
    ours, theirs = server.export("ours"), server.export("theirs")
    command("mount.nfs", f"{ADDRESS}:/theirs", str(tmp_path), "-o", "vers=4.2")
    stores = [ours.store(), theirs.store()]
    for store in stores:
        put(store, "object", b"1")
        assert not store.mounted.unmount_unused(), "it is in use"
        store.mounted.release()
    assert not stores[0].mounted.unmount_unused(idle_s=3600)
    assert [store.mounted.unmount_unused() for store in stores] == [True, False]
    assert mounted(ours) == []
    assert [each.point for each in mounted(theirs)] == [str(tmp_path)]
    assert theirs.files() == ["object"]
    command("umount", str(tmp_path))


def test_worker_killed_while_it_mounts(server: Server) -> None:
    """A killed worker's mount is finished or given up before another starts, and is then usable."""
    export = server.export("killed")
    server.hang()
    worker = multiprocessing.get_context("fork").Process(target=put, args=(export.store(), "a/one", b"1"))
    worker.start()
    until(lambda: _mounting(export), "mount.nfs runs")
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join()
    assert _mounting(export), "it went with its worker, and this test tries nothing"
    server.go_on()
    store = export.store()
    put(store, "a/two", b"2")
    assert list(keys(store)) == ["a/two"]
    assert not _mounting(export)
    assert len(mounted(export)) == 1
    store.mounted.release()
    assert store.mounted.unmount_unused()
    assert (mounted(export), os.listdir(store.mounted.paths.point)) == ([], [])


def _mounting(export: Export) -> bool:
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(each.read_bytes())
    return any(b"mount.nfs\0" in each and f":/{export.name}\0".encode() in each for each in found)


def test_wrong_export(server: Server) -> None:
    """A file system that replaced an export's content is not written to, even with the right name and server."""
    export = server.export("wrong")
    put(export.store(), "a/one", b"1")
    export.mount()  # as when a disk is missing after a boot
    with pytest.raises(StoreAway, match="Not the export that this host knows: it has no marker"):
        put(export.store(), "a/two", b"2")
    assert export.files() == []
    assert mounted(export) == [], "it would stay the wrong one"
    export.unmount()
    assert list(keys(reached(export))) == ["a/one"]


def test_export_that_is_not_there(server: Server) -> None:
    """A withdrawn export is an absent store, never the directory that its server shows instead."""
    export = server.export("gone")
    put(export.store(), "a/one", b"1")
    export.withdraw()
    with pytest.raises(StoreAway):
        put(export.store(), "a/two", b"2")
    export.offer()
    put(reached(export), "a/two", b"2")
    assert export.files() == ["a/one", "a/two"]


def reached(export: Export) -> NfsStore:
    """Return a store on it whose breaker is due, as after its wait."""
    store = export.store()
    store.mounted.paths.file("health").unlink(missing_ok=True)
    return store


def test_refused(server: Server) -> None:
    """An export that is not for this host is a permanent error with the server's reason."""
    export = server.export("refused")
    export.withdraw()
    server.host.run(command, "exportfs", "-o", "rw,fsid=777", f"192.0.2.1:{export.directory}")
    store = NfsStore("primary", f"nfs://{ADDRESS}{export.directory}?vers=3", NfsSettings(MOUNTS))
    with pytest.raises(StoreDenied, match="The server refuses the mount"):
        put(store, "object", b"1")
    assert mounted(export) == []
    server.host.run(command, "exportfs", "-u", f"192.0.2.1:{export.directory}")
