"""The reaper's rules on a real Valkey: jobs that get a message, jobs that are left alone, and pages of jobs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ssvm_worker.errors import EXIT_RETRYABLE, InvalidRequest, StoreUnavailable
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import NewJob, queue_name
from tests.neighbours import missing
from tests.servers.broker import Broker, StoppableBroker, running_broker
from tests.servers.clock import Clock
from tests.servers.worker import until

BUG = {"error": "ValueError", "message": "ours"}


def a_job(job_id: str, zone: str = "z", lane: str = "download") -> NewJob:
    return NewJob(job_id, "download", zone, lane, {"url": "http://x/y"})


@pytest.fixture
def ledger(broker: Broker) -> Iterator[Ledger]:
    """Return a ledger whose claims last until the test ends."""
    with Ledger(broker.url, prefix=broker.prefix, claim_s=100) as found:
        yield found


def overdue(broker: Broker, *job_ids: str) -> None:
    """Act as if the jobs had been runnable for long without a claim."""
    with broker.client() as client:
        for job_id in job_ids:
            client.hset(f"{broker.prefix}ssvm.ledger:job:{job_id}", "ready", "0")


def test_lost_message(ledger: Ledger, broker: Broker) -> None:
    """A job without a claim gets another message, because its message was lost or never sent."""
    ledger.submit(a_job("j1"))
    assert ledger.reap(0.001, 5) == []
    overdue(broker, "j1")
    assert [each.job_id for each in ledger.reap(0.001, 5)] == ["j1"]
    assert ledger.reap(0.001, 5) == []


def test_waiting_message(ledger: Ledger, broker: Broker) -> None:
    """A lane with a waiting message gets no other, because its receiver takes the next job."""
    for job_id, lane in (("j1", "download"), ("j2", "upload"), ("j3", "upload")):
        ledger.submit(a_job(job_id, lane=lane))
    overdue(broker, "j1", "j2", "j3")
    with broker.client() as client:
        client.lpush(broker.prefix + queue_name("z", "download"), "a message")
    assert sorted(each.job_id for each in ledger.reap(0.001, 5)) == ["j2", "j3"]


def test_messages_elsewhere(ledger: Ledger, broker: Broker) -> None:
    """If messages use another broker, the caller says which queues have any."""
    for job_id, lane in (("j1", "download"), ("j2", "upload")):
        ledger.submit(a_job(job_id, lane=lane))
    overdue(broker, "j1", "j2")
    found = ledger.reap(0.001, 5, lambda queue: queue == "ssvm.z.download")
    assert [each.job_id for each in found] == ["j2"]


def test_delay_is_over(ledger: Ledger, broker: Broker) -> None:
    """A job whose delay is over gets a message, for any content of the queue."""
    ledger.submit(a_job("j1"))
    claim = ledger.claim("j1", "w")
    assert claim
    ledger.release(claim, BUG, delay_s=0.05)
    with broker.client() as client:
        client.lpush(broker.prefix + queue_name("z", "download"), "a message")
    woken: list[str] = []
    until(lambda: bool(woken.extend(each.job_id for each in ledger.reap(0.001, 5)) or woken), "it is woken")
    assert ledger.claim("j1", "w")


def test_two_reapers(ledger: Ledger, broker: Broker) -> None:
    """One of several reapers acts."""
    ledger.submit(a_job("j1"))
    rounds = []
    for _ in range(5):
        overdue(broker, "j1")
        rounds.append(len(ledger.reap(3600, 5)))
    assert rounds == [1, 0, 0, 0, 0]


def test_broker_was_frozen(stoppable_broker: StoppableBroker) -> None:
    """Live workers get time to renew claims that expired while the broker was away."""
    with Ledger(stoppable_broker.url, claim_s=0.5) as ledger:
        ledger.submit(a_job("j1"))
        until(lambda: _rounds_without_a_gap(ledger), "the reaper is under way")
        claim = ledger.claim("j1", "w")
        assert claim
        os.kill(stoppable_broker.pid, signal.SIGSTOP)
        time.sleep(1.0)  # the broker's clock must pass the expiry of the claim
        os.kill(stoppable_broker.pid, signal.SIGCONT)
        assert ledger.reap(0.001, 5) == []
        assert ledger.beat(claim) is False


def _rounds_without_a_gap(ledger: Ledger) -> bool:
    """Run quick rounds for longer than a claim lasts, so that the first one's gap is forgotten."""
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        ledger.reap(0.001, 5)
    return True


@pytest.mark.parametrize("begun", [False, True], ids=["nobody began", "somebody did"])
def test_lost_claims(ledger: Ledger, broker: Broker, begun: bool) -> None:
    """An expired claim costs an attempt, unless no process began it."""
    ledger.submit(a_job("j1"))
    for _ in range(3):
        taken = ledger.claim_next("z", "download", "w")
        assert taken
        if begun:
            assert all(ledger.begin(taken.job_id, taken.token) for _ in range(2))
        with broker.client() as client:  # as if it had expired
            client.zadd(f"{broker.prefix}ssvm.ledger:claims", {"j1": 0})
            client.hset(f"{broker.prefix}ssvm.ledger:reaper", mapping={"last": client.time()[0] - 1, "spare": 0})
        assert [each.job_id for each in ledger.reap(0.001, 3)] == ["j1"]
    record = ledger.get("j1")
    assert (record.tries, len(record.attempts), record.ending) == ((3, 3, "failed") if begun else (0, 3, ""))
    claim = ledger.claim("j1", "w")
    assert claim
    assert (claim.number, claim.record.tries) == (4, record.tries + 1)


def test_restart_forgets_nothing(stoppable_broker: StoppableBroker) -> None:
    """A broker with an append-only file keeps every job after a restart, and the connection continues."""
    with Ledger(stoppable_broker.url) as ledger:
        ledger.submit(a_job("j1"))
        claim = ledger.claim("j1", "w")
        assert claim
        stoppable_broker.stop()
        with pytest.raises(StoreUnavailable):
            ledger.beat(claim)
        stoppable_broker.start()
        assert ledger.beat(claim) is False
        ledger.finish(claim, "succeeded", result={})


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:sesame@127.0.0.1:1/0",
        "redis+socket:///nowhere/valkey.sock?virtual_host=0",
        "unix:///nowhere/v.sock",
    ],
    ids=["a port", "a socket", "a socket in the spelling of redis-py"],
)
def test_broker_down(url: str) -> None:
    """Without a broker, a submission is a temporary error that names the broker without its password."""
    with Ledger(url) as ledger, pytest.raises(StoreUnavailable, match="broker cannot be reached") as caught:
        ledger.submit(a_job("j1"))
    assert caught.value.exit_code == EXIT_RETRYABLE
    assert "sesame" not in str(caught.value)
    assert caught.value.where in url.replace("user:sesame@", "")


def test_expire(broker: Broker) -> None:
    """Records that ended longer ago than keep_s are deleted from every list, and others stay."""
    with Ledger(broker.url, prefix=broker.prefix, keep_s=0) as ledger:
        for job_id in ("ended", "waiting"):
            ledger.submit(a_job(job_id))
        claim = ledger.claim("ended", "w")
        assert claim
        ledger.finish(claim, "succeeded", result={})
        assert ledger.expired() == 1
        assert ledger.expire() == 1
        assert [each.job_id for each in ledger.page()] == ["waiting"]
        assert ledger.counts() == {"queued": 1, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0}


def test_live(ledger: Ledger) -> None:
    """live reports what queued and running jobs write, but not ended or read-only jobs."""
    for job_id in ("queued", "running", "ended", "reader"):
        ledger.submit(replace(a_job(job_id), resource="" if job_id == "reader" else f"template/{job_id}"))
    assert ledger.claim("running", "w")
    ledger.cancel("ended", "ann")
    assert ledger.live() == {"template/queued", "template/running"}


def test_kept(ledger: Ledger) -> None:
    """A record that ended recently is kept."""
    ledger.submit(a_job("j1"))
    ledger.cancel("j1", "ann")
    assert ledger.expire() == 0


@pytest.fixture
def thirty(ledger: Ledger) -> Ledger:
    """Return thirty jobs in two zones and two lanes, of which every third is cancelled."""
    for number in range(30):
        lane = "upload" if number % 5 == 0 else "download"
        ledger.submit(a_job(f"j{number:02}", zone=f"z{number % 2}", lane=lane))
        if number % 3 == 0:
            ledger.cancel(f"j{number:02}", "ann")
    return ledger


@pytest.mark.parametrize(
    ("asked", "numbers"),
    [
        ({"limit": 3}, [29, 28, 27]),
        ({"limit": 3, "offset": 28}, [1, 0]),
        ({"state": "cancelled", "limit": 3}, [27, 24, 21]),
        ({"zone": "z1", "limit": 2, "offset": 1}, [27, 25]),
        ({"lane": "upload"}, [25, 20, 15, 10, 5, 0]),
        ({"state": "queued", "zone": "z0", "lane": "upload"}, [20, 10]),
        ({"zone": "elsewhere"}, []),
    ],
    ids=["the newest", "the rest", "by state", "by zone", "by lane", "by all", "none"],
)
def test_page(thirty: Ledger, asked: dict[str, object], numbers: list[int]) -> None:
    """A page has the newest matching jobs from the offset."""
    assert [each.job_id for each in thirty.page(**asked)] == [f"j{number:02}" for number in numbers]  # type: ignore[arg-type]


def test_page_reads_what_it_shows(ledger: Ledger, broker: Broker) -> None:
    """A page reads only the records that it shows, even if few of the jobs match."""
    for number in range(300):
        ledger.submit(a_job(f"j{number:03}", zone="far" if number == 0 else "near"))
    with broker.client() as client:
        client.config_resetstat()
        assert [each.job_id for each in ledger.page(zone="far")] == ["j000"]
        assert len(ledger.page(offset=250, limit=10)) == 10
        assert client.info("commandstats")["cmdstat_hgetall"]["calls"] == 11


def test_nul_in_an_ended_record(ledger: Ledger) -> None:
    """A NUL byte, which separates the fields of an ended record, is removed from all text."""
    ledger.submit(a_job("j1"))
    ledger.cancel("j1", "an\0n")
    assert (ledger.get("j1").cancelled_by, ledger.get("j1").zone) == ("ann", "z")


def test_page_of_an_unknown_state(ledger: Ledger) -> None:
    """The error of an unknown state lists the known ones."""
    with pytest.raises(InvalidRequest, match="succeeded"):
        ledger.page(state="done")


def test_counts(thirty: Ledger) -> None:
    """Every job is counted in exactly one state."""
    assert thirty.counts() == {"queued": 20, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 10}


def test_warnings(ledger: Ledger, stoppable_broker: StoppableBroker, tmp_path: Path) -> None:
    """A broker that may lose or evict jobs is reported, and one that keeps them is not."""
    assert ledger.warnings() == []
    with Ledger(stoppable_broker.url) as other, stoppable_broker.with_prefix("").client() as client:
        client.config_set("appendonly", "no")
        client.config_set("maxmemory-policy", "allkeys-lru")
        assert [each.partition(" ")[0] for each in other.warnings()] == ["appendonly", "maxmemory-policy"]


def test_clock_set_back(ledger: Ledger, broker: Broker) -> None:
    """A broker with its clock set back still has a reaper."""
    ledger.submit(a_job("j1"))
    overdue(broker, "j1")
    with broker.client() as client:
        client.hset(f"{broker.prefix}ssvm.ledger:reaper", "last", str(time.time() + 3600))
    assert ledger.reap(1, 5)


@pytest.mark.parametrize(("before", "after"), [(0, -3), (3, 0)], ids=["set back", "set forward, then right"])
def test_clock_is_set(tmp_path: Path, before: int, after: int) -> None:
    """After any clock change, lost jobs are taken over and lost messages are sent again quickly."""
    clock = Clock(tmp_path, "broker")
    if not clock.environ:
        missing("a C compiler", "apt install gcc")
    with running_broker(clock.environ) as broker, Ledger(broker.url, claim_s=0.5) as ledger:
        clock.jump(before * 3600)
        ledger.submit(a_job("dead"))
        assert ledger.claim("dead", "w")
        ledger.submit(a_job("waits"))
        claim = ledger.claim("waits", "w")
        assert claim
        ledger.release(claim, BUG, delay_s=0.05)
        ledger.reap(0.001, 5)
        clock.jump(after * 3600)
        woken: set[str] = set()
        until(lambda: bool(woken.update(each.job_id for each in ledger.reap(0.001, 5)) or len(woken) == 2), "both are")
        assert not ledger.sparing()
        assert ledger.claim("dead", "w")
        assert ledger.claim("waits", "w")
