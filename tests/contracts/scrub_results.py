"""What whoever remembers verdicts promises."""

from __future__ import annotations

import time

from ssvm_worker.ledger.scrub_results import ScrubResults

A, B = "template/tmpl/2/2", "template/tmpl/2/20"


class VerdictsContract:
    """The suite; a subclass has the fixture ``verdicts``."""

    def test_times(self, verdicts: ScrubResults) -> None:
        """What was read has a time, what was not has 0, each store its own."""
        before = time.time() - 60
        verdicts.note("s", A, (), "j")
        assert verdicts.times("s", [B, A])[0] == 0
        assert verdicts.times("s", [B, A])[1] > before
        assert verdicts.times("t", [A]) == [0]
        assert verdicts.times("s", []) == []

    def test_findings(self, verdicts: ScrubResults) -> None:
        """Findings stand until a later look finds none."""
        verdicts.note("s", B, ["cut", 'bytes "differ"'], "j1")
        verdicts.note("s", A, [], "j1")
        (found,) = verdicts.findings()
        assert (found.store, found.place, found.findings, found.job_id) == ("s", B, ("cut", 'bytes "differ"'), "j1")
        verdicts.note("s", B, [], "j2")
        assert list(verdicts.findings()) == []

    def test_reached(self, verdicts: ScrubResults) -> None:
        """A job knows how far it has come on each store."""
        verdicts.note("s", A, (), "j")
        verdicts.note("s", B, (), "j")
        assert verdicts.reached("j", "s") == B
        assert verdicts.reached("j", "t") == verdicts.reached("k", "s") == ""

    def test_forget(self, verdicts: ScrubResults) -> None:
        """Of what is gone nothing is known."""
        verdicts.note("s", A, ["cut"], "j")
        assert list(verdicts.noted("s", time.time() + 60)) == [A]
        assert list(verdicts.noted("s", time.time() - 60)) == []
        verdicts.forget("s", A)
        assert verdicts.times("s", [A]) == [0]
        assert list(verdicts.findings()) == list(verdicts.noted("s", time.time() + 60)) == []
