"""copy all and the ledger: each artifact is a separate job, which other jobs exclude, take over, cancel and retry."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker import config
from ssvm_worker.artifacts.manifest import artifacts_below, find_manifest
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import (
    CorruptImage,
    ResourceBusy,
    StoreUnavailable,
)
from ssvm_worker.jobs.copy import job as copy
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import NewJob
from ssvm_worker.operations.scaling import decisions
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.wiring.assembly import RecordedJobs, open_job_metrics, open_ledger
from tests.attempts import attempt
from tests.contracts.store import put
from tests.copies import content
from tests.faults import store_failing_commit
from tests.migrations import PLACES, SIZE, fill, outcomes, result_of, run, theirs
from tests.servers.broker import Broker


@pytest.fixture
def settings(broker: Broker, tmp_path: Path) -> Settings:
    """Return settings with two directories and one broker."""
    for name in ("s", "a"):
        (tmp_path / name).mkdir()
    stores = {"primary": {"url": f"file://{tmp_path}/s"}, "archive": {"url": f"file://{tmp_path}/a"}}
    values = {"zone": "z", "broker": {"url": broker.url, "prefix": broker.prefix}, "stores": stores}
    return config.parse(values | {"state_dir": str(tmp_path / "state")}, "test")


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    """Return the ledger of the settings."""
    with open_ledger(settings) as found:
        yield found


def test_records(source: MemoryStore, archive: MemoryStore, settings: Settings, ledger: Ledger) -> None:
    """Each artifact's copy is a separate job, with its own outcome and its own retry."""
    put(source, PLACES[2].key("2.raw"), b"damaged")
    how = {"jobs": RecordedJobs(settings)}
    with pytest.raises(CorruptImage) as caught:
        run(source, archive, how=how)
    records = {each.job_id: each for each in ledger.page()}
    rows = result_of(caught.value)["artifacts"]
    assert len(records) == len(rows) == 9
    for row in rows[1:]:
        assert records[row["job_id"]].state == "succeeded"
        assert (records[row["job_id"]].result or {})["prefix"] == row["artifact"]
    (failed,) = ledger.page(state="failed")
    assert (failed.error or {})["error"] == "CorruptImage"
    parsed = parse_request(copy.Request, failed.request, "copy")
    assert (parsed.artifact, parsed.stores, copy.resource(parsed)) == (PLACES[2], ["archive"], PLACES[2].prefix)

    put(source, PLACES[2].key("2.raw"), bytes([2]) * SIZE)
    run(source, archive, how=how)
    again = ledger.get(failed.job_id)
    assert (again.state, len(again.attempts), len(ledger.page())) == ("succeeded", 2, 9)


def test_sum_of_attempts(source: MemoryStore, archive: MemoryStore, settings: Settings, ledger: Ledger) -> None:
    """The result of a job sums all of its attempts, each artifact once."""
    how = {"jobs": RecordedJobs(settings)}
    all_ = {"move": True, "prefix": "template"}
    failing = store_failing_commit(archive, chosen=lambda key: key.endswith("/4.raw"))
    with pytest.raises(StoreUnavailable):
        run(source, failing, how=how, **all_)
    result = run(source, archive, how=how | {"number": 2, "token": 1}, **all_)
    assert (result["found"], result["counts"]) == (6, {"moved": 6})
    assert len(outcomes(result)) == len(result["artifacts"]) == 6
    assert {each.job_id for each in ledger.parts("job-1")} == {each["job_id"] for each in result["artifacts"]}
    assert run(source, archive, how=how | {"job_id": "job-2", "number": 2}, **all_)["counts"] == {}


def test_made_again(source: MemoryStore, archive: MemoryStore, settings: Settings) -> None:
    """An artifact that this job copied and that was deleted since is copied again."""
    for _ in range(2):
        run(source, archive, how={"jobs": RecordedJobs(settings)}, prefix="volumes")
        assert find_manifest(archive, PLACES[-1])
        for key in [each.key for each in archive.list()]:
            archive.delete(key)


def test_busy(source: MemoryStore, archive: MemoryStore, settings: Settings, ledger: Ledger) -> None:
    """An artifact that another job writes is skipped, and the job that copies all is tried again."""
    ledger.submit(NewJob("other", "download", "z", "download", {}, PLACES[0].prefix))
    assert ledger.claim("other", "w")
    with pytest.raises(ResourceBusy, match="1 of 9") as caught:
        run(source, archive, how={"jobs": RecordedJobs(settings)})
    assert result_of(caught.value)["counts"] == {"failed": 1, "copied": 8}
    assert find_manifest(archive, PLACES[0]) is None
    assert ledger.page(state="queued") == []


class Watched:
    """A wrapper of a store that calls *seen* with the key before each chunk is read."""

    def __init__(self, inner: Store, seen: Callable[[str], None]) -> None:
        self._inner, self._seen = inner, seen

    def reader(self, key: str) -> Any:
        source, seen = self._inner.reader(key), self._seen

        class Reader:
            def open(self, offset: int = 0) -> Iterator[bytes]:
                for chunk in source.open(offset):
                    for each in chunk:
                        seen(key)
                        yield bytes([each])

            def __getattr__(self, name: str) -> Any:
                return getattr(source, name)

        return Reader()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_cancel_of_one(source: MemoryStore, archive: MemoryStore, settings: Settings, ledger: Ledger) -> None:
    """One running artifact's copy can be cancelled alone; the others continue, and it leaves nothing."""
    hasty = settings.model_copy(update={"ledger": config.parse({"ledger": {"claim_s": 0.4}}, "test").ledger})
    cancelled = threading.Event()

    def seen(key: str) -> None:
        if key.endswith("/4.raw"):
            if not cancelled.is_set():
                (record,) = [each for each in ledger.page(state="running") if each.resource == PLACES[4].prefix]
                ledger.cancel(record.job_id, "somebody")
                cancelled.set()
            time.sleep(0.01)

    watched: Any = Watched(source, seen)
    result = run(watched, archive, how={"jobs": RecordedJobs(hasty)}, prefix="template")
    assert result["counts"] == {"copied": 5, "cancelled": 1}
    assert [each for each in content(archive) if each.startswith("template/tmpl/2/4/")] == []
    assert [each.resource for each in ledger.page(state="cancelled")] == [PLACES[4].prefix]


def test_no_worker_is_wanted(source: MemoryStore, archive: MemoryStore, settings: Settings) -> None:
    """Copies inside the job request no more workers."""
    running: list[Any] = []

    def seen(key: str) -> None:
        if key.endswith(".raw") and not running:
            counters = open_job_metrics(settings)
            running.extend(each.lane for each in counters.lanes() if each.counts.get("running"))
            running.extend(each.desired for each in decisions(settings))

    watched: Any = Watched(source, seen)
    run(watched, archive, how={"jobs": RecordedJobs(settings)}, prefix="volumes")
    assert running == ["held", decisions(settings)[0].desired]
    assert {each.lane for each in open_job_metrics(settings).lanes() if any(each.counts.values())} == {"maintenance"}


def test_dies(source: MemoryStore, archive: MemoryStore, settings: Settings, ledger: Ledger) -> None:
    """A worker that is killed during an artifact leaves a job that another worker can complete."""

    class Died(BaseException):
        """An error that no job catches."""

    def die(_: BaseException) -> bool:
        raise Died

    with pytest.raises(Died):
        run(
            source,
            store_failing_commit(archive),
            how={"jobs": RecordedJobs(settings), "will_resume": die},
            prefix="volumes",
        )
    (record,) = ledger.page(state="running")
    copy.run(parse_request(copy.Request, record.request, "copy"), attempt(source, archive, token=2))
    assert find_manifest(archive, PLACES[-1])


@pytest.mark.parametrize("reachable", [True, False], ids=["with a ledger", "without"])
def test_two_commands(settings: Settings, broker: Broker, tmp_path: Path, reachable: bool) -> None:
    """Two parallel command processes copy every artifact once and completely."""
    source, target = FileStore("primary", tmp_path / "s"), FileStore("archive", tmp_path / "a")
    fill(source)
    (locks := tmp_path / "locks").mkdir()
    environment = {
        "TMPDIR": str(locks),
        "SSVM_STORES__PRIMARY__URL": f"file://{tmp_path}/s",
        "SSVM_STORES__ARCHIVE__URL": f"file://{tmp_path}/a",
        "SSVM_STATE_DIR": str(tmp_path / "state"),
    }
    if reachable:
        environment |= {"SSVM_BROKER__URL": broker.url, "SSVM_BROKER__PREFIX": broker.prefix}
    argv = [sys.executable, "-m", "ssvm_worker", "run", "copy", "--all", "--stores", "archive", "--json"]
    both = [subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [json.loads(each.communicate()[0]) for each in both]
    assert {each.returncode for each in both} <= {0, 75}
    last = subprocess.run(argv, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    results.append(json.loads(last.stdout))
    copied = [row for each in results for row in each.get("result", each).get("artifacts", [])]
    assert sorted(row["artifact"] for row in copied if row["outcome"] == "copied") == [
        each.prefix for each in artifacts_below(source)
    ]
    assert content(target) == theirs(source)
    assert list(target.leftovers()) == []
    assert list(locks.iterdir()) == []
