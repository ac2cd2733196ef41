"""The benches run with a small size, and their table shows the comparison; no test judges the measurements."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.contest import OURS, Broken, Contender, Row, contest, left_out
from tests.neighbours import ROOT
from tests.waiting import PATIENCE_S


def bench(*words: str) -> list[list[str]]:
    """Run the program, and return the cells of each line of its table."""
    command = [sys.executable, "-m", "benchmarks", *words, "--runs", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode in (0, 1), done.stderr
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]


@pytest.mark.e2e
@pytest.mark.parametrize(
    "name", ["download", *(pytest.param(each, marks=pytest.mark.soak) for each in
                           ("backup", "copy", "decompress", "grains", "inspection", "memory"))]
)  # fmt: skip
def test_runs_small(name: str) -> None:
    """Each line has a verdict or the reason of an omission, except the hash alone, which is a lower bound."""
    lines = [line for line in bench(name, "--size", "8MiB") if not line[0].startswith("SHA-256 alone")]
    assert lines
    assert all(line[-1] in ("yes", "**no**") or line[2].startswith("left out: ") for line in lines)


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["ledger", pytest.param("queue", marks=pytest.mark.soak)])
def test_counts_jobs(name: str) -> None:
    """The size of the ledger's benches is a number of jobs, and each line has a verdict."""
    assert {line[-1] for line in bench(name, "--size", "60")} <= {"yes", "**no**"}


def test_contender_makes_too_little() -> None:
    """A contender that does not produce all bytes has not won."""
    sides = [Contender(OURS, ["/bin/true"], lambda: 5), Contender("peer", ["/bin/true"], lambda: 4)]
    with pytest.raises(Broken, match="peer produced 4 bytes instead of 5"):
        contest("x", sides, 5, 1)


def test_contender_fails() -> None:
    """A failure is no result, and its output is shown."""
    sides = [Contender(OURS, ["/bin/sh", "-c", "echo no disk >&2; exit 3"], lambda: 5)]
    with pytest.raises(Broken, match="no disk"):
        contest("x", sides, 5, 1)


def test_kept_between_marks(tmp_path: Path) -> None:
    """A bench's new table replaces its old one, and other tables and texts stay."""
    kept = tmp_path / "benchmarks.md"
    sections = "### upload\n\nearlier\n\n### download\n\nold"
    kept.write_text(f"Before.\n<!-- measured: begin -->\n{sections}\n<!-- measured: end -->\nAfter.\n")
    row = Row("x", "1 s", "2 s", "2.00", "≥ 1.0", "yes")
    report.keep({"download": [left_out("download", "nginx is not installed"), row], "memory": [row]}, 3, kept)
    text = kept.read_text()
    assert text.startswith("Before.\n<!-- measured: begin -->\n### upload\n\nearlier\n\n### download\n\n| bench")
    assert text.endswith("<!-- measured: end -->\nAfter.\n")
    assert text.count("Medians of 3") == 2
    assert "left out: nginx is not installed" in text
    assert "old" not in text
