"""The table of a run."""

from __future__ import annotations

from collections.abc import Iterator

from .faults import FAULTS
from .rounds import Tally

_MB = 1e6


def table(tally: Tally) -> str:
    """Return the table: survived faults, jobs, artifacts, and bytes that were sent more than once."""
    return "\n".join(_lines(tally))


def _lines(tally: Tally) -> Iterator[str]:
    width = max(map(len, FAULTS))
    yield f"{'fault':<{width}}  survived  jobs struck"
    for name in FAULTS:
        if name in tally.absent:
            yield f"{name:<{width}}  {'-':>8}  {tally.absent[name]}"
        elif tally.faults[name]:
            yield f"{name:<{width}}  {tally.faults[name]:>8}  {tally.struck[name]:>11}"
    total = sum(tally.faults.values())
    yield f"{'all':<{width}}  {total:>8}  {sum(tally.struck.values()):>11}"
    yield ""
    yield f"seed {tally.seed}, {tally.rounds} rounds, {tally.seconds:.0f} s"
    yield f"jobs       {sum(tally.states.values())}: {_counted(tally.states)}; {tally.retried} after a retry by hand"
    yield f"attempts   {sum(tally.attempts.values())}: {_counted(tally.attempts)}"
    yield f"fenced     {tally.fenced} attempts lost their claim, noticed this, and committed nothing"
    yield f"artifacts  {tally.whole} complete, on all stores and destinations; nothing remains of other jobs"
    yield f"commits    {tally.commits} manifests written to the directory, each once; in the bucket also each once"
    yield f"fetched    {_again(tally.fetched, tally.needed)}"
    yield f"to S3      {_again(tally.sent, tally.kept)}"
    yield "leftovers  no part, draft, multipart upload, snapshot, lease, slot, mount or claim"
    if tally.late:
        yield f"late       {tally.late} objects and uploads of ended attempts at S3; the clean-up deleted them"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda each: -each[1]))


def _again(moved: int, needed: int) -> str:
    """Return the moved, the needed and the repeated bytes. Bytes of cancelled jobs count as not needed."""
    again = max(0, moved - needed)
    return f"{moved / _MB:.0f} MB for {needed / _MB:.0f} MB kept: {again / _MB:.0f} MB sent again or not needed"
