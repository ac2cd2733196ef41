"""docs/explanation/cloudstack.md: each claim about the agent names tests that exist."""

from __future__ import annotations

import re

from tests.neighbours import ROOT

PAGE = ROOT / "docs/explanation/cloudstack.md"


def test_claims_have_tests() -> None:
    """Each row of the page names at least one test, and each named test exists."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "Tests |" not in line]
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`([a-z0-9_/]+\.py)::(test_\w+)`", row.split("|")[-2])
        assert named, f"no test proves: {row}"
        for file, test in named:
            text = (ROOT / "tests" / file).read_text()
            assert f"def {test}(" in text, f"tests/{file} has no {test}"
