"""Any bytes from a stranger give a parser's result or a WorkerError; `make fuzz` searches longer."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.targets import TARGETS
from ssvm_worker.errors import WorkerError


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes(name: str) -> None:
    """Changed valid input and random bytes raise only WorkerError."""
    target = TARGETS[name]

    @settings(max_examples=60, database=None)
    @given(st.sampled_from(target.seeds), st.integers(0, 1 << 12), st.binary(max_size=24), st.booleans())
    def look(seed: bytes, at: int, new: bytes, cut: bool) -> None:
        place = at % (len(seed) + 1)
        with suppress(WorkerError):
            target.run(seed[:place] + new + (b"" if cut else seed[place + len(new) :]))

    look()
