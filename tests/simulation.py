"""Simulate one day of a busy zone in virtual time, with the real rule of ``ssvm scale``.

``make simulate`` draws docs/pictures/scaling.svg. The day has 10,000 jobs, with a peak in the morning, a peak in the
afternoon, and four bursts. The lengths of jobs have a heavy tail: log-normal, median one minute, one in a hundred
above half an hour. A worker needs 90 s to start. A check runs each minute.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ssvm_worker.config.schema import ScalingSection
from ssvm_worker.operations.scaling import Running, decide, workers_needed

DAY_S, JOBS, LOOK_S, START_S = 86_400, 10_000, 60, 90
#: Jobs of one worker.
SESSIONS = 2
POLICY = ScalingSection(sessions=SESSIONS, standby=4, min=2, max=100)
COOL_DOWN_S = 600
PICTURE = Path(__file__).resolve().parent.parent / "docs/pictures/scaling.svg"


@dataclass
class Worker:
    """A simulated worker."""

    name: str
    #: The time of its first job, in seconds of the day.
    ready: float
    active: int = 0
    gone: bool = False


@dataclass
class Outcome:
    """The results of a simulated day."""

    #: The seconds that each job has waited.
    waits: list[float] = field(default_factory=list)
    #: The number of workers at each check.
    workers: list[int] = field(default_factory=list)
    #: The number of waiting jobs at each check.
    queued: list[int] = field(default_factory=list)
    #: The names of workers that were stopped while they had work.
    broken_off: list[str] = field(default_factory=list)

    @property
    def worker_hours(self) -> float:
        """Return the worker hours."""
        return sum(self.workers) * LOOK_S / 3600

    def wait(self, quantile: int) -> float:
        """Return the percentile of the waiting times, in seconds."""
        return statistics.quantiles(self.waits, n=100)[quantile - 1]


def arrivals(seed: int = 1) -> list[tuple[float, float]]:
    """Return the arrival and the duration of each job, in seconds."""
    dice = random.Random(seed)
    came = [dice.choice((3, 9.5, 14.5, 21)) * 3600 + dice.choice((0, 0, 0, 0, 300)) for _ in range(JOBS * 15 // 100)]
    while len(came) < JOBS:
        at = dice.uniform(0, DAY_S)
        busy = 0.25 + math.exp(-(((at / 3600 - 10) / 2.5) ** 2)) + 0.8 * math.exp(-(((at / 3600 - 15) / 2) ** 2))
        if dice.random() < busy / 1.3:
            came.append(at)
    return sorted((max(0.0, min(DAY_S - 1, dice.gauss(at, 60))), dice.lognormvariate(math.log(60), 1.5)) for at in came)


#: A function of (active, queued, workers, time). It returns the number of workers, and the names to stop.
Rule = Callable[[int, int, list[Worker], float], tuple[int, tuple[str, ...]]]


def ours() -> Rule:
    """Return the rule of ``ssvm scale``, with its cool-down."""
    recent: deque[tuple[float, int]] = deque()

    def rule(active: int, queued: int, workers: list[Worker], now: float) -> tuple[int, tuple[str, ...]]:
        recent.append((now, workers_needed(POLICY, active, queued)))
        while recent[0][0] < now - COOL_DOWN_S:
            recent.popleft()
        running = [Running(each.name, each.active, each.ready) for each in workers]
        made = decide("zone1", (active, queued), running, POLICY, max(most for _, most in recent))
        return made.desired, made.removable

    return rule


def cloudstack() -> Rule:
    """Return the rule of CloudStack's SSVM manager: one more at each check without capacity. It stops none."""

    def rule(active: int, queued: int, workers: list[Worker], _now: float) -> tuple[int, tuple[str, ...]]:
        short = active + queued + POLICY.standby > len(workers) * SESSIONS
        return min(POLICY.max, len(workers) + short), ()

    return rule


def fixed(number: int) -> Rule:
    """Return the rule of a constant number of workers."""
    return lambda _active, _queued, _workers, _now: (number, ())


class Day:
    """Runs the jobs of a day with a rule."""

    def __init__(self, rule: Rule, jobs: list[tuple[float, float]]) -> None:
        self._rule = rule
        self._outcome = Outcome()
        self._workers: list[Worker] = []
        self._waiting: deque[tuple[float, float]] = deque()
        self._ending: list[tuple[float, int, Worker]] = []
        self._coming = deque(jobs)
        self._made = 0

    def run(self) -> Outcome:
        """Run the day, and continue until the last job has ended."""
        now = 0.0
        self._look(-START_S)
        while self._coming or self._waiting or self._ending:
            now += 1
            self._advance(now)
            if now % LOOK_S == 0:
                self._look(now)
        return self._outcome

    def _advance(self, now: float) -> None:
        while self._ending and self._ending[0][0] <= now:
            heapq.heappop(self._ending)[2].active -= 1
        while self._coming and self._coming[0][0] <= now:
            self._waiting.append(self._coming.popleft())
        if not self._waiting:
            return
        free = [each for each in self._workers if each.ready <= now and each.active < SESSIONS]
        while self._waiting and free:
            worker = min(free, key=lambda each: each.active)
            came, length = self._waiting.popleft()
            worker.active += 1
            self._outcome.waits.append(now - came)
            heapq.heappush(self._ending, (now + length, len(self._outcome.waits), worker))
            if worker.active == SESSIONS:
                free.remove(worker)

    def _look(self, now: float) -> None:
        active = sum(each.active for each in self._workers)
        desired, removable = self._rule(active, len(self._waiting), self._workers, now)
        for each in [worker for worker in self._workers if worker.name in removable]:
            if each.active:
                self._outcome.broken_off.append(each.name)
            self._workers.remove(each)
        for _ in range(desired - len(self._workers)):
            self._made += 1
            self._workers.append(Worker(f"w{self._made}", now + START_S))
        self._outcome.workers.append(len(self._workers))
        self._outcome.queued.append(len(self._waiting))


def compare() -> dict[str, Outcome]:
    """Run the same day with each rule."""
    jobs = arrivals()
    own = Day(ours(), jobs).run()
    average = round(statistics.mean(own.workers))
    rules = {
        "CloudStack's rule": cloudstack(),
        f"always {average}": fixed(average),
        f"always {POLICY.max}": fixed(POLICY.max),
    }
    return {"ssvm scale": own} | {name: Day(rule, jobs).run() for name, rule in rules.items()}


def table(days: dict[str, Outcome]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| rule | worker-hours | most workers | wait, median | 95 % | 99 % | longest |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, day in days.items():
        waits = " | ".join(f"{each:.0f} s" for each in (day.wait(50), day.wait(95), day.wait(99), max(day.waits)))
        lines.append(f"| {name} | {day.worker_hours:.0f} | {max(day.workers)} | {waits} |")
    return "\n".join(lines)


_COLOURS = ("#0b6e4f", "#c0392b", "#8e8e8e", "#2c5f9e")
_WIDTH, _HEIGHT, _LEFT = 760, 200, 50


def draw(days: dict[str, Outcome]) -> str:
    """Return workers and waiting jobs of the day as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH + 70} {2 * _HEIGHT + 110}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for row, (title, values) in enumerate(
        (
            ("workers", {name: day.workers for name, day in days.items()}),
            ("waiting jobs", {name: day.queued for name, day in days.items()}),
        )
    ):
        parts += _chart(title, values, 30 + row * (_HEIGHT + 40))
    for number, name in enumerate(days):
        at = _LEFT + number * 180
        parts.append(f'<text x="{at}" y="{2 * _HEIGHT + 95}" fill="{_COLOURS[number]}">— {name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _chart(title: str, values: dict[str, list[int]], top: int) -> list[str]:
    most = max(max(each) for each in values.values()) or 1
    parts = [f'<text x="{_LEFT}" y="{top - 8}">{title}</text>']
    for share in (0, 0.5, 1):
        y = top + _HEIGHT * (1 - share)
        parts.append(f'<path d="M{_LEFT} {y:.0f}h{_WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.0f}" text-anchor="end">{most * share:.0f}</text>')
    for hour in range(0, 25, 6):
        x = _LEFT + hour / 24 * _WIDTH
        parts.append(f'<text x="{x:.0f}" y="{top + _HEIGHT + 15}" text-anchor="middle">{hour}:00</text>')
    for number, series in enumerate(values.values()):
        day = series[::5][: DAY_S // LOOK_S // 5]
        points = " ".join(
            f"{_LEFT + 5 * LOOK_S * index / DAY_S * _WIDTH:.0f},{top + _HEIGHT * (1 - value / most):.1f}"
            for index, value in enumerate(day)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{_COLOURS[number]}" stroke-width="1.3"/>')
    return parts


if __name__ == "__main__":
    found = compare()
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(found))
    print(table(found))
