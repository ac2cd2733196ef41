"""Retention: which backups stay, on a UTC calendar, and that clean-up deletes exactly the others."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssvm_worker import config
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, artifacts_below, write_manifest
from ssvm_worker.cli import main
from ssvm_worker.config.schema import RetentionRule, Settings
from ssvm_worker.errors import Cancelled, InvalidRequest
from ssvm_worker.jobs.cleanup import job as cleanup
from ssvm_worker.jobs.cleanup.retention import BackupAge, backups_to_keep
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.ledger.quota import LocalQuota
from ssvm_worker.ledger.record import Claim, NewJob
from ssvm_worker.ledger.scrub_results import LocalScrubResults
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Owner, Store
from ssvm_worker.streaming.pipeline import put_bytes
from ssvm_worker.wiring.assembly import RecordedJobs, open_ledger
from tests.attempts import attempt
from tests.grain_bench import packs, restored
from tests.servers.broker import Broker
from tests.servers.worker import until
from tests.unit.jobs.backup.test_grain_jobs import RAWS, back_up
from tests.waiting import CLAIM_S

#: A Wednesday.
START = datetime(2025, 1, 1, 2, tzinfo=UTC)
OWNER = Owner("j", 1)


def day(number: float, **known: Any) -> BackupAge:
    """Return a backup of 2 o'clock on that day, counted from 0."""
    return BackupAge(f"d{number:g}", (START + timedelta(days=number)).timestamp(), **known)


def stays(rule: RetentionRule, *backups: BackupAge) -> list[str]:
    """Return the kept backups in the order in which they were made."""
    found = backups_to_keep(rule, backups)
    return [each.id for each in sorted(backups, key=lambda each: each.created) if each.id in found]


def days(*numbers: float) -> list[str]:
    return [f"d{each:g}" for each in numbers]


YEAR = [day(each) for each in range(365)]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        pytest.param(RetentionRule(keep_last=1), days(364), id="last"),
        pytest.param(RetentionRule(keep_last=3), days(362, 363, 364), id="last three"),
        pytest.param(RetentionRule(keep_daily=2), days(363, 364), id="daily"),
        pytest.param(RetentionRule(keep_weekly=3), days(354, 361, 364), id="weekly: Sundays, and this week's last"),
        pytest.param(RetentionRule(keep_monthly=3), days(303, 333, 364), id="monthly: the last of each month"),
        pytest.param(
            RetentionRule(keep_monthly=99), days(30, 58, 89, 119, 150, 180, 211, 242, 272, 303, 333, 364), id="a year"
        ),
        pytest.param(
            RetentionRule(keep_last=2, keep_daily=3, keep_weekly=2, keep_monthly=2),
            days(333, 361, 362, 363, 364),
            id="together: what any of them keeps",
        ),
        pytest.param(RetentionRule(), [each.id for each in YEAR], id="no rule keeps all"),
    ],
)
def test_a_year_of_days(rule: RetentionRule, expected: list[str]) -> None:
    """After a year of daily backups, exactly those that the rule names stay."""
    assert stays(rule, *YEAR) == expected


@pytest.mark.parametrize(
    ("rule", "backups", "expected"),
    [
        pytest.param(
            RetentionRule(keep_daily=2), [day(0), day(0.1), day(0.2), day(5)], days(0.2, 5), id="days without any"
        ),
        pytest.param(
            RetentionRule(keep_daily=1), [day(0.9), day(0.92)], days(0.92), id="one day, by UTC: before midnight"
        ),
        pytest.param(
            RetentionRule(keep_daily=2), [day(0.91), day(0.92)], days(0.91, 0.92), id="two days: across midnight"
        ),
        pytest.param(
            RetentionRule(keep_weekly=2), [day(-3), day(-2), day(4)], days(-3, 4), id="ISO week: one over New Year"
        ),
        pytest.param(RetentionRule(keep_last=2), [day(1)], days(1), id="fewer than the rule keeps"),
        pytest.param(RetentionRule(keep_last=5), [], [], id="none"),
    ],
)
def test_calendar(rule: RetentionRule, backups: list[BackupAge], expected: list[str]) -> None:
    """Periods are in UTC, weeks start on Monday and may span a year's end, and empty periods do not count."""
    assert stays(rule, *backups) == expected


BAD = {"good": False}


@pytest.mark.parametrize(
    ("rule", "backups", "expected"),
    [
        pytest.param(
            RetentionRule(keep_last=1), [day(0), day(1, **BAD)], days(0, 1), id="the last good one, behind a bad one"
        ),
        pytest.param(
            RetentionRule(keep_last=1), [day(0), day(1, **BAD), day(2)], days(2), id="a bad one goes with its time"
        ),
        pytest.param(
            RetentionRule(keep_last=2), [day(0), day(1, **BAD), day(2)], days(0, 1, 2), id="a bad one takes no place"
        ),
        pytest.param(
            RetentionRule(keep_last=1), [day(0, **BAD), day(1, **BAD)], days(0, 1), id="none is good: all stay"
        ),
        pytest.param(
            RetentionRule(keep_last=1), [day(0, verified=9), day(1), day(2)], days(0, 2), id="the last that was read"
        ),
        pytest.param(
            RetentionRule(keep_last=1), [day(0, verified=9), day(1, verified=9), day(2)], days(1, 2), id="only that"
        ),
        pytest.param(
            RetentionRule(keep_last=1),
            [day(0), day(1, verified=9, **BAD), day(2)],
            days(2),
            id="read, and found to be bad",
        ),
    ],
)
def test_good_and_bad(rule: RetentionRule, backups: list[BackupAge], expected: list[str]) -> None:
    """The last good backup and the last verified one stay, and a bad one displaces neither."""
    assert stays(rule, *backups) == expected


@given(
    st.builds(RetentionRule, **dict.fromkeys(RetentionRule.model_fields, st.integers(0, 3))),
    st.lists(st.tuples(st.integers(0, 200), st.booleans(), st.booleans()), min_size=1, unique_by=lambda each: each[0]),
)
def test_never_without_a_good_one(rule: RetentionRule, made: list[tuple[int, bool, bool]]) -> None:
    """Any rule keeps a good and a verified backup if they exist, and a second run deletes nothing."""
    backups = [day(at, good=good, verified=float(read)) for at, good, read in made]
    left = [each for each in backups if each.id in backups_to_keep(rule, backups)]
    assert any(each.good for each in left) == any(each.good for each in backups)
    assert any(each.good and each.verified for each in left) == any(each.good and each.verified for each in backups)
    assert set(backups_to_keep(rule, left)) == {each.id for each in left}


def test_whose_rule() -> None:
    """A volume's rule precedes its account's rule, which precedes the general one."""
    table = {"keep_last": 3, "accounts": {"acme": {"keep_daily": 7}}, "volumes": {"acme/v": {}}}
    rules = config.parse({"retention": table}, "test").retention
    assert rules.of("2", "v").keep_last == 3
    assert rules.of("acme", "w") == RetentionRule(keep_daily=7)
    assert not rules.of("acme", "v")


def back_up_at(store: Store, id_: str, number: int, volume: str = "vol1", **facts: Any) -> Artifact:
    """Make a full backup of that day; *wanted* are the disks that its request named."""
    source = {"request": {"disks": facts.pop("wanted", None)}}
    artifact = Artifact("backup", "acme", id_, volume)
    put_bytes(store, artifact.key("x.vmdk"), b"disk", OWNER)
    created = (START + timedelta(days=number)).strftime("%Y-%m-%dT%H:%M:%SZ")
    entries = (Entry("x.vmdk", 4, ""),)
    write_manifest(store, Manifest(artifact, "j", entries, source=source, facts=facts, created=created), OWNER)
    return artifact


def clean(store: Store, rule: RetentionRule | None = None, fields: Any = None, **it: Any) -> dict[str, Any]:
    settings = {"retention": rule.model_dump() if rule else {}}
    request = parse_request(cleanup.Request, fields or {}, "cleanup")
    return cleanup.run(request, attempt(store, settings=settings, **it))


def ids(store: Store) -> list[str]:
    return [each.id for each in artifacts_below(store)]


def test_cleanup_expires() -> None:
    """Clean-up deletes and reports each volume's unkept backups with reasons, and a dry run only reports."""
    store, quota = MemoryStore("primary"), LocalQuota()
    for number in range(4):
        it = back_up_at(store, f"b{number}", number)
        quota.note("acme", "primary", it.prefix, 4)
    back_up_at(store, "other", 0, "vol2")
    told = clean(store, RetentionRule(keep_last=2), {"dry_run": True})
    assert ids(store) == ["b0", "b1", "b2", "b3", "other"]
    did = clean(store, RetentionRule(keep_last=2), quota=quota)
    assert ids(store) == ["b2", "b3", "other"]
    assert did["counts"] == told["counts"] == {"expired backup": 2}
    assert [each["where"] for each in told["found"]] == ["snapshots/acme/vol1/b0", "snapshots/acme/vol1/b1"]
    assert told["found"][0]["why"] == "no rule keeps it (keep_last 2); of 4 backups 2 stay, the newest is b3"
    assert next(quota.usage()).used == 8
    assert clean(store, RetentionRule(keep_last=2))["counts"] == {}


def test_cleanup_knows_what_is_good() -> None:
    """A damaged or incomplete backup does not displace the last good one."""
    store, verdicts = MemoryStore("primary"), LocalScrubResults()
    for number in range(4):
        back_up_at(store, f"b{number}", number, disks=[{"status": "missing" if number == 2 else "exported"}])
    verdicts.note("primary", "snapshots/acme/vol1/b3", ["cut"], "j")
    clean(store, RetentionRule(keep_last=1), scrub_results=verdicts)
    assert ids(store) == ["b1", "b3"]


@pytest.mark.parametrize(("wanted", "stay"), [(["scsi0:0"], ["b1"]), (None, ["b0", "b1"])])
def test_disks_left_out(wanted: list[str] | None, stay: list[str]) -> None:
    """A backup of only the requested disks is good, and one that lacks a requested disk is not."""
    store = MemoryStore("primary")
    for number in range(2):
        back_up_at(store, f"b{number}", number, wanted=wanted, disks=[{"status": "exported"}, {"status": "rdm"}])
    clean(store, RetentionRule(keep_last=1))
    assert ids(store) == stay


def test_unreadable_manifest_stays() -> None:
    """A backup whose manifest cannot be read stays."""
    store = MemoryStore("primary")
    for number in range(3):
        it = back_up_at(store, f"b{number}", number)
        if not number:
            put_bytes(store, it.key("manifest.json"), b"{", OWNER)
    clean(store, RetentionRule(keep_last=1))
    assert [each.id for each in artifacts_below(store)] == ["b0", "b2"]


def test_incrementals_expire() -> None:
    """Expired incremental backups lose packs that no other needs, and the rest restore as before."""
    store = MemoryStore("primary")
    manifests = {id_: back_up(store, id_, raw) for id_, raw in RAWS.items()}
    before = len(packs(store))
    clean(store, RetentionRule(keep_last=1), {"older_than": "0"})
    (left,) = ids(store)
    assert restored(store, manifests[left]) == RAWS[left]
    assert left == "b3"
    assert len(packs(store)) < before


def test_unneeded_packs() -> None:
    """Only packs that no backup needs are deleted, and without a rule no backup is."""
    store = MemoryStore("primary")
    manifests = {id_: back_up(store, id_, raw) for id_, raw in RAWS.items()}
    needed = set(packs(store))
    put_bytes(store, "snapshots/acme/vol1/_packs/ab/" + "ab" * 16, b"a pack", OWNER)
    told = clean(store, fields={"older_than": "0", "dry_run": True})
    assert len(packs(store)) == len(needed) + 1
    assert told["counts"] == {"unneeded pack": 1}
    assert clean(store, fields={"older_than": "0"})["counts"] == {"unneeded pack": 1}
    assert set(packs(store)) == needed
    assert all(restored(store, manifests[id_]) == raw for id_, raw in RAWS.items())


def test_young_packs_stay() -> None:
    """A volume with a young pack is left alone, because an unknown backup may be running."""
    store = MemoryStore("primary")
    put_bytes(store, "snapshots/acme/vol1/_packs/ab/" + "ab" * 16, b"a pack", OWNER)
    assert clean(store)["counts"] == {}


@pytest.fixture
def settings(broker: Broker, tmp_path: Path) -> Settings:
    """Return settings with a store in a directory, a broker, and a rule."""
    (tmp_path / "s").mkdir()
    values = {
        "broker": {"url": broker.url, "prefix": broker.prefix},
        "stores": {"primary": {"url": f"file://{tmp_path}/s"}},
        "retention": {"keep_last": 1},
    }
    return config.parse(values, "test")


@pytest.mark.parametrize("lock", ["a backup is queued", "a restore is queued", "another clean-up", ""])
def test_lock_of_the_volume(settings: Settings, tmp_path: Path, lock: str) -> None:
    """No data of a volume is deleted while a job may write there, or during another clean-up."""
    store = FileStore("primary", tmp_path / "s")
    for number in range(3):
        back_up_at(store, f"b{number}", number)
    jobs, volume = RecordedJobs(settings), "snapshots/acme/vol1"
    with open_ledger(settings) as ledger:
        if lock == "a backup is queued":
            ledger.submit(NewJob("b4", "backup", "z", "backup", {}, volume))
        if lock == "a restore is queued":
            names = {"account": "acme", "volume": "vol1", "id": "b0"}
            ledger.submit(NewJob("r", "restore", "z", "backup", names, "template/tmpl/acme/new"))
        if lock == "another clean-up":
            with jobs.hold(volume) as confirm:
                assert confirm
                with jobs.hold(volume) as second:
                    assert second is None
                clean(store, RetentionRule(keep_last=1), jobs=jobs)
        else:
            clean(store, RetentionRule(keep_last=1), jobs=jobs)
        assert ids(store) == (["b0", "b1", "b2"] if lock else ["b2"])
        assert {each.state for each in ledger.page() if each.job == "cleanup"} <= {"succeeded", "cancelled"}


def test_lock_is_kept(settings: Settings, broker: Broker) -> None:
    """The lock is renewed beyond the time of a claim, and without it no more is deleted."""
    short = settings.model_copy(update={"ledger": config.parse({"ledger": {"claim_s": CLAIM_S}}, "test").ledger})
    volume = "snapshots/acme/vol1"
    with open_ledger(short) as ledger, RecordedJobs(short).hold(volume) as confirm:
        assert confirm
        over = time.monotonic() + 2 * CLAIM_S
        until(lambda: time.monotonic() > over, "two claims' time has passed")
        (record,) = ledger.page()
        with broker.client() as client:
            now, _ = client.time()
            assert client.zscore(f"{broker.prefix}ssvm.ledger:claims", record.job_id) > now
        confirm()
        ledger.finish(Claim(record.job_id, 1, record), "failed", error={"message": "x"})
        with pytest.raises(Cancelled):
            confirm()


@pytest.mark.parametrize("volume", ["../x", "snapshots/a", "snapshots/a/b/c", "volumes/a/b", "snapshots/a/.."])
def test_no_volume(volume: str) -> None:
    """A path that is not a volume's is refused."""
    with pytest.raises(InvalidRequest, match="volume: must be snapshots/ACCOUNT/VOLUME"):
        parse_request(cleanup.Request, {"volume": volume}, "cleanup")


def test_lock_of_the_dead(settings: Settings, tmp_path: Path) -> None:
    """A clean-up that is killed with the lock leaves a job that a worker can complete."""
    store = FileStore("primary", tmp_path / "s")
    for number in range(3):
        back_up_at(store, f"b{number}", number)
    jobs, volume = RecordedJobs(settings), "snapshots/acme/vol1"
    died = jobs.hold(volume)
    died.__enter__()
    with open_ledger(settings) as ledger:
        (record,) = ledger.page()
    request = parse_request(cleanup.Request, record.request, "cleanup")
    assert (record.resource, record.lane, cleanup.resource(request)) == (volume, "maintenance", volume)
    cleanup.run(request, attempt(store, settings={"retention": {"keep_last": 1}}, jobs=jobs, token=2))
    assert ids(store) == ["b2"]


def test_two_processes(settings: Settings, broker: Broker, tmp_path: Path) -> None:
    """Two parallel clean-up processes delete each item once, and no kept one."""
    store = FileStore("primary", tmp_path / "s")
    for volume in range(5):
        for number in range(6):
            back_up_at(store, f"b{number}", number, f"vol{volume}")
    environment = {
        "SSVM_STORES__PRIMARY__URL": f"file://{tmp_path}/s",
        "SSVM_BROKER__URL": broker.url,
        "SSVM_BROKER__PREFIX": broker.prefix,
        "SSVM_RETENTION__KEEP_LAST": "2",
    }
    argv = [sys.executable, "-m", "ssvm_worker", "cleanup", "--older-than", "0", "--json"]
    both = [subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [json.loads(each.communicate()[0]) for each in both]
    assert [each.returncode for each in both] == [0, 0]
    assert [each["failed"] for each in results] == [{}, {}]
    subprocess.run(argv, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert ids(store) == ["b4", "b5"] * 5


def test_command(
    settings: Settings,
    broker: Broker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`ssvm cleanup --dry-run` prints each backup that would be deleted, and the reason."""
    monkeypatch.setenv("SSVM_STORES__PRIMARY__URL", f"file://{tmp_path}/s")
    monkeypatch.setenv("SSVM_BROKER__URL", broker.url)
    monkeypatch.setenv("SSVM_BROKER__PREFIX", broker.prefix)
    monkeypatch.setenv("SSVM_RETENTION__KEEP_LAST", "1")
    store = FileStore("primary", tmp_path / "s")
    for number in range(3):
        back_up_at(store, f"b{number}", number)
    assert main(["cleanup", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "expired backup primary:snapshots/acme/vol1/b0 (4 B): no rule keeps it (keep_last 1)" in said
    assert main(["cleanup"]) == 0
    assert capsys.readouterr().out == "cleanup removed 2 expired backups: 8 B\n"
    assert ids(store) == ["b2"]
