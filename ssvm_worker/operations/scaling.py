"""How many workers a zone should have, and which of them may go: the rule, without any clock or connection.

CloudStack starts one more system VM when the active commands and a standby capacity no longer fit into those that run
(SecondaryStorageManagerImpl, secstorage.session.max and secstorage.capacity.standby). The same two figures decide
here, but for any number at once, down as well as up, and no worker that has work is ever named to go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """The settings of a zone."""

    #: Jobs that one worker runs at once.
    sessions: int
    #: Jobs that could begin at once, whatever is running already.
    standby: int = 2
    min: int = 1
    max: int = 10

    def needed(self, active: int, queued: int) -> int:
        """Workers for so many running and waiting jobs, within the bounds."""
        return max(self.min, min(self.max, -(-(active + queued + self.standby) // self.sessions)))


@dataclass(frozen=True)
class Running:
    """One worker that takes jobs."""

    name: str
    #: Jobs that it runs now.
    active: int
    #: Seconds since the epoch.
    started: float


@dataclass(frozen=True)
class Decision:
    """What to do about the workers of a zone."""

    zone: str
    active: int
    queued: int
    #: Workers that take jobs now.
    workers: int
    #: Workers that there should be.
    desired: int
    #: Idle ones that may be stopped, the youngest first; never more than are too many.
    removable: tuple[str, ...]
    why: str

    def to_dict(self) -> dict[str, object]:
        """The JSON shape."""
        return {**vars(self), "removable": list(self.removable)}


def decide(zone: str, load: tuple[int, int], workers: Sequence[Running], policy: Policy, recent: int) -> Decision:
    """What to do; *load*: active and queued jobs; *recent*: the most workers that were needed within the cool-down."""
    active, queued = load
    needed = policy.needed(active, queued)
    desired = max(needed, min(recent, policy.max, max(len(workers), needed)))
    surplus = max(0, len(workers) - desired)
    idle = sorted((each for each in workers if not each.active), key=lambda each: -each.started)
    removable = tuple(each.name for each in idle[:surplus])
    return Decision(zone, active, queued, len(workers), desired, removable, _why(needed, desired, policy, load))


def _why(needed: int, desired: int, policy: Policy, load: tuple[int, int]) -> str:
    text = f"{load[0]} running + {load[1]} waiting + {policy.standby} standby, {policy.sessions} to a worker"
    if desired > needed:
        return f"{text}; {needed} would do, but more were needed within the cool-down"
    if needed == policy.max:
        return f"{text}; {policy.max} at the most"
    return f"{text}; {policy.min} at the least" if needed == policy.min else text
