"""The benches run with a small size, and their table shows the comparison; no test judges the measurements."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.contest import OURS, Broken, Contender, Parts, Row, contest, left_out
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
                           ("backup", "cloudstack", "copy", "decompress", "download_s3", "grains", "inspection",
                            "memory", "restore", "scale", "system_vm", "upload"))]
)  # fmt: skip
def test_runs_small(name: str) -> None:
    """Each line with a target has a verdict, and each side is compared warm and cold."""
    lines = [line for line in bench(name, "--size", "8MiB") if len(line) == len(report.HEADS)]
    assert lines
    assert all((line[-1] in ("yes", "of bound", "**no**")) == bool(line[-2]) for line in lines)
    if name in ("download", "upload", "backup", "restore") and not any("left out" in line[2] for line in lines):
        assert {line[0].rpartition(", ")[2] for line in lines} >= {"cold", "warm", "CPU for 1 GiB"}


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["ledger", pytest.param("queue", marks=pytest.mark.soak)])
def test_counts_jobs(name: str) -> None:
    """The size of the ledger's benches is a number of jobs, and each line with a target has a verdict."""
    lines = [line for line in bench(name, "--size", "60") if len(line) == len(report.HEADS)]
    assert lines
    assert all((line[-1] in ("yes", "**no**")) == bool(line[-2]) for line in lines)


def test_contender_makes_too_little() -> None:
    """A contender that does not produce all bytes has not won."""
    sides = [Contender(OURS, ["/bin/true"], lambda: 5), Contender("peer", ["/bin/true"], lambda: 4)]
    with pytest.raises(Broken, match="peer produced 4 bytes instead of 5"):
        contest("x", sides, 5, 1)


@pytest.mark.parametrize(
    ("parts", "target", "ok"),
    [(None, "≥ 1000000000.0", "**no**"), (Parts({"hash": 1e12}, start=0.0), "≥ 1000000000.0, bound ", "of bound")],
)
def test_target_above_the_bound(parts: Parts | None, target: str, ok: str) -> None:
    """If the parts make a target impossible, nine tenths of the bound are enough."""
    sides = [Contender(OURS, ["/bin/true"], lambda: 5), Contender("peer", ["/bin/true"], lambda: 5, target=1e9)]
    row = contest("x", sides, 5, 1, parts=parts)[0]
    assert (row.target.startswith(target), row.ok) == (True, ok)


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
    rows = {"download": [left_out("download", "nginx is not installed"), row], "memory": [row]}
    report.keep(rows, {"download": 3, "memory": 3}, kept)
    text = kept.read_text()
    assert text.startswith("Before.\n<!-- measured: begin -->\n### upload\n\nearlier\n\n### download\n\n| bench")
    assert text.endswith("<!-- measured: end -->\nAfter.\n")
    assert text.count("Medians of 3") == 2
    assert "left out: nginx is not installed" in text
    assert "old" not in text
