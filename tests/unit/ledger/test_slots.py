"""Slots of one process, and slots that all workers share."""

from __future__ import annotations

import multiprocessing
import time

import pytest

from ssvm_worker.errors import Cancelled
from ssvm_worker.ledger.slots import LocalSlots
from ssvm_worker.ledger.slots.redis import SharedSlots
from tests.contracts.slots import Make, SlotsContract, give_up
from tests.servers.broker import Broker
from tests.waiting import CLAIM_S, PATIENCE_S


class TestLocal(SlotsContract):
    """Slots in this process."""

    @pytest.fixture
    def make(self) -> Make:
        """Return the same slots each time."""
        slots = LocalSlots()
        return lambda: slots


class TestShared(SlotsContract):
    """Slots in one broker."""

    @pytest.fixture
    def make(self, broker: Broker) -> Make:
        """Return another worker's slots each time."""
        return lambda: SharedSlots(broker.url, prefix=broker.prefix, claim_s=60)


def hold_for_ever(url: str, prefix: str, held: object) -> None:
    """Hold a slot until the process is killed."""
    with SharedSlots(url, prefix=prefix, claim_s=CLAIM_S).hold("esx1", 1, give_up):
        held.set()  # type: ignore[attr-defined]
        time.sleep(PATIENCE_S)


def test_killed(broker: Broker) -> None:
    """A killed worker's slot is free again soon, and is kept until then."""
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    worker = context.Process(target=hold_for_ever, args=(broker.url, broker.prefix, held))
    worker.start()
    assert held.wait(PATIENCE_S)
    mine, tries = SharedSlots(broker.url, prefix=broker.prefix), list[float]()

    def wait(seconds: float) -> None:
        if not tries:
            worker.kill()
        tries.append(seconds)
        time.sleep(0.05)

    with mine.hold("esx1", 1, wait):
        assert tries
    worker.join()


def test_renewed(broker: Broker) -> None:
    """A slot is kept beyond the time of a claim while its holder lives."""
    with (
        broker.client() as client,
        SharedSlots(broker.url, prefix=broker.prefix, claim_s=CLAIM_S).hold("e", 1, give_up),
    ):
        key = f"{broker.prefix}ssvm.slots:e"
        first = client.zrange(key, 0, -1, withscores=True)
        while (now := client.zrange(key, 0, -1, withscores=True)) == first:
            pass
        assert now[0][1] > first[0][1] + 0.01


def test_clock_was_set_back(broker: Broker) -> None:
    """A dead worker's slot is released even if the broker's clock was set back."""
    with broker.client() as client:
        client.zadd(f"{broker.prefix}ssvm.slots:e", {"dead": time.time() + 3 * 3600})
    with SharedSlots(broker.url, prefix=broker.prefix).hold("e", 1, give_up):
        pass


def test_broker_away() -> None:
    """Without the broker no slot is granted, and a cancel takes effect."""
    with pytest.raises(Cancelled), SharedSlots("redis://127.0.0.1:1/0").hold("e", 1, give_up):
        pass
