"""The contract of all slots."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from ssvm_worker.errors import Cancelled
from ssvm_worker.ledger.slots import Slots
from tests.waiting import PATIENCE_S

Make = Callable[[], Slots]


def give_up(_: float) -> None:
    """Cancel every wait."""
    raise Cancelled("user")


class SlotsContract:
    """The tests; a subclass has the fixture ``make``, which returns slots with a shared pool."""

    def test_limit(self, make: Make) -> None:
        """No more slots than the limit are in use, and a cancel ends the wait for a slot."""
        with ExitStack() as stack:
            for _ in range(2):
                stack.enter_context(make().hold("esx1", 2, give_up))
            with pytest.raises(Cancelled):
                stack.enter_context(make().hold("esx1", 2, give_up))
            stack.enter_context(make().hold("esx2", 1, give_up))

    def test_free_again(self, make: Make) -> None:
        """A slot is free as soon as its holder has left, also after an error."""
        with pytest.raises(Cancelled), make().hold("esx1", 1, give_up):
            raise Cancelled("user")
        with make().hold("esx1", 1, give_up):
            pass

    def test_waits(self, make: Make) -> None:
        """A waiting thread gets the slot when it is free."""
        waiting, left = threading.Event(), threading.Event()

        def wait(_: float) -> None:
            waiting.set()
            assert left.wait(PATIENCE_S)

        def hold() -> None:
            with make().hold("esx1", 1, wait):
                got.append(left.is_set())

        got: list[bool] = []
        with make().hold("esx1", 1, give_up):
            thread = threading.Thread(target=hold)
            thread.start()
            assert waiting.wait(PATIENCE_S)
        left.set()
        thread.join(PATIENCE_S)
        assert got == [True]
