"""Whatever bytes a stranger sends, a parser gives an answer or a WorkerError. `make fuzz` looks longer and deeper."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.targets import TARGETS
from ssvm_worker.errors import WorkerError


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes(name: str) -> None:
    """Nothing but a WorkerError, of what a parser takes with a few bytes changed, and of any other bytes."""
    target = TARGETS[name]

    @settings(max_examples=60, database=None)
    @given(st.sampled_from(target.seeds), st.integers(0, 1 << 12), st.binary(max_size=24), st.booleans())
    def look(seed: bytes, at: int, new: bytes, cut: bool) -> None:
        place = at % (len(seed) + 1)
        with suppress(WorkerError):
            target.run(seed[:place] + new + (b"" if cut else seed[place + len(new) :]))

    look()
