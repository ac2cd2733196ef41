"""The claim to a GUID: one agent holds it, and the others wait."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ssvm_worker.cloudstack.guid_claim import GuidClaim
from ssvm_worker.ledger.agents import AgentInfo, AgentRegistry
from tests.servers.broker import Broker, StoppableBroker
from tests.waiting import CLAIM_S, until

INFO = AgentInfo("other", 1, "z", "1.0")


@contextmanager
def started(registry: AgentRegistry) -> Iterator[GuidClaim]:
    """A claim that is renewed while the block runs."""
    claim = GuidClaim(registry, "s-1-VM", "z", CLAIM_S)
    claim.start()
    try:
        yield claim
    finally:
        claim.release()


@pytest.fixture
def registry(broker: Broker) -> AgentRegistry:
    """The registry of that broker."""
    return AgentRegistry(broker.url, prefix=broker.prefix)


def test_release(registry: AgentRegistry, broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    """The second agent waits, its log names the first one, and it takes over at once after a release."""
    other = AgentRegistry(broker.url, prefix=broker.prefix)
    with caplog.at_level(logging.INFO), started(registry) as first:
        assert first.wait(threading.Event())
        with started(other) as second:
            until(lambda: "this one waits" in caplog.text, "the second one knows the first one")
            assert (second.held, second.lost) == (False, True)
            assert "(process " in caplog.text
            first.release()
            assert second.wait(threading.Event())
            assert (first.held, second.lost) == (False, False)


def test_wait_ends(registry: AgentRegistry) -> None:
    """An agent that stops does not wait for the claim."""
    registry.hold("s-1-VM", "other", 3600, INFO)
    stopping = threading.Event()
    stopping.set()
    with started(registry) as claim:
        assert not claim.wait(stopping)


def test_taken(registry: AgentRegistry, broker: Broker) -> None:
    """An agent that was frozen for longer than its claim learns that another one has taken it."""
    with started(registry) as claim:
        assert claim.wait(threading.Event())
        broker.client().delete(f"{broker.prefix}ssvm.agents")
        registry.hold("s-1-VM", "other", 3600, INFO)
        until(lambda: claim.lost, "the claim is lost")
        assert not claim.held


def test_ledger_away(stoppable_broker: StoppableBroker, caplog: pytest.LogCaptureFixture) -> None:
    """Without the ledger, a claim is not held after its time and not lost, and counts are kept."""
    registry = AgentRegistry(stoppable_broker.url)
    with caplog.at_level(logging.INFO), started(registry) as claim:
        assert claim.wait(threading.Event())
        stoppable_broker.stop()
        claim.note("DownloadCommand", ok=True, seconds=0.1)
        claim.note("no/name", ok=False, seconds=99.0)
        until(lambda: not claim.held, "the claim has expired")
        assert not claim.lost
        stoppable_broker.start()
        assert claim.wait(threading.Event())
        until(lambda: len(registry.answers()) == 2, "the counts are stored")
    found = {(each.command, each.result): each for each in registry.answers()}
    assert found["DownloadCommand", "ok"].buckets == (0, 1, 0, 0, 0)
    assert found["other", "failed"].buckets == (0, 0, 0, 0, 1)


def test_unanswered(registry: AgentRegistry, broker: Broker) -> None:
    """The next holder learns, once, which commands the last one left without an answer, with exact numbers."""
    heads = ((0x27, 0x7FC0000000000001, 0x2FC00000001, 1),)
    other = AgentRegistry(broker.url, prefix=broker.prefix)
    with started(registry) as first:
        assert first.wait(threading.Event())
        first.note_unanswered(heads)
        until(lambda: registry.agents()[0].info.unanswered == heads, "it is stored")
        first._over.set()  # as by kill -9
        with started(other) as second:
            assert second.wait(threading.Event())
            assert second.take_unanswered() == heads
            assert (second.take_unanswered(), first.take_unanswered()) == ((), ())


def test_description(registry: AgentRegistry) -> None:
    """The ledger says at which server the host is Up."""
    with started(registry) as claim:
        claim.describe("ms:8250", 7)
        until(lambda: [each.connected for each in registry.agents()] == [True], "the ledger knows it")
        (found,) = registry.agents()
        assert (found.info.server, found.info.host_id) == ("ms:8250", 7)
    (found,) = registry.agents()
    assert (found.held, found.connected) == (False, False)
