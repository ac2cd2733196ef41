"""Runs our program and its peers in turn, as separate processes, and compares the medians of their costs."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from ssvm_worker.units import human_size

_STOPWATCH = Path(__file__).with_name("stopwatch.py")
OURS = "ssvm run"


class Broken(Exception):
    """A contender failed or produced the wrong number of bytes, so the comparison is invalid."""


@dataclass(frozen=True)
class Contender:
    """One program of a comparison."""

    name: str
    command: Sequence[str]
    #: Returns the bytes that the command produced, and removes its files, so that all runs start equal.
    made: Callable[[], int]
    environment: Mapping[str, str] = field(default_factory=dict)
    #: For a peer: our wall time must be at most the peer's divided by this number.
    target: float = 1.0


@dataclass(frozen=True)
class Cost:
    """The cost of a run, or the medians of several runs."""

    #: Seconds.
    wall: float
    #: Seconds, user and system.
    cpu: float
    #: Peak memory in bytes.
    rss: float

    def __str__(self) -> str:
        return f"{self.wall:.2f} s ({self.cpu:.1f} s CPU, {human_size(self.rss)})"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    bench: str
    ours: str
    peer: str
    ratio: str
    target: str
    ok: str


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command and return its cost; raise Broken if it fails."""
    done = subprocess.run(
        [sys.executable, "-ISs", str(_STOPWATCH), *command],
        env=os.environ | dict(environment or {}),
        capture_output=True,
        text=True,
    )
    cost = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"status": done.returncode}
    if cost.pop("status"):
        raise Broken(f"{' '.join(command)[:200]} failed: {done.stderr[-2000:]}")
    return Cost(**cost)


def contest(
    bench: str,
    contenders: Sequence[Contender],
    size: int,
    runs: int,
    fresh: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[Row]:
    """Run all contenders in turn and compare our program, the first one, with each peer.

    Each round starts with another contender. The context manager *fresh* encloses each run. Raises Broken if a
    contender does not produce exactly *size* bytes.
    """
    costs: dict[str, list[Cost]] = {each.name: [] for each in contenders}
    for number in range(runs):
        turn = number % len(contenders)
        for each in [*contenders[turn:], *contenders[:turn]]:
            with fresh():
                costs[each.name].append(_run_one(each, size))
    return [_compare(f"{bench}, {human_size(size)}", costs[OURS], costs[each.name], each) for each in contenders[1:]]


def _run_one(contender: Contender, size: int) -> Cost:
    cost = run(contender.command, contender.environment)
    made = contender.made()
    if made != size:
        raise Broken(f"{contender.name} produced {made} bytes instead of {size}")
    print(f"  {contender.name}: {cost}", file=sys.stderr, flush=True)
    return cost


def _compare(bench: str, ours: list[Cost], theirs: list[Cost], peer: Contender) -> Row:
    own, other = _median(ours), _median(theirs)
    ratio = other.wall / own.wall
    rounds = sorted(b.wall / a.wall for a, b in zip(ours, theirs, strict=True))
    spread = f" ({rounds[0]:.2f}–{rounds[-1]:.2f})" if len(rounds) > 1 else ""
    ok = "yes" if ratio >= peer.target else "**no**"
    return Row(bench, str(own), f"{peer.name}: {other}", f"{ratio:.2f}{spread}", f"≥ {peer.target:.1f}", ok)


def _median(costs: list[Cost]) -> Cost:
    return Cost(*(statistics.median(getattr(each, name) for each in costs) for name in ("wall", "cpu", "rss")))


def left_out(bench: str, what: str) -> Row:
    """Return the row of a comparison that this machine cannot run."""
    return Row(bench, "", f"left out: {what}", "", "", "")
