"""Which jobs a user asks for: a filter of records, for lists and for retries of many jobs."""

from __future__ import annotations

from dataclasses import dataclass

from .record import STATES, Record


@dataclass(frozen=True)
class JobFilter:
    """The conditions that a record must meet. An empty condition is met by every record."""

    states: tuple[str, ...] = STATES
    zone: str | None = None
    lane: str | None = None
    #: The kind of job, such as ``download``.
    job: str | None = None
    account: str | None = None
    #: The class of the error, such as ``StoreFull``.
    error: str | None = None
    #: The last change of the job, in seconds since the epoch by the broker's clock.
    since: float = 0.0
    until: float = float("inf")

    def matches(self, record: Record) -> bool:
        """Return whether the record meets all conditions."""
        return (
            record.state in self.states
            and self.zone in (None, record.zone)
            and self.lane in (None, record.lane)
            and self.job in (None, record.job)
            and self.account in (None, account_of(record))
            and self.error in (None, (record.error or {}).get("error"))
            # The time of a damaged record may be not a number. Such a record is shown too.
            and not (record.updated < self.since or record.updated > self.until)
        )


def account_of(record: Record) -> str:
    """Return the account whose data the job reads or writes; "" if its request names none."""
    if account := record.request.get("account"):
        return str(account)
    # template/tmpl/ACCOUNT/… · volumes/ACCOUNT/… · snapshots/ACCOUNT/…
    parts = str(record.request.get("key", "")).removeprefix("template/").split("/")
    return parts[1] if len(parts) > 1 else ""
