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

from ssvm_worker.units import GiB, human_size

_STOPWATCH = Path(__file__).with_name("stopwatch.py")
#: Our two sides: a command, which includes the start of Python, and the same job inside a running worker.
OURS, WARM = "ssvm run", "job in a worker"
#: Our sides in the tables.
_SIDES = {OURS: "cold", WARM: "warm"}
#: The section of the rows with the CPU time for each GiB.
COST = "cost"


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
    #: For a peer: our wall time as a command must be at most the peer's divided by this number. None: no target.
    target: float | None = 1.0
    #: The same for our job inside a running worker.
    warm_target: float | None = 1.0
    #: Measures a run that is no command.
    measure: Callable[[], Cost] | None = None


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
    #: The section of the tables. Empty: that of the benchmark.
    section: str = ""


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
    """Run all contenders in turn and compare each of our sides with each peer.

    Our side in a worker runs once before, because its first job imports libraries. Each round starts with another
    contender. The context manager *fresh* encloses each run. Raises Broken if a contender does not produce exactly
    *size* bytes.
    """
    costs: dict[str, list[Cost]] = {each.name: [] for each in contenders}
    for each in contenders:
        if each.name == WARM:
            with fresh():
                _run_one(each, size)
    for number in range(runs):
        turn = number % len(contenders)
        for each in [*contenders[turn:], *contenders[:turn]]:
            with fresh():
                costs[each.name].append(_run_one(each, size))
    rows = []
    for peer in [each for each in contenders if each.name not in _SIDES]:
        for side in [each for each in _SIDES if each in costs]:
            title = f"{bench}, {human_size(size)}" + (f", {_SIDES[side]}" if WARM in costs else "")
            target = peer.target if side == OURS else peer.warm_target
            rows.append(_compare(title, costs[side], costs[peer.name], peer.name, target))
        if WARM in costs:
            rows.append(_cost(bench, costs[WARM], costs[peer.name], peer.name, size))
    return rows


def _run_one(contender: Contender, size: int) -> Cost:
    cost = contender.measure() if contender.measure else run(contender.command, contender.environment)
    made = contender.made()
    if made != size:
        raise Broken(f"{contender.name} produced {made} bytes instead of {size}")
    print(f"  {contender.name}: {cost}", file=sys.stderr, flush=True)
    return cost


def _compare(bench: str, ours: list[Cost], theirs: list[Cost], peer: str, target: float | None) -> Row:
    own, other = _median(ours), _median(theirs)
    ratio = other.wall / own.wall
    rounds = sorted(b.wall / a.wall for a, b in zip(ours, theirs, strict=True))
    spread = f" ({rounds[0]:.2f}–{rounds[-1]:.2f})" if len(rounds) > 1 else ""
    ok = "" if target is None else "yes" if ratio >= target else "**no**"
    wanted = "" if target is None else f"≥ {target:.1f}"
    return Row(bench, str(own), f"{peer}: {other}", f"{ratio:.2f}{spread}", wanted, ok)


def _cost(bench: str, ours: list[Cost], theirs: list[Cost], peer: str, size: int) -> Row:
    """Return the row with the CPU time of both sides for each GiB."""
    own, other = (_median(each).cpu * GiB / size for each in (ours, theirs))
    return Row(f"{bench}, CPU for 1 GiB", f"{own:.2f} s", f"{peer}: {other:.2f} s", f"{other / own:.2f}", "", "", COST)


def _median(costs: list[Cost]) -> Cost:
    return Cost(*(statistics.median(getattr(each, name) for each in costs) for name in ("wall", "cpu", "rss")))


def left_out(bench: str, what: str) -> Row:
    """Return the row of a comparison that this machine cannot run."""
    return Row(bench, "", f"left out: {what}", "", "", "")
