"""Runs our program and its peers in turn, as separate processes, and compares the medians of their costs."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
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
#: The part of a bound that our side must reach if a target is above the bound.
OF_BOUND = 0.9


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
    #: Whether it does nothing but the parts of our work. Then its wall time counts as a bound.
    is_bare: bool = False


@dataclass(frozen=True)
class Cost:
    """The cost of a run, or the medians of several runs."""

    #: Seconds.
    wall: float
    #: Seconds, user and system.
    cpu: float
    #: Peak memory in bytes.
    rss: float
    #: CPU seconds of the servers at the same time.
    served: float = 0.0

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


@dataclass(frozen=True)
class Parts:
    """The parts of the work that no program can avoid. Each was measured alone, in CPU seconds of one core.

    The CPU time of the servers is the lowest of a peer's runs.
    """

    seconds: Mapping[str, float]
    #: The wall time in seconds to start Python with the libraries that the job needs.
    start: float
    #: Whether the server handles one connection, and so uses one core.
    one_connection: bool = True
    #: Wall seconds in which all others wait for an S3 server, which joins the parts of an upload.
    join: float = 0.0

    def bounds(self, served: float, bare: float = 0.0) -> dict[str, float]:
        """Return the shortest wall time of our two sides: all cores are always busy, or one part takes as long.

        *bare*: the wall time in seconds of a program that does only these parts.
        """
        parts = [*self.seconds.values(), served]
        longest = max(parts if self.one_connection else self.seconds.values())
        warm = max(longest, (sum(parts) - self.join) / len(os.sched_getaffinity(0)) + self.join, bare)
        return {OURS: warm + self.start, WARM: warm}

    def row(self, bench: str, served: float) -> Row:
        """Return the row that shows how the bounds were computed."""
        shown = [f"{name} {seconds:.2f} s" for name, seconds in {**self.seconds, "server": served}.items()]
        bounds = self.bounds(served)
        joined = f"; all wait for the server's join {self.join:.2f} s" if self.join else ""
        text = f"CPU time: {', '.join(shown)}{joined}; start {self.start:.2f} s"
        return Row(f"{bench}, bound of the parts", f"{bounds[WARM]:.2f} s, cold {bounds[OURS]:.2f} s", text, "", "", "")


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command and return its cost; raise Broken if it fails."""
    before = served_cpu()
    done = subprocess.run(
        [sys.executable, "-ISs", str(_STOPWATCH), *command],
        env=os.environ | dict(environment or {}),
        capture_output=True,
        text=True,
    )
    cost = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"status": done.returncode}
    if cost.pop("status"):
        raise Broken(f"{' '.join(command)[:200]} failed: {done.stderr[-2000:]}")
    return Cost(**cost, served=served_cpu() - before)


def served_cpu() -> float:
    """Return the CPU seconds so far of all processes below this one. Between two runs these are only the servers."""
    stats: dict[str, list[str]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has ended
            stats[file.parent.name] = file.read_text().rpartition(")")[2].split()
    found, seconds = {str(os.getpid())}, 0.0
    # A child may have a lower number than its parent, so look until no more are found.
    while more := {pid for pid, fields in stats.items() if fields[1] in found} - found:
        found |= more
        seconds += sum(int(stats[pid][11]) + int(stats[pid][12]) for pid in more)
    return seconds / os.sysconf("SC_CLK_TCK")


def contest(
    bench: str,
    contenders: Sequence[Contender],
    size: int,
    runs: int,
    *,
    fresh: Callable[[], AbstractContextManager[object]] = nullcontext,
    parts: Parts | None = None,
) -> list[Row]:
    """Run all contenders in turn and compare each of our sides with each peer.

    Our side in a worker runs once before, because its first job imports libraries. Each round starts with another
    contender. The context manager *fresh* encloses each run. With *parts*, add a row with the bound. A bare program is
    a bound, too. If a target is above the bound, 0.9 of the bound is enough. Raises Broken if a contender does not
    produce exactly *size* bytes.
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
    rows, peers = [], [each for each in contenders if each.name not in _SIDES]
    served = min((cost.served for each in peers for cost in costs[each.name]), default=0.0)
    bare = max((_median(costs[each.name]).wall for each in contenders if each.is_bare), default=0.0)
    # What was reached once is possible: a server may use several cores for one connection.
    bounds = {
        side: min(bound, *(each.wall for each in costs[side]))
        for side, bound in (parts.bounds(served, bare) if parts else {}).items()
        if side in costs
    }
    for peer in peers:
        for side in [each for each in _SIDES if each in costs]:
            title = f"{bench}, {human_size(size)}" + (f", {_SIDES[side]}" if WARM in costs else "")
            target = peer.target if side == OURS else peer.warm_target
            rows.append(_compare(title, costs[side], costs[peer.name], peer.name, _Goal(target, bounds.get(side))))
        if WARM in costs:
            rows.append(_cost(bench, costs[WARM], costs[peer.name], peer.name, size))
    return [*rows, parts.row(bench, served)] if parts and peers else rows


def _run_one(contender: Contender, size: int) -> Cost:
    cost = contender.measure() if contender.measure else run(contender.command, contender.environment)
    made = contender.made()
    if made != size:
        raise Broken(f"{contender.name} produced {made} bytes instead of {size}")
    print(f"  {contender.name}: {cost}", file=sys.stderr, flush=True)
    return cost


@dataclass(frozen=True)
class _Goal:
    """The wanted ratio, and the shortest wall time that is possible. None: there is none, and it was not measured."""

    target: float | None
    bound_s: float | None

    def verdict(self, ratio: float, peer_s: float) -> tuple[str, str]:
        """Return the cells *target* and *ok* for our ratio to a peer that took *peer_s* seconds."""
        if self.target is None:
            return "", ""
        wanted = f"≥ {self.target:.1f}"
        if ratio >= self.target:
            return wanted, "yes"
        bound = peer_s / self.bound_s if self.bound_s else math.inf
        if bound >= self.target:
            return wanted, "**no**"
        return f"{wanted}, bound {bound:.2f}", "of bound" if ratio >= OF_BOUND * bound else "**no**"


def _compare(bench: str, ours: list[Cost], theirs: list[Cost], peer: str, goal: _Goal) -> Row:
    own, other = _median(ours), _median(theirs)
    ratio = other.wall / own.wall
    rounds = sorted(b.wall / a.wall for a, b in zip(ours, theirs, strict=True))
    spread = f" ({rounds[0]:.2f}–{rounds[-1]:.2f})" if len(rounds) > 1 else ""
    return Row(bench, str(own), f"{peer}: {other}", f"{ratio:.2f}{spread}", *goal.verdict(ratio, other.wall))


def _cost(bench: str, ours: list[Cost], theirs: list[Cost], peer: str, size: int) -> Row:
    """Return the row with the CPU time of both sides for each GiB."""
    own, other = (_median(each).cpu * GiB / size for each in (ours, theirs))
    return Row(f"{bench}, CPU for 1 GiB", f"{own:.2f} s", f"{peer}: {other:.2f} s", f"{other / own:.2f}", "", "", COST)


def _median(costs: list[Cost]) -> Cost:
    return Cost(
        *(statistics.median(getattr(each, name) for each in costs) for name in ("wall", "cpu", "rss", "served"))
    )


def left_out(bench: str, what: str) -> Row:
    """Return the row of a comparison that this machine cannot run."""
    return Row(bench, "", f"left out: {what}", "", "", "")
