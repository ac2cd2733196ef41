"""Threads that renew slots, reservations and claims: a refusal by the broker ends none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ssvm_worker.ledger.inline_job import claim_inline
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.quota.redis import SharedQuota
from ssvm_worker.ledger.record import NewJob
from ssvm_worker.ledger.slots.redis import SharedSlots
from tests.contracts.slots import give_up
from tests.servers.broker import Broker, StoppableBroker
from tests.waiting import until

#: Seconds of a claim. It is renewed four times as often.
CLAIM_S = 0.4


@contextmanager
def slot(broker: Broker) -> Iterator[None]:
    """Hold a slot."""
    with SharedSlots(broker.url, claim_s=CLAIM_S).hold("esx1", 1, give_up):
        yield


@contextmanager
def reservation(broker: Broker) -> Iterator[None]:
    """Hold a reservation."""
    with SharedQuota(broker.url, claim_s=CLAIM_S).hold("acme", "j1", 1000) as grow:
        grow(5)
        yield


@contextmanager
def inline(broker: Broker) -> Iterator[None]:
    """Hold the claim of a job in this process."""
    new = NewJob("j1", "delete", "z", "maintenance", {})
    with Ledger(broker.url, claim_s=CLAIM_S) as ledger, claim_inline(ledger, new, "w") as claim:
        assert claim
        yield


@pytest.mark.parametrize("hold", [slot, reservation, inline])
def test_refused_for_a_while(stoppable_broker: StoppableBroker, hold: Callable[[Broker], Iterator[None]]) -> None:
    """A thread that the broker refuses, as after a change of its users, renews again when it may."""
    broker = stoppable_broker.with_prefix("")
    with broker.client() as client, hold(broker):  # type: ignore[attr-defined]

        def count(name: str) -> int:
            return int(client.info("commandstats").get("cmdstat_evalsha", {}).get(name, 0))

        refused = count("rejected_calls")
        client.execute_command("ACL", "SETUSER", "default", "-evalsha")
        until(lambda: count("rejected_calls") > refused, "a renewal is refused")
        client.execute_command("ACL", "SETUSER", "default", "+@all")
        accepted = count("calls")
        until(lambda: count("calls") > accepted, "the next renewal is accepted")
