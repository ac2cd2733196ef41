"""A worker sends a few callbacks in parallel to each receiver, so a slow receiver delays no other."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from ssvm_worker.config import parse
from ssvm_worker.config.schema import Settings
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import NewJob
from ssvm_worker.runner.callbacks import CallbackSender
from ssvm_worker.wiring.assembly import open_ledger
from tests.servers.broker import Broker
from tests.servers.receiver import Receiver
from tests.waiting import until


@pytest.fixture
def settings(broker: Broker) -> Settings:
    """Return settings that give a receiver 15 minutes, which no test waits for."""
    broker_values = {"url": broker.url, "prefix": broker.prefix}
    callback = {"timeout_s": 900, "allow_networks": ["127.0.0.0/8"]}
    return parse({"broker": broker_values, "callback": callback}, "the test")


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    """Return a ledger for this test."""
    with open_ledger(settings) as found:
        yield found


@pytest.fixture
def outbox(settings: Settings) -> Iterator[CallbackSender]:
    """Return the worker's outbox."""
    found = CallbackSender(settings, 0.05)
    found.start()
    yield found
    found.stop()


def end(ledger: Ledger, job_id: str, url: str) -> None:
    """End a job that has a callback."""
    ledger.submit(NewJob(job_id, "delete", "z", "maintenance", {}, callback_url=url))
    ledger.cancel(job_id, "the test")


def state(ledger: Ledger, job_id: str) -> str:
    """Return the state of the callback."""
    return ledger.get(job_id).callback.state


def test_slow_receivers(ledger: Ledger, outbox: CallbackSender) -> None:
    """Three receivers that never answer, with ten callbacks each, leave threads for the others."""
    silent = [socket.create_server(("127.0.0.1", 0), backlog=64) for _ in range(3)]
    for number, each in enumerate(silent):
        for count in range(10):
            end(ledger, f"slow-{number}-{count}", f"http://127.0.0.1:{each.getsockname()[1]}/x")
    with Receiver() as receiver:
        for count in range(20):
            end(ledger, f"quick-{count}", receiver.url)
        until(
            lambda: all(state(ledger, f"quick-{each}") == "delivered" for each in range(20)), "all callbacks are sent"
        )
    assert {state(ledger, f"slow-0-{each}") for each in range(10)} == {"pending"}
    for each in silent:
        each.close()


def test_many(ledger: Ledger, outbox: CallbackSender) -> None:
    """A receiver with more callbacks than one round reads gets all of them, each once."""
    with Receiver() as receiver:
        for count in range(600):
            end(ledger, f"j{count}", receiver.url)
        until(lambda: len(receiver.got) >= 600, "all are sent")
        until(lambda: state(ledger, "j599") == "delivered", "the last is noted")
        assert len(receiver.got) == 600
