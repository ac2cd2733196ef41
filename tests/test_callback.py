"""Whoever asked to be told of a job's end is told, by a real POST to a real server, until he takes it."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterator
from typing import Any

import pytest

from ssvm_worker.jobs.request import redact
from ssvm_worker.ledger import Callback, Ledger, NewJob, Record
from ssvm_worker.ledger.callback import Callbacks, CallbackSettings
from ssvm_worker.retry import RetryPolicy
from tests.servers.broker import Broker
from tests.servers.receiver import Receiver

QUICK = RetryPolicy(first_delay_s=0.001, max_delay_s=0.001)


@pytest.fixture
def ledger(broker: Broker) -> Iterator[Ledger]:
    """A ledger."""
    with Ledger(broker.url, prefix=broker.prefix) as found:
        yield found


def ended(ledger: Ledger, url: str | None, state: str = "succeeded") -> None:
    """A job j1 that has ended and wants this URL to know."""
    ledger.submit(NewJob("j1", "download", "z", "download", {"url": "http://x/y?key=open"}, callback_url=url))
    claim = ledger.claim("j1", "w")
    assert claim
    ledger.finish(claim, state, result={"size": 5}, error={"error": "TooLarge"} if state == "failed" else None)


def outbox(ledger: Ledger, **settings: Any) -> Callbacks:
    """Callbacks that are tried again at once."""
    show = lambda record: record.to_dict(redact)  # noqa: E731 - what assembly passes
    return Callbacks(ledger, CallbackSettings(**({"policy": QUICK} | settings)), show)


def send_all(callbacks: Callbacks, ledger: Ledger) -> Callback:
    """Send until nothing is pending; how it ended."""
    while ledger.get("j1").callback.state == "pending":
        callbacks.send_due()
    return ledger.get("j1").callback


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
def test_delivered(ledger: Ledger, state: str) -> None:
    """Every end is told, with the record as the body and its secrets masked."""
    with Receiver() as receiver:
        ended(ledger, receiver.url, state)
        assert send_all(outbox(ledger), ledger).state == "delivered"
    ((headers, body),) = receiver.got
    told = json.loads(body)
    assert (told["job_id"], told["state"], told["request"]["url"]) == ("j1", state, "http://x/y?***")
    assert (headers["Content-Type"], headers["X-SSVM-Job"]) == ("application/json", "j1")
    assert "X-SSVM-Signature" not in headers


def test_signed_and_tried_again(ledger: Ledger) -> None:
    """A receiver that fails twice gets it a third time, and every try is numbered and signed over its own bytes."""
    with Receiver(500, 503) as receiver:
        ended(ledger, receiver.url)
        assert send_all(outbox(ledger, secret="sesame"), ledger) == Callback(receiver.url, "delivered", 3, "")
    assert [headers["X-SSVM-Delivery-Attempt"] for headers, _ in receiver.got] == ["1", "2", "3"]
    for headers, body in receiver.got:
        right = hmac.new(b"sesame", body, hashlib.sha256).hexdigest()
        assert headers["X-SSVM-Signature"] == f"sha256={right}"


def test_given_up(ledger: Ledger) -> None:
    """After max_tries it is given up, and the record keeps the last answer."""
    with Receiver(*[500] * 9) as receiver:
        ended(ledger, receiver.url)
        callback = send_all(outbox(ledger, max_tries=3), ledger)
    assert (callback.state, callback.tries, callback.error) == ("failed", 3, "the answer was 500")
    assert outbox(ledger).send_due() is False


@pytest.mark.parametrize("status", [301, 302, 307])
def test_redirect(ledger: Ledger, status: int) -> None:
    """A redirect is no delivery: the record goes where it was asked for, or nowhere."""
    with Receiver(status) as receiver:
        ended(ledger, receiver.url)
        assert send_all(outbox(ledger, max_tries=1), ledger).error == f"the answer was {status}"


def test_nobody_there(ledger: Ledger) -> None:
    """A receiver that cannot be reached is tried again, and no error repeats the URL's secrets."""
    ended(ledger, "http://127.0.0.1:1/done?token=sesame")
    callback = send_all(outbox(ledger, max_tries=2), ledger)
    assert (callback.state, callback.tries) == ("failed", 2)
    assert "sesame" not in callback.error
    assert callback.error.startswith("no answer")


def test_nobody_asked(ledger: Ledger) -> None:
    """A job without a callback URL sends nothing."""
    ended(ledger, None)
    assert outbox(ledger).send_due() is False
    assert ledger.get("j1").to_dict()["callback"] is None


def test_survives_the_worker(ledger: Ledger) -> None:
    """A callback that its worker did not live to send is sent by whoever comes next, and by one of them."""
    with Receiver() as receiver:
        ended(ledger, receiver.url)
        assert outbox(ledger).send_due() is True
        assert outbox(ledger).send_due() is False
    assert len(receiver.got) == 1


def test_one_sender(ledger: Ledger) -> None:
    """While one worker is busy with a callback, no other one sends it."""
    ended(ledger, "http://127.0.0.1:1/")
    taken: Record | None = ledger.take_callback(60, "j1")
    assert taken
    assert ledger.take_callback(60, "j1") is None
    assert ledger.take_callback(60) is None


def test_retried_job_waits_for_its_new_end(ledger: Ledger) -> None:
    """A callback that was still to be sent when its job was retried is not sent before the new end."""
    with Receiver() as receiver:
        ended(ledger, receiver.url, "failed")
        ledger.retry("j1", "ann")
        assert outbox(ledger).send_due() is False
    assert receiver.got == []


def test_retried_job_tells_again(ledger: Ledger) -> None:
    """A job that is retried is told of at its new end."""
    with Receiver() as receiver:
        ended(ledger, receiver.url, "failed")
        send_all(outbox(ledger), ledger)
        ledger.retry("j1", "ann")
        claim = ledger.claim("j1", "w")
        assert claim
        ledger.finish(claim, "succeeded", result={})
        send_all(outbox(ledger), ledger)
    assert [json.loads(body)["state"] for _, body in receiver.got] == ["failed", "succeeded"]
