"""The order of jobs on a real Valkey: priorities, a fair share between accounts, limits, and no starvation."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import ClaimedJob, NewJob
from tests.servers.broker import Broker

#: One of ten claims goes to the oldest job.
BY_AGE = 10


def a_job(job_id: str, account: str = "a", priority: int = 0, uses: tuple[str, ...] = (), **given: Any) -> NewJob:
    values = {"job": "download", "zone": "z", "lane": "download", "request": {"url": "http://x/y"}}
    return NewJob(job_id, **(values | given), account=account, priority=priority, uses=uses)


@pytest.fixture
def make_ledger(broker: Broker) -> Iterator[Callable[..., Ledger]]:
    """Return a factory of ledgers of one broker with these limits."""
    with ExitStack() as stack:
        yield lambda **limits: stack.enter_context(Ledger(broker.url, prefix=broker.prefix, claim_s=100, limits=limits))


@pytest.fixture
def ledger(make_ledger: Callable[..., Ledger]) -> Ledger:
    """Return a ledger without limits."""
    return make_ledger()


def submit(ledger: Ledger, *jobs: NewJob) -> None:
    for each in jobs:
        ledger.submit(each)


def take(ledger: Ledger, count: int = 1000) -> list[str]:
    """Claim the next jobs, and return their ids."""
    found = []
    while len(found) < count and (taken := ledger.claim_next("z", "download", "w")):
        found.append(taken.job_id)
    return found


def end(ledger: Ledger, taken: ClaimedJob) -> list[str]:
    """End the job with success, and return the jobs that may run now."""
    claim = ledger.begin(taken.job_id, taken.token)
    assert claim
    return ledger.finish(claim, "succeeded", result={})


def run_all(ledger: Ledger, count: int = 1000) -> list[str]:
    """Run the next jobs one after the other, and return their ids."""
    found = []
    while len(found) < count and (taken := ledger.claim_next("z", "download", "w")):
        found.append(taken.job_id)
        end(ledger, taken)
    return found


def test_age(ledger: Ledger) -> None:
    """The oldest of one account's jobs with one priority is next."""
    submit(ledger, *(a_job(f"j{number}") for number in range(5)))
    assert take(ledger) == [f"j{number}" for number in range(5)]
    assert take(ledger) == []


def test_priority(ledger: Ledger) -> None:
    """The higher priority is next, for any account and any age of the others."""
    submit(ledger, *(a_job(f"j{priority}", priority=priority) for priority in (0, 5, 9)))
    submit(ledger, a_job("other", "b", priority=7))
    assert take(ledger) == ["j9", "other", "j5", "j0"]


def test_small_account_beside_a_large_one(ledger: Ledger) -> None:
    """An account with one job does not wait for another account's thousand."""
    submit(ledger, *(a_job(f"a{number:04}") for number in range(1000)))
    assert take(ledger, 3) == ["a0000", "a0001", "a0002"]
    submit(ledger, a_job("b", "b"))
    assert take(ledger, 1) == ["b"]


def test_accounts_take_turns(ledger: Ledger) -> None:
    """Waiting accounts get the same number of jobs, in any order of submission."""
    submit(ledger, *(a_job(f"a{number:02}") for number in range(30)))
    submit(ledger, *(a_job(f"{account}{number}", account) for account in "bc" for number in range(9)))
    assert Counter(each[0] for each in run_all(ledger, 18)) == {"a": 6, "b": 6, "c": 6}


def test_fewest_running(ledger: Ledger) -> None:
    """The account with fewer running jobs is next, even if it was served later."""
    submit(ledger, a_job("a1"), a_job("a2"), a_job("b1", "b"), a_job("b2", "b"))
    first, second = (ledger.claim_next("z", "download", "w") for _ in range(2))
    assert first
    assert second
    assert (first.job_id, second.job_id) == ("a1", "b1")
    end(ledger, second)
    assert take(ledger) == ["b2", "a2"]


def test_lanes_and_zones_do_not_mix(ledger: Ledger) -> None:
    """A worker takes only jobs of its zone and lane, and jobs elsewhere do not affect an account's turn."""
    submit(ledger, a_job("there", zone="y"), a_job("up", lane="upload"), a_job("a"), a_job("b", "b"))
    others = [ledger.claim_next(*each, "w") for each in (("y", "download"), ("z", "upload"))]
    assert [each.job_id for each in others if each] == ["there", "up"]
    assert take(ledger, 1) == ["a"]


def test_every_tenth_by_age(ledger: Ledger) -> None:
    """The oldest job gets one claim in ten, for any number of jobs with a higher priority."""
    submit(ledger, a_job("patient"))
    for number in range(3 * BY_AGE):
        submit(ledger, a_job(f"urgent{number:03}", "b", priority=9))
    assert take(ledger, 2 * BY_AGE).index("patient") == BY_AGE - 1


def test_limit(make_ledger: Callable[..., Ledger]) -> None:
    """A job above a limit waits, costs no attempt, gives the reason, and blocks no other job."""
    ledger = make_ledger(store=1)
    submit(ledger, *(a_job(f"s{number}", uses=("store:z/s",)) for number in range(3)), a_job("t", uses=("store:z/t",)))
    first = ledger.claim_next("z", "download", "w")
    assert first
    assert take(ledger) == ["t"]
    waiting = ledger.get("s1")
    assert (waiting.state, waiting.attempts, waiting.waits_for) == ("queued", (), "store:z/s")
    assert waiting.to_dict()["waits_for"] == "store:z/s"
    assert end(ledger, first) == ["s1"]
    assert ledger.get("s1").waits_for == ""
    assert take(ledger) == ["s1"]


@pytest.mark.parametrize("how", ["finish", "release", "lost"])
def test_slot_is_freed(make_ledger: Callable[..., Ledger], broker: Broker, how: str) -> None:
    """A slot is free as soon as its job no longer runs, for any reason."""
    ledger = make_ledger(account=1)
    submit(ledger, a_job("a1", uses=("account:a",)), a_job("a2", uses=("account:a",)))
    taken = ledger.claim_next("z", "download", "w")
    assert taken
    assert take(ledger) == []
    claim = ledger.begin(taken.job_id, taken.token)
    assert claim
    if how == "finish":
        assert ledger.finish(claim, "failed", error={"error": "x"}) == ["a2"]
    elif how == "release":
        assert ledger.release(claim, None, delay_s=100) == ["a2"]
    else:
        with broker.client() as client:
            client.zadd(f"{broker.prefix}ssvm.ledger:claims", {"a1": 0})
            client.hset(f"{broker.prefix}ssvm.ledger:reaper", mapping={"last": client.time()[0] - 1, "spare": 0})
        assert {each.job_id for each in ledger.reap(1, 5)} == {"a1", "a2"}
    assert take(ledger, 1) in (["a1"], ["a2"])


def test_limit_is_fair(make_ledger: Callable[..., Ledger]) -> None:
    """Jobs that wait at a limit start in the order of the lanes: priority, turn, age."""
    ledger = make_ledger(store=1)
    uses = ("store:z/s",)
    submit(ledger, a_job("first", uses=uses))
    running = ledger.claim_next("z", "download", "w")
    submit(ledger, *(a_job(f"a{number}", uses=uses) for number in range(3)))
    submit(ledger, a_job("b", "b", uses=uses), a_job("urgent", priority=3, uses=uses))
    assert take(ledger) == []
    order = []
    while running:
        order += end(ledger, running)
        running = ledger.claim_next("z", "download", "w")
    assert order == ["urgent", "b", "a0", "a1", "a2"]


def test_two_limits(make_ledger: Callable[..., Ledger]) -> None:
    """A job that a second limit stops does not occupy a slot of the first."""
    ledger = make_ledger(store=1, source=1)
    submit(ledger, a_job("s", uses=("store:z/s",)), a_job("h", uses=("source:h",)))
    one, _ = (ledger.claim_next("z", "download", "w") for _ in range(2))
    assert one
    submit(ledger, a_job("both", uses=("store:z/s", "source:h")), a_job("next", uses=("store:z/s",)))
    assert take(ledger) == []
    assert end(ledger, one) == ["both"]
    assert take(ledger) == ["next"]
    assert ledger.get("both").waits_for == "source:h"


def test_raised_limit(make_ledger: Callable[..., Ledger]) -> None:
    """A raised limit releases waiting jobs at the reaper's next round."""
    ledger = make_ledger(account=1)
    submit(ledger, *(a_job(f"a{number}", uses=("account:a",)) for number in range(4)))
    assert take(ledger) == ["a0"]
    wider = make_ledger(account=3)
    assert sorted(each.job_id for each in wider.reap(0.001, 5)) == ["a1", "a2"]
    assert take(wider) == ["a1", "a2"]


def test_limit_by_id(make_ledger: Callable[..., Ledger]) -> None:
    """A claim by job id obeys limits too."""
    ledger = make_ledger(account=1)
    submit(ledger, a_job("a0", uses=("account:a",)), a_job("a1", uses=("account:a",)))
    assert ledger.claim("a0", "w")
    assert ledger.claim("a1", "w") is None
    assert ledger.claim("a1", "w") is None
    assert ledger.get("a1").waits_for == "account:a"


def test_cancel_of_one_that_waits(make_ledger: Callable[..., Ledger]) -> None:
    """A job that is cancelled while it waits at a limit never runs."""
    ledger = make_ledger(account=1)
    submit(ledger, *(a_job(f"a{number}", uses=("account:a",)) for number in range(3)))
    taken = ledger.claim_next("z", "download", "w")
    assert taken
    assert take(ledger) == []
    ledger.cancel("a1", "ann")
    assert end(ledger, taken) == ["a2"]
    assert take(ledger) == ["a2"]


def test_record_deleted_by_hand(ledger: Ledger, broker: Broker) -> None:
    """A job whose record was deleted by hand does not block its queue."""
    submit(ledger, a_job("gone"), a_job("there"))
    with broker.client() as client:
        client.delete(f"{broker.prefix}ssvm.ledger:job:gone")
    assert take(ledger) == ["there"]


def test_ten_workers_race(make_ledger: Callable[..., Ledger]) -> None:
    """Ten parallel workers get each job once, and never exceed a limit."""
    submitter = make_ledger()
    submit(submitter, *(a_job(f"j{n:03}", "abc"[n % 3], uses=("store:z/s",)) for n in range(60)))
    running, most, done = Counter[str](), [0], Counter[str]()
    lock = threading.Lock()

    def work() -> None:
        mine = make_ledger(store=4)
        while sum(done.values()) < 60:
            if not (taken := mine.claim_next("z", "download", "w")):
                continue
            with lock:
                running["s"] += 1
                most[0] = max(most[0], running["s"])
                running["s"] -= 1 if not (claim := mine.begin(taken.job_id, taken.token)) else 0
            assert claim
            with lock:
                running["s"] -= 1
            mine.finish(claim, "succeeded", result={})
            with lock:
                done[taken.job_id] += 1

    workers = [threading.Thread(target=work) for _ in range(10)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert len(done) == 60
    assert set(done.values()) == {1}
    assert most[0] <= 4


def keys(broker: Broker, *patterns: str) -> list[str]:
    with broker.client() as client:
        return sorted(key for each in patterns for key in client.keys(f"{broker.prefix}ssvm.ledger:{each}"))


def test_leaves_no_key(make_ledger: Callable[..., Ledger], broker: Broker) -> None:
    """When no job waits or runs, the queues leave only the turns of the accounts."""
    ledger = make_ledger(store=2, source=1, account=3)
    submit(ledger, *(a_job(f"j{n}", "ab"[n % 2], n % 3, ("store:z/s", "source:h")) for n in range(20)))
    assert len(run_all(ledger)) == 20
    assert keys(broker, "q:*", "all:*", "slots:*", "places:*", "queues", "picks", "running") == []
