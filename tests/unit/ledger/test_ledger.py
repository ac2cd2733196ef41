"""The ledger on a real Valkey: one owner at a time, nothing forgotten, nothing done twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from ssvm_worker.errors import Cancelled, InvalidRequest, ObjectNotFound, ResourceBusy
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import NewJob
from tests.servers.broker import Broker

BUG = {"error": "ValueError", "message": "ours"}
Act = Callable[[Ledger, str], object]


def a_job(job_id: str = "j1", **changes: Any) -> NewJob:
    given: dict[str, Any] = {"job": "download", "zone": "z", "lane": "download", "request": {"url": "http://x/y"}}
    return NewJob(job_id, **(given | changes))


@pytest.fixture
def ledger(broker: Broker) -> Iterator[Ledger]:
    """Return a ledger whose claims last until the test ends."""
    with Ledger(broker.url, prefix=broker.prefix, claim_s=100) as found:
        yield found


@pytest.fixture
def hasty(broker: Broker) -> Iterator[Ledger]:
    """Return the same ledger with claims that expire at once."""
    with Ledger(broker.url, prefix=broker.prefix, claim_s=0.001) as found:
        yield found


def reap(ledger: Ledger, max_attempts: int = 5) -> list[str]:
    """Run the reaper until live workers have had time to renew, and once more."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if woken := ledger.reap(0.001, max_attempts):
            return [each.job_id for each in woken]
        if not ledger.counts()["running"]:
            break
    return []


def test_submit_and_get(ledger: Ledger) -> None:
    """A submitted job is queued and shows its request."""
    record, new = ledger.submit(a_job())
    assert new
    shown = ledger.get("j1").to_dict()
    assert shown == record.to_dict()
    assert (shown["state"], shown["attempts"], shown["request"]) == ("queued", [], {"url": "http://x/y"})
    assert shown["created"].endswith("Z")


def test_unknown_job(ledger: Ledger) -> None:
    """An unknown id is not found."""
    with pytest.raises(ObjectNotFound, match="ssvm jobs"):
        ledger.get("nobody")


def test_submit_again(ledger: Ledger) -> None:
    """The same id with the same request is the same job in any state."""
    ledger.submit(a_job())
    assert ledger.claim("j1", "w")
    record, new = ledger.submit(a_job())
    assert (new, record.state) == (False, "running")


@pytest.mark.parametrize(
    "change", [{"request": {"url": "http://other"}}, {"job": "upload"}], ids=["another request", "another job"]
)
def test_submit_another_under_the_same_id(ledger: Ledger, change: dict[str, Any]) -> None:
    """An id belongs to one request permanently, and its job is unchanged."""
    before, _ = ledger.submit(a_job())
    with pytest.raises(InvalidRequest, match="another request"):
        ledger.submit(a_job(**change))
    assert ledger.get("j1") == before


def test_submit_several(ledger: Ledger, broker: Broker) -> None:
    """Several jobs are submitted together, also to a broker that has lost all scripts."""
    with broker.client() as client:
        for first in (0, 2):
            client.script_flush()
            found = ledger.submit_or_find([(a_job(f"j{number}"), None) for number in range(first, first + 3)])
            assert [(record.job_id, new) for record, new in found] == [
                (f"j{number}", number > 2 or first == 0) for number in range(first, first + 3)
            ]
    assert ledger.counts()["queued"] == 5


def test_redaction(ledger: Ledger) -> None:
    """The caller of a record decides how its secrets are masked."""
    record, _ = ledger.submit(a_job(request={"url": "http://x/y?token=1"}))
    assert record.to_dict(lambda request: {"url": "***"})["request"] == {"url": "***"}


def test_claim_is_exclusive(ledger: Ledger) -> None:
    """If twenty workers claim a job at once, one gets it."""
    ledger.submit(a_job())
    got: list[Any] = []
    workers = [threading.Thread(target=lambda: got.append(ledger.claim("j1", "w"))) for _ in range(20)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert len([each for each in got if each]) == 1
    assert len(ledger.get("j1").attempts) == 1


def test_claim_of_nothing(ledger: Ledger) -> None:
    """A message for an unknown job has no effect."""
    assert ledger.claim("nobody", "w") is None


def test_finish(ledger: Ledger) -> None:
    """A finished job keeps its result and its attempt."""
    ledger.submit(a_job())
    claim = ledger.claim("j1", "host:1")
    assert claim
    assert ledger.beat(claim, {"stage": "download", "bytes": 5}) is False
    ledger.finish(claim, "succeeded", result={"size": 5})
    shown = ledger.get("j1").to_dict()
    assert (shown["state"], shown["result"], shown["error"]) == ("succeeded", {"size": 5}, None)
    assert shown["progress"]["bytes"] == 5
    assert [(each["number"], each["worker"], each["error"]) for each in shown["attempts"]] == [(1, "host:1", None)]
    assert shown["attempts"][0]["ended"] >= shown["attempts"][0]["started"]


def test_finish_is_repeatable(ledger: Ledger) -> None:
    """A finish or release whose answer was lost can be repeated."""
    ledger.submit(a_job())
    first = ledger.claim("j1", "w")
    assert first
    for _ in range(2):
        ledger.release(first, BUG)
    second = ledger.claim("j1", "w")
    assert second
    for _ in range(2):
        ledger.finish(second, "failed", error=BUG)
    assert len(ledger.get("j1").attempts) == 2


@pytest.mark.parametrize(
    "act",
    [
        lambda ledger, old: ledger.beat(old),
        lambda ledger, old: ledger.confirm(old),
        lambda ledger, old: ledger.finish(old, "succeeded", result={"by": "zombie"}),
        lambda ledger, old: ledger.release(old, BUG),
    ],
    ids=["beat", "confirm", "finish", "release"],
)
def test_fencing(ledger: Ledger, hasty: Ledger, act: Act) -> None:
    """A worker whose claim went to another one can change nothing."""
    ledger.submit(a_job())
    old = hasty.claim("j1", "zombie")
    assert reap(hasty) == ["j1"]
    new = ledger.claim("j1", "heir")
    assert old
    assert new
    assert new.token > old.token
    before = ledger.get("j1")
    with pytest.raises(Cancelled, match="Another worker"):
        act(ledger, old)  # type: ignore[arg-type]
    assert ledger.get("j1") == before


def test_expired_claim(ledger: Ledger, hasty: Ledger) -> None:
    """A job whose worker was lost is queued again, and its history gives the reason."""
    ledger.submit(a_job())
    assert hasty.claim("j1", "dead:1")
    assert reap(hasty) == ["j1"]
    record = ledger.get("j1")
    assert record.state == "queued"
    assert record.attempts[0].error
    assert record.attempts[0].error["error"] == "WorkerLost"
    assert record.attempts[0].ended


def test_living_claim(ledger: Ledger) -> None:
    """The reaper ignores a job whose claim is renewed."""
    ledger.submit(a_job())
    assert ledger.claim("j1", "w")
    for _ in range(20):
        assert ledger.reap(0.001, 5) == []
    assert ledger.get("j1").state == "running"


def test_worker_killer(ledger: Ledger, hasty: Ledger) -> None:
    """A job that lost max_attempts workers gets one attempt for clean-up only, and then always fails."""
    ledger.submit(a_job())
    for _ in range(2):
        assert hasty.claim("j1", "w")
        assert reap(hasty, max_attempts=2) == ["j1"]
    last = hasty.claim("j1", "w")
    assert last
    assert last.record.ending == "failed"
    assert reap(hasty, max_attempts=2) == []
    record = ledger.get("j1")
    assert (record.state, len(record.attempts)) == ("failed", 3)
    assert record.error
    assert record.error["error"] == "WorkerLost"


def test_release(ledger: Ledger) -> None:
    """A released job waits for its delay, keeps the error, and cannot be claimed earlier."""
    ledger.submit(a_job())
    claim = ledger.claim("j1", "w")
    assert claim
    ledger.release(claim, BUG, delay_s=100)
    record = ledger.get("j1")
    assert (record.state, record.error, record.tries) == ("queued", BUG, 1)
    assert record.not_before > record.updated
    assert ledger.claim("j1", "w") is None


def test_uncounted_release(ledger: Ledger) -> None:
    """A release at shutdown does not count as an attempt, but is in the history."""
    ledger.submit(a_job())
    for number in (1, 2, 3):
        claim = ledger.claim("j1", "w")
        assert claim
        assert (claim.number, claim.record.tries) == (number, 1)
        ledger.release(claim, None, counted=False)


def test_success_forgets_the_error(ledger: Ledger) -> None:
    """A job that succeeded at the second attempt shows its error only in the history."""
    ledger.submit(a_job())
    first = ledger.claim("j1", "w")
    assert first
    ledger.release(first, BUG)
    second = ledger.claim("j1", "w")
    assert second
    ledger.finish(second, "succeeded", result={})
    record = ledger.get("j1")
    assert (record.error, record.attempts[0].error) == (None, BUG)


def test_resource(ledger: Ledger) -> None:
    """Two jobs that write one artifact run one after the other, and a wait is no attempt."""
    ledger.submit(a_job("first", resource="template/1"))
    ledger.submit(a_job("second", resource="template/1"))
    claim = ledger.claim("first", "w")
    assert claim
    assert ledger.claim("second", "w") is None
    waiting = ledger.get("second")
    assert (waiting.state, waiting.attempts) == ("queued", ())
    assert waiting.waits_for == "resource:template/1"
    assert ledger.finish(claim, "succeeded", result={}) == ["second"]
    assert ledger.get("second").waits_for == ""
    assert ledger.claim("second", "w")


def test_resource_is_freed(ledger: Ledger, hasty: Ledger) -> None:
    """A resource is free as soon as its job no longer runs, for any reason."""
    for number, end in enumerate(("finish", "release", "lost")):
        ledger.submit(a_job(f"j{number}", resource="template/1"))
        claim = (hasty if end == "lost" else ledger).claim(f"j{number}", "w")
        assert claim
        if end == "finish":
            ledger.finish(claim, "failed", error=BUG)
        elif end == "release":
            ledger.release(claim, BUG, delay_s=100)
        else:
            reap(hasty)
    ledger.submit(a_job("heir", resource="template/1"))
    assert ledger.claim("heir", "w")


def test_resource_leaves_no_key(ledger: Ledger, broker: Broker) -> None:
    """The key of a job's resource is deleted at its end, so the broker does not fill up."""
    ledger.submit(a_job(resource="template/1"))
    claim = ledger.claim("j1", "w")
    assert claim
    ledger.finish(claim, "succeeded", result={})
    with broker.client() as client:
        assert client.keys(f"{broker.prefix}*holder*") == []


def into(ledger: Ledger, state: str) -> None:
    """Bring a new job j1 into that state."""
    ledger.submit(a_job())
    if state == "queued":
        return
    claim = ledger.claim("j1", "w")
    assert claim
    if state != "running":
        ledger.finish(claim, state, error=BUG if state == "failed" else None)


def test_an_ended_record_is_one_text(ledger: Ledger, broker: Broker) -> None:
    """An ended record uses little memory, shows the same, and can be expanded for another attempt."""
    into(ledger, "failed")
    keys = f"{broker.prefix}ssvm.ledger:*:j1"
    with broker.client() as client:
        assert client.keys(keys) == [f"{broker.prefix}ssvm.ledger:ended:j1"]
        before = ledger.get("j1")
        after = ledger.retry("j1", "ann")
        assert client.keys(keys) == [f"{broker.prefix}ssvm.ledger:job:j1"]
    assert (after.request, after.attempts, after.created) == (before.request, before.attempts, before.created)


def test_an_ended_record_says_all(ledger: Ledger) -> None:
    """For any request, a record has the same fields before and after its end, except the changed ones."""
    asked = {"resource": "r", "callback_url": "http://x", "traceparent": "00-1", "priority": 7, "account": "a"}
    ledger.submit(a_job(**asked, uses=("store:z/primary", "account:a")))
    first = ledger.claim("j1", "w")
    assert first
    ledger.release(first, BUG)
    claim = ledger.claim("j1", "w")
    assert claim
    ledger.beat(claim, {"stage": "download", "bytes": 5})
    ledger.cancel("j1", "ann")
    before = ledger.get("j1")
    ledger.finish(claim, "cancelled", error=BUG)
    after = ledger.get("j1")
    ends = ("state", "attempts", "updated", "error", "callback")
    assert replace(after, **{each: getattr(before, each) for each in ends}) == before
    assert (after.attempts[0], len(after.attempts), after.callback.url) == (before.attempts[0], 2, "http://x")
    ledger.note_callback("j1", "failed", "nobody there")
    assert (ledger.get("j1").callback.tries, ledger.get("j1").callback.error) == (1, "nobody there")


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_retry(ledger: Ledger, state: str) -> None:
    """A failed or cancelled job is queued again with its history, a new count, and the user's name."""
    into(ledger, state)
    record = ledger.retry("j1", "ann")
    assert (record.state, record.tries, len(record.attempts)) == ("queued", 0, 1)
    claim = ledger.claim("j1", "w")
    assert claim
    assert (claim.number, claim.record.attempts[1].by) == (2, "ann")


@pytest.mark.parametrize(
    ("state", "error"), [("queued", InvalidRequest), ("running", ResourceBusy), ("succeeded", InvalidRequest)]
)
def test_retry_refused(ledger: Ledger, state: str, error: type[Exception]) -> None:
    """A job that waits, runs or succeeded cannot be retried, and the answer has its state."""
    into(ledger, state)
    with pytest.raises(error, match=state):
        ledger.retry("j1", "ann")
    assert ledger.get("j1").state == state


def test_cancel_queued(ledger: Ledger) -> None:
    """A job that never ran is cancelled at once and never runs."""
    into(ledger, "queued")
    record = ledger.cancel("j1", "ann")
    assert (record.state, record.cancelled_by) == ("cancelled", "ann")
    assert ledger.claim("j1", "w") is None


def test_cancel_running(ledger: Ledger) -> None:
    """A running job's worker receives the cancel at its next heartbeat."""
    ledger.submit(a_job())
    claim = ledger.claim("j1", "w")
    assert claim
    assert ledger.cancel("j1", "ann").state == "running"
    assert ledger.beat(claim) is True


def test_cancel_between_attempts(ledger: Ledger) -> None:
    """A job between two attempts is cancelled by an immediate attempt for clean-up only."""
    ledger.submit(a_job())
    claim = ledger.claim("j1", "w")
    assert claim
    ledger.release(claim, BUG, delay_s=100)
    ledger.cancel("j1", "ann")
    assert ledger.reap(0.001, 5)
    again = ledger.claim("j1", "w")
    assert again
    assert again.record.ending == "cancelled"


def test_cancel_of_a_failing_attempt(ledger: Ledger) -> None:
    """A cancel during a failing attempt is kept, and the next claim is for clean-up only."""
    ledger.submit(a_job())
    claim = ledger.claim("j1", "w")
    assert claim
    ledger.cancel("j1", "ann")
    ledger.release(claim, BUG, delay_s=100)
    again = ledger.claim("j1", "w")
    assert again
    assert again.record.ending == "cancelled"


def test_cancel_of_a_lost_job(ledger: Ledger, hasty: Ledger) -> None:
    """A cancel remains if its worker is lost."""
    ledger.submit(a_job())
    assert hasty.claim("j1", "w")
    ledger.cancel("j1", "ann")
    reap(hasty)
    assert ledger.get("j1").ending == "cancelled"


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
def test_cancel_refused(ledger: Ledger, state: str) -> None:
    """An ended job cannot be cancelled, and the answer says how it ended."""
    into(ledger, state)
    with pytest.raises(InvalidRequest, match=state):
        ledger.cancel("j1", "ann")
