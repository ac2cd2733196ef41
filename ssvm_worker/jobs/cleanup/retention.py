"""The retention rules: keep the last backups of a volume, and the last backup of several days, weeks and months."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ssvm_worker.config.schema import RetentionRule


@dataclass(frozen=True)
class BackupAge:
    """The facts of a backup that the rules use."""

    id: str
    #: Seconds since the epoch.
    created: float
    #: Whether the backup has all requested disks and no known damage.
    good: bool = True
    #: When the backup was last verified, in seconds since the epoch; 0 for never.
    verified: float = 0.0


#: The functions that return the period of a backup's time. Days, ISO weeks and months are those of UTC.
_PERIODS: dict[str, Callable[[datetime], object]] = {
    "keep_last": lambda created: created,
    "keep_daily": lambda created: created.date(),
    "keep_weekly": lambda created: created.isocalendar()[:2],
    "keep_monthly": lambda created: (created.year, created.month),
}


def backups_to_keep(rule: RetentionRule, backups: Sequence[BackupAge]) -> dict[str, list[str]]:
    """Return the ids of the backups to keep, with the reasons. All other backups may be deleted.

    - A bad backup never takes the place of a good one. It is kept as long as a good one of its age.
    - If no backup is good, all are kept.
    - The newest good backup is always kept.
    - The newest good backup that was verified is always kept. A later one may have damage that no verification found.
    """
    good = [each for each in backups if each.good]
    if not rule:
        return {each.id: ["no rule"] for each in backups}
    if not good:
        return {each.id: ["none is known to be good"] for each in backups}
    reasons: dict[str, list[str]] = {}
    for each, name in _select(rule, good):
        reasons.setdefault(each.id, []).append(name)
    for each, name in _select(rule, backups):
        if each.id not in reasons:
            reasons[each.id] = [f"{name}, though not good"]
    reasons.setdefault(max(good, key=_age).id, []).append("the last good one")
    if verified := [each for each in good if each.verified]:
        reasons.setdefault(max(verified, key=_age).id, []).append("the last that was verified")
    return reasons


def _select(rule: RetentionRule, backups: Sequence[BackupAge]) -> list[tuple[BackupAge, str]]:
    """Return the newest backup of each of the last periods, with the name of the rule's field."""
    selected = []
    for name, period in _PERIODS.items():
        newest: dict[object, BackupAge] = {}
        for each in sorted(backups, key=_age, reverse=True):
            key = each.id if name == "keep_last" else period(datetime.fromtimestamp(each.created, UTC))
            newest.setdefault(key, each)
        selected += [(each, name) for each in list(newest.values())[: getattr(rule, name)]]
    return selected


def _age(backup: BackupAge) -> tuple[float, str]:
    return backup.created, backup.id
