"""How much each account has stored, and what running jobs hold of its limit; the ledger keeps it for all workers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from ssvm_worker.errors import QuotaExceeded
from ssvm_worker.units import MiB, human_size

#: Holds so many bytes in all, in place of what was held before; QuotaExceeded leaves that as it was.
Grow = Callable[[int], None]
#: Held ahead of a stream whose length nobody knows; the less often the broker is asked.
_STEP = 64 * MiB


class Held:
    """What one job holds of its account's limit. Threads may share it."""

    def __init__(self, grow: Grow | None, copies: int) -> None:
        self._grow = grow
        self._copies = copies
        self._taken = self._reserved = 0
        self._lock = threading.Lock()

    def expect(self, size: int | None) -> None:
        """So many bytes will come for each store; QuotaExceeded if they are too many. None: nobody knows."""
        with self._lock:
            if self._grow and (size or 0) * self._copies > self._reserved:
                self._hold((size or 0) * self._copies)

    def took(self, chunk: bytes) -> None:
        """An observer of what is stored; QuotaExceeded when it has become too much."""
        self.add(len(chunk))

    def add(self, size: int) -> None:
        """So many bytes more were stored on each store."""
        with self._lock:
            self._taken += size * self._copies
            if self._grow and self._taken > self._reserved:
                self._ahead()

    def part(self) -> StreamQuota:
        """One of several streams, which may have to begin again."""
        return StreamQuota(self)

    def restart(self) -> None:
        """Nothing of it was stored: all begins again."""
        with self._lock:
            self._taken = 0

    def _ahead(self) -> None:
        try:
            self._hold(self._taken + _STEP * self._copies)
        except QuotaExceeded:
            self._hold(self._taken)

    def _hold(self, size: int) -> None:
        assert self._grow
        self._grow(size)
        self._reserved = size


class StreamQuota:
    """One stream of several."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self._size = 0

    def took(self, chunk: bytes) -> None:
        """An observer of what is stored."""
        self._size += len(chunk)
        self._held.add(len(chunk))

    def take_back(self) -> None:
        """It failed, and begins again."""
        self._held.add(-self._size)
        self._size = 0


#: For what is not limited.
UNLIMITED = Held(None, 1)


@dataclass(frozen=True)
class QuotaLimits:
    """Bytes that accounts may have on all stores together; None for no limit."""

    default: int | None = None
    accounts: Mapping[str, int | None] = field(default_factory=dict)

    def of(self, account: str) -> int | None:
        """The limit of that account."""
        return self.accounts.get(account, self.default)


@dataclass(frozen=True)
class AccountUsage:
    """One account, in bytes."""

    account: str
    #: Of its artifacts on all stores.
    used: int = 0
    #: That running jobs may still add.
    reserved: int = 0

    def to_dict(self, limit: int | None) -> dict[str, Any]:
        """The JSON shape."""
        free = None if limit is None else max(0, limit - self.used - self.reserved)
        return {"account": self.account, "used": self.used, "reserved": self.reserved, "limit": limit, "free": free}

    def refusal(self, size: int, limit: int) -> QuotaExceeded:
        """Why a job that needs *size* bytes does not get them."""
        held = f" and other jobs hold {human_size(self.reserved)} ({self.reserved} bytes)" if self.reserved else ""
        what = (
            f"The quota of account {self.account} is {human_size(limit)} ({limit} bytes): it has used "
            f"{human_size(self.used)} ({self.used} bytes){held}, and this needs {human_size(size)} ({size} bytes)"
        )
        return QuotaExceeded(what, self.account, "Delete what it no longer needs, or raise its limit: `ssvm quota`")


class Quota(Protocol):
    """Counts. Each call raises StoreUnavailable while whoever counts is away."""

    def hold(self, account: str, job_id: str, limit: int) -> AbstractContextManager[Grow]:
        """Within, the job may hold bytes of the account, which count against the limit; a dead worker's do not."""

    def note(self, account: str, store: str, place: str, size: int, job_id: str = "") -> None:
        """That artifact is there, of that size; what the job holds is less by as much. Safe to repeat."""

    def forget(self, account: str, store: str, place: str) -> None:
        """It is no longer there. Safe to repeat."""

    def usage(self) -> Iterator[AccountUsage]:
        """Every account that has, or had, anything; by name."""

    def places(self, store: str) -> Iterator[tuple[str, str]]:
        """Account and place of all that is counted there."""


class LocalQuota:
    """Counts as long as the process lives."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[str, str, str], int] = {}
        self._held: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def hold(self, account: str, job_id: str, limit: int) -> Iterator[Grow]:
        def grow(size: int) -> None:
            with self._lock:
                known = self._usage(account, job_id)
                if known.used + known.reserved + size > limit:
                    raise known.refusal(size, limit)
                self._held[account, job_id] = size

        try:
            yield grow
        finally:
            self._held.pop((account, job_id), None)

    def note(self, account: str, store: str, place: str, size: int, job_id: str = "") -> None:
        with self._lock:
            added = size - self._sizes.get((account, store, place), 0)
            self._sizes[account, store, place] = size
            if (account, job_id) in self._held:
                self._held[account, job_id] = max(0, self._held[account, job_id] - added)

    def forget(self, account: str, store: str, place: str) -> None:
        with self._lock:
            self._sizes.pop((account, store, place), None)

    def usage(self) -> Iterator[AccountUsage]:
        with self._lock:
            names = {account for account, *_ in (*self._sizes, *self._held)}
            return iter([self._usage(each) for each in sorted(names)])

    def places(self, store: str) -> Iterator[tuple[str, str]]:
        return iter([(account, place) for account, where, place in sorted(self._sizes) if where == store])

    def _usage(self, account: str, but: str = "") -> AccountUsage:
        used = sum(size for (whose, *_), size in self._sizes.items() if whose == account)
        held = sum(size for (whose, job_id), size in self._held.items() if whose == account and job_id != but)
        return AccountUsage(account, used, held)
