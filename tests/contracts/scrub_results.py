"""The contract of every memory of verdicts."""

from __future__ import annotations

import time

from ssvm_worker.ledger.scrub_results import ScrubResults

A, B = "template/tmpl/2/2", "template/tmpl/2/20"


class VerdictsContract:
    """The tests; a subclass has the fixture ``verdicts``."""

    def test_times(self, verdicts: ScrubResults) -> None:
        """A read artifact has a time on each store, and an unread one has 0."""
        before = time.time() - 60
        verdicts.note("s", A, (), "j")
        assert verdicts.times("s", [B, A])[0] == 0
        assert verdicts.times("s", [B, A])[1] > before
        assert verdicts.times("t", [A]) == [0]
        assert verdicts.times("s", []) == []

    def test_findings(self, verdicts: ScrubResults) -> None:
        """A finding is kept until a later verification finds none."""
        verdicts.note("s", B, ["cut", 'bytes "differ"'], "j1")
        verdicts.note("s", A, [], "j1")
        (found,) = verdicts.findings()
        assert (found.store, found.place, found.findings, found.job_id) == ("s", B, ("cut", 'bytes "differ"'), "j1")
        verdicts.note("s", B, [], "j2")
        assert list(verdicts.findings()) == []

    def test_reached(self, verdicts: ScrubResults) -> None:
        """A job knows its progress on each store."""
        verdicts.note("s", A, (), "j")
        verdicts.note("s", B, (), "j")
        assert verdicts.reached("j", "s") == B
        assert verdicts.reached("j", "t") == verdicts.reached("k", "s") == ""

    def test_forget(self, verdicts: ScrubResults) -> None:
        """A deleted artifact has no verdict."""
        verdicts.note("s", A, ["cut"], "j")
        assert list(verdicts.noted("s", time.time() + 60)) == [A]
        assert list(verdicts.noted("s", time.time() - 60)) == []
        verdicts.forget("s", A)
        assert verdicts.times("s", [A]) == [0]
        assert list(verdicts.findings()) == list(verdicts.noted("s", time.time() + 60)) == []
