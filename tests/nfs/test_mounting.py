"""An export is mounted as the settings say, shared, unmounted by whom it was mounted, and never taken for another."""

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
    """What alpha has mounted of that export, by whatever path and version."""
    return [each for each in mounts() if each.fstype in ("nfs", "nfs4") and each.source.endswith(f"/{export.name}")]


def test_as_wanted(server: Server) -> None:
    """The first use mounts, by 4.2 and with the options that docs/nfs.md argues; all who come later share the mount."""
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
    """What a URL says goes before the defaults."""
    export = server.export("options")
    put(export.store("?vers=4.1&nconnect=2&timeo=100&rsize=65536"), "object", b"1")
    [mount] = mounted(export)
    assert {"vers": "4.1", "nconnect": "2", "timeo": "100", "rsize": "65536"}.items() <= mount.options.items()


def test_path_of_version_3(server: Server) -> None:
    """A path that the server shows by version 3 alone is mounted by that, without locks."""
    export = server.export("three")
    store = NfsStore("primary", f"nfs://{ADDRESS}{export.directory}", NfsSettings(MOUNTS))
    put(store, "object", b"1")
    [mount] = mounted(export)
    assert (mount.fstype, mount.options["vers"], "nolock" in mount.options) == ("nfs", "3", True)
    assert export.read("object") == b"1"


def test_unmounted_by_whom_it_was_mounted(server: Server, tmp_path: Path) -> None:
    """Ours goes when nobody has used it for long enough; an administrator's is used where it is, and left."""
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
    """A mount whose worker is killed is finished or given up before another begins, and then used like any other."""
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
    """A file system that has taken an export's place is not written to, though its name and its server are right."""
    export = server.export("wrong")
    put(export.store(), "a/one", b"1")
    export.mount()  # as when a disk is not there after a boot
    with pytest.raises(StoreAway, match="Not the export that this host knows: it has no marker"):
        put(export.store(), "a/two", b"2")
    assert export.files() == []
    assert mounted(export) == [], "it would stay the wrong one"
    export.unmount()
    assert list(keys(reached(export))) == ["a/one"]


def test_export_that_is_not_there(server: Server) -> None:
    """An export taken away is a store that is away, and never the directory which its server shows in its place."""
    export = server.export("gone")
    put(export.store(), "a/one", b"1")
    export.withdraw()
    with pytest.raises(StoreAway):
        put(export.store(), "a/two", b"2")
    export.offer()
    put(reached(export), "a/two", b"2")
    assert export.files() == ["a/one", "a/two"]


def reached(export: Export) -> NfsStore:
    """A store on it whose breaker is due: as after the seconds that it would wait."""
    store = export.store()
    store.mounted.paths.file("health").unlink(missing_ok=True)
    return store


def test_refused(server: Server) -> None:
    """An export that is not for this host is a mistake that a person mends: the job fails, and says what was said."""
    export = server.export("refused")
    export.withdraw()
    server.host.run(command, "exportfs", "-o", "rw,fsid=777", f"192.0.2.1:{export.directory}")
    store = NfsStore("primary", f"nfs://{ADDRESS}{export.directory}?vers=3", NfsSettings(MOUNTS))
    with pytest.raises(StoreDenied, match="The server refuses the mount"):
        put(store, "object", b"1")
    assert mounted(export) == []
    server.host.run(command, "exportfs", "-u", f"192.0.2.1:{export.directory}")
