"""Which backups of a volume are kept: the last ones, and the last of so many days, weeks and months."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime


@dataclass(frozen=True)
class RetentionRule:
    """How many are kept; a period counts only if there is a backup of it. All 0: every backup is kept."""

    keep_last: int = 0
    keep_daily: int = 0
    keep_weekly: int = 0
    keep_monthly: int = 0

    def __bool__(self) -> bool:
        return any((self.keep_last, self.keep_daily, self.keep_weekly, self.keep_monthly))

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in vars(self).items() if count)


@dataclass(frozen=True)
class RetentionRules:
    """The rule of each volume: its own, else its account's, else the one of all."""

    default: RetentionRule = RetentionRule()
    accounts: Mapping[str, RetentionRule] = field(default_factory=dict)
    #: By ``ACCOUNT/VOLUME``.
    volumes: Mapping[str, RetentionRule] = field(default_factory=dict)

    def of(self, account: str, volume: str) -> RetentionRule:
        """The rule for backups of that volume."""
        return self.volumes.get(f"{account}/{volume}", self.accounts.get(account, self.default))


@dataclass(frozen=True)
class BackupAge:
    """What the rules look at."""

    id: str
    #: Seconds since the epoch.
    created: float
    #: Whether it has all disks that were asked for, and nothing is known to be wrong with it.
    good: bool = True
    #: When it was last read again, in seconds since the epoch; 0 for never.
    verified: float = 0.0


#: Two backups of one period have the same name of it. Days, ISO weeks and months are UTC's.
_PERIODS: dict[str, Callable[[datetime], object]] = {
    "keep_last": lambda when: when,
    "keep_daily": lambda when: when.date(),
    "keep_weekly": lambda when: when.isocalendar()[:2],
    "keep_monthly": lambda when: (when.year, when.month),
}


def kept(rule: RetentionRule, backups: Sequence[BackupAge]) -> dict[str, list[str]]:
    """Ids of the backups that stay, each with the reasons; what is not in it may go.

    A backup that is not good takes no place of a good one, but stays as long as it would if it was good. Where none is
    good all stay. So does, whatever the rule, the newest good one; and the newest that was read again and found sound,
    for a later one in which nobody has found anything may be one at which nobody has looked.
    """
    good = [each for each in backups if each.good]
    if not rule:
        return {each.id: ["no rule"] for each in backups}
    if not good:
        return {each.id: ["none is known to be good"] for each in backups}
    found: dict[str, list[str]] = {}
    for each, why in _chosen(rule, good):
        found.setdefault(each.id, []).append(why)
    for each, why in _chosen(rule, backups):
        if each.id not in found:
            found[each.id] = [f"{why}, though not good"]
    found.setdefault(max(good, key=_age).id, []).append("the last good one")
    if read := [each for each in good if each.verified]:
        found.setdefault(max(read, key=_age).id, []).append("the last that was verified")
    return found


def _chosen(rule: RetentionRule, backups: Sequence[BackupAge]) -> list[tuple[BackupAge, str]]:
    """The newest of each of the last periods."""
    found = []
    for name, period in _PERIODS.items():
        newest: dict[object, BackupAge] = {}
        for each in sorted(backups, key=_age, reverse=True):
            key = each.id if name == "keep_last" else period(datetime.fromtimestamp(each.created, UTC))
            newest.setdefault(key, each)
        found += [(each, name) for each in list(newest.values())[: getattr(rule, name)]]
    return found


def _age(backup: BackupAge) -> tuple[float, str]:
    return backup.created, backup.id
