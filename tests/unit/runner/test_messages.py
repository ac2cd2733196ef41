"""The bridge from messages to jobs, in one process with a real ledger: the effect of each outcome of a job."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssvm_worker.config import parse
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import Cancelled, ChecksumMismatch, InvalidRequest, ObjectNotFound, SourceUnavailable
from ssvm_worker.jobs import JOBS, Job
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.request import JobRequest
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import NewJob, Record, queue_name
from ssvm_worker.runner.heartbeat import ClaimHeartbeat
from ssvm_worker.runner.messages import Message, job_id_of
from ssvm_worker.runner.run import draining, run_job
from ssvm_worker.runner.worker_command import worker_command
from ssvm_worker.wiring.assembly import open_ledger
from ssvm_worker.wiring.celery_sender import send_wakeup
from tests.servers.broker import Broker, StoppableBroker
from tests.waiting import PATIENCE_S

Run = Callable[[Attempt], dict[str, Any]]


class Request(JobRequest):
    """A request without fields."""

    what: str = "nothing"


class Workshop:
    """A workshop that runs messages against a job with the test's behaviour."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self.settings, self.ledger = settings, ledger
        self.runs = 0
        self.discarded = 0
        self.act: Run = lambda _: {"done": True}
        self.clean: Callable[[Attempt], object] = lambda _: None

    def job(self) -> Job:
        def run(_: Request, attempt: Attempt) -> dict[str, Any]:
            self.runs += 1
            return self.act(attempt)

        def discard(_: Request, attempt: Attempt) -> None:
            self.clean(attempt)
            self.discarded += 1

        module = SimpleNamespace(Request=Request, run=run, discard=discard, resource=lambda _: "")
        return Job("odd", "maintenance", "An odd job", lambda _: module)

    def send(self, *args: Any, task_id: str = "t1", **kwargs: Any) -> dict[str, Any]:
        """Deliver a message, and return what Celery's log would show."""
        return run_job(self.settings, Message("odd", args, kwargs, task_id))

    def outcome(self, act: Run) -> Record:
        """Return the record of job t1 after one attempt with this behaviour."""
        self.act = act
        try:
            self.send({})
        except Exception as error:
            logging.getLogger(__name__).info("the task failed", exc_info=error)
        return self.ledger.get("t1")


@pytest.fixture
def settings(broker: Broker) -> Settings:
    """Return settings with short times."""
    values = {
        "zone": "z",
        "broker": {"url": broker.url, "prefix": broker.prefix},
        "ledger": {"claim_s": 5},
        "retry": {"max_attempts": 2, "first_delay_s": 600},
    }
    return parse(values, "the test")


@pytest.fixture
def shop(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    """Return a job named odd, and its ledger."""
    with open_ledger(settings) as ledger:
        shop = Workshop(settings, ledger)
        monkeypatch.setitem(JOBS, "odd", shop.job())
        yield shop


def raising(error: BaseException) -> Run:
    """Return a job that ends with this error."""

    def run(_: Attempt) -> dict[str, Any]:
        raise error

    return run


def test_success(shop: Workshop) -> None:
    """A job that returns has succeeded with that result, and nothing is cleaned up."""
    record = shop.outcome(lambda _: {"size": 5})
    assert (record.state, record.result, shop.discarded) == ("succeeded", {"size": 5}, 0)


@pytest.mark.parametrize(
    ("error", "state", "shown", "discarded"),
    [
        (SourceUnavailable("gone", "http://x/y"), "queued", "SourceUnavailable", 0),
        (ChecksumMismatch("wrong"), "failed", "ChecksumMismatch", 1),
        (ZeroDivisionError("oops"), "failed", "ZeroDivisionError", 1),
        (Cancelled("user"), "cancelled", "Cancelled", 1),
        (Cancelled("deadline"), "failed", "Cancelled", 1),
        (Cancelled("shutdown"), "queued", "Cancelled", 0),
        (SystemExit(0), "queued", "Cancelled", 0),
    ],
    ids=["retryable", "permanent", "a bug", "cancelled", "deadline", "shutdown", "the process is asked to exit"],
)
def test_outcomes(shop: Workshop, error: BaseException, state: str, shown: str, discarded: int) -> None:
    """Only the error decides whether a job waits for a retry or has ended without leftovers."""
    record = shop.outcome(raising(error))
    assert (record.state, shop.discarded) == (state, discarded)
    assert record.error
    assert record.error["error"] == shown
    assert record.attempts[0].error == record.error


def test_clean_up_that_breaks(shop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    """A job ends even if its leftovers cannot be deleted."""

    def clean(_: Attempt) -> None:
        raise OSError(5, "the disk is broken")

    shop.clean = clean
    record = shop.outcome(raising(ChecksumMismatch("wrong")))
    assert (record.state, shop.discarded) == ("failed", 0)
    assert "leftovers remain" in caplog.text


def test_callback_is_left_to_the_main_process(shop: Workshop) -> None:
    """The process of a job sends no callback, so no receiver can block it."""
    shop.send({"callback_url": "http://127.0.0.1:1/"})
    assert (shop.ledger.get("t1").callback.state, shop.ledger.get("t1").callback.tries) == ("pending", 0)


def test_bug_is_logged(shop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    """A bug leaves a traceback in the log, and its location in the record."""
    record = shop.outcome(raising(ZeroDivisionError("oops")))
    assert "Traceback" in caplog.text
    assert record.error
    assert record.error["where"].startswith("test_messages.py:")


def test_last_attempt(shop: Workshop) -> None:
    """A temporary error ends the job after max_attempts, and a shutdown counts no attempt."""
    shop.outcome(raising(Cancelled("shutdown")))
    for _ in range(2):
        make_due(shop)
        shop.outcome(raising(SourceUnavailable("gone")))
    record = shop.ledger.get("t1")
    assert (record.state, len(record.attempts), shop.discarded) == ("failed", 3, 1)


def make_due(shop: Workshop) -> None:
    """Act as if the back-off were over."""
    with Broker(shop.settings.broker.url.get_secret_value(), "").client() as client:
        client.hset(f"{shop.settings.broker.prefix}ssvm.ledger:job:t1", "not_before", "0")


def test_shutdown_rings(shop: Workshop, broker: Broker) -> None:
    """A job that is returned to the queue has its message there at once."""
    shop.outcome(raising(Cancelled("shutdown")))
    with broker.client() as client:
        assert client.llen(broker.prefix + queue_name("z", "maintenance")) == 1


@pytest.mark.parametrize(
    ("error", "kept"),
    [(SourceUnavailable("gone"), True), (Cancelled("shutdown"), True), (SystemExit(0), True),
     (Cancelled("fenced"), True), (Cancelled("user"), False), (ChecksumMismatch("wrong"), False)],
    ids=["retryable", "shutdown", "exit", "fenced", "cancelled", "permanent"],
)  # fmt: skip
def test_will_resume(shop: Workshop, error: BaseException, kept: bool) -> None:
    """A job keeps its partial bytes exactly if a later attempt will use them."""
    answers = []
    shop.outcome(lambda attempt: {"kept": answers.append(attempt.will_resume(error))})
    assert answers == [kept]


def test_fenced(shop: Workshop) -> None:
    """An attempt that lost its claim deletes nothing and records nothing."""

    def lose(attempt: Attempt) -> dict[str, Any]:
        with Ledger(
            shop.settings.broker.url.get_secret_value(), prefix=shop.settings.broker.prefix, claim_s=100
        ) as other:
            claim = other.claim("t1", "another worker")  # another attempt owns it now
            assert claim is None
            take_away(shop)
            assert other.claim("t1", "heir")
        attempt.confirm()
        raise AssertionError("confirm let a fenced attempt pass")

    record = shop.outcome(lose)
    assert (record.state, record.attempts[-1].worker, shop.discarded) == ("running", "heir", 0)


def take_away(shop: Workshop) -> None:
    """Act as if the reaper had found the claim expired."""
    key = f"{shop.settings.broker.prefix}ssvm.ledger:"
    with Broker(shop.settings.broker.url.get_secret_value(), "").client() as client:
        client.zadd(f"{key}claims", {"t1": 0})
        client.hset(f"{key}reaper", mapping={"last": client.time()[0] - 1, "spare": 0})
    assert shop.ledger.reap(0.1, 5)


def test_failure_of_a_fenced_attempt(shop: Workshop) -> None:
    """An attempt that fails after it lost its claim deletes nothing, because the next attempt owns the data."""

    def run(attempt: Attempt) -> dict[str, Any]:
        take_away(shop)
        raise ChecksumMismatch("two wrote at once")

    assert (shop.outcome(run).state, shop.discarded) == ("queued", 0)


def test_success_of_a_fenced_attempt(shop: Workshop) -> None:
    """A result after the loss of the claim is not recorded."""
    record = shop.outcome(lambda _: take_away(shop) or {"late": True})
    assert (record.state, record.result) == ("queued", None)


def test_cancel_is_heard(shop: Workshop) -> None:
    """A running job notices its cancel."""

    def run(attempt: Attempt) -> dict[str, Any]:
        shop.ledger.cancel("t1", "ann")
        attempt.wait(PATIENCE_S)
        return {}

    assert shop.outcome(run).state == "cancelled"


def test_clean_up_of_a_cancelled_job(shop: Workshop) -> None:
    """A cancelled job may still delete its leftovers."""

    def act(attempt: Attempt) -> dict[str, Any]:
        shop.ledger.cancel("t1", "ann")
        attempt.confirm()
        return {}

    def clean(attempt: Attempt) -> None:
        attempt.check()
        attempt.confirm()

    shop.clean = clean
    assert shop.outcome(act).state == "cancelled"
    assert shop.discarded == 1


def test_progress(shop: Workshop) -> None:
    """The record of a running job shows its progress."""
    seen: list[Any] = []

    def run(attempt: Attempt) -> dict[str, Any]:
        attempt.progress.start("copying", 10, 4)
        attempt.confirm()
        seen.append(shop.ledger.get("t1").progress)
        return {}

    shop.outcome(run)
    assert (seen[0]["stage"], seen[0]["bytes"], seen[0]["total"]) == ("copying", 4, 10)


def test_last_progress(shop: Workshop) -> None:
    """The record of an ended job shows its final progress, not that of the last heartbeat."""

    def run(attempt: Attempt) -> dict[str, Any]:
        attempt.progress.start("copying", 10, 10)
        return {}

    record = shop.outcome(run)
    assert record.progress
    assert record.progress["bytes"] == 10


def test_doorbell(shop: Workshop) -> None:
    """A message with only the id of a known job runs it, and a second one does nothing."""
    shop.send({"what": "this"})
    assert shop.send({"job_id": "t1"}, task_id="t2")["state"] == "left"
    assert shop.runs == 1


def test_doorbell_of_an_unknown_job(shop: Workshop) -> None:
    """A message with the id of a forgotten job creates no record."""
    with pytest.raises(ObjectNotFound):
        shop.send({"job_id": "forgotten"})
    assert shop.ledger.page() == []


def test_another_request_under_the_same_id(shop: Workshop) -> None:
    """A message that reuses an id for another request fails, and the existing job is unchanged."""
    shop.send({"what": "this", "job_id": "j1"})
    before = shop.ledger.get("j1")
    with pytest.raises(InvalidRequest, match="another request"):
        shop.send({"what": "that", "job_id": "j1"})
    with pytest.raises(InvalidRequest):
        shop.send({"whta": "typo", "job_id": "j1"})
    assert shop.ledger.get("j1") == before


def test_refused_request_tells(shop: Workshop) -> None:
    """A refused request still sends its callback, if those fields are valid."""
    with pytest.raises(InvalidRequest, match="did you mean what"):
        shop.send({"wat": "typo", "callback_url": "http://127.0.0.1:1/"})
    assert shop.ledger.get("t1").callback.state == "pending"


@pytest.mark.parametrize(
    ("args", "expected"),
    [(("j1",), ("j1", "celery")), (({"job_id": "j1", "by": "ann"},), ("j1", "ann"))],
    ids=["an id", "an object"],
)
def test_orders(args: tuple[Any, ...], expected: tuple[str, str]) -> None:
    """A retry or cancel message names the job, and may name its sender."""
    assert job_id_of(Message("retry", args, {}, "t")) == expected


@pytest.mark.parametrize("args", [(), ({},), (5,), ("../x",)], ids=["nothing", "no id", "a number", "no safe id"])
def test_orders_refused(args: tuple[Any, ...]) -> None:
    """A retry or cancel message without a job is refused."""
    with pytest.raises(InvalidRequest):
        job_id_of(Message("retry", args, {}, "t"))


def test_ring_without_a_broker(settings: Settings, shop: Workshop) -> None:
    """A queue message that cannot be sent is no error, because the reaper sends it later."""
    shop.outcome(raising(SourceUnavailable("gone")))
    nowhere = parse({"broker": {"url": "redis://127.0.0.1:1/0"}}, "the test")
    assert send_wakeup(nowhere, shop.ledger.get("t1")) is False


def test_transfer_outlives_an_outage(stoppable_broker: StoppableBroker) -> None:
    """A job continues while the broker is away, and still owns its claim afterwards."""
    with Ledger(stoppable_broker.url, claim_s=0.4) as ledger:
        ledger.submit(NewJob("j1", "odd", "z", "maintenance", {}))
        claim = ledger.claim("j1", "w")
        assert claim
        with ClaimHeartbeat(ledger, claim) as heart:
            stoppable_broker.stop()
            time.sleep(0.6)  # the claim must pass its expiry
            assert heart.stop_reason() is None
            stoppable_broker.start()
            heart.confirm()


def test_frozen_process_finds_out(broker: Broker) -> None:
    """A process that was frozen past its claim's expiry stops before it writes another byte."""
    with Ledger(broker.url, prefix=broker.prefix, claim_s=0.05) as ledger:
        ledger.submit(NewJob("j1", "odd", "z", "maintenance", {}))
        claim = ledger.claim("j1", "w")
        assert claim
        heart = ClaimHeartbeat(ledger, claim)  # its thread does not run, like that of a frozen process
        time.sleep(0.1)
        while not ledger.reap(0.001, 5):
            pass
        assert ledger.claim("j1", "heir")
        assert heart.stop_reason() == "fenced"


def test_drain_steps() -> None:
    """The first termination signal lets the job continue, the second stops it, and the third kills it."""
    told: list[str] = []
    with draining(lambda: told.append("stop"), 3600):
        os.kill(os.getpid(), signal.SIGTERM)
        assert told == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert told == ["stop"]
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)


def test_drain_by_itself() -> None:
    """After one termination signal, the job is stopped when its time is over."""
    told: list[str] = []
    with draining(lambda: told.append("stop"), 0.01):
        os.kill(os.getpid(), signal.SIGTERM)
        while not told:
            time.sleep(0.001)
    assert told == ["stop"]


def test_drain_puts_back() -> None:
    """After the job, the previous signal handlers are restored."""
    before = signal.getsignal(signal.SIGTERM)
    with draining(lambda: None, 1):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_worker_command(settings: Settings, tmp_path: Path) -> None:
    """A worker reads only the queues of its lanes in its zone."""
    few = settings.model_copy(update={"worker": settings.worker.model_copy(update={"lanes": ("download", "backup")})})
    argv, environ = worker_command(few)
    assert argv[argv.index("-Q") + 1] == "ssvm.z.download,ssvm.z.backup"
    assert environ == {"REMAP_SIGTERM": "SIGQUIT"}
