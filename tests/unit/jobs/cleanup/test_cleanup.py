"""cleanup deletes leftovers of ended jobs, and never changes complete, young or live data."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker import config
from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.artifacts.layout import DRAFT, Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, write_draft, write_manifest
from ssvm_worker.cli import main
from ssvm_worker.errors import InvalidRequest, StoreUnavailable
from ssvm_worker.jobs.cleanup import job as cleanup
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.services import NullJobs
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import NewJob
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.stores.s3.store import S3Store
from ssvm_worker.streaming.interfaces import Owner, Store
from ssvm_worker.streaming.pipeline import put_bytes
from ssvm_worker.wiring.assembly import RecordedJobs
from tests.attempts import attempt
from tests.faults import store_unreachable
from tests.grain_bench import back_up, disk
from tests.servers.broker import Broker
from tests.servers.s3 import S3Server
from tests.unit.stores.s3.test_s3_store import settings_of

DAY = 86400
MiB = 1 << 20
OWNER = Owner("job-dead", 1)
WHOLE, DEAD, OPEN = (Artifact("template", "2", id_) for id_ in ("20", "2", "201"))
BACKUP = Artifact("backup", "acme", "b1", "vol1")
PACK = f"{BACKUP.family}/_packs/ab/{'ab' * 16}"


def fill(store: Store) -> Any:
    """Store one complete artifact with a draft, one without a manifest, and open writes of an artifact and a pack."""
    put_bytes(store, WHOLE.key("20.raw"), b"whole", OWNER)
    put_bytes(store, PACK, b"a pack", OWNER)
    manifest = Manifest(WHOLE, "job-0", (Entry("20.raw", 5, str(digest_of(b"whole"))),))
    write_manifest(store, manifest, OWNER)
    write_draft(store, manifest, OWNER)
    for name in ("2.raw", "template.properties"):
        put_bytes(store, DEAD.key(name), b"half", OWNER)
    for key in (OPEN.key("201.raw"), PACK[:-1] + "0"):
        sink = store.writer(key, owner=OWNER)
        sink.write(b"open")
        sink.suspend()
    return store


def age(root: Path, seconds: float = 2 * DAY) -> None:
    """Set all modification times to so long ago."""
    then = time.time() - seconds
    for each in root.rglob("*"):
        if each.is_file():
            os.utime(each, (then, then))


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    """Return a store with leftovers of two days ago."""
    (tmp_path / "store").mkdir()
    store: FileStore = fill(FileStore("primary", tmp_path / "store"))
    age(tmp_path / "store")
    return store


@pytest.fixture
def ledger(broker: Broker) -> Iterator[Ledger]:
    """Return a ledger that forgets jobs when they have ended."""
    with Ledger(broker.url, prefix=broker.prefix, keep_s=0) as found:
        yield found


def run(*stores: Store, jobs: Any = None, **fields: Any) -> dict[str, Any]:
    it = attempt(*stores, **({"jobs": jobs} if jobs else {}))
    return cleanup.run(parse_request(cleanup.Request, fields, "cleanup"), it)


def left(store: Store) -> set[str]:
    """Return all objects of the store, committed or not."""
    return {each.key for each in (*store.list(), *store.leftovers())}


GOOD = {WHOLE.key("20.raw"), WHOLE.key("manifest.json")}


def test_removes(store: FileStore) -> None:
    """Abandoned data is deleted, complete data stays, and the result has the amount."""
    result = run(store)
    assert left(store) == GOOD
    assert result["counts"] == {"abandoned write": 2, "incomplete artifact": 1, "draft": 1, "unneeded pack": 1}
    assert result["bytes"] > 16


def test_dry_run(store: FileStore) -> None:
    """A dry run changes nothing, and reports exactly what the real run then deletes, with reasons."""
    before = left(store)
    told = run(store, dry_run=True)
    assert left(store) == before
    did = run(store)
    assert [each | {"why": ""} for each in told["found"]] == [each | {"why": ""} for each in did["found"]]
    assert {each["why"].partition(" 0 min")[0] for each in told["found"]} == {
        "untouched for 48 h",
        "no backup of the volume needs it",
    }


def test_nothing(store: FileStore) -> None:
    """The second clean-up finds nothing."""
    run(store)
    assert run(store)["counts"] == {}


@pytest.mark.parametrize("older_than", ["3d", "49h", "3w"])
def test_young(store: FileStore, older_than: str) -> None:
    """Recently changed data stays."""
    before = left(store)
    run(store, older_than=older_than)
    assert left(store) == before


@pytest.mark.parametrize("young", ["an object", "an open write"])
def test_partly_young(store: FileStore, young: str) -> None:
    """An artifact with any young part stays, because a program without a ledger may be writing it."""
    with store.writer(DEAD.key("2-more.raw"), owner=Owner("job-run", 1)) as sink:
        sink.write(b"more")
        if young == "an object":
            sink.commit()
        else:
            sink.suspend()
    run(store)
    assert {DEAD.key("2.raw"), DEAD.key("2-more.raw")} <= left(store)


@pytest.mark.parametrize("state", ["queued", "running"])
def test_live(store: FileStore, ledger: Ledger, state: str) -> None:
    """Nothing that a queued or running job may write is deleted at any age, including its volume's packs."""
    before = left(store)
    for number, artifact in enumerate((WHOLE, DEAD, OPEN, BACKUP)):
        ledger.submit(NewJob(f"j{number}", "download", "z", "download", {}, artifact.resource))
        assert state == "queued" or ledger.claim(f"j{number}", "w")
    assert run(store, jobs=ledger, older_than="0")["counts"] == {}
    assert left(store) == before


def test_ended(store: FileStore, ledger: Ledger, broker: Broker) -> None:
    """An ended job protects nothing, and its record expires in time; a dry run only counts it."""
    known = {"broker": {"url": broker.url, "prefix": broker.prefix}, "ledger": {"keep_days": 0}}
    jobs = RecordedJobs(config.parse(known, "test"))
    ledger.submit(NewJob("j1", "download", "z", "download", {}, DEAD.resource))
    ledger.cancel("j1", "ann")
    assert run(store, jobs=jobs, dry_run=True)["records"] == len(ledger.page()) == 1
    assert run(store, jobs=jobs)["records"] == 2  # and the record of the lock under which the pack was deleted
    assert ledger.page() == []
    assert left(store) == GOOD


def test_twice_at_once(store: FileStore) -> None:
    """Parallel clean-ups do no harm."""
    with ThreadPoolExecutor(4) as pool:
        results = [each.result() for each in [pool.submit(run, store) for _ in range(4)]]
    assert left(store) == GOOD
    assert [each["failed"] for each in results] == [{}] * 4


def test_foreign(store: FileStore, tmp_path: Path) -> None:
    """Files outside the layout are foreign and stay."""
    foreign = tmp_path / "store/systemvm/iso.img"
    foreign.parent.mkdir()
    foreign.write_bytes(b"not ours")
    age(tmp_path / "store")
    run(store)
    assert foreign.exists()


def test_a_store_that_is_away(store: FileStore, tmp_path: Path) -> None:
    """A store that cannot be reached is reported, and the others are cleaned."""
    away = store_unreachable(FileStore("archive", tmp_path), "leftovers")
    result = run(away, store)
    assert result["failed"]["archive"]["error"] == "StoreUnavailable"
    assert left(store) == GOOD


def test_ledger_away(store: FileStore) -> None:
    """While the live jobs are unknown, nothing is deleted."""
    before = left(store)
    with Ledger("redis://127.0.0.1:1/0") as nowhere, pytest.raises(StoreUnavailable):
        run(store, jobs=nowhere)
    assert left(store) == before


def test_s3(s3_server: S3Server) -> None:
    """An abandoned upload is aborted, but not one of a live job."""
    store = S3Store("archive", s3_server.make_bucket(), "zone/1", settings_of(s3_server))
    sinks = [store.writer(each.key("x.raw"), owner=OWNER) for each in (DEAD, OPEN)]
    for sink in sinks:
        for _ in range(6):
            sink.write(bytes(MiB))
    jobs = _Living(OPEN.resource)
    assert run(store, jobs=jobs)["counts"] == {}
    assert run(store, jobs=jobs, older_than="0")["counts"] == {"abandoned write": 1}
    assert left(store) == {OPEN.key("x.raw")}
    for sink in sinks:
        sink.abort()


class _Living:
    """A ledger with one live job."""

    def __init__(self, resource: str) -> None:
        self._resource = resource

    def live(self) -> set[str]:
        return {self._resource}

    def expire(self) -> int:
        return 0


@pytest.mark.parametrize("older_than", ["soon", "-1h", "1y", "5", ""])
def test_bad_times(older_than: str) -> None:
    """An invalid time is refused."""
    with pytest.raises(InvalidRequest, match="older_than: must be a number"):
        parse_request(cleanup.Request, {"older_than": older_than}, "cleanup")


@pytest.fixture
def cron(store: FileStore, broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Return settings with the store and a broker."""
    monkeypatch.setenv("SSVM_STORES__PRIMARY__URL", f"file://{tmp_path}/store")
    monkeypatch.setenv("SSVM_BROKER__URL", broker.url)
    monkeypatch.setenv("SSVM_BROKER__PREFIX", broker.prefix)


def test_cron(cron: None, capsys: pytest.CaptureFixture[str]) -> None:
    """For cron, clean-up prints one line if it deleted data, and otherwise nothing."""
    assert main(["cleanup"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.startswith("cleanup removed 2 abandoned writes, 1 unneeded pack, 1 incomplete artifact, 1 draft: ")
    assert main(["cleanup"]) == 0
    assert capsys.readouterr().out == ""


def test_cron_dry_run(cron: None, store: FileStore, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run prints each deletion with its reason, and then the sum."""
    main(["cleanup", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert f"incomplete artifact primary:{DEAD.prefix} (8 B): untouched for 48 h" in "\n".join(lines)
    assert lines[-1].startswith("cleanup would remove 2 abandoned writes")
    assert WHOLE.key(DRAFT) in left(store)


def test_cron_as_json(cron: None, capsys: pytest.CaptureFixture[str]) -> None:
    """With --json the whole result is printed, even if it is empty."""
    main(["cleanup", "--json", "--older-than", "30d"])
    assert json.loads(capsys.readouterr().out)["counts"] == {}


def test_cron_with_a_store_away(
    cron: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An absent store is named once, on standard error, and the exit status means a temporary error."""
    monkeypatch.setenv("SSVM_STORES__ARCHIVE__URL", f"file://{tmp_path}/nowhere")
    for argv in (["cleanup"], ["cleanup", "--dry-run"]):
        assert main(argv) == 75
        shown = capsys.readouterr()
        assert shown.err.count("archive is not cleaned up: The store's directory does not exist") == 1
        assert "is not cleaned up" not in shown.out
    assert shown.out == "cleanup would remove nothing. Not examined: archive\n"


class Counting(NullJobs):
    """A ledger that counts how often it is read."""

    def __init__(self) -> None:
        self.reads = 0

    def live(self) -> frozenset[str]:
        self.reads += 1
        return frozenset(f"template/tmpl/9/{number}" for number in range(300))


def test_the_ledger_is_read_once() -> None:
    """For any number of volumes the ledger is read once, and again only before deletions."""
    store, jobs = MemoryStore("primary"), Counting()
    for number in range(50):
        back_up(store, "b1", disk(2), volume=f"v{number}")
    cleanup.run(cleanup.Request(), attempt(store, jobs=jobs))
    assert jobs.reads == 1
