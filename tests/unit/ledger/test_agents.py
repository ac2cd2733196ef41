"""The registry of agents in a real broker."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from ssvm_worker.ledger.agents import AgentInfo, AgentRegistry, AnswerCounts
from tests.servers.broker import Broker
from tests.waiting import until

INFO = AgentInfo("host1", 7, "zone1", "1.0")


@pytest.fixture
def registry(broker: Broker) -> AgentRegistry:
    """The registry of that broker."""
    return AgentRegistry(broker.url, prefix=broker.prefix)


def test_one_holder(registry: AgentRegistry) -> None:
    """One agent holds a GUID until it releases it, and other GUIDs are independent."""
    assert registry.hold("s-1-VM", "a", 60, INFO)
    assert registry.hold("s-1-VM", "a", 60, INFO)
    assert not registry.hold("s-1-VM", "b", 60, INFO)
    assert registry.hold("s-2-VM", "b", 60, INFO)
    assert registry.hold("s-1-VM", "a", 0, INFO)
    assert registry.hold("s-1-VM", "b", 60, INFO)


def test_expiry(registry: AgentRegistry) -> None:
    """The claim of a dead agent expires."""
    assert registry.hold("s-1-VM", "a", 0.1, INFO)
    until(lambda: registry.hold("s-1-VM", "b", 60, INFO), "the claim is free")


def test_listed(registry: AgentRegistry) -> None:
    """The list says who holds a GUID, whether its host is Up, and who held it last."""
    registry.hold("s-1-VM", "a", 60, replace(INFO, server="ms:8250", host_id=4, up_since=time.time()))
    registry.hold("s-2-VM", "b", 0, INFO)
    first, second = registry.agents()
    assert (first.guid, first.held, first.connected, first.info.host_id) == ("s-1-VM", True, True, 4)
    assert (second.guid, second.held, second.connected) == ("s-2-VM", False, False)
    assert first.to_dict()["server"] == "ms:8250"


def test_unreadable(registry: AgentRegistry, broker: Broker) -> None:
    """An unreadable entry hides no other."""
    registry.hold("s-1-VM", "a", 60, INFO)
    broker.client().hset(f"{broker.prefix}ssvm.agents", "s-0-VM", '{"info": 1}')
    assert [each.guid for each in registry.agents()] == ["s-1-VM"]


def test_answers(registry: AgentRegistry) -> None:
    """Counters of several agents add up."""
    kind = ("DownloadCommand", "ok")
    registry.note({(*kind, 0): 2, (*kind, 4): 1}, {kind: 1.5})
    registry.note({(*kind, 0): 1, ("CopyCommand", "failed", 1): 1}, {kind: 0.5, ("CopyCommand", "failed"): 0.25})
    assert registry.answers() == [
        AnswerCounts("CopyCommand", "failed", (0, 1, 0, 0, 0), 0.25),
        AnswerCounts("DownloadCommand", "ok", (3, 0, 0, 0, 1), 2.0),
    ]
